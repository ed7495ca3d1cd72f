"""Base class of the closed-form editors: recipe fields, and the steps from facts to factors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench.edit.closed_form.preset import Preset
from workbench.edit.closed_form.solve import ClosedFormSolve
from workbench.edit.closed_form.sweep import FACTS, LAYERS, Choice, choose
from workbench.edit.places.parts import Parts
from workbench.edit.places.rows import check_rows
from workbench.facts import Fact, latest
from workbench.models.layout import Model
from workbench.models.texts import longest_row
from workbench.steps import Edit, MethodContext

LONGEST = 512
"""Largest number of tokens of a prompt with its target."""


class ClosedForm(Preset):
    """A closed-form editor: computes values from facts, and factors from values."""

    def cost(self, model: Model, project: Path, cache: Path) -> dict[str, Any]:
        """Estimate the tokens of each part of the work without a cache; values of most facts need a quarter of the steps."""
        facts = self.read(project)
        row, steps = 12, max(1, self.steps // 4)  # tokens of a prompt with its target and half a context
        places = model.layout.mlp_layers()
        width = int(model.weights.specs[model.layout.mlp_out(places[0] if places else 0)].cols)
        auto = self.layers == "auto"
        layers = min(LAYERS, len(places)) if auto else len(self.layers)
        work = {
            "facts": len(facts),
            "statistics": self.tokens_per_input * width if self.needs_statistics else 0,
            "sweep": layers * FACTS * row * steps if auto else 0,
            "values": len(facts) * (self.contexts + 1) * row * steps * (1 if auto else layers),
        }
        sweep = {"sweep": {"layers": layers, "facts": FACTS}} if auto else {}
        return {"layers": self.layers, **sweep, "work": work, "tokens": sum(work.values()) - work["facts"]}

    def solve(self, context: MethodContext) -> Edit:
        """Optimize values and solve for the factors; the model is left unchanged."""
        facts = self.read(context.project)
        check_rows(facts, context.tokenizer, longest_row(context.layout.config, LONGEST))
        parts = Parts.of(context)
        choice = self._choice(context, parts, latest(facts))
        return ClosedFormSolve(self, context, parts, facts, choice).run()

    def _choice(self, context: MethodContext, parts: Parts, facts: Sequence[Fact]) -> Choice:
        if self.layers != "auto":
            parts.check_layers(self.layers, f"edit {self.name}")
        return choose(self, context, parts, facts)
