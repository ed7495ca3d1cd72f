"""Rows of routers from the router's own inputs on texts: by ridge regression, from the mean over prompts, or such that no token selects them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import InvalidRecipeError
from workbench.ground.lazy import no_grad, torch
from workbench.ground.results import OpenJsonObject
from workbench.grow.mixtures.texts import load_measured, save_measured
from workbench.models.layout import Model
from workbench.models.live import live_names
from workbench.models.prompts import encode_text
from workbench.models.texts import TextRow, batches, longest_row
from workbench.steps import GrowContext, Grown

if TYPE_CHECKING:
    from torch import Tensor


RIDGE = 1e-2
"""Value added to the diagonal of the inputs' second moments, relative to the mean of the diagonal, as in DUME."""
TEMPERATURE = 0.1
"""Divisor of the regression's values (about 0 and 1), and of cosines. A lower value makes the router more decided. DUME's value."""
HELD_OUT = 5
"""Every fifth text is held out."""
SAME = 0.9999
"""Cosine of two rows above which a router cannot tell the experts apart."""


@dataclass(frozen=True)
class Gates:
    """Router weights, with a record of how they were made.

    Attributes:
        rows: Router's tensor name -> [experts, hidden].
        record: Number of tokens; how often the router ranks the right expert first, for each expert (mean over layers) and each
            layer (mean over experts); and, from `ridge_gates`, how often each expert ranks first.
    """

    rows: dict[str, Tensor]
    record: dict[str, object]


@dataclass
class _Moments:
    """Moments of one layer's inputs on one expert's texts: Σ x xᵀ, Σ x, the number of inputs, and the held-out inputs."""

    gram: Tensor
    total: Tensor
    count: int
    held_out: list[Tensor]


def ridge_gates(
    context: GrowContext,
    rows: Mapping[str, Sequence[TextRow]],
    changes: Mapping[str, Mapping[str, Grown]],
    readers: Mapping[str, str],
    model: Model,
) -> Gates:
    """Solve every layer's router by ridge regression (DUME, arXiv 2603.29765).

    W = Y' X (Σ over experts of mean x x' + λ I)^-1 / temperature, with one-hot Y. Each expert's texts run through the model with
    that expert's feed-forward layers, so that the inputs are those of a router without errors. All experts have the same weight,
    however many tokens they have.

    Args:
        context: Live models, cache and progress.
        rows: Expert -> its texts, in the router's order.
        changes: Expert -> its tensors in the model before growth.
        readers: Dense matrix with the same inputs as the router -> tensor name of the router.
        model: Model before growth.
    """
    if (cached := _load_stored(context)) is not None:
        return cached
    modules = live_modules(model, readers)
    moments: dict[str, dict[str, _Moments]] = {}
    for number, (expert, texts) in enumerate(rows.items()):
        context.progress(number, len(rows), f"{expert or 'anchor'}: inputs of the router")
        moments[expert] = _moments(context, changes[expert], texts, modules)
    solved = {reader: _solve([moments[e][reader] for e in rows]) / TEMPERATURE for reader in readers}
    shares = {reader: [_selected_shares(solved[reader], moments[e][reader].held_out) for e in rows] for reader in readers}
    hits = {reader: [float(share[i]) for i, share in enumerate(expert_shares)] for reader, expert_shares in shares.items()}
    selected = torch.stack([torch.stack(expert_shares).mean(0) for expert_shares in shares.values()]).mean(0)
    record = {
        "tokens": {e or "anchor": next(iter(moments[e].values())).count for e in rows},
        "found": {e or "anchor": round(sum(h[i] for h in hits.values()) / len(hits), 4) for i, e in enumerate(rows)},
        "found_by_layer": [round(sum(h) / len(h), 4) for h in hits.values()],
        "used": {e or "anchor": round(float(selected[i]), 4) for i, e in enumerate(rows)},
    }
    context.progress(len(rows), len(rows), "routers")
    return _store(context, {readers[reader]: w for reader, w in solved.items()}, record)


