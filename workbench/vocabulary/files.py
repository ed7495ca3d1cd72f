"""Writing of a configuration's tokenizer: a copy of the one that the recipe chooses, with added tokens and chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import file_digest, scratch_beside, write_json
from workbench.ground.manifest import has_its_files, publish_sealed
from workbench.models.identity import GENERATION, tokenizer_files
from workbench.vocabulary.tokens import Tokens, checked_tokenizer
from workbench.weights.header import TEXT_CONFIGS

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Files with a second copy of the vocabulary, which would lack the added tokens.
_SECOND_COPIES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt")
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


@dataclass(frozen=True)
class Addition:
    """A token that the chosen tokenizer lacks: a regular token of a brick's tokenizer, or (with flags) an added token."""

    token: str
    id: int
    flags: dict[str, bool] | None = None


def tokenizer_digests(path: Path) -> list[list[str]]:
    """Return names and digests of a directory's tokenizer files and generation_config.json."""
    files = tokenizer_files(path) | ({GENERATION: path / GENERATION} if (path / GENERATION).is_file() else {})
    return [[name, file_digest(file)] for name, file in files.items()]


def write_tokenizer(
    out: Path,
    chosen: Path,
    additions: Sequence[Addition],
    donors: Iterable[Path],
    template: str | None,
    generation: dict[str, object],
    kind: object,
) -> None:
    """Write the tokenizer's files and generation_config.json atomically, unless all of them are there.

    A config.json with the model's type is written too, so that transformers chooses the class that it chooses beside the weights.

    Args:
        out: The directory to create; one that lacks a file is moved aside.
        chosen: Directory of the tokenizer to copy.
        additions: Tokens to add, by id.
        donors: Directories of the tokenizers that the added tokens come from; their merges and scores are added too.
        template: A chat template that replaces the tokenizer's own.
        generation: Content of generation_config.json; if empty, no file is written.
        kind: `model_type` of the model whose tokenizer it becomes.

    Raises:
        WorkbenchError: If the tokenizer cannot have the tokens at these ids.
    """
    if has_its_files(out):
        return
    with scratch_beside(out) as folder:
        partial = folder / "tokenizer"
        partial.mkdir()
        if additions and not (chosen / "tokenizer.json").is_file():
            checked_tokenizer(chosen, "tokenizer").save_pretrained(partial)
        else:
            for name, file in tokenizer_files(chosen).items():
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, partial / name)
        if additions:
            _add_tokens(partial, additions, donors)
        if template is not None:
            # A template may be stored in each of these files.
            config = jsondoc.optional(partial / "tokenizer_config.json")
            if config and config.pop("chat_template", None) is not None:
                write_json(partial / "tokenizer_config.json", config, indent=2)
            (partial / "chat_template.json").unlink(missing_ok=True)
            (partial / "chat_template.jinja").write_text(template, "utf-8")
        if generation:
            write_json(partial / GENERATION, generation, indent=2)
        if kind:
            write_json(partial / "config.json", {"model_type": kind})
        publish_sealed(partial, out)


