"""Import of mergekit files: translate one to recipes with the same numbers, or list the fields that cannot be translated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workbench.bricks.locate import kinds_of
from workbench.exchange.mergekit.config import Config, Make, Reference, is_mixture, read_config, read_mixture, read_reference
from workbench.exchange.mergekit.layers import SliceSources, is_layered, read_slices, stack_step, whole_slice
from workbench.exchange.mergekit.methods import MethodInputs, step_of
from workbench.exchange.mergekit.places import Named, Places, Stage, comment, in_order, recipe_text
from workbench.ground import jsondoc, yamldoc
from workbench.ground.errors import WorkbenchError, shell
from workbench.ground.files import write_text
from workbench.ground.project import find_project
from workbench.ground.recognize import MERGED, expecting
from workbench.merge.mergekit.table import KNOWN, base_policy
from workbench.models.layout import Layout, Model
from workbench.recipe.recipe import from_data

RESERVED = ("base", "union", "zero", "mean")
"""Words with a meaning in a recipe's `tokenizer` block."""
_WRITABLE = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ImportedRecipe:
    """Result of an import.

    Attributes:
        text: Text of the recipe.
        extra: File -> text of other recipes that it uses as bricks.
        notes: Differences that the reader should know; the recipe has them as comments.
    """

    text: str
    extra: dict[Path, str]
    notes: list[str]


def import_recipe(file: Path, to: Path | None = None) -> ImportedRecipe:
    """Translate a mergekit file to a recipe, without writing it.

    Args:
        file: A YAML file for `mergekit-yaml`, `mergekit-multi` or `mergekit-moe`, or the folder that mergekit wrote.
        to: The recipe file to write later. Its paths start at the project of this file; None stands for the project of the
            working directory.

    Raises:
        WorkbenchError: If fields cannot be translated; the message lists all of them with their lines.
    """
    file = file / MERGED if (file / MERGED).is_file() else file
    with expecting(file, "a file for mergekit", "mergekit"):
        return _imported(file, to)


def _imported(file: Path, to: Path | None) -> ImportedRecipe:
    """Translate a mergekit file to a recipe."""
    documents = yamldoc.load_all(file)
    project = find_project(to or Path.cwd() / "recipe.yaml")
    if len(documents) == 1:
        imported, _ = _translated(documents[0], Places(file, project, to), file.name)
        return imported
    stages: dict[str, Stage] = {}
    extra: dict[Path, str] = {}
    notes: list[str] = []
    last: ImportedRecipe | None = None
    for name, document in in_order(documents, to):
        places = Places(file, project, to, stages)
        path = places.stage_path(name) if name else to
        places = replace(places, to=path)
        last, stage = _translated(document, places, f"{file.name}, {name or 'its last document'}")
        notes += [note for note in last.notes if note not in notes]
        extra |= last.extra
        if name and path:
            stages[name] = replace(stage, recipe=places.in_project(path))
            extra[path] = last.text
    assert last is not None
    if to in extra:  # all documents have names: the last one is the result
        del extra[to]
    return ImportedRecipe(last.text, extra, notes)


