"""Checks of bricks that steps use as whole models: teachers, their vocabulary, and the tokenizer that a step takes from one of them."""

from __future__ import annotations

from pathlib import Path

from workbench.errors import InvalidRecipeError, WorkbenchError
from workbench.resolve.checks import compare_configs, read_notes
from workbench.resolve.resolved import Resolved
from workbench.vocabulary.tokens import check_same_vocabulary, has_tokenizer


def check_teacher(name: str, resolved: Resolved) -> None:
    """Check that a brick can teach: it has a tokenizer of its own and is another model than the base.

    Args:
        name: The brick, a checkpoint or a recipe.
        resolved: The recipe.

    Raises:
        WorkbenchError: If it has no tokenizer, or is the base itself.
    """
    path = resolved.tokenizer_of(name)
    if not has_tokenizer(path):
        raise InvalidRecipeError(
            f"brick '{name}' is a teacher, but {path} has no tokenizer (expected tokenizer.json)",
            "Copy the tokenizer's files there: the teacher reads the texts with its own tokens.",
        )
    same = name in resolved.on_disk and resolved.on_disk[name].path.resolve() == resolved.base_path.resolve()
    if same and resolved.base_adapter is None:
        raise InvalidRecipeError(
            f"brick '{name}' is a teacher, but it is the base itself ({path}), which has nothing to teach it",
            "Name another model, or remove it: `with_base: true` fuses the distributions of the base already.",
        )


def check_whole_model(name: str, resolved: Resolved) -> list[str]:
    """Check the vocabulary of a brick that steps use as a whole model. The step itself compares shapes.

    Args:
        name: The brick.
        resolved: The recipe.

    Returns:
        Warnings about tokens and settings that differ from the base's.

    Raises:
        WorkbenchError: If the same row belongs to different tokens, unless the brick has `any_base`.
    """
    if resolved.vocabulary is not None:
        if name in resolved.nested:
            raise WorkbenchError(
                f"brick '{name}': a recipe cannot be a whole model in a recipe with a `tokenizer` block",
                "Run that recipe with `-o DIR`, and use the directory as the brick.",
            )
        return []
    base = resolved.checkpoint
    if name in resolved.nested:
        source, path = resolved.nested[name].checkpoint, resolved.nested[name].tokenizer_path
        warnings = []
    else:
        brick = resolved.on_disk[name]
        if brick.kind == "adapter":
            return []
        source, path = brick.checkpoint, brick.path
        warnings = [*read_notes(source), *compare_configs(brick, base)]
    try:
        return [*warnings, *check_same_vocabulary(name, path, source.specs, base.path, base.specs)]
    except WorkbenchError as error:
        if resolved.recipe.fields.bricks[name].any_base:
            return [*warnings, error.message]
        hint = f"To use its layers with this vocabulary nevertheless, add `any_base: true` to the brick. {error.hint}"
        raise error.reworded(error.message, hint) from None


def tokenizer_of(resolved: Resolved, name: str) -> Path:
    """Return the directory of a brick's tokenizer.

    Args:
        resolved: The recipe.
        name: The brick.

    Raises:
        WorkbenchError: If the brick has none, or the recipe has a `tokenizer` block, which says the same.
    """
    if resolved.vocabulary is not None:
        raise InvalidRecipeError(
            f"`tokenizer: {name}` of a step contradicts the recipe's `tokenizer` block", "Remove one of them."
        )
    path = resolved.nested[name].tokenizer_path if name in resolved.nested else resolved.on_disk[name].path
    if not has_tokenizer(path):
        raise InvalidRecipeError(
            f"brick '{name}' is named for the tokenizer, but {path} has none (expected tokenizer.json)",
            "Name a brick with a tokenizer, or remove `tokenizer` from the step to keep the base's.",
        )
    return path
