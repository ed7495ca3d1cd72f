"""Choice of the layer and token to edit, measured on facts that the model knows before the recipe's own facts are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.edit.closed_form.bundled import known_facts
from workbench.edit.closed_form.moments import Moments, moments, statistics_source
from workbench.edit.closed_form.solver import solve
from workbench.edit.closed_form.values import Lookup, grouped, values
from workbench.edit.places.parts import Parts
from workbench.edit.places.passes import run, score
from workbench.edit.places.rows import Position, padded, row_of
from workbench.edit.places.tracing import Trace, trace
from workbench.facts import Fact
from workbench.files import json_digest, read_json, write_json
from workbench.lazy import torch
from workbench.steps import MethodContext

if TYPE_CHECKING:
    from workbench.edit.closed_form.preset import Preset

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


@dataclass(frozen=True)
class Choice:
    """Layers and tokens to edit.

    Attributes:
        layers: The layers.
        positions: Layer -> token at which facts are looked up.
        record: Measurements behind the choice, for the brick's record.
    """

    layers: tuple[int, ...]
    positions: dict[int, Position]
    record: dict[str, Any]


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
    key = json_digest([_VERSION, context.model_key, method.name, method.code_key(), _strengths(method), settings, texts, names])
    file = context.cache / "sweeps" / f"{key}.json"
    record = read_json(file, layers=list, positions=dict)
    if record is None:
        record = _measure_layers(method, context, parts, pilot, layers)
        write_json(file, record, indent=2)
    positions: dict[int, Position] = {int(layer): position for layer, position in record["positions"].items()}
    return Choice(tuple(record["layers"]), positions, {**record, "sweep": key})


def _strengths(method: Preset) -> dict[str, Any]:
    """Return the editor's own strengths and the settings of the optimization."""
    fields = {**method.model_dump(mode="json"), **method.constants}
    return {k: v for k, v in fields.items() if k not in (*_NOT_SWEPT, *method.unkeyed)}


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


def _measure_layers(
    method: Preset, context: MethodContext, parts: Parts, pilot: Sequence[Fact], layers: Sequence[int]
) -> dict[str, Any]:
    """Trace the pilot facts, then edit them at each layer."""
    context.progress(0, len(layers), "tracing facts")
    tracing = trace(context, parts, pilot, layers)
    if method.layers == "auto" and method.position == "auto":
        layers, positions = _carrying_layers(tracing, layers)
    else:
        positions = {layer: _choose_position(method, tracing, layer) for layer in layers}
    record: dict[str, Any] = {
        "layers": list(layers),
        "positions": {str(i): p for i, p in positions.items()},
        "pilot": [f.id for f in pilot],
    }
    if tracing is not None:
        record["trace"] = {str(i): {k: round(v, 3) for k, v in shares.items()} for i, shares in tracing.recovered.items()}
    if method.layers != "auto":
        return record
    second_moments = (
        moments(context, parts, layers, method.statistics, method.tokens_per_input) if method.needs_statistics else {}
    )
    rows = {}
    for number, layer in enumerate(layers):
        context.progress(number, len(layers), f"sweep: layer {layer}")
        rows[layer] = _try_layer(method, Lookup(context, parts, layer, positions[layer]), pilot, second_moments.get(layer))
    best = max(layers, key=lambda layer: (rows[layer]["score"], rows[layer]["margin"]))
    return {
        **record,
        "layers": [best],
        "positions": {str(best): positions[best]},
        "candidates": {str(i): r for i, r in rows.items()},
    }


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


def _try_layer(method: Preset, at: Lookup, pilot: Sequence[Fact], second_moments: Moments | None) -> dict[str, Any]:
    """Edit the pilot facts at one layer, and measure the answers to them, to paraphrases and to neighbors."""
    context, parts, position = at.context, at.parts, at.position
    solutions = values(at, grouped(pilot, position), method.settings(), context.model_key, "sweep: values")
    solved = solve(solutions.rows("key"), method.metric(second_moments, at.width), method.ridge(at.width))
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
    return {"position": position, **{name: round(value, 4) for name, value in numbers.items()}}


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