def _translated(document: yamldoc.Document, places: Places, origin: str) -> tuple[ImportedRecipe, Stage]:
    """Translate one document.

    Returns:
        The recipe, and what later documents need to know about it; its path is still empty.
    """
    stack: dict[str, object] | None = None
    slices: list[SliceSources] | None = None
    make: Make | None = None
    if is_mixture(document.data):
        config, make = read_mixture(document)
    elif is_layered(document.data):
        config, slices = read_slices(document)
    else:
        config = read_config(document)
    anchor = _anchor(config)
    places.root = places.stages[anchor.model].root if anchor.model in places.stages else anchor
    if config.data.get("tokenizer") or config.data.get("tokenizer_source"):
        places.reserved = RESERVED
    _check_places(config, places, slices is not None)
    model = None if places.root.model in places.stages else places.model(places.root)
    if anchor != places.root and slices is None and make is None:
        slices = whole_slice(config)  # the base is the result of an earlier document
    if slices is None and make is None and _is_cut(config, model):
        config, slices = read_slices(document)
    inputs = None
    if slices is not None:
        stack = stack_step(config, slices, places)
        stack |= {"tokenizer": places.name(anchor)} if anchor != places.root else {}
    elif make is None:
        inputs = _inputs(config, places, model)
    dtype = _dtype(config)
    references = [*([config.base] if config.base else []), *(source.reference for source in config.sources)]
    known = {str(reference): places.find(reference.model) for reference in references}
    tokenizer = carry_vocabulary(config, known, places.names, places.root.model)
    config.report.stop()
    if tokenizer and slices is not None:
        config.report.note(
            ("tokenizer",) if "tokenizer" in config.data else ("tokenizer_source",),
            "rows of tokens that the models of the first slice lack come from the models that have them; mergekit writes zeros",
        )
    step = step_of(inputs) if inputs else make(places.name) if make else stack or {}
    config.report.stop()
    used = {name: places.brick(name, slices is not None) for name in _named(step)}
    data: dict[str, object] = {"version": 1, "base": places.base(), **({"bricks": used} if used else {})}
    data |= {**tokenizer, "steps": [step], **({"output": {"dtype": dtype}} if dtype else {})}
    head = [f"# workbench run {shell(places.to or 'RECIPE.yaml')}", f"# Imported from {origin}, mergekit's {config.method}."]
    text = recipe_text(data, [*head, *map(comment, config.report.notes)])
    for written in (text, *places.extra.values()):
        from_data(yamldoc.parse(written).data, places.project)
    return ImportedRecipe(text, places.extra, config.report.notes), Stage("", places.root, _result(places, slices))


def _named(step: Mapping[str, object]) -> list[str]:
    """Return all brick names in a step, in order, each once."""
    names: list[str] = []
    slices = step.get("slices")
    whole = (step.get(key) for key in ("embeddings", "norm", "head", "tokenizer"))
    for part in (step, *(slices if isinstance(slices, list) else ()), *whole):
        if isinstance(part, str):
            names.append(part)
        elif isinstance(part, Mapping):
            names += [*([part["brick"]] if "brick" in part else []), *part.get("bricks", ())]
            names += [part["base"]] if isinstance(part.get("base"), str) else []
    return list(dict.fromkeys(names))


def _result(places: Places, slices: list[SliceSources] | None) -> Named | None:
    """Return the tensor names of a document's result; None if its base is not local."""
    named = places.named(places.root)
    lengths = [part.length for part in slices or ()]
    if named is None or None in lengths:
        return named
    depth = sum(length for length in lengths if length) or named.layout.depth
    prefix, layer = named.layout.prefix, len(f"{named.layout.prefix}0.")
    inside = [f"{prefix}{i}.{name[layer:]}" for i in range(depth) for name in named.layout.in_layer(0)]
    outside = [name for name in named.layout.names if named.layout.layer(name) is None]
    return replace(named, layout=Layout(prefix, depth, (*outside, *inside)))


def _anchor(config: Config) -> Reference:
    """Return the model whose configuration the result has: the base, else the first input."""
    if config.base is not None:
        return config.base
    if not config.sources:
        raise config.report.document.error((), "names no model to start from", "Name a model, or a base_model.")
    anchor = config.sources[0].reference
    config.report.note((), f"no base_model: configuration and tokenizer come from the first input, {anchor.model}")
    return anchor


def _check_places(config: Config, places: Places, layered: bool) -> None:
    """Report models that cannot be found, and inputs that need a second recipe if no output file is named."""
    report, root = config.report, places.root
    for source in config.sources:
        reference, name = source.reference, source.reference.model
        if name in places.stages:
            if reference.lora:
                report.refuse(source.path, f"{reference}: an adapter on an earlier document; bake it in a document of its own")
            continue
        is_root = reference == root and (layered or base_policy(config.method) != "ignored")
        if reference.lora and not is_root and (name != root.model or root.lora) and places.to is None:
            report.refuse(
                source.path,
                f"{reference} is an adapter on a model other than the base, which needs a second recipe: name the output file with -o",
            )
        directory = places.find(name)
        if directory and "adapter" in kinds_of(directory):
            report.refuse(source.path, f"{name} is an adapter; mergekit reads it as BASE+{name}")
        if directory is None and (name.startswith(("/", ".", "~")) or "/" not in name):
            report.note(
                source.path,
                f"{name} does not exist, neither in the working directory, where mergekit looks, nor next to the file",
            )


