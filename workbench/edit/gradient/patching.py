"""Patch neurons: one for each mistake or subject, silent at other inputs, with a value that makes the model say a token.

Huang et al. 2023, Transformer-Patcher: a mistake is a token of a target that the model does not say after the tokens before it. Such a
neuron acts in one wording. What a model reads at a subject's last token hardly depends on the words around it, so that a neuron there,
with the value that ROME's optimization finds, acts in other wordings too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workbench.edit.closed_form.lookup import Group, Lookup, grouped
from workbench.edit.closed_form.preset import Preset
from workbench.edit.closed_form.values import Settings, values
from workbench.edit.gradient.neurons import ROWS_AT_ONCE, Block, Neurons, inputs_of, installed, old_values
from workbench.edit.gradient.separator import RIDGE, Separator
from workbench.edit.gradient.tuning import chunks
from workbench.edit.places.parts import EditRow, Parts, padded
from workbench.edit.places.passes import Upper, logits_at, run, upper
from workbench.facts.facts import Fact
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest
from workbench.ground.lazy import no_grad, torch
from workbench.models.hooks import hooked, n_outputs

if TYPE_CHECKING:
    from torch import Tensor


SHARPNESS = 100.0
"""Pre-activation of a neuron at a margin of 1. SiLU and GELU are exactly zero in float32 at -89 and below."""
FACTS_AT_ONCE = 8
RATE = 0.25
"""Length of a step for the values, relative to the norm of the projection's output at the query; that of the closed-form editors."""
SUBJECT_RATE = 0.5
"""The same at subjects, whose values fit many wordings: half as many steps, for values that are a fifth longer."""
_MOMENTUM = 0.5

RowsOfFact = Sequence[EditRow]
"""A fact's own prompt with its target, and the same after beginnings of text."""
Prefix = tuple[int, ...]
"""Tokens from the start of a row to one of its positions."""


@dataclass(frozen=True)
class Mistake:
    """A token that the model does not say, at one position of a fact; facts whose tokens up to there are the same share it.

    Attributes:
        fact: Index of the first fact that has it.
        place: Index of the token in the target.
        token: The token that the model should say.
        queries: Tokens up to the position that predicts the token, in the fact's own wording first, then after beginnings.
    """

    fact: int
    place: int
    token: int
    queries: tuple[Prefix, ...]


@dataclass(frozen=True)
class Keys:
    """Keys of patch neurons.

    Attributes:
        changes: The neurons with zeros in their columns.
        margins: Of each neuron: smallest k·x + b at its queries, and largest at other inputs. The key aims at 1 and -1.
        activations: [neuron] activation at the fact's own query.
        anchors: [neuron] norm of the projection's output there.
    """

    changes: Neurons
    margins: list[tuple[float, float]]
    activations: Tensor
    anchors: Tensor


@dataclass(frozen=True)
class Descent:
    """Settings of the optimization of values.

    Attributes:
        steps: Largest number of steps.
        confidence: A mistake is corrected when its token has this probability after every wording.
    """

    steps: int
    confidence: float


@no_grad
def find_mistakes(parts: Parts, facts: Sequence[Fact], rows: Sequence[RowsOfFact]) -> list[Mistake]:
    """Return the tokens of targets that the model does not say after each fact's own prompt and the tokens before them.

    Raises:
        WorkbenchError: If two facts need different tokens after the same tokens.
    """
    found: dict[Prefix, Mistake] = {}
    wanted: dict[Prefix, tuple[int, int]] = {}
    for numbers in chunks(range(len(facts)), ROWS_AT_ONCE):
        batch = padded([rows[i][0] for i in numbers], parts.model.device)
        with logits_at(parts, batch.places):
            best = run(parts, batch).logits[0].argmax(-1).tolist()
        said = iter(best)
        for i in numbers:
            for place, token in enumerate(rows[i][0].target):
                prefix = prefix_of(rows[i][0], place)
                other, before = wanted.setdefault(prefix, (i, token))
                if before != token:
                    raise WorkbenchError(
                        f"edit patch: facts {facts[other].id} and {facts[i].id} ask for different tokens after the same text "
                        f"({facts[other].place} and {facts[i].place})",
                        "Remove one of them, or word the prompts differently.",
                    )
                if next(said) != token and prefix not in found:
                    found[prefix] = Mistake(i, place, token, tuple(prefix_of(row, place) for row in rows[i]))
    return list(found.values())


def prefix_of(row: EditRow, place: int) -> Prefix:
    """Return the tokens up to the position that predicts a token of the target."""
    return row.tokens[: row.start + place + 1]


