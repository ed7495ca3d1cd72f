"""Translation of mergekit's `tokenizer_source`, `tokenizer` and `chat_template` to a recipe's `tokenizer` block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench import jsondoc, yamldoc
from workbench.errors import WorkbenchError
from workbench.recipe.mergekit.config import Config, Reference, read_reference

Block = dict[str, Any]


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
        tokenizer = data[key] if key == "tokenizer" and isinstance(data[key], dict) else {"source": data[key]}
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

    def block(self, tokenizer: Mapping[str, Any], key: str, key_path: yamldoc.KeyPath) -> Block:
        """Return the recipe's `tokenizer` block for mergekit's mapping, which is the value of `key`."""
        source = tokenizer.get("source", "union")
        block: Block = {"source": source if source in ("union", "base") else self._model(source, key_path)}
        if tokenizer.get("tokens"):
            block["tokens"] = {str(t): self._rule(rule, (key, "tokens", t)) for t, rule in tokenizer["tokens"].items()}
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