def _is_cut(config: Config, model: Model | None) -> bool:
    """Return True if one slice does not have all layers of the base. Without the base's files it is taken as the whole model."""
    if config.layers is None:
        return False
    if model is None:
        config.report.note((), f"one slice over layers 0 to {config.layers} is taken as the whole model")
        return False
    return model.layout.depth != config.layers


def write_imported(imported: ImportedRecipe, to: Path) -> None:
    """Write an imported recipe and the other recipes that it uses.

    Raises:
        WorkbenchError: If one of the files exists. Nothing is overwritten.
    """
    files = {to: imported.text, **imported.extra}
    for path in files:
        if path.exists():
            raise WorkbenchError(f"{path} already exists", "Choose another name. Existing files are not overwritten.")
    for path, text in files.items():
        write_text(path, text)


def _inputs(config: Config, places: Places, model: Model | None) -> MethodInputs:
    """Return the inputs that become bricks. Report inputs that the method cannot use."""
    policy = base_policy(config.method)
    report = config.report
    if policy == "required" and config.base is None:
        report.refuse(("merge_method",), f"{config.method} needs a base_model; mergekit rejects this too")
    if policy != "ignored" and config.base and config.base not in [s.reference for s in config.sources]:
        report.refuse(("base_model",), f"{config.base} is not among the sources; mergekit rejects this too")
    if policy == "ignored" and config.sources[-1].path == ("base_model",):
        report.note(("base_model",), f"mergekit adds it to the models that {config.method} merges, so it is one of the bricks")
    sources = [s for s in config.sources if policy == "ignored" or s.reference != config.base]
    least, most = KNOWN[config.method].laws.arity
    if not least <= len(sources) <= (most or len(sources)):
        expected = f"exactly {least}" if least == most else f"at least {least}"
        suffix = " beside the base" if policy != "ignored" else ""
        report.refuse(
            ("merge_method",),
            f"{config.method} takes {expected} model{'s' if (most or 2) > 1 else ''}{suffix}, found {len(sources)}",
        )
    report.stop()
    bricks = {places.name(source.reference): source for source in sources}
    return MethodInputs(config, bricks, places.name(places.root), model)


def _dtype(config: Config) -> str | None:
    """Return the dtype of the output: `out_dtype`, else `dtype`, in which mergekit also computes."""
    report = config.report
    work, out = (config.data.get(name) for name in ("dtype", "out_dtype"))
    for name, value in (("dtype", work), ("out_dtype", out)):
        if value is not None and value not in (*_WRITABLE, "float64"):
            report.refuse((name,), f"found {value!r}; expected one of {', '.join(_WRITABLE)}")
    if (out or work) == "float64":
        report.refuse(("out_dtype" if out else "dtype",), "float64 outputs are not supported, expected " + ", ".join(_WRITABLE))
    if work in ("float16", "bfloat16") or work is None:
        report.note(
            ("dtype",) if work else (),
            f"mergekit computes in {work or 'the dtype of the inputs'}, the recipe in float32, rounded once at the end",
        )
    elif work == "float64":
        report.note(("dtype",), "mergekit computes in float64, the recipe in float32")
    return None if not (out or work) else str(out or work)


Block = dict[str, object]


def carry_vocabulary(config: Config, places: Mapping[str, Path | None], names: Mapping[str, str], base: str) -> dict[str, Block]:
    """Return the recipe's `tokenizer` field; empty if all inputs have the same tokens in the same rows.

    Args:
        config: The configuration; its report collects problems and notes.
        places: Reference -> directory of the model, or None if it is not local.
        names: Reference -> brick name.
        base: The recipe's base, as the file names it.
    """
    data, report = config.data, config.report
    if data.get("tokenizer_source") and data.get("tokenizer"):
        report.refuse(("tokenizer",), "cannot be used together with tokenizer_source; mergekit rejects this too")
        return {}
    block: Block = {}
    key = next((key for key in ("tokenizer_source", "tokenizer") if data.get(key)), None)
    if key is not None:
        stated = data[key]
        tokenizer = stated if key == "tokenizer" and isinstance(stated, dict) else {"source": stated}
        key_path: yamldoc.KeyPath = (key,) if key == "tokenizer_source" else (key, "source")
        block = _Translation(config, names, base).block(tokenizer, key, key_path)
        if list(block) == ["source"] and _same_tokens(config, key, places):
            block = {}
    return {"tokenizer": block} if (block := _with_template(config, block)) else {}


