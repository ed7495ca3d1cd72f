"""Checks that the bricks of a recipe without a `tokenizer` block have the base's vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from workbench.errors import WorkbenchError
from workbench.vocabulary.aligned import vocabulary_tensors
from workbench.vocabulary.tokens import TokenDifference, has_tokenizer, read_tokens, same_file
from workbench.weights.specs import TensorSpec

_BLOCK = (
    "Add `tokenizer: {source: union}` (the tokens of the base and the bricks), `{source: base}` or `{source: BRICK}` to the recipe: "
    "rows are then aligned by token."
)


def check_same_vocabulary(
    name: str, path: Path, specs: Mapping[str, TensorSpec], base_path: Path, base_specs: Mapping[str, TensorSpec]
) -> list[str]:
    """Check that the rows of a checkpoint brick and of the base belong to the same tokens.

    Args:
        name: The brick's name.
        path: The brick's directory.
        specs: The brick's tensors.
        base_path: The base's directory.
        base_specs: The base's tensors.

    Returns:
        Warnings about tokens that only one of them has.

    Raises:
        WorkbenchError: If their numbers of rows differ, or if a token has different ids.
    """
    tensor = next(iter(_vocabulary_tensors(base_specs)), "")
    if tensor not in specs:
        return []  # another check reports missing tensors
    rows, base_rows = specs[tensor].shape[0], base_specs[tensor].shape[0]
    difference = _difference(path, base_path, f"brick '{name}'")
    text = f"brick '{name}': its vocabulary differs from the base's: "
    if rows != base_rows:
        raise WorkbenchError(
            f"{text}{tensor} has {rows:,} rows{_count_text(path)}, the base's {base_rows:,}{_count_text(base_path)}"
            + (f"; {difference or 'the tokens are the same, the other rows are padding'}" if difference is not None else ""),
            _BLOCK,
        )
    if difference is None or not difference:
        return []
    if difference.moved:
        raise WorkbenchError(f"{text}{rows:,} rows each, but {difference}", _BLOCK)
    return [f"{text}{difference}; the base's tokenizer is written. {_BLOCK}"]


def check_adapter_vocabulary(
    name: str, path: Path, places: Collection[str], base_path: Path, base_specs: Mapping[str, TensorSpec]
) -> list[str]:
    """Compare the tokenizer in an adapter's directory, if there is one, with the base's.

    Args:
        name: The brick's name.
        path: The adapter's directory.
        places: Tensors that the adapter updates.
        base_path: The base's directory.
        base_specs: The base's tensors.

    Returns:
        Warnings about the differences.

    Raises:
        WorkbenchError: If a token has different ids and the adapter updates vocabulary rows.
    """
    difference = _difference(path, base_path, f"brick '{name}'")
    if difference is None or not difference:
        return []
    text = f"brick '{name}': the tokenizer in its directory differs from the base's: {difference}"
    if difference.moved and any(tensor in places for tensor in _vocabulary_tensors(base_specs)):
        raise WorkbenchError(
            text,
            "The adapter updates rows of another vocabulary: bake it into a checkpoint of the model that it was trained on, then use "
            f"`checkpoint:` with `tokenizer: {{source: {name}}}`.",
        )
    return [f"{text}; the base's tokenizer is written (`tokenizer: {{source: {name}}}` writes the adapter's)"]


def with_vocabulary_hint(error: WorkbenchError, name: str, path: Path, base_path: Path) -> WorkbenchError:
    """Add a hint to the error of an adapter that does not fit the base, if its tokenizer differs from the base's."""
    difference = _difference(path, base_path, f"brick '{name}'")
    if not difference:
        return error
    return error.reworded(
        f"{error.message}; the tokenizer in its directory differs from the base's: {difference}",
        "The adapter updates rows of another vocabulary: bake it into a checkpoint of the model that it was trained on, with that "
        f"tokenizer, then use `checkpoint: DIR` with `tokenizer: {{source: union}}` or `{{source: {name}}}`.",
    )


def _vocabulary_tensors(specs: Mapping[str, TensorSpec]) -> list[str]:
    try:
        return vocabulary_tensors(specs)
    except WorkbenchError:
        return []


def _difference(path: Path, base_path: Path, label: str) -> TokenDifference | None:
    """Return the difference between two directories' vocabularies; None if one has no tokenizer."""
    if not (has_tokenizer(path) and has_tokenizer(base_path)):
        return None
    if same_file(path, base_path):  # large vocabularies take more memory than a merge
        return TokenDifference({}, {}, {})
    return TokenDifference.between(read_tokens(path, label).ids, read_tokens(base_path, "base").ids)


def _count_text(path: Path) -> str:
    return f" for {len(read_tokens(path, str(path)).ids):,} tokens" if has_tokenizer(path) else ""
