"""Keys of a recipe's steps: all that the numbers after a step depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.recipe import dump_step
from workbench.registry import EditMethod, GrowMethod, MemoryMethod, MergeMethod, TrainMethod
from workbench.weights.digests import json_digest

if TYPE_CHECKING:
    from workbench.resolve import Resolved


def chain(resolved: Resolved, base: list[Any], bricks: Mapping[str, str], listed: bool = False) -> list[str]:
    """Return the keys of the states before the first step and after each.

    Args:
        resolved: The recipe.
        base: What the base's numbers depend on.
        bricks: Digest, or another key, of every brick.
        listed: Give the same keys for a merge step that takes all bricks and for one that names them.
    """
    keys = [json_digest(base)]
    for i, step in enumerate(resolved.recipe.steps):
        parts: list[Any] = [keys[-1], dump_step(step), type(step).version]
        if isinstance(step, MergeMethod):
            if listed:
                entries = {name: step.entry(name).model_dump(mode="json") for name in resolved.recipe.used_bricks(step)}
                parts[1] = {**parts[1], "bricks": entries}
            parts.append([[name, bricks[name]] for name in resolved.recipe.used_bricks(step)])
            parts += [resolved.recipe.fields.seed] if step.laws.random else []
            if files := step.inputs():
                parts += [[resolved.input_digest(f) for f in files], resolved.vocabulary_at(0)]
        elif isinstance(step, GrowMethod):
            parts += [[[name, bricks[name]] for name in step.names()]] if step.names() else []
            parts += [resolved.recipe.fields.seed] if step.random else []
            parts += [step.binding()] if step.binding() is not None else []
            if (files := step.inputs()) or step.measures():
                parts += [[resolved.input_digest(f) for f in files], resolved.vocabulary_at(i)]
            if step.train:
                parts.append([resolved.input_digest(f) for f in step.train.inputs()])
                parts.append([resolved.recipe.fields.seed, resolved.vocabulary_at(i + 1), step.train.version])
        elif isinstance(step, TrainMethod):
            parts.append([[name, bricks[name]] for name in step.names() or ()])
            parts.append([resolved.input_digest(f) for f in step.inputs()])
            parts.append([resolved.recipe.fields.seed, step.id, resolved.vocabulary_at(i)])
        elif isinstance(step, (EditMethod, MemoryMethod)):
            parts.append([resolved.input_digest(f) for f in step.inputs()])
            parts.append([resolved.recipe.fields.seed, resolved.vocabulary_at(i)])
        keys.append(json_digest(parts))
    return keys
