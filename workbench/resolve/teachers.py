"""Checks of bricks that a step only learns from, so that they need not fit the base."""

from __future__ import annotations

from workbench.errors import InvalidRecipeError
from workbench.resolve.resolved import Resolved
from workbench.vocabulary.tokens import has_tokenizer


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