def prompt_gates(
    context: GrowContext,
    prompts: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    changes: Mapping[str, Mapping[str, Grown]],
    readers: Mapping[str, str],
    model: Model,
    max_length: int,
    old_rows: Mapping[str, Tensor] | None = None,
) -> Gates:
    """Make a row for every expert from the mean of the router's inputs on its prompts.

    The row is (m/|m| - m'/|m'|) / (s temperature), where m is the mean on the prompts and m' that on the negative prompts, if
    there are any (mergekit-moe's `hidden`, but on the router's own input). s is the mean norm of the router's inputs on all
    prompts, about the square root of the width after an RMS norm, so that logits are cosines divided by the temperature.

    Args:
        context: Live models, cache and progress.
        prompts: Expert -> its prompts and negative prompts, in the router's order.
        changes: Expert -> its tensors in the model before growth, for its own prompts.
        readers: Matrix with the same inputs as the router -> tensor name of the router.
        model: Model before growth.
        max_length: Largest number of tokens of a prompt.
        old_rows: Matrix, as in `readers` -> the router's old rows [experts, hidden], for the record.

    Returns:
        Router's tensor name -> [experts of `prompts`, hidden]. The record states how often the router ranks the right expert
        first on the prompts from which the rows were made.

    Raises:
        WorkbenchError: If a prompt has no token, or the rows of two experts have the same direction (cosine above 0.9999).
    """
    if (cached := _load_stored(context)) is not None:
        return cached
    modules, longest = live_modules(model, readers), longest_row(model.config, max_length)
    expert_inputs: dict[str, dict[str, Tensor]] = {}
    rows: dict[str, list[Tensor]] = {reader: [] for reader in readers}
    for number, (expert, (positive, negative)) in enumerate(prompts.items()):
        context.progress(number, len(prompts), f"{expert or 'anchor'}: inputs of the router on prompts")
        live = context.live(changes[expert])
        wanted, unwanted = (_encoded(texts, context, longest, expert) for texts in (positive, negative))
        expert_inputs[expert] = _all_inputs(live, modules, wanted, context)
        negative_inputs = _all_inputs(live, modules, unwanted, context) if unwanted else {}
        for reader, x in expert_inputs[expert].items():
            unit = torch.nn.functional.normalize(x.mean(0), dim=0)
            rows[reader].append(unit - (torch.nn.functional.normalize(negative_inputs[reader].mean(0), dim=0) if negative else 0))
    new_rows = {reader: torch.stack(unit_rows) for reader, unit_rows in rows.items()}
    _check_distinct(list(prompts), new_rows)
    for reader, w in new_rows.items():
        w /= torch.cat([unit_rows[reader] for unit_rows in expert_inputs.values()]).norm(dim=1).mean() * TEMPERATURE
    all_rows = {r: torch.cat([old_rows[r], w]) if old_rows else w for r, w in new_rows.items()}
    hits = {
        r: [float(_selected_shares(w, [expert_inputs[e][r]])[i - len(prompts)]) for i, e in enumerate(prompts)]
        for r, w in all_rows.items()
    }
    record = {
        "tokens": {e or "anchor": len(next(iter(expert_inputs[e].values()))) for e in prompts},
        "found_on_prompts": {
            e or "anchor": round(sum(h[i] for h in hits.values()) / len(hits), 4) for i, e in enumerate(prompts)
        },
        "found_on_prompts_by_layer": [round(sum(h) / len(h), 4) for h in hits.values()],
    }
    context.progress(len(prompts), len(prompts), "routers")
    return _store(context, {readers[reader]: w for reader, w in new_rows.items()}, record)


def _check_distinct(experts: Sequence[str], rows: Mapping[str, Tensor]) -> None:
    """Check that a router can tell all experts apart."""
    for reader, w in rows.items():
        if (is_zero := w.norm(dim=1) < 1 - SAME).any():
            raise InvalidRecipeError(
                f"gate: prompts: {experts[int(is_zero.int().argmax())] or 'the anchor'}: prompts and negative prompts read the "
                f"same ({reader}), and leave no row",
                "Give it other `negative_prompts`.",
            )
        units = torch.nn.functional.normalize(w, dim=1)
        for a, b in combinations(range(len(experts)), 2):
            if units[a] @ units[b] > SAME:
                first, second = (experts[i] or "the anchor" for i in (a, b))
                raise InvalidRecipeError(
                    f"gate: prompts: the prompts of {first} and {second} give the same row of the router ({reader}, cosine > {SAME})",
                    "Give each its own `prompts`, or `negative_prompts`.",
                )


