"""Base class of the closed-form editors, and the choice of the layer and token that they write to.

The choice is measured on facts that the model knows, before the recipe's own facts are written.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from workbench.edit.closed_form.lookup import Lookup, grouped
from workbench.edit.closed_form.moments import Moments, moments, statistics_source
from workbench.edit.closed_form.preset import Preset
from workbench.edit.closed_form.solve import Choice, ClosedFormSolve
from workbench.edit.closed_form.solver import solve
from workbench.edit.closed_form.values import values
from workbench.edit.inputs import known_facts
from workbench.edit.places.knowledge import Trace, trace
from workbench.edit.places.parts import LONGEST, Parts, Position, check_rows, padded, row_of
from workbench.edit.places.passes import run, score
from workbench.facts.facts import Fact
from workbench.facts.stream import latest
from workbench.ground.errors import InvalidRecipeError
from workbench.ground.files import json_digest, write_json
from workbench.ground.lazy import torch
from workbench.ground.results import JsonObject, Number, absent
from workbench.models.layout import Model
from workbench.models.texts import longest_row
from workbench.steps import Cost, Edit, MethodContext
from workbench.steps.step import REGISTERED

FACTS, LAYERS = 8, 6
CARRIES = 0.6
"""A layer carries a fact if restoring its state recovers at least this share of the answer."""
_VERSION = 2
_NOT_SWEPT = (
    "id",
    "facts",
    "first",
    "mode",
    "history",
    "continues",
    "preserve_steps",
    "preserve",
    "preserve_generated",
    "preserve_tokens",
    "scale",
    "unconverged",
    "refine",
    "contexts",
)
"""Fields that the sweep does not use."""


class Candidate(JsonObject):
    """An edit of the pilot facts at one layer."""

    position: Position
    """Token at which the facts were looked up."""
    efficacy: Number
    """Share of the facts that the edited model says."""
    converged: Number
    """Share of the facts with a value that makes the model say them."""
    paraphrase: Number | None = absent()
    """Share of paraphrases that it answers with the target."""
    unchanged: Number | None = absent()
    """Share of neighbors whose next token stays."""
    score: Number
    """Harmonic mean of these shares."""
    margin: Number
    """Mean log-probability of the targets."""


class Sweep(JsonObject):
    """Layers and tokens that an edit writes to, and the measurements behind the choice."""

    layers: list[int]
    """The layers."""
    positions: dict[int, Position]
    """Layer -> token at which facts are looked up."""
    pilot: list[str]
    """Ids of the facts that were traced and edited."""
    trace: dict[int, dict[str, Number]] | None = absent()
    """Layer -> place -> share of the answers that restoring it recovers."""
    candidates: dict[int, Candidate] | None = absent()
    """Layer -> the edit there, if layers were compared."""


def candidates(editable: Sequence[int]) -> list[int]:
    """Return at most LAYERS of the editable layers, evenly spaced."""
    depth, count = len(editable), min(LAYERS, len(editable))
    return [editable[int((2 * i + 1) * depth / (2 * count))] for i in range(count)]


def choose(method: Preset, context: MethodContext, parts: Parts, facts: Sequence[Fact]) -> Choice:
    """Return the step's layers and positions; `auto` is measured once per base and relevant settings."""
    layers = candidates(parts.editable) if method.layers == "auto" else sorted(method.layers)
    if method.position != "auto" and method.layers != "auto":
        return Choice(tuple(layers), dict.fromkeys(layers, method.position), {"layers": layers, "position": method.position})
    pilot = _pilot_facts(context, parts, facts)
    settings = {name: getattr(method, name) for name in ("position", "layers", "statistics", "tokens_per_input")}
    _, texts = statistics_source(context, method.statistics)
    names = [[f.prompt, f.subject, f.target] for f in pilot]
    fields = {**method.model_dump(mode="json"), **method.constants}
    strengths = {name: value for name, value in fields.items() if name not in (*_NOT_SWEPT, *method.unkeyed)}
    key = json_digest([_VERSION, context.model_key, method.name, method.code_key(), strengths, settings, texts, names])
    file = context.cache / "sweeps" / f"{key}.json"
    sweep = Sweep.read_cached(file)
    if sweep is None:
        sweep = _measure_layers(method, context, parts, pilot, layers)
        write_json(file, sweep.to_dict(), indent=2)
    return Choice(tuple(sweep.layers), sweep.positions, {**sweep.to_dict(), "sweep": key})


