"""Keys of a recipe's steps: all that the numbers after a step depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from workbench.files import json_digest
from workbench.recipe.recipe import Recipe, dump_step
from workbench.steps import EditMethod, GrowMethod, MemoryMethod, MergeMethod, TrainMethod


class KeyInputs(Protocol):
    """What keys are made of beside the digests of bricks."""

    @property
    def recipe(self) -> Recipe:
        """The recipe."""

    def input_digest(self, name: str) -> str:
        """Return the digest of a file that a step reads."""

    def vocabulary_at(self, steps: int) -> str | None:
        """Return the digest of the vocabulary after the first `steps` steps."""


def chain(inputs: KeyInputs, base: list[Any], bricks: Mapping[str, str], listed: bool = False) -> list[str]:
    """Return the keys of the states before the first step and after each.

    Args:
        inputs: The recipe, and the digests of its files and vocabularies.
        base: What the base's numbers depend on.
        bricks: Digest, or another key, of every brick.
        listed: Give the same keys for a merge step that takes all bricks and for one that names them.
    """
    keys = [json_digest(base)]
    for i, step in enumerate(inputs.recipe.steps):
        parts: list[Any] = [keys[-1], dump_step(step), type(step).code_key()]
        if isinstance(step, MergeMethod):
            if listed:
                entries = {name: step.entry(name).model_dump(mode="json") for name in inputs.recipe.used_bricks(step)}
                parts[1] = {**parts[1], "bricks": entries}
            parts.append([[name, bricks[name]] for name in inputs.recipe.used_bricks(step)])
            parts += [inputs.recipe.fields.seed] if step.laws.random else []
            if files := step.inputs():
                parts += [[inputs.input_digest(f) for f in files], inputs.vocabulary_at(0)]
        elif isinstance(step, GrowMethod):
            parts += [[[name, bricks[name]] for name in step.names()]] if step.names() else []
            parts += [inputs.recipe.fields.seed] if step.random else []
            parts += [step.binding()] if step.binding() is not None else []
            if (files := step.inputs()) or step.measures():
                parts += [[inputs.input_digest(f) for f in files], inputs.vocabulary_at(i)]
            if step.train:
                parts.append([inputs.input_digest(f) for f in step.train.inputs()])
                parts.append([inputs.recipe.fields.seed, inputs.vocabulary_at(i + 1), step.train.version])
        elif isinstance(step, TrainMethod):
            parts.append([[name, bricks[name]] for name in step.names() or ()])
            parts.append([inputs.input_digest(f) for f in step.inputs()])
            parts.append([inputs.recipe.fields.seed, step.id, inputs.vocabulary_at(i)])
        elif isinstance(step, (EditMethod, MemoryMethod)):
            parts.append([inputs.input_digest(f) for f in step.inputs()])
            parts.append([inputs.recipe.fields.seed, inputs.vocabulary_at(i)])
        keys.append(json_digest(parts))
    return keys
