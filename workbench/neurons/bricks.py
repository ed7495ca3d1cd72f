"""A recipe's bricks as a decomposition: coupling when one is left out, how few keep the quality, and cosines in weight and function space.

The scale is that of emergent bricks: damage matrices have the same form as those of neuron sets that are switched off.

Source: the questions of Xiao et al. 2024, arXiv 2409.02877, section 5.3, which gives no formulas; the definitions are this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from workbench.activations.labelled import Item, item_rows
from workbench.activations.losses import ItemLosses, Scored, SetLosses, loss_batches, losses
from workbench.activations.sites import sample_places
from workbench.errors import WorkbenchError
from workbench.events import Events, no_events, progress
from workbench.lazy import no_grad, torch
from workbench.merge.measuring.deltas import measure
from workbench.models.hooks import first_of, hooked, shaped
from workbench.models.layout import stack_prefix
from workbench.models.live import compute, live_model
from workbench.models.prompts import load_tokenizer
from workbench.models.texts import Text, encode, longest_row, side_by_side
from workbench.neurons.damage import DamageTable, damage_table
from workbench.neurons.subject import LONGEST
from workbench.recipe.recipe import Recipe, from_data
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved
from workbench.results import Measured, Number, Part, absent
from workbench.run.compose import compose, deltas, recipe_deltas
from workbench.weights.device import exact

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class QualityCurve(Part):
    """Quality of nested sets of bricks, from few bricks to all."""

    shares: list[Number]
    """Share of the bricks in each set."""
    scores: list[Number]
    """Its score: the negative loss in nats per token."""
    floor: Number
    """Score without any brick."""
    quality: list[Number]
    """Share of the full score above the floor that each set keeps."""
    kept: Number
    """Share of the score that defines `least_share`."""
    least_share: Number
    """Least share of the bricks that keeps this share of the score; all larger sets keep it too."""
    area: Number
    """Area under quality against share."""
    order: list[str] | None = absent()
    """Bricks of a recipe in the order in which they are added."""


def quality_curve(
    shares: Sequence[float], scores: Sequence[float], floor: float, kept: float = 0.9, order: Sequence[str] | None = None
) -> QualityCurve | None:
    """Return a curve with its sparsity and area; None if the full score does not exceed the floor.

    Args:
        shares: Share of the bricks in each set, ascending; the last is 1.
        scores: Score of each set; higher is better.
        floor: Score that is no quality at all: that of no bricks.
        kept: Share of the score to keep, which defines the sparsity.
        order: Bricks in the order in which they are added.

    Raises:
        ValueError: If shares do not ascend to 1.
    """
    ascending = all(a < b for a, b in pairwise(shares))
    if len(shares) != len(scores) or not shares or not ascending or shares[0] < 0 or shares[-1] != 1:
        raise ValueError(f"expected one score for each share, with shares ascending to 1; found {shares} and {scores}")
    if scores[-1] <= floor:
        return None
    quality = [(score - floor) / (scores[-1] - floor) for score in scores]
    least = 1.0  # every larger set must keep the score too, so that one lucky small set does not count
    for share, own in zip(reversed(shares), reversed(quality), strict=True):
        if own < kept:
            break
        least = share
    points = list(zip(shares, quality, strict=True))
    if shares[0] > 0:  # below the smallest share, quality falls to 0 at no bricks
        points = [(0.0, 0.0), *points]
    return QualityCurve(
        shares=list(shares),
        scores=list(scores),
        floor=floor,
        quality=quality,
        kept=kept,
        least_share=least,
        area=sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in pairwise(points)),
        order=None if order is None else list(order),
    )


@no_grad
def layer_updates(model: PreTrainedModel, depth: int, rows: Sequence[Sequence[int]], places: Tensor) -> Tensor:
    """Return what every layer adds to the hidden state of some tokens, float32 [layers, tokens, width].

    Models of bricks can be loaded one after the other for this.

    Args:
        model: The live model.
        depth: Number of its layers.
        rows: Tokens of the texts.
        places: Row and position of each token [tokens, 2]; see `sample_places`.
    """
    device = next(model.parameters()).device
    layers = model.get_submodule(stack_prefix(model, depth))
    assert isinstance(layers, torch.nn.ModuleList)
    backbone = getattr(model, model.base_model_prefix, model)
    size, at = (0, 0), (places[:0, 0], places[:0, 1])  # shape of the current batch, and its tokens
    states: dict[tuple[str, int], Tensor] = {}

    def keep(side: str, number: int, hidden: Tensor) -> None:
        states[side, number] = shaped(hidden, *size)[at].float().cpu()

    collected: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            before, after = _hooks(number, keep)
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.enter_context(hooked(layer, after=after))
        counts = places[:, 0].bincount(minlength=len(rows)).tolist()
        for index in loss_batches([len(row) for row in rows], counts, len(places)):
            batch = side_by_side([rows[i] for i in index], device)
            row_of = {i: b for b, i in enumerate(index)}
            where = torch.tensor([n for n, i in enumerate(places[:, 0].tolist()) if i in row_of])
            size = (len(index), batch.tokens.shape[1])
            at = torch.tensor([row_of[i] for i in places[where, 0].tolist()]), places[where, 1]
            backbone(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
            entering, leaving = (torch.stack([states[side, n] for n in range(depth)]) for side in ("in", "out"))
            collected.append((where, leaving - entering))
    order = torch.cat([where for where, _ in collected]).argsort()
    return torch.cat([update for _, update in collected], 1)[:, order]


def _hooks(number: int, keep: Callable[[str, int, Tensor], None]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return hooks that keep the hidden states before and after a layer."""

    def before(_module: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        keep("in", number, args[0] if args else named["hidden_states"])

    def after(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        keep("out", number, first_of(output))

    return before, after


class FunctionSpace(Part):
    """Cosines of the changes that bricks make to a model's outputs on the same tokens: near 1 they repeat each other, below 0 they conflict."""

    names: list[str]
    """The bricks."""
    tokens: int
    """Number of tokens."""
    mean: list[list[Measured]]
    """Mean over layers; null if a brick changes nothing."""
    layers: list[list[list[Measured]]]
    """Layer -> cosines."""


def function_cosines(base: Tensor, bricks: Mapping[str, Tensor]) -> FunctionSpace:
    """Compare what bricks change in function space: mean cosine over tokens of the differences to the base's updates.

    Args:
        base: Updates of the base's layers; see `layer_updates`.
        bricks: Brick -> updates of the base with this brick, on the same tokens.
    """
    changes = torch.stack([updates - base for updates in bricks.values()], 1)  # [layers, bricks, tokens, width]
    norms = changes.norm(dim=-1)
    products = torch.einsum("latw,lbtw->labt", changes, changes)
    lengths = norms[:, :, None] * norms[:, None]
    cosines = torch.where(lengths > 0, products / lengths, torch.nan).nanmean(-1)
    return FunctionSpace(names=list(bricks), tokens=base.shape[1], mean=cosines.nanmean(0).tolist(), layers=cosines.tolist())


TOKENS = 512
"""Number of tokens on which bricks are compared in function space."""


def without_brick(recipe: Recipe, brick: str) -> Recipe:
    """Return the recipe without one of its bricks. A step that uses no other brick is removed.

    Args:
        recipe: The recipe.
        brick: Name of the brick.

    Raises:
        WorkbenchError: If the recipe has no such brick, or is not valid without it.
    """
    fields = recipe.fields
    if brick not in fields.bricks:
        raise WorkbenchError(f"recipe {recipe.name} has no brick '{brick}'", f"Its bricks: {', '.join(fields.bricks)}.")
    data = fields.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude={"search", "eval"})
    steps = []
    for step, written in zip(recipe.steps, data.get("steps", []), strict=True):
        used = recipe.used_bricks(step)
        if brick in used:
            if used == [brick]:
                continue
            listed = written.get("bricks")
            if isinstance(listed, dict):
                written["bricks"] = {name: entry for name, entry in listed.items() if name != brick}
            else:
                written["bricks"] = [name for name in used if name != brick]
        steps.append(written)
    # A union vocabulary depends on all bricks of the recipe: without one of them, rows would belong to other tokens.
    kept = {name: ref.data() for name, ref in fields.bricks.items() if name != brick or fields.tokenizer}
    return from_data(
        {"version": 1, **data, "name": f"{recipe.name}-without-{brick}", "steps": steps, "bricks": kept}, recipe.project
    )


class BrickSubsets:
    """Losses of texts on a recipe with only some of its bricks. Each subset is composed once.

    Attributes:
        bricks: All bricks of the recipe.
        named: Those that serve texts.
    """

    def __init__(
        self, recipe: Recipe, items: Sequence[Item], *, scored: Scored = "whole", device: torch.device, events: Events = no_events
    ) -> None:
        """Check the texts and the recipes without one brick. Nothing is composed yet.

        Args:
            recipe: The recipe.
            items: Texts. The function of a text is the name of the brick that serves it.
            scored: Tokens whose loss counts.
            device: Device of the models, which are loaded one after the other.
            events: Receives progress.

        Raises:
            WorkbenchError: If the recipe has a memory, fewer than two bricks have texts, or texts have the name of no brick.
        """
        whole = resolve(recipe)
        self.bricks: tuple[str, ...] = tuple(whole.parents)
        self.named = tuple(name for name in whole.parents if any(item.function == name for item in items))
        if unknown := sorted({item.function for item in items} - set(whole.parents)):
            raise WorkbenchError(
                f"texts have the function '{unknown[0]}', which is no brick of recipe {recipe.name}",
                f"Name the function of each text after the brick that serves it: {', '.join(whole.parents)}.",
            )
        if len(self.named) < 2:
            raise WorkbenchError(
                f"coupling needs texts of at least two bricks of recipe {recipe.name}, found {len(self.named)}", None
            )
        if beside := whole.beside:
            raise WorkbenchError(f"recipe {recipe.name} ends in a {beside}, which is not a brick that can be left out", None)
        for name in self.named:
            resolve(without_brick(recipe, name))
        tokenizer = load_tokenizer(whole.tokenizer_path)
        self.items = tuple(items)
        self._rows = item_rows(items, tokenizer, longest_row(whole.base.config, LONGEST))
        self._recipe, self._scored, self._device = recipe, scored, device
        self._tell = progress(events, "measure", recipe.name)
        self._known: dict[frozenset[str], ItemLosses] = {}

    def losses(self, kept: Iterable[str]) -> ItemLosses:
        """Return the losses of all texts with only these bricks.

        Raises:
            WorkbenchError: If the recipe is not valid with these bricks alone.
        """
        key = frozenset(kept)
        if key not in self._known:
            recipe = self._recipe
            for name in self.bricks:
                recipe = recipe if name in key else without_brick(recipe, name)
            self._known[key] = losses(live_float32(resolve(recipe), self._device), self._rows, scored=self._scored)
        return self._known[key]

    def compute(self, subsets: Iterable[Iterable[str]]) -> None:
        """Compute the losses of some subsets, and report progress."""
        missing = list(dict.fromkeys(key for kept in subsets if (key := frozenset(kept)) not in self._known))
        for number, key in enumerate(missing):
            self.losses(key)
            self._tell(number + 1, len(missing), f"{len(key)} of {len(self.bricks)} bricks")

    def without(self, brick: str) -> tuple[str, ...]:
        """Return all bricks but one."""
        return tuple(name for name in self.bricks if name != brick)

    def table(self) -> DamageTable:
        """Return the damage when each brick with texts is left out once."""
        self.compute([self.bricks, *(self.without(name) for name in self.named)])
        sums = torch.stack([self.losses(self.without(name)).sums for name in self.named])
        result = SetLosses(self.named, self.losses(self.bricks), sums, self._scored)
        return damage_table(result, self.items, self.named)


def live_float32(resolved: Resolved, device: torch.device) -> PreTrainedModel:
    """Return a configuration without its memory as a live model in float32, in which small differences are not rounded away."""
    with exact(device):
        model = compose(resolved, device, no_events).model
        return live_model(model.config, compute(model, torch.float32, device), resolved.tokenizer_path, device)


class BrickCosines(Part):
    """Cosines of a recipe's bricks: near 1 they repeat each other, below 0 they are in conflict."""

    names: list[str]
    """The bricks."""
    weight: list[list[Measured]]
    """Cosine of their deltas; null if two bricks change no common tensor."""
    function: FunctionSpace | None
    """Cosines in function space; null without texts."""


def brick_cosines(
    recipe: Recipe, texts: Sequence[Text], *, device: torch.device, events: Events = no_events, tokens: int = TOKENS
) -> BrickCosines:
    """Compare the bricks of a recipe in weight space and in function space.

    In function space, each brick is added alone to the base, with weight 1, and the differences to the base's outputs are compared. LoRA
    bricks that do the same can be nearly orthogonal in weight space.

    Args:
        recipe: The recipe with at least two bricks.
        texts: Texts on which the outputs are compared; without any, only weights are.
        device: Device of the models, which are loaded one after the other.
        events: Receives progress.
        tokens: Number of their tokens to compare.

    Raises:
        WorkbenchError: If the recipe has fewer than two bricks.
    """
    whole = resolve(recipe)
    names = list(whole.parents)
    if len(names) < 2:
        raise WorkbenchError(f"recipe {recipe.name} uses {len(names)} bricks, but cosines compare at least two", None)
    function = None
    if texts:
        longest = longest_row(whole.base.config, LONGEST)
        rows = [row.tokens for row in encode(texts, load_tokenizer(whole.tokenizer_path), longest)]
        places = sample_places([len(row) for row in rows], tokens)
        report = progress(events, "measure", recipe.name)
        updates: list[Tensor] = []
        for number, name in enumerate(["base", *names]):
            steps = [{"merge": "task_arithmetic", "bricks": {name: 1.0}}] if number else []
            alone = resolve(recipe.derive(name, steps, [name] if number else []))
            updates.append(layer_updates(live_float32(alone, device), whole.base.layout.depth, rows, places))
            report(number + 1, 1 + len(names), name)
        function = function_cosines(updates[0], dict(zip(names, updates[1:], strict=True)))
    return BrickCosines(names=names, weight=_weight_cosines(whole, names, device).tolist(), function=function)


def _weight_cosines(resolved: Resolved, names: Sequence[str], device: torch.device) -> Tensor:
    nested = resolved.nested
    changes = {
        name: recipe_deltas(nested[name], resolved, device) if name in nested else deltas(name, resolved) for name in names
    }
    cosines = torch.eye(len(names), dtype=torch.float64)
    for i, name in enumerate(names[:-1]):
        others = {other: changes[other] for other in names[i + 1 :]}
        total = measure(resolved.base, changes[name], others, device=device, threads=1).total
        for j, other in enumerate(names[i + 1 :], i + 1):
            value = total.cosine(other) if other in total.meetings else None
            cosines[i, j] = cosines[j, i] = float("nan") if value is None else value
    return cosines
