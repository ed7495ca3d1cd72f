"""Comparison of models of sentence-transformers beside their transformers: modules, their weights, and settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.files import file_digest
from workbench.ground.foreign_names import CONFIG, fields_of
from workbench.models.sentences import modules_of, pooling_modes, setting_files

_DEFAULTS = {
    "include_prompt": True,
    "bias": True,
    "activation_function": "torch.nn.modules.activation.Tanh",
    "module_input_name": "sentence_embedding",
    "module_output_name": "sentence_embedding",
    "similarity_fn_name": "cosine",
}
"""What sentence-transformers takes for a setting that a file leaves out."""
_SIZES = ("embedding_dimension", "word_embedding_dimension", "in_features", "out_features")
_SETTINGS = ("max_seq_length", "do_lower_case", "prompts", "default_prompt_name", "similarity_fn_name")


def compare_modules(label: str, brick: Path, base: Path) -> list[str]:
    """Return a warning about what a brick has otherwise than the base beside the transformer, in sentence-transformers.

    Args:
        label: The brick in messages.
        brick: Folder of the brick's weights.
        base: Folder of the base's transformer.

    Raises:
        WorkbenchError: If both have a module with other weights.
    """
    (mine, own), (theirs, others) = modules_of(brick), modules_of(base)
    if not own:
        return []
    if not others:
        text = "the base is no model of sentence-transformers, so that the result has no modules.json"
        return [f"{label}: {text}; the brick's modules are {_listed(own)}"]
    pairs = list(zip(own[1:], others[1:], strict=False))
    for (name, folder), (other, place) in pairs:
        if name == other and _weights(mine / folder) != _weights(theirs / place):
            raise WorkbenchError(
                f"{label}: {folder} ({name}) has other weights than the base's, and a merge changes only the transformer",
                f"Use a brick that was trained with {folder} frozen. To take the base's, copy its {folder} to the brick.",
            )
    found = [] if _listed(own) == _listed(others) else [f"modules {_listed(own)} (base: {_listed(others)})"]
    for (name, folder), (other, place) in pairs:
        if name == other:
            read = [fields_of(root / inner / CONFIG) for root, inner in ((mine, folder), (theirs, place))]
            found += [f"{name} {text}" for text in _differing(*map(_meaning, read))]
    files = [setting_files(mine, brick), setting_files(theirs, base)]
    read = [
        {key: value for file in some.values() for key, value in fields_of(file).items() if key in _SETTINGS} for some in files
    ]
    found += _differing(*map(_meaning, read))
    return [f"{label}: sentence-transformers reads it with {', '.join(found)}; the result has the base's"] if found else []


def _listed(modules: list[tuple[str, str]]) -> str:
    return " + ".join(name for name, _ in modules)


def _weights(folder: Path) -> list[tuple[str, str]]:
    """Return names and digests of the files in a module's folder that are no settings. None is opened."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != ".json"]
    return [(file.relative_to(folder).as_posix(), file_digest(file)) for file in files]


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file that count, in one form for all versions of sentence-transformers."""
    given = {key: value for key, value in config.items() if key not in _SIZES and not key.startswith("pooling_mode")}
    if isinstance(prompts := given.get("prompts"), Mapping):
        given["prompts"] = {name: text for name, text in prompts.items() if text}
    stated = {key: value for key, value in given.items() if value or (key in _DEFAULTS and value is not None)}
    return _DEFAULTS | stated | {"pooling": pooling_modes(config)}


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """Yield each setting in which two files differ."""
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            yield f"{key} {mine.get(key)} (base: {theirs.get(key)})"
