"""Models of sentence-transformers: modules.json lists a transformer, at the root or in `0_Transformer`, and modules with a folder each.

A merge changes the transformer. Its other modules (pooling, dense layers, normalization) and settings are the base's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.ground.foreign_names import CONFIG, MODULES, SENTENCES, fields_of

_DAMAGED = "Download the model again."


def modules_in(root: Path) -> list[tuple[str, str]]:
    """Return (class, folder) of each module of a model of sentence-transformers, the transformer first; empty for other folders.

    Raises:
        WorkbenchError: If modules.json is damaged, names a folder outside its own, or lists no transformer first.
    """
    file = root / MODULES
    if not file.is_file():
        return []
    rows: Any = jsondoc.read(file, hint=_DAMAGED)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(row.get("type"), str) for row in rows):
        raise WorkbenchError(f"{file}: expected a list of modules with a type", _DAMAGED)
    found = [(row["type"].rpartition(".")[2], str(row.get("path", ""))) for row in rows]
    if outside := [folder for _, folder in found if Path(folder).is_absolute() or ".." in Path(folder).parts]:
        raise WorkbenchError(f"{file}: names a folder outside its own ({outside[0]!r})", _DAMAGED)
    if not found or not found[0][0].endswith("Transformer"):
        first = found[0][0] if found else "missing"
        raise WorkbenchError(f"{file}: the first module is {first}, expected Transformer", "Merge models with one transformer.")
    return found


def transformer_in(path: Path) -> Path:
    """Return the folder of the transformer of a model of sentence-transformers; another folder as it is."""
    found = [] if (path / CONFIG).is_file() else modules_in(path)
    return path / found[0][1] if found else path


def modules_of(transformer: Path) -> tuple[Path, list[tuple[str, str]]]:
    """Return the folder of the model that a transformer is a module of, and its modules; no modules if it is part of none."""
    root = transformer.parent if transformer.name.startswith("0_") else transformer
    found = modules_in(root)
    return (root, found) if found and root / found[0][1] == transformer else (transformer, [])


def module_files(transformer: Path) -> dict[str, Path]:
    """Return name -> file of all that a model of sentence-transformers has beside its transformer; empty for other models.

    Raises:
        WorkbenchError: If the folder of a module is missing. Only a normalization needs none.
    """
    root, modules = modules_of(transformer)
    if not modules:
        return {}
    if missing := [folder for name, folder in modules[1:] if folder and name != "Normalize" and not (root / folder).is_dir()]:
        raise WorkbenchError(f"{root / MODULES}: names {missing[0]}, which is missing", _DAMAGED)
    inner = [file for _, folder in modules[1:] if folder for file in sorted((root / folder).rglob("*")) if file.is_file()]
    files = {MODULES: root / MODULES, **{file.relative_to(root).as_posix(): file for file in inner}}
    return files | setting_files(root, transformer)


def sentence_class(transformer: Path) -> str | None:
    """Return the class of sentence-transformers that loads the model of a transformer; None for a model of another library."""
    root, modules = modules_of(transformer)
    settings = fields_of(root / "config_sentence_transformers.json")
    return str(settings.get("model_type", "SentenceTransformer")) if modules else None


def setting_files(root: Path, transformer: Path) -> dict[str, Path]:
    """Return name -> file with settings of a model of sentence-transformers."""
    files = [file for place in (root, transformer) for file in sorted(place.iterdir())]
    return {file.name: file for file in files if SENTENCES.fullmatch(file.name)}


def pooling_modes(config: Mapping[str, Any]) -> list[str]:
    """Return the ways of pooling that the config.json of a module names, as of sentence-transformers 5.3."""
    if named := config.get("pooling_mode"):
        return [named] if isinstance(named, str) else sorted(named)
    old = [name.removeprefix("pooling_mode_") for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
    return sorted(name if "sqrt" in name else name.removesuffix("_tokens").removesuffix("_token") for name in old)
