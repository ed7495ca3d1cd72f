"""Base class of the closed-form editors: recipe fields, and the steps from facts to factors."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench.edit.closed_form.preset import LONGEST, Preset
from workbench.edit.closed_form.solve import ClosedFormSolve
from workbench.edit.closed_form.sweep import FACTS, LAYERS, Choice, choose
from workbench.edit.places.parts import Parts
from workbench.edit.places.rows import check_rows
from workbench.errors import InvalidRecipeError
from workbench.facts import Fact, latest
from workbench.models.layout import Model
from workbench.models.texts import longest_row
from workbench.steps import Edit, MethodContext
from workbench.steps.registry import REGISTERED


class ClosedForm(Preset):
    """A closed-form editor: computes values from facts, and factors from values."""

    def cost(self, model: Model, project: Path, cache: Path) -> dict[str, Any]:
        """Estimate the tokens of each part of the work without a cache; values of most facts need a quarter of the steps."""
        facts, earlier = self.read(project), self.earlier(project)
        before = earlier.start().facts if earlier else ()
        kept = self._kept(facts, before)
        row, steps = 12, max(1, self.steps // 4)  # tokens of a prompt with its target and half a context
        places = model.layout.mlp_layers()
        width = int(model.weights.specs[model.layout.mlp_out(places[0] if places else 0)].cols)
        auto = self.layers == "auto" and earlier is None
        layers = min(LAYERS, len(places)) if auto else len(earlier.layers if earlier else self.layers)
        # Values of a run that is continued are those of its lowest layer; higher layers get the current facts again.
        solved = len(facts) - kept + (layers - 1) * len(latest(facts)) if earlier else len(facts) * (1 if auto else layers)
        work = {
            "facts": len(facts) - kept,
            "statistics": self.tokens_per_input * width if self.needs_statistics else 0,
            "sweep": layers * FACTS * row * steps if auto else 0,
            "values": solved * (self.contexts + 1) * row * steps,
        }
        sweep = {"sweep": {"layers": layers, "facts": FACTS}} if auto else {}
        continues = {"continues": {"run": earlier.name, "facts": len(latest(before)), "kept": kept}} if earlier else {}
        return {"layers": self.layers, **sweep, **continues, "work": work, "tokens": sum(work.values()) - work["facts"]}

    def solve(self, context: MethodContext) -> Edit:
        """Optimize values and solve for the factors; the model is left unchanged."""
        facts = self.read(context.project)
        check_rows(facts, context.tokenizer, longest_row(context.layout.config, LONGEST), self.end_of_text)
        if self.preserve_steps and not context.earlier:
            raise InvalidRecipeError(
                f"edit {self.name}: `preserve_steps` preserves what earlier edit steps have written, but no edit step comes before it",
                "Remove `preserve_steps`, or put the step after another edit step.",
            )
        parts = Parts.of(context)
        if earlier := self.earlier(context.project):
            earlier.restore(context.cache)
            parts.check_layers(earlier.layers, f"edit {self.name}")
            choice = Choice(earlier.layers, earlier.positions, earlier.choice)
        else:
            choice = self._choice(context, parts, latest(facts))
        return ClosedFormSolve(self, context, parts, facts, choice).run()

    def _kept(self, facts: Sequence[Fact], before: Sequence[Fact]) -> int:
        """Return the number of statements whose values are those of the run that is continued.

        A value depends on the batches before it and on its own batch, so the first batch with a changed statement ends them.

        Args:
            facts: Statements of the whole stream.
            before: Statements of the run.
        """
        if self.mode == "joint":
            return 0
        same = [(fact.text, fact.target) == (old.text, old.target) for fact, old in zip(facts, before, strict=False)]
        number = same.index(False) if False in same else len(same)
        return number if number == len(facts) == len(before) else number - number % self.mode.sequential.batch

    def _choice(self, context: MethodContext, parts: Parts, facts: Sequence[Fact]) -> Choice:
        if self.layers != "auto":
            parts.check_layers(self.layers, f"edit {self.name}")
        return choose(self, context, parts, facts)


def editor(name: str) -> type[ClosedForm]:
    """Return a closed-form editor by its name, for steps that use another one."""
    importlib.import_module(f"workbench.edit.{name}")  # its file registers it, and may not have been needed so far
    method = REGISTERED[f"edit:{name}"]
    assert issubclass(method, ClosedForm)
    return method
