"""A recipe's bricks as a decomposition: coupling when one brick is left out, and cosines of bricks in weight and in function space.

The scale is that of emergent bricks: damage matrices have the same form as those of neuron sets that are switched off.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from workbench.activations.labelled import Item, item_rows
from workbench.activations.losses import ItemLosses, Scored, SetLosses, losses
from workbench.activations.sites import sample_places
from workbench.errors import WorkbenchError
from workbench.events import Events, no_events, progress
from workbench.lazy import torch
from workbench.merge.measuring.deltas import measure
from workbench.models.live import compute, live_model
from workbench.models.prompts import load_tokenizer
from workbench.models.texts import Text, encode, longest_row
from workbench.neurons.brick_metrics import FunctionSpace, function_cosines, layer_updates
from workbench.neurons.damage import DamageTable, damage_table
from workbench.neurons.subject import LONGEST
from workbench.recipe.recipe import Recipe, from_data
from workbench.resolve.resolve import resolve
from workbench.resolve.resolved import Resolved
from workbench.results import Measured, Part
from workbench.run.compose import compose, deltas, recipe_deltas
from workbench.weights.device import exact

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

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
        self,
        recipe: Recipe,
        items: Sequence[Item],
        *,
        scored: Scored = "whole",
        device: torch.device,
        events: Events = no_events,
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
        name: recipe_deltas(nested[name], resolved, device)
        if name in nested
        else deltas(resolved.on_disk[name], resolved.base, resolved.vocabulary)
        for name in names
    }
    cosines = torch.eye(len(names), dtype=torch.float64)
    for i, name in enumerate(names[:-1]):
        others = {other: changes[other] for other in names[i + 1 :]}
        total = measure(resolved.base, changes[name], others, device=device, threads=1).total
        for j, other in enumerate(names[i + 1 :], i + 1):
            value = total.cosine(other) if other in total.meetings else None
            cosines[i, j] = cosines[j, i] = float("nan") if value is None else value
    return cosines