def _with_template(config: Config, block: Block) -> Block:
    """Copy a chat template that the file contains. Names of templates that come with mergekit are not translated."""
    template, report = config.data.get("chat_template"), config.report
    if not template:
        return block
    if isinstance(template, str) and "{" in template:
        return {**(block or {"source": "base"}), "chat_template": template}
    template_text = template if len(str(template)) < 20 else "a template"
    report.note(
        ("chat_template",),
        f"{template_text}: not carried over, the output keeps the template of its tokenizer; the weights are the same",
    )
    return block


class _Translation:
    """Translates mergekit's `tokenizer` mapping."""

    def __init__(self, config: Config, names: Mapping[str, str], base: str) -> None:
        self.config, self.names, self.base = config, names, base

    def block(self, tokenizer: Mapping[str, object], key: str, key_path: yamldoc.KeyPath) -> Block:
        """Return the recipe's `tokenizer` block for mergekit's mapping, which is the value of `key`."""
        source = tokenizer.get("source", "union")
        block: Block = {"source": source if source in ("union", "base") else self._model(source, key_path)}
        if isinstance(tokens := tokenizer.get("tokens"), dict):
            block["tokens"] = {str(t): self._rule(rule, (key, "tokens", t)) for t, rule in tokens.items()}
        if tokenizer.get("pad_to_multiple_of"):
            block["pad_to_multiple_of"] = tokenizer["pad_to_multiple_of"]
        return block

    def _rule(self, rule: Any, key_path: yamldoc.KeyPath) -> Block:
        translated: Block = {}
        source = rule.get("source") if isinstance(rule, dict) else None
        kind = source.get("kind") if isinstance(source, dict) else None
        if kind == "zero":
            translated["source"] = "zero"
        elif kind == "model_token" and isinstance(source, dict):
            row = {name: source[name] for name in ("token", "token_id") if source.get(name) is not None}
            translated["source"] = {"model": self._model(source.get("model"), (*key_path, "source", "model")), **row}
        elif source is not None:
            translated["source"] = self._model(source, (*key_path, "source"))
        if isinstance(rule, dict) and rule.get("force"):
            translated["force"] = True
        return translated

    def _model(self, value: Any, key_path: yamldoc.KeyPath) -> str:
        """Return the name of an input in the recipe: `base` or a brick."""
        reference = read_reference(self.config.report, value, key_path)
        if reference == Reference(self.base):
            return "base"
        if reference is None or reference.lora or str(reference) not in self.names:
            self.config.report.refuse(key_path, f"{value} is neither the base nor a checkpoint among the inputs")
        return self.names.get(str(reference), "base")


def _same_tokens(config: Config, key: str, places: Mapping[str, Path | None]) -> bool:
    """Return True if all models have the same tokens in the same rows, so that no row moves."""
    vocabularies = [None if path is None else _vocabulary(path) for path in places.values()]
    first = vocabularies[0]
    if first is None or any(vocabulary != first for vocabulary in vocabularies):
        return False
    config.report.note((key,), "all inputs have the same vocabulary, so no row moves and it is omitted")
    if (unused := first[1] - len(first[0])) > 0:
        config.report.note((key,), f"mergekit cuts the {unused} rows beyond the tokenizer's tokens, but the recipe keeps them")
    return True


def _vocabulary(path: Path) -> tuple[dict[str, int], int] | None:
    """Return token -> row, and the number of rows; None if a file is missing or invalid."""
    try:
        document = jsondoc.read_object(path / "tokenizer.json")
        rows = int(jsondoc.read_object(path / "config.json", infinite=True)["vocab_size"])
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):
            vocabulary = {token: row for row, (token, _) in enumerate(vocabulary)}
        tokens = {**vocabulary, **{added["content"]: added["id"] for added in document.get("added_tokens", [])}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, WorkbenchError):
        return None
    return tokens, rows