def _pilot_facts(context: MethodContext, parts: Parts, facts: Sequence[Fact]) -> list[Fact]:
    """Return bundled facts that the model knows, from as many relations as possible; facts of the recipe if it knows too few."""
    bundled = [f for f in known_facts() if f.target_true]
    true_facts = [Fact(f.id, f.prompt, f.subject, f.target_true or "", place=f.place) for f in bundled]
    _, top = score(parts, padded([row_of(f, context.tokenizer, "prompt_last") for f in true_facts], context.device))
    known = [fact for fact, right in zip(bundled, top.tolist(), strict=True) if right]
    if len(known) >= FACTS:
        by_relation: dict[str, list[Fact]] = {}
        for fact in known:
            by_relation.setdefault(fact.relation, []).append(fact)
        rounds = [
            group[i] for i in range(max(map(len, by_relation.values()))) for group in by_relation.values() if i < len(group)
        ]
        return rounds[:FACTS]
    step = max(1, len(facts) // FACTS)
    return list(facts[::step][:FACTS])


def _measure_layers(method: Preset, context: MethodContext, parts: Parts, pilot: Sequence[Fact], layers: Sequence[int]) -> Sweep:
    """Trace the pilot facts, then edit them at each layer."""
    context.progress(0, len(layers), "tracing facts")
    tracing = trace(context, parts, pilot, layers)
    if method.layers == "auto" and method.position == "auto":
        layers, positions = _carrying_layers(tracing, layers)
    else:
        positions = {layer: _choose_position(method, tracing, layer) for layer in layers}
    traced = tracing and {i: {k: round(v, 3) for k, v in shares.items()} for i, shares in tracing.recovered.items()}
    sweep = Sweep(layers=list(layers), positions=positions, pilot=[f.id for f in pilot], trace=traced)
    if method.layers != "auto":
        return sweep
    second_moments = moments(context, parts, layers, method.statistics, method.tokens_per_input)
    rows = {}
    for number, layer in enumerate(layers):
        context.progress(number, len(layers), f"sweep: layer {layer}")
        rows[layer] = _try_layer(method, Lookup(context, parts, layer, positions[layer]), pilot, second_moments[layer])
    best = max(layers, key=lambda layer: (rows[layer].score, rows[layer].margin))
    return sweep.model_copy(update={"layers": [best], "positions": {best: positions[best]}, "candidates": rows})


def _carrying_layers(traced: Trace | None, layers: Sequence[int]) -> tuple[list[int], dict[int, Position]]:
    """Return the layers that carry facts, and the token where they do.

    The token is the subject's last one if restoring the subject at any layer recovers most of the answer; else it is the prompt's
    last token. An edit at the prompt's last token holds for one wording only, and consequences of the fact do not follow from it.
    """
    if traced is None:
        return list(layers), dict.fromkeys(layers, "prompt_last")
    at_subject = [layer for layer in layers if traced.recovered[layer]["subject"] >= CARRIES]
    at_last = [layer for layer in layers if traced.recovered[layer]["last"] >= CARRIES]
    position: Position = "subject_last" if at_subject else "prompt_last"
    carrying = at_subject or at_last or list(layers)
    return carrying, dict.fromkeys(carrying, position)


def _choose_position(method: Preset, traced: Trace | None, layer: int) -> Position:
    """Return the token to edit at a layer: the step's own setting, or the one that tracing recommends."""
    if method.position != "auto":
        return method.position
    return "prompt_last" if traced is None else traced.position(layer)


def _try_layer(method: Preset, at: Lookup, pilot: Sequence[Fact], second_moments: Moments) -> Candidate:
    """Edit the pilot facts at one layer, and measure the answers to them, to paraphrases and to neighbors."""
    context, parts, position = at.context, at.parts, at.position
    solutions = values(at, grouped(pilot, position), method.settings(), context.model_key, "sweep: values")
    solved = solve(solutions.rows("key"), method.metric(second_moments), method.ridge)
    left, right = solved.update(solutions.rows("change"))
    update = left @ right
    paraphrases = [Fact(f.id, text, None, f.target, place=f.place) for f in pilot for text in f.paraphrases]
    neighbours = [Fact(f.id, probe.prompt, None, ".", place=f.place) for f in pilot for probe in f.neighbours]
    answers_before = _next_tokens(context, parts, neighbours)
    with parts.changed({at.layer: update.float()}):
        loss, pilot_right = score(parts, padded([row_of(f, context.tokenizer, position) for f in pilot], context.device))
        shares = {"efficacy": float(pilot_right.float().mean()), "converged": sum(v.top for v in solutions) / len(solutions)}
        if paraphrases:
            _, paraphrase_right = score(
                parts, padded([row_of(f, context.tokenizer, "prompt_last") for f in paraphrases], context.device)
            )
            shares["paraphrase"] = float(paraphrase_right.float().mean())
        if neighbours:
            shares["unchanged"] = float((_next_tokens(context, parts, neighbours) == answers_before).float().mean())
    parts_of_score = [shares[name] for name in ("converged", "efficacy", "paraphrase", "unchanged") if name in shares]
    harmonic = len(parts_of_score) / sum(1 / max(value, 1e-3) for value in parts_of_score)
    numbers = {**shares, "score": harmonic, "margin": float(loss.mean())}
    return Candidate(position=position, **{name: round(value, 4) for name, value in numbers.items()})


def _next_tokens(context: MethodContext, parts: Parts, prompts: Sequence[Fact]) -> torch.Tensor:
    """Return the next token of each prompt."""
    if not prompts:
        return torch.zeros(0)
    rows = [row_of(prompt, context.tokenizer, "prompt_last") for prompt in prompts]
    batch = padded(rows, context.device)
    with torch.no_grad():
        logits = run(parts, batch).logits
    places = torch.tensor([row.start for row in rows], device=logits.device)
    tokens: torch.Tensor = logits[torch.arange(len(rows), device=logits.device), places].argmax(-1)
    return tokens


class ClosedForm(Preset):
    """Closed-form editors optimize a value for each fact and write all values by one linear solve.

    A value is the change of a layer's output that makes the model say the target. The editors differ in the metric of the solve, which
    says what a change costs elsewhere. See [how they work](../editing-methods.md).
    """

    def cost(self, model: Model, project: Path, cache: Path) -> Cost:
        """Estimate the tokens of each part of the work without a cache; values of most facts need a quarter of the steps."""
        facts, earlier = self.read(project), self.earlier(project)
        before = earlier.start().facts if earlier else ()
        kept = self._unchanged(facts, before)
        row, steps = 12, max(1, self.steps // 4)  # tokens of a prompt with its target and half a context
        places = model.layout.edited()
        width = int(model.weights.specs[next(iter(places.values()), None) or model.layout.mlp_out(0)].cols)
        auto = self.layers == "auto" and earlier is None
        layers = min(LAYERS, len(places)) if auto else len(earlier.layers if earlier else self.layers)
        # Values of a run that is continued are those of its lowest layer; higher layers get the current facts again.
        solved = len(facts) - kept + (layers - 1) * len(latest(facts)) if earlier else len(facts) * (1 if auto else layers)
        work = {
            "facts": len(facts) - kept,
            "statistics": self.tokens_per_input * width,
            "sweep": layers * FACTS * row * steps if auto else 0,
            "values": solved * (self.contexts + 1) * row * steps,
        }
        cost: Cost = {"layers": self.layers}
        if auto:
            cost["sweep"] = {"layers": layers, "facts": FACTS}
        if earlier:
            cost["continues"] = {"run": earlier.name, "facts": len(latest(before)), "kept": kept}
        cost |= {"work": work, "tokens": sum(work.values()) - work["facts"]}
        return cost

    def solve(self, context: MethodContext) -> Edit:
        """Optimize values and solve for the factors; the model is left unchanged."""
        facts = self.read(context.project)
        check_rows(facts, context.tokenizer, longest_row(context.layout.config, LONGEST), self.end_of_text)
        if self.preserve_steps and not context.earlier:
            raise InvalidRecipeError(
                f"edit {self.name}: `preserve_steps` preserves what earlier edit steps have written, but no edit step comes before it",
                "Remove `preserve_steps`, or put the step after another edit step.",
            )
        parts = Parts.find(context)
        if earlier := self.earlier(context.project):
            earlier.restore(context.cache)
            parts.check_layers(earlier.layers, f"edit {self.name}")
            choice = Choice(earlier.layers, earlier.positions, earlier.choice)
        else:
            if self.layers != "auto":
                parts.check_layers(self.layers, f"edit {self.name}")
            choice = choose(self, context, parts, latest(facts))
        return ClosedFormSolve(self, context, parts, facts, choice).run()

    def _unchanged(self, facts: Sequence[Fact], before: Sequence[Fact]) -> int:
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


def editor(name: str) -> type[ClosedForm]:
    """Return a closed-form editor by its name, for steps that use another one."""
    importlib.import_module(f"workbench.edit.{name}")  # its file registers it, and may not have been needed so far
    method = REGISTERED[f"edit:{name}"]
    assert issubclass(method, ClosedForm)
    return method
