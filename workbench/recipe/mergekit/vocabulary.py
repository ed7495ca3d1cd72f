"""`tokenizer_source`, `tokenizer` and `chat_template` of a mergekit YAML as the recipe's `tokenizer` block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench import jsondoc, yamldoc
from workbench.errors import WorkbenchError
from workbench.recipe.mergekit.config import Config, Reference, read_reference

Block = dict[str, Any]


def carry_vocabulary(config: Config, places: Mapping[str, Path | None], names: Mapping[str, str], base: str) -> dict[str, Block]:
    """The recipe's `tokenizer` field, or nothing where all inputs have the same tokens at the same rows.

    Args:
        config: The configuration; what does not carry over goes to its report.
        places: Reference -> directory of the model, where it is at hand.
        names: Reference -> brick name.
        base: The recipe's base, as the file names it.
    """
    data, report = config.data, config.report
    if data.get("tokenizer_source") and data.get("tokenizer"):
        report.refuse(("tokenizer",), "stands beside tokenizer_source; mergekit refuses both together")
        return {}
    block: Block = {}
    key = next((key for key in ("tokenizer_source", "tokenizer") if data.get(key)), None)
    if key is not None:
        given = data[key] if key == "tokenizer" and isinstance(data[key], dict) else {"source": data[key]}
        at: yamldoc.KeyPath = (key,) if key == "tokenizer_source" else (key, "source")
        block = _Translation(config, names, base).block(given, key, at)
        if list(block) == ["source"] and _same_tokens(config, key, places):
            block = {}
    return {"tokenizer": block} if (block := _with_template(config, block)) else {}


def _with_template(config: Config, block: Block) -> Block:
    """A chat template that the file spells out goes along; names mean templates that mergekit brings."""
    template, report = config.data.get("chat_template"), config.report
    if not template:
        return block
    if isinstance(template, str) and "{" in template:
        return {**(block or {"source": "base"}), "chat_template": template}
    report.note(("chat_template",), f"{template if len(str(template)) < 20 else 'a template'}: not carried over, the output keeps the "
                "template of its tokenizer; the weights are the same")  # fmt: skip
    return block


class _Translation:
    """mergekit's `tokenizer` mapping in the recipe's words."""

    def __init__(self, config: Config, names: Mapping[str, str], base: str) -> None:
        self.config, self.names, self.base = config, names, base

    def block(self, given: Mapping[str, Any], key: str, at: yamldoc.KeyPath) -> Block:
        source = given.get("source", "union")
        block: Block = {"source": source if source in ("union", "base") else self._model(source, at)}
        if given.get("tokens"):
            block["tokens"] = {str(t): self._rule(rule, (key, "tokens", t)) for t, rule in given["tokens"].items()}
        if given.get("pad_to_multiple_of"):
            block["pad_to_multiple_of"] = given["pad_to_multiple_of"]
        return block

    def _rule(self, rule: Any, at: yamldoc.KeyPath) -> Block:
        found: Block = {}
        source = rule.get("source") if isinstance(rule, dict) else None
        kind = source.get("kind") if isinstance(source, dict) else None
        if kind == "zero":
            found["source"] = "zero"
        elif kind == "model_token" and isinstance(source, dict):
            row = {name: source[name] for name in ("token", "token_id") if source.get(name) is not None}
            found["source"] = {"model": self._model(source.get("model"), (*at, "source", "model")), **row}
        elif source is not None:
            found["source"] = self._model(source, (*at, "source"))
        if isinstance(rule, dict) and rule.get("force"):
            found["force"] = True
        return found

    def _model(self, value: Any, at: yamldoc.KeyPath) -> str:
        """An input by its name in the recipe."""
        reference = read_reference(self.config.report, value, at)
        if reference == Reference(self.base):
            return "base"
        if reference is None or reference.lora or str(reference) not in self.names:
            self.config.report.refuse(at, f"{value} is not the base and not a checkpoint among the inputs")
        return self.names.get(str(reference), "base")


def _same_tokens(config: Config, key: str, places: Mapping[str, Path | None]) -> bool:
    """Whether all models have the same tokens at the same rows: then no row moves."""
    found = [None if path is None else _vocabulary(path) for path in places.values()]
    first = found[0]
    if first is None or any(one != first for one in found):
        return False
    config.report.note((key,), "all inputs have the same vocabulary: no row moves, left out")
    if (spare := first[1] - len(first[0])) > 0:
        config.report.note((key,), f"mergekit cuts the {spare} rows beyond the tokenizer's tokens, which are kept here")
    return True


def _vocabulary(path: Path) -> tuple[dict[str, int], int] | None:
    """Token -> row, and the number of rows; None where a file is missing."""
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