def _encoded(prompts: Sequence[str], context: GrowContext, longest: int, expert: str) -> list[TextRow]:
    """Return prompts as tokens, at most `longest` of each. Raises WorkbenchError if a prompt has no token."""
    rows = [TextRow(encode_text(context.tokenizer, text)[:longest], 0) for text in prompts]
    for text, row in zip(prompts, rows, strict=True):
        if not row.tokens:
            raise InvalidRecipeError(f"gate: prompts: {expert or 'the anchor'}: the prompt {text!r} has no token")
    return rows


def _load_stored(context: GrowContext) -> Gates | None:
    """Return the gates of an earlier call, or None."""
    found = load_measured(context, OpenJsonObject)
    return None if found is None else Gates(found[0], found[1].to_dict())


def _store(context: GrowContext, rows: Mapping[str, Tensor], record: dict[str, object]) -> Gates:
    """Return gates, and cache them for the next call."""
    gates = Gates({name: w.float().cpu() for name, w in rows.items()}, record)
    save_measured(context, gates.rows, record)
    return gates


def live_modules(model: Model, tensors: Iterable[str]) -> dict[str, str]:
    """Return the live module of each weight, by its tensor name on disk."""
    names = live_names(model.config, model.weights.specs)
    return {name: names[name][0].removesuffix(".weight") for name in tensors}


@no_grad
def _moments(
    context: GrowContext, changes: Mapping[str, Grown], texts: Sequence[TextRow], modules: Mapping[str, str]
) -> dict[str, _Moments]:
    """Measure one expert's moments in every layer, in one pass over its texts."""
    live = context.live(changes)
    sizes = {reader: live.get_submodule(module).weight.shape[1] for reader, module in modules.items()}
    by_reader = {
        r: _Moments(torch.zeros(d, d, device=context.device), torch.zeros(d, device=context.device), 0, [])
        for r, d in sizes.items()
    }
    halves = ([r for i, r in enumerate(texts) if i % HELD_OUT], [r for i, r in enumerate(texts) if not i % HELD_OUT])
    for is_held_out, half_texts in enumerate(halves):
        for inputs in read_inputs(live, modules, half_texts, context.device):
            for reader, x in inputs.items():
                moments = by_reader[reader]
                if is_held_out:
                    moments.held_out.append(x.cpu())
                else:
                    moments.gram += x.T @ x
                    moments.total += x.sum(0)
                    moments.count += len(x)
    return by_reader


