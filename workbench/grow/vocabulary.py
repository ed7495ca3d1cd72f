"""Vocabulary: add tokens to the model and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from workbench.ground import jsondoc
from workbench.ground.errors import InvalidRecipeError, WorkbenchError, refuse_unknown
from workbench.ground.files import json_digest
from workbench.ground.lazy import np
from workbench.grow.expansion.parts import check_shapes
from workbench.models.architecture import vocabulary_tensors
from workbench.models.identity import GENERATION
from workbench.models.layout import Model
from workbench.steps import NEW, Axis, GrowMethod, Grown, Growth, Learns, Preserves, register
from workbench.steps.fields import Whole
from workbench.vocabulary.files import Addition, configured, tokenizer_digests, write_tokenizer
from workbench.vocabulary.tokens import checked_tokenizer, read_tokens


@register
class Vocabulary(GrowMethod):
    """Add tokens to the model and its tokenizer (Hewitt 2021; Gee et al. 2022, fast vocabulary transfer).

    A new token's rows in the embeddings and the head are means of old rows: of all tokens, of the tokens into which its text splits
    now, or of the tokens of a description. Unused rows are taken first. The logits of old tokens do not change. The check measures
    the probability that new tokens take. The tokenizer's files and config.json are written with the model.
    """

    paper = "Hewitt 2021, Initializing new word embeddings for pretrained language models; Gee et al. 2022, Fast Vocabulary Transfer for Language Model Compression, arXiv 2402.09977"
    formula = "E ↦ [E; mean of rows of E], W_head ↦ [W_head; mean of the same rows]"
    preserves: ClassVar[Preserves] = "exact"
    learns: ClassVar[Learns] = "now"
    builds: ClassVar[bool] = True

    grow: Literal["vocabulary"]
    tokens: tuple[str, ...] | dict[str, str | None] | None = None
    """The new tokens as a list; or a mapping of token to a description, a text whose tokens' rows are averaged (null means that
    `rows` decides)."""
    file: str | None = None
    """Instead of `tokens`: a text file with one token a line, or a .jsonl file with {"token":, "description":} a line, relative
    to the project."""
    rows: Literal["mean", "pieces"] = "mean"
    """Rows of tokens without a description: the mean over all tokens (`mean`), or over the tokens into which the token's own text
    splits now (`pieces`)."""
    special: bool = False
    """Add the tokens as special tokens, which are never split and can be skipped in decoded text."""
    pad_to_multiple_of: Whole | None = Field(None, ge=1)
    """Round the number of rows up to a multiple of this number; rows without a token are means, too."""

    _ids: dict[str, int] = PrivateAttr(default_factory=dict)
    _sources: dict[int, list[int]] = PrivateAttr(default_factory=dict)
    _known: list[int] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _check_fields(self) -> Vocabulary:
        if (not self.tokens) == (self.file is None):
            raise ValueError('expected one of `tokens: ["<tool>"]` and `file: words.txt`')
        if any(not token.strip() for token in self.tokens or ()):
            raise ValueError("`tokens` has an empty token")
        if isinstance(self.tokens, tuple) and (twice := next((t for t in self.tokens if self.tokens.count(t) > 1), None)):
            raise ValueError(f"{twice!r} is listed twice")
        return self

    def inputs(self) -> list[str]:
        """Return the file of tokens, if the step has one."""
        return [self.file] if self.file else []

    def check_inputs(self, project: Path) -> None:
        """Check the file of tokens."""
        self.requested(project)

    def requested(self, project: Path) -> dict[str, str | None]:
        """Return the new tokens with their descriptions.

        Raises:
            WorkbenchError: If the file has no tokens, an invalid line, or a token twice.
        """
        if not self.file:
            return dict(self.tokens) if isinstance(self.tokens, Mapping) else dict.fromkeys(self.tokens or ())
        descriptions: dict[str, str | None] = {}
        for number, line in enumerate(jsondoc.text_of(project / self.file, self.file).split("\n"), 1):
            if not line.strip():
                continue
            token, description = _entry(line, f"{self.file}:{number}") if self.file.endswith(".jsonl") else (line.strip(), None)
            if token in descriptions:
                raise InvalidRecipeError(f"{self.file}:{number}: {token!r} is listed twice")
            descriptions[token] = description
        if not descriptions:
            raise InvalidRecipeError(f"{self.file}: the file has no token", "Write one token a line.")
        return descriptions

    def bind(self, base: Model, tokenizer: Path, project: Path, cache: Path) -> tuple[Vocabulary, Path]:
        """Assign ids to the new tokens, and write the grown tokenizer to the cache.

        Returns:
            The bound step, and the directory of the new tokenizer.

        Raises:
            WorkbenchError: If the tokenizer already has a token, or cannot tokenize a description.
        """
        requested, tokens = self.requested(project), read_tokens(tokenizer, "grow vocabulary")
        if existing := [token for token in requested if token in tokens.ids]:
            count_text = f" ({len(existing)} of {len(requested)} tokens exist)" if existing[1:] else ""
            raise InvalidRecipeError(
                f"grow vocabulary: {existing[0]!r} already exists as token {tokens.ids[existing[0]]}{count_text}",
                "Remove it from the step: only new tokens get rows.",
            )
        first = max(tokens.ids.values(), default=-1) + 1
        bound = self.model_copy()
        bound._ids = {token: first + i for i, token in enumerate(requested)}
        bound._known = sorted(set(tokens.ids.values()))
        texts = {token: text or (token if self.rows == "pieces" else None) for token, text in requested.items()}
        if any(texts.values()):
            encode = checked_tokenizer(tokenizer, "grow vocabulary")
            for token, text in texts.items():
                if text is None:
                    continue
                pieces = [int(i) for i in encode(text, add_special_tokens=False)["input_ids"] if i != encode.unk_token_id]
                if not pieces:
                    raise InvalidRecipeError(
                        f"grow vocabulary: the description {text!r} of {token!r} has no known token",
                        "Describe it in other words.",
                    )
                bound._sources[bound._ids[token]] = pieces
        additions = [Addition(token, i, {"special": self.special}) for token, i in bound._ids.items()]
        generation = jsondoc.optional(tokenizer / GENERATION)
        kind = base.config.get("model_type")
        files = json_digest([tokenizer_digests(tokenizer), [[a.token, a.id, a.flags] for a in additions], kind])
        path = cache / "tokenizers" / files
        write_tokenizer(path, tokenizer, additions, [], None, generation, kind)
        return bound, path

    def binding(self) -> Any:
        """Return the new ids, the sources of their rows and a digest of the ids of old tokens."""
        return [self._ids, sorted(self._sources.items()), json_digest(self._known)]

    def expand(self, model: Model) -> Growth:
        """Plan the rows of the new ids.

        Raises:
            WorkbenchError: If the model has no known embeddings, or config.json cannot state the number of rows.
        """
        names = vocabulary_tensors(model.weights.specs, "grow vocabulary")
        before = model.weights.specs[names[0]].shape[0]
        ids = list(self._ids.values())
        rows = max(before, max(ids) + 1)
        if self.pad_to_multiple_of:
            rows = -(-rows // self.pad_to_multiple_of) * self.pad_to_multiple_of
        index = np.concatenate([np.arange(before), np.full(rows - before, NEW)])
        index[ids] = NEW
        everything = np.array([i for i in self._known if i < before], np.int64)
        means = {int(row): everything for row in np.flatnonzero(index == NEW)}
        means |= {row: np.array(pieces, np.int64) for row, pieces in self._sources.items()}
        tensors = {n: Grown(n, rows=Axis(index), means=means) if n in names else Grown(n) for n in model.weights.specs}
        config = configured(model.config, None, rows)
        check_shapes(config, {n: g.spec(model.weights.specs[n]) for n, g in tensors.items()}, "vocabulary")
        new = tuple(int(row) for row in np.flatnonzero(index == NEW))
        record = {"new_tokens": len(ids), "first_id": min(ids), "rows": [before, rows]}
        return Growth(tensors, config, record, new)


def _entry(line: str, where: str) -> tuple[str, str | None]:
    """Return the token and the description of a line of JSON."""
    row = None
    try:
        row = jsondoc.parse(line, where)
        token, description = row["token"], row.get("description")
    except (WorkbenchError, KeyError, TypeError, AttributeError):
        token, description = None, None
    if isinstance(row, dict):
        refuse_unknown(row, ("token", "description"), where, "a new token", InvalidRecipeError)
    if not isinstance(token, str) or not token.strip() or not isinstance(description, str | None):
        raise InvalidRecipeError(f'{where}: expected {{"token": "…", "description": "…"}}, found {line[:60]}')
    return token, description