def _add_tokens(path: Path, additions: Sequence[Addition], donors: Iterable[Path]) -> None:
    """Add tokens to tokenizer.json.

    Every token, including added tokens, gets an entry in the model's vocabulary, which fixes its id. Regular tokens keep their merges
    (after the base's) or scores, so that a vocabulary that extends the base's encodes like its own tokenizer.
    """
    for name in _SECOND_COPIES:
        (path / name).unlink(missing_ok=True)
    data = jsondoc.read_object(path / "tokenizer.json")
    added = data.setdefault("added_tokens", []) or []
    ids = {str(entry["content"]): int(entry["id"]) for entry in added} | {a.token: a.id for a in additions}
    donor_models = [jsondoc.read_object(file)["model"] for d in donors if (file := d / "tokenizer.json").is_file()]
    model = data["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] |= {token: i for token, i in ids.items() if token not in model["vocab"]}
        if model.get("merges") is not None:
            # The merges of the donors follow, as far as the vocabulary has their tokens.
            merges = list(model["merges"])
            pairs = {_pair(m) for m in merges}
            text = bool(merges) and isinstance(merges[0], str)
            for donor in donor_models:
                for merge in donor.get("merges") or ():
                    left, right = pair = _pair(merge)
                    if pair not in pairs and {left, right, left + right} <= model["vocab"].keys():
                        pairs.add(pair)
                        merges.append(f"{left} {right}" if text else [left, right])
            model["merges"] = merges
    else:
        model["vocab"] = _scores(model["vocab"], ids, donor_models)
    new_entries = [{"id": a.id, "content": a.token, **_FLAGS, **a.flags} for a in additions if a.flags is not None]
    data["added_tokens"] = sorted([*added, *new_entries], key=lambda entry: int(entry["id"]))
    (path / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), "utf-8")
    config = jsondoc.optional(path / "tokenizer_config.json")
    if config and "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {str(n["id"]): {k: v for k, v in n.items() if k != "id"} for n in new_entries}
        write_json(path / "tokenizer_config.json", config, indent=2)
    if (path / "added_tokens.json").is_file():
        write_json(
            path / "added_tokens.json",
            {**jsondoc.optional(path / "added_tokens.json"), **{n["content"]: n["id"] for n in new_entries}},
        )
    _check_ids(path, additions)


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _scores(vocabulary: list[Any], ids: dict[str, int], donor_models: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return a Unigram vocabulary with the new pieces at their ids, with their own model's scores or a score that is never chosen."""
    scores = {str(p): s for donor in reversed(donor_models) if isinstance(donor.get("vocab"), list) for p, s in donor["vocab"]}
    unused_score = min((s for _, s in vocabulary), default=0.0) - 100.0
    pieces = {i: [token, scores.get(token, unused_score)] for token, i in ids.items() if i >= len(vocabulary)}
    return [
        *vocabulary,
        *(pieces.get(i, [f"<unused {i}>", unused_score]) for i in range(len(vocabulary), max(pieces, default=-1) + 1)),
    ]


def _check_ids(path: Path, additions: Sequence[Addition]) -> None:
    """Check that the tokenizers library finds every new token at its id."""
    from tokenizers import Tokenizer

    try:
        built = Tokenizer.from_file(str(path / "tokenizer.json"))
        misplaced = [a.token for a in additions if built.token_to_id(a.token) != a.id or built.id_to_token(a.id) != a.token]
    except Exception as error:  # noqa: BLE001  (the library raises plain Exception)
        raise WorkbenchError(
            f"tokenizer: the union cannot be built ({str(error)[:200]})", "Choose `source: base` or a brick."
        ) from None
    if misplaced:
        raise WorkbenchError(
            f"tokenizer: {misplaced[0]!r} cannot be added at its id ({len(misplaced)} such tokens)",
            "Choose `source: base` or a brick.",
        )


def read_template(path: Path) -> str | None:
    """Return a directory's chat template, from its own file or from tokenizer_config.json; None if there is none."""
    if (path / "chat_template.jinja").is_file():
        return jsondoc.text_of(path / "chat_template.jinja")
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = jsondoc.optional(path / name).get("chat_template")
        if isinstance(template, list):
            template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None)
        if isinstance(template, str):
            return template
    return None


def special_ids(path: Path, config: dict[str, object] | None, tokens: Tokens) -> dict[str, object]:
    """Return the ids of the special tokens (bos, eos, pad) of a directory's tokenizer.

    Args:
        path: The directory.
        config: The content of config.json, whose ids are used; None takes the tokens named in tokenizer_config.json.
        tokens: The tokenizer's vocabulary.
    """
    if config is not None:
        return {key: config[key] for key in SPECIAL_IDS if key in config}
    strings = jsondoc.optional(path / "tokenizer_config.json")
    ids: dict[str, object] = {}
    for key in SPECIAL_IDS:
        value = strings.get(key.removesuffix("_id"))
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str) and token in tokens.ids:
            ids[key] = tokens.ids[token]
    return ids


def generation_config(base: Path, chosen: Path, ids: dict[str, object]) -> dict[str, object]:
    """Return the base's generation_config.json with the token ids of the chosen tokenizer.

    Args:
        base: The base's directory.
        chosen: Directory of the chosen tokenizer. If it is not the base's, other settings with ids of the base's tokens are removed.
        ids: Ids of the chosen tokenizer's special tokens.
    """
    settings: dict[str, object] = jsondoc.optional(base / GENERATION)
    if base == chosen:
        return settings
    chosen_settings: dict[str, object] = jsondoc.optional(chosen / GENERATION)
    special = {**ids, **{key: value for key, value in chosen_settings.items() if key in SPECIAL_IDS}}
    without_ids = {key: value for key, value in settings.items() if not key.endswith(("_token_id", "_tokens", "_token_ids"))}
    return {**without_ids, **special} if settings or chosen_settings else {}


def configured(config: dict[str, object], special: dict[str, object] | None, rows: int) -> dict[str, object]:
    """Return config.json with the output's number of rows and special tokens, also in the part for the text decoder.

    Args:
        config: The base's config.json.
        special: Ids of special tokens; None keeps those of the base. An id that is missing here becomes null, because the base's number
            would stand for another token.
        rows: Number of rows of the output's vocabulary.
    """
    inner = {k: configured(v, special, rows) for k, v in config.items() if k in TEXT_CONFIGS and isinstance(v, dict)}
    changed: dict[str, object] = {"vocab_size": rows} if "vocab_size" in config or not inner else {}
    if special is not None:
        changed |= {key: special.get(key) for key in SPECIAL_IDS if key in config or (key in special and not inner)}
    return {**config, **changed, **inner}