@no_grad
def read_inputs(
    live: Any, modules: Mapping[str, str], texts: Sequence[TextRow], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Yield the inputs of modules on texts, batch by batch: [tokens, hidden] in float32, without padding."""
    for batch in batches(texts, device):
        with _recording_inputs(live, modules) as inputs:
            live(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
        is_token = batch.mask.flatten().bool()
        yield {reader: x.reshape(-1, x.shape[-1])[is_token].float() for reader, x in inputs.items()}


def _all_inputs(live: Any, modules: Mapping[str, str], texts: Sequence[TextRow], context: GrowContext) -> dict[str, Tensor]:
    """Return the inputs of modules on all texts [tokens, hidden], on the CPU."""
    recorded = [{r: x.cpu() for r, x in inputs.items()} for inputs in read_inputs(live, modules, texts, context.device)]
    return {reader: torch.cat([inputs[reader] for inputs in recorded]) for reader in modules}


@contextmanager
def _recording_inputs(live: Any, modules: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """Record the inputs of modules inside the block."""
    inputs: dict[str, Tensor] = {}

    def record(reader: str, _module: Any, args: tuple[Any, ...]) -> None:
        inputs[reader] = args[0]

    with ExitStack() as hooks:
        for reader, module in modules.items():
            hooks.enter_context(live.get_submodule(module).register_forward_pre_hook(partial(record, reader)))
        yield inputs


def _solve(moments: Sequence[_Moments]) -> Tensor:
    """Solve the ridge regression; return [experts, hidden] in float64."""
    gram = sum((m.gram.double() / m.count for m in moments), torch.zeros_like(moments[0].gram, dtype=torch.float64))
    means = torch.stack([m.total.double() / m.count for m in moments])
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solution: Tensor = torch.linalg.solve(gram, means.T)
    return solution.T


def _selected_shares(router: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Return [experts], the share of tokens for which each expert has the largest value."""
    x = torch.cat(list(inputs)).double().to(router.device)
    first = (x @ router.double().T).argmax(1)
    return torch.bincount(first, minlength=len(router)).double().cpu() / max(1, len(x))


STRENGTH = 10.0
"""Default negative logit of the new expert, for a token in the direction of the mean."""


@no_grad
def never_gates(
    context: GrowContext,
    rows: Sequence[TextRow],
    routers: Mapping[str, Tensor],
    corrections: Mapping[str, Tensor],
    model: Model,
    top_k: int,
) -> Gates:
    """Return a router row per layer, -c m / (|m| s), with which no token selects the new expert.

    m is the mean of the router's inputs, s their mean norm, and c is chosen so that no token selects the expert.

    Args:
        context: Live model, cache and progress.
        rows: Texts as tokens, read in two passes.
        routers: Router's tensor name -> its current rows [experts, hidden].
        corrections: Router's tensor name -> bias [experts] that is added to the softmax before the selection; a router without
            one selects by logits.
        model: Model with these routers.
        top_k: Number of experts that the router selects for each token.

    Returns:
        Router's tensor name -> [1, hidden]; the record states the number of tokens that select the new expert, 0.

    Raises:
        WorkbenchError: If no c works in a layer, because tokens point away from the mean.
    """
    if (cached := _load_stored(context)) is not None:
        return cached
    live, modules = context.live({}), live_modules(model, routers)
    sums = {name: torch.zeros(w.shape[1], dtype=torch.float64) for name, w in routers.items()}
    norms = dict.fromkeys(routers, 0.0)
    tokens = 0
    context.progress(0, 2, "mean of the router's inputs")
    for inputs in read_inputs(live, modules, rows, context.device):
        for name, x in inputs.items():
            sums[name] += x.sum(0).double().cpu()
            norms[name] += float(x.norm(dim=1).sum())
        tokens += len(next(iter(inputs.values())))
    # m / (|m| s), the new row for c = -1
    direction = {name: (torch.nn.functional.normalize(t, dim=0) / (norms[name] / tokens)).float() for name, t in sums.items()}
    batch_scores: dict[str, list[Tensor]] = {name: [] for name in routers}
    context.progress(1, 2, "tokens that would select the new expert")
    for inputs in read_inputs(live, modules, rows, context.device):
        for name, x in inputs.items():
            batch_scores[name].append((x @ torch.cat([routers[name], direction[name][None]]).to(x.device).T).cpu())
    strengths, new_rows = {}, {}
    for name, parts in batch_scores.items():
        scores = torch.cat(parts)  # [tokens, experts + 1], the new expert last
        lowest_selected = scores[:, :-1].topk(top_k).values[:, -1]
        strengths[name] = _strength(lowest_selected, scores[:, -1])
        scores[:, -1] *= -strengths[name]
        if name in corrections:
            scores = scores.softmax(1) + torch.nn.functional.pad(corrections[name], (0, 1))
        selected = int((scores.topk(top_k).indices == scores.shape[1] - 1).any(1).sum())
        if selected:
            raise InvalidRecipeError(
                f"gate: never: {selected} of {tokens} tokens still select the new expert ({name}): they point against the mean input "
                "of the router",
                "Use other texts, `gate: prompts` or `gate: random`.",
            )
        new_rows[name] = -strengths[name] * direction[name][None]
    context.progress(2, 2, "routers")
    record = {"tokens": tokens, "selected": 0, "strength": [round(v, 3) for v in strengths.values()]}
    return _store(context, new_rows, record)


def _strength(threshold: Tensor, along: Tensor) -> float:
    """Return a c for which -c `along` stays below `threshold` for every token, close to `STRENGTH` if the valid range allows.

    Args:
        threshold: [tokens], the lowest logit among the experts that a token selects.
        along: [tokens], the logit of a row in the direction of the mean.
    """
    with_mean, against_mean = along > 0, along < 0
    low = max(0.0, float((-threshold / along)[with_mean].max())) if with_mean.any() else 0.0
    high = float((threshold / -along)[against_mean].min()) if against_mean.any() else float("inf")
    return min(max(2 * low, STRENGTH), (low + high) / 2) if high > low else STRENGTH