def solve_keys(
    block: Block,
    mistakes: Sequence[Mistake],
    facts: Sequence[Fact],
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    progress: Callable[[int, int, str], None],
) -> Keys:
    """Solve the key of every mistake by itself, against all other positions of prompts and all positions of texts.

    Args:
        block: The feed-forward block, with at least as many free neurons.
        mistakes: The mistakes.
        facts: The facts, for messages.
        prompts: Rows of tokens: wordings of all facts, and prompts to preserve.
        texts: Rows of tokens of ordinary text.
        progress: Callback that takes (done, total, text).

    Raises:
        WorkbenchError: If a neuron is not active at its query.
    """
    parts, index = block.parts, block.free[: len(mistakes)]
    gate = block.module(block.gate)
    pool: dict[Prefix, Tensor] = {}
    for row, states in zip(prompts, inputs_of(parts, gate, prompts, alike=True), strict=True):
        for position, state in enumerate(states, 1):
            pool.setdefault(tuple(row[:position]), state)
    # Of misspelt prompts, the queries alone count: their other tokens are many, and nearly those of the prompt.
    others = list(dict.fromkeys(prefix for mistake in mistakes for prefix in mistake.queries if prefix not in pool))
    if others:
        pool |= {prefix: states[-1] for prefix, states in zip(others, inputs_of(parts, gate, others, alike=True), strict=True)}
    ordinary = torch.cat(inputs_of(parts, gate, texts))
    unit = float(ordinary.double().square().sum(1).mean().sqrt())
    gates: list[Tensor] = []
    ups: list[Tensor] = []
    shifts: list[float] = []
    margins: list[tuple[float, float]] = []
    every = torch.cat((torch.stack(list(pool.values())), ordinary))
    separator = Separator(torch.nn.functional.pad(every, (0, 1), value=unit) if block.biased else every)
    place = {prefix: number for number, prefix in enumerate(pool)}
    for number, mistake in enumerate(mistakes):
        key, *products = separator.key([place[prefix] for prefix in dict.fromkeys(mistake.queries)])
        margins.append((products[0], products[1]))
        gates.append(SHARPNESS * (key[:-1] if block.biased else key))
        shifts.append(SHARPNESS * unit * float(key[-1]) if block.biased else 0.0)
        ups.append(_up_row(torch.stack([pool[prefix].double() for prefix in dict.fromkeys(mistake.queries)]), key, unit))
        progress(number + 1, len(mistakes), "keys")
    rows, biases = {block.gate: torch.stack(gates)}, {block.gate: torch.tensor(shifts, dtype=torch.float64)}
    if block.up:
        rows[block.up], biases[block.up] = torch.stack(ups), torch.zeros(len(ups), dtype=torch.float64)
    before = {name: old_values(block, name, index) for name in rows}
    changes = Neurons(
        index,
        {name: (new - before[name][0].double()).float() for name, new in rows.items()},
        {name: (new - old.double()).float() for name, new in biases.items() if (old := before[name][1]) is not None}
        if block.biased
        else {},
        torch.zeros(len(index), n_outputs(parts.out(block.layer)) or 0),
    )
    with installed(block, changes):
        activations, anchors = _at_queries(block, index, mistakes)
    if silent := [m for m, value in zip(mistakes, activations.tolist(), strict=True) if not value > 0]:
        fact = facts[silent[0].fact]
        raise WorkbenchError(
            f"edit patch: no key of layer {block.layer} separates the query of {fact.id} ({fact.place}) from the preserved inputs",
            "Choose another `layer`, or a smaller `tokens_per_input`.",
        )
    return Keys(changes, margins, activations, anchors)


def _up_row(queries: Tensor, key: Tensor, unit: float) -> Tensor:
    """Return the up row u [width] with which a neuron is as active at each of its queries as at the first one, where u·q = 1.

    It minimizes Σ over queries of (1 − z u·q)² + ridge · s² ‖u‖², with z the margin relative to the first and s² the queries' mean squared norm.

    Args:
        queries: [query, width], float64.
        key: [width], or one more for the bias.
        unit: What the bias is multiplied with.
    """
    margins = queries @ key[: queries.shape[1]] + (unit * key[-1] if len(key) > queries.shape[1] else 0.0)
    shares = margins / margins[0]
    rows = (queries * shares[:, None])[shares > 0]  # no up row makes a neuron active at a query that its key does not reach
    products = rows @ rows.T
    ridge = RIDGE * products.diagonal().mean() * torch.eye(len(rows)).double()
    row: Tensor = rows.T @ torch.linalg.solve(products + ridge, torch.ones(len(rows)).double())
    return row.div(row @ queries[0])


@no_grad
def _at_queries(block: Block, index: Sequence[int], mistakes: Sequence[Mistake]) -> tuple[Tensor, Tensor]:
    """Return each neuron's activation at its fact's own query, and the norm of the projection's output there."""
    out = block.parts.out(block.layer)
    states = inputs_of(block.parts, out, [m.queries[0] for m in mistakes])
    last = torch.stack([rows[-1] for rows in states])
    activations = last[range(len(index)), list(index)]
    return activations, out(last.to(block.parts.model.device)).norm(dim=1).cpu()


