"""Keys of a recipe's steps, made from everything that determines the weights after a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from workbench.bricks.brick import Brick, BrickSource
from workbench.ground.files import json_digest
from workbench.ground.identity import WatchedFiles
from workbench.models.identity import template_digest, tokens_digest
from workbench.recipe.recipe import Recipe, dump_step
from workbench.weights.kernels import PRODUCTS

if TYPE_CHECKING:
    from workbench.activations.sets import NeuronSet

_FACTORS = ("edit", "steer", "train")  # kinds of steps whose result is an update in factors


class KeyInputs(Protocol):
    """Inputs of keys besides the digests of bricks."""

    @property
    def recipe(self) -> Recipe:
        """The recipe."""

    def input_digest(self, name: str) -> str:
        """Return the digest of a file that a step reads."""

    def tokens_at(self, steps: int) -> str | None:
        """Return the digest of what turns text into tokens after the first `steps` steps."""

    def tokenizer_at(self, steps: int) -> Path:
        """Return the directory of the tokenizer after the first `steps` steps."""

    def tokenizer_of(self, name: str) -> Path:
        """Return the directory of the tokenizer of a brick's whole model."""

    @property
    def watched(self) -> WatchedFiles:
        """Record of the small input files that were read."""

    def neurons(self, folder: str) -> NeuronSet:
        """Return a set of neurons that a step names."""

    @property
    def bricks(self) -> Mapping[str, BrickSource]:
        """The bricks by name."""

    @property
    def base_adapter(self) -> Brick | None:
        """The adapter on the base, if it has one."""


@dataclass(frozen=True)
class StepKey:
    """Inputs of the key of one step; implements `steps.KeyContext`.

    Attributes:
        inputs: The recipe, and the digests of its files and tokenizers.
        digests: Brick -> digest, or another key.
        number: The step's index, from 0.
    """

    inputs: KeyInputs
    digests: Mapping[str, str]
    number: int

    @property
    def seed(self) -> int:
        """The recipe's seed."""
        return self.inputs.recipe.fields.seed

    def bricks(self, names: Sequence[str] | None) -> list[list[str]]:
        """Return [name, digest] of each named brick; None stands for all bricks of the recipe."""
        return [[name, self.digests[name]] for name in (self.inputs.recipe.fields.bricks if names is None else names)]

    def files(self, names: Sequence[str]) -> list[str]:
        """Return the digest of each input file."""
        return [self.inputs.input_digest(name) for name in names]

    def wording(self, names: Sequence[str] | None, steps: int) -> list[str]:
        """Return the digest of the chat template after the first `steps` steps in a list, if the files may have conversations, else no digest."""
        files = [] if names is None else [self.inputs.watched.read(self.inputs.recipe.project / name) for name in names]
        may_have = names is None or any(b'"messages"' in content for content in files)
        return [str(template_digest(self.inputs.tokenizer_at(steps), self.inputs.watched))] if may_have else []

    def tokens(self, steps: int) -> str | None:
        """Return the digest of what turns text into tokens after the first `steps` steps."""
        return self.inputs.tokens_at(steps)

    def brick_tokens(self, names: Sequence[str]) -> list[str | None]:
        """Return the same digest for each named brick's whole model."""
        return [tokens_digest(self.inputs.tokenizer_of(name), self.inputs.watched) for name in names]

    def neurons(self, folder: str) -> str:
        """Return the digest of a set of neurons."""
        return self.inputs.neurons(folder).digest()


def chain(inputs: KeyInputs, base: list[Any], bricks: Mapping[str, str], listed: bool = False) -> list[str]:
    """Return the key before the first step and the key after each step.

    Args:
        inputs: The recipe, and the digests of its files and tokenizers.
        base: Everything that determines the base's weights.
        bricks: Brick -> digest, or another key.
        listed: Give a step that uses all bricks the same key whether or not it lists them.
    """
    keys = [json_digest(base)]
    recipe = inputs.recipe
    for i, step in enumerate(recipe.steps):
        fields = {**dump_step(step), **(step.listed(recipe.used_bricks(step)) if listed else {})}
        order = [PRODUCTS] if step.kind in _FACTORS else products(inputs, recipe.used_bricks(step))
        keys.append(json_digest([keys[-1], fields, type(step).code_key(), *step.key_parts(StepKey(inputs, bricks, i)), *order]))
    return keys


def products(inputs: KeyInputs, bricks: Sequence[str]) -> list[str]:
    """Return the order of sums in products of factors, if the base has an adapter or one of these bricks is one; else nothing."""
    return [PRODUCTS] if inputs.base_adapter or any(inputs.bricks[name].kind == "adapter" for name in bricks) else []


def distinct_keys(keys: Mapping[str, str], content: Callable[[str], str]) -> dict[str, str]:
    """Make sort keys unique: append the digest of the content to keys that several bricks share.

    Args:
        keys: Brick name -> sort key.
        content: Returns the digest of a brick's content.
    """
    counts = Counter(keys.values())
    return {name: key if counts[key] == 1 else f"{key}-{content(name)}" for name, key in keys.items()}