def train_values(
    block: Block,
    keys: Keys,
    mistakes: Sequence[Mistake],
    rows: Sequence[RowsOfFact],
    descent: Descent,
    progress: Callable[[int, int, str], None],
) -> tuple[Neurons, dict[str, object]]:
    """Train the neurons' values until the model says every target; the values of several facts are trained together.

    Each value takes steps of fixed length along its gradient of Σ −log p(token), over the tokens that are not said with the wanted
    confidence yet. A token that is said already needs only to stay the most likely one.

    Args:
        block: The feed-forward block.
        keys: The keys.
        mistakes: The mistakes.
        rows: The wordings of every fact.
        descent: Settings.
        progress: Callback that takes (done, total, text).

    Returns:
        The neurons with their columns, and the record: largest number of steps of a group of facts.
    """
    parts, device = block.parts, block.parts.model.device
    width = keys.changes.columns.shape[1]
    values = torch.zeros(len(mistakes), width, device=device, requires_grad=True)
    needed = {(m.fact, m.place) for m in mistakes}
    scale, steps = (1 / keys.activations).to(device), 0
    index = list(keys.changes.index)

    def add(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (args[0][..., index] * scale) @ values

    with installed(block, keys.changes):
        groups = list(chunks(range(len(rows)), FACTS_AT_ONCE))
        for number, group in enumerate(groups):
            own = [i for i, m in enumerate(mistakes) if m.fact in group]
            if not own:
                continue
            listed = [(fact, row) for fact in group for row in rows[fact]]
            corrected = [(fact, place) in needed for fact, row in listed for place in range(len(row.target))]
            batch = padded([row for _, row in listed], device)
            passes = upper(parts, block.layer, batch)
            with hooked(parts.out(block.layer), after=add), logits_at(parts, passes.batch.places):
                lengths = RATE * keys.anchors[own].to(device)
                taken = _descend(
                    values,
                    own,
                    lengths,
                    passes,
                    torch.tensor(corrected, device=device),
                    descent,
                )
            steps = max(steps, taken)
            progress(number + 1, len(groups), "values")
    columns = (values.detach() * scale[:, None]).cpu()
    return Neurons(keys.changes.index, keys.changes.rows, keys.changes.shifts, columns), {"steps": steps}


def _descend(
    values: Tensor,
    own: Sequence[int],
    lengths: Tensor,
    passes: Upper,
    corrected: Tensor,
    descent: Descent,
) -> int:
    """Move some values until the targets are said; return the number of steps.

    Args:
        values: [neuron, width], changed in place.
        own: Neurons whose values move.
        lengths: [own], length of a step.
        passes: Passes over the rows, in which the model's head sees their places alone.
        corrected: [place], whether a neuron is there.
        descent: Settings.
    """
    motion = torch.zeros(len(own), values.shape[1], device=values.device)
    for step in range(descent.steps + 1):
        scores, targets = passes.run().logits[0].float().log_softmax(-1), passes.batch.targets
        chosen = scores.gather(1, targets[:, None])[:, 0]
        said = scores.argmax(-1) == targets
        done = said & (~corrected | (chosen.exp() >= descent.confidence))
        if bool(done.all()) or step == descent.steps:
            return step
        (gradient,) = torch.autograd.grad(-chosen[~done].sum(), values)
        norms = gradient[own].norm(dim=1, keepdim=True)
        moves = norms[:, 0] > 0
        if not bool(moves.any()):
            return step
        motion = _MOMENTUM * motion + gradient[own] / norms.clamp(min=1e-30)
        direction = motion / motion.norm(dim=1, keepdim=True).clamp(min=1e-30)
        with torch.no_grad():
            values[own] -= lengths[:, None] * direction * moves[:, None]
    return descent.steps


def subjects_of(
    facts: Sequence[Fact], queries: Sequence[Sequence[Prefix]], mistakes: Sequence[Mistake]
) -> tuple[list[Mistake], list[Group]]:
    """Return the subjects of the facts that the model does not say, each as one mistake, and all facts about each.

    Args:
        facts: The facts, each with a subject.
        queries: The tokens up to the subject's last one, in every wording of each fact, the fact's own first.
        mistakes: The tokens that the model does not say.
    """
    unsaid, number = {m.fact for m in mistakes}, {fact.id: i for i, fact in enumerate(facts)}
    found, groups = [], []
    for group in grouped(facts, "subject_last"):
        members = [number[fact.id] for fact in group]
        if unsaid.isdisjoint(members):
            continue
        own = tuple(prefix for i in members for prefix in queries[i])
        found.append(Mistake(members[0], 0, own[0][-1], own))
        groups.append(group)
    return found, groups


def subject_values(
    at: Lookup, block: Block, groups: Sequence[Group], keys: Keys, descent: Descent
) -> tuple[Neurons, dict[str, object]]:
    """Optimize the value of every subject by itself, as the closed-form editors do, and return the neurons that write it.

    Args:
        at: The layer, and the texts before prompts.
        block: The feed-forward block without the columns that are lent: values are those of this model.
        groups: The facts about each subject.
        keys: The neurons' keys.
        descent: Settings; clamp and divergence are the closed-form editors' defaults.

    Returns:
        The neurons with their columns, and the record: largest number of steps of a subject.
    """
    settings = Settings(descent.steps, SUBJECT_RATE, Preset.model_fields["clamp"].default, descent.confidence)
    found = values(at, groups, settings, json_digest([at.context.model_key, sorted(block.lent)]))
    columns = found.rows("change") / keys.activations[:, None]
    return replace(keys.changes, columns=columns), {"steps": max(value.steps for value in found)}
