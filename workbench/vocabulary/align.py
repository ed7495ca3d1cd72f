"""Models with different vocabularies, aligned by token string to the one that the recipe chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench import jsondoc
from workbench.errors import WorkbenchError, nearest
from workbench.files import json_digest
from workbench.models.architecture import is_embedding_module, is_head_module
from workbench.models.layout import Model
from workbench.vocabulary.fields import TokenizerFields, TokenRow
from workbench.vocabulary.files import (
    SPECIAL_IDS,
    Addition,
    generation_config,
    read_template,
    special_ids,
    tokenizer_digests,
    write_tokenizer,
)
from workbench.vocabulary.tokens import Tokens, has_tokenizer, read_tokens, same_file
from workbench.weights.configuration import TEXT_CONFIGS
from workbench.weights.row_alignment import MEAN, PAD, ZERO, AlignedWeights, RowPlan, WholeTensors
from workbench.weights.specs import TensorSpec, Weights

if TYPE_CHECKING:
    from workbench.weights.row_alignment import Index


@dataclass(frozen=True)
class Member:
    """A model that takes part.

    Attributes:
        name: base, or the brick's name.
        path: Directory of its tokenizer.
        key: Of its content: orders the bricks.
        weights: None for an adapter, which has no rows of its own.
        config: config.json, None for an adapter.
    """

    name: str
    path: Path
    key: str
    weights: Weights | None
    config: dict[str, Any] | None

    @property
    def label(self) -> str:
        """How errors call it."""
        return "base" if self.name == "base" else f"brick '{self.name}'"


def vocabulary_tensors(specs: Mapping[str, TensorSpec], label: str = "base") -> list[str]:
    """The tensors with one row a token, embeddings first: by their names, and by having as many rows as the embeddings.

    Errors: none found.
    """
    modules = {n: n.rpartition(".")[0] for n, s in specs.items() if n.endswith((".weight", ".bias")) and 1 <= len(s.shape) <= 2}
    named = [n for n, module in modules.items() if is_embedding_module(module) or is_head_module(module)]
    if not named:
        raise WorkbenchError(
            f"{label}: no embeddings among the tensor names ({', '.join(list(specs)[:3])}, …)",
            "Vocabularies can be aligned for decoder-only language models. Leave `tokenizer` out for others.",
        )
    named.sort(key=lambda n: is_head_module(modules[n]))
    rows = specs[named[0]].shape[0]
    return [n for n in named if specs[n].shape[0] == rows]


def _rows(specs: Mapping[str, TensorSpec], tensors: Sequence[str], label: str) -> int:
    """Rows of a model's vocabulary, padding included. Errors: tensors missing, or of different lengths."""
    sizes = {specs[name].shape[0] if name in specs else 0: name for name in tensors}
    if len(sizes) > 1 or 0 in sizes:
        found = ", ".join(f"{name} has {rows or 'no'} rows" for rows, name in sorted(sizes.items()))
        raise WorkbenchError(
            f"{label}: {found}; expected one row a token in {', '.join(tensors)}",
            "A checkpoint brick has the base's tensors: tie or untie its embeddings as the base does.",
        )
    return next(iter(sizes))


@dataclass(frozen=True)
class AlignedVocabulary:
    """The output's vocabulary and every model's rows in it.

    Attributes:
        members: The models with rows: the base, then checkpoint bricks in the order of their keys.
        plan: Where their rows come from.
        tensors: Names of the tensors that have one row a token.
        tokens: Token -> id of the output.
        path: Directory with the output's tokenizer files and generation_config.json.
        config: The base's config.json for the output's vocabulary.
        digest: Of all vocabularies and rules; not of the models' rows.
        warnings: What the user should know.
    """

    members: list[Member]
    plan: RowPlan
    tensors: frozenset[str]
    tokens: dict[str, int]
    path: Path
    config: dict[str, Any]
    digest: str
    warnings: list[str]

    @cached_property
    def _weights(self) -> list[Weights]:
        return [member.weights for member in self.members if member.weights is not None]

    @cached_property
    def _whole(self) -> WholeTensors:
        return WholeTensors()

    @property
    def plain(self) -> Weights:
        """The base's weights as they are on disk."""
        return self._weights[0]

    @cached_property
    def base(self) -> Model:
        """The base with the output's vocabulary."""
        return Model(AlignedWeights(self._weights, 0, self.plan, self.tensors, self._whole), self.config)

    def view(self, brick: str) -> AlignedWeights:
        """A checkpoint brick with the output's vocabulary."""
        number = [member.name for member in self.members].index(brick)
        return AlignedWeights(self._weights, number, self.plan, self.tensors, self._whole)

    def on_base(self, weights: Weights) -> AlignedWeights:
        """Weights in the base's vocabulary, such as a recipe's result, in the output's."""
        return AlignedWeights(self._weights, 0, self.plan, self.tensors, self._whole, weights)

    @property
    def base_rows(self) -> Index:
        """[rows]: the base's row, -1 where it has none: where the rows of an adapter's update go."""
        return self.plan.own[0]

    def memory(self) -> int:
        """Bytes of the tensors that are read whole because their rows lie scattered: all models', as if all at a time."""
        return sum(
            sum(weights.specs[name].nbytes for name in self.tensors if name in weights.specs)
            for number, weights in enumerate(self._weights)
            if self.plan.is_kept(number)
        )

    def note(self) -> str | None:
        """How many tokens the models lack and what then stands in their rows, in a line; None where they have all."""
        lacking = self.describe()["lacking"]
        if not lacking:
            return None
        counts = ", ".join(f"{name} lacks {count:,}" for name, count in lacking.items())
        return (
            f"tokenizer: {len(self.tokens):,} tokens in {self.plan.rows:,} rows; {counts}: their rows are the base's, else the only "
            "model's that has one, else the mean, so that a model without a token leaves it alone"
        )

    def describe(self) -> dict[str, Any]:
        """What the run records."""
        rows = self.plan.tokens
        lacking = {m.name: int((rows & (owned < 0)).sum()) for m, owned in zip(self.members, self.plan.owned, strict=True)}
        return {
            "rows": self.plan.rows,
            "tokens": int(rows.sum()),
            "lacking": {n: k for n, k in sorted(lacking.items(), key=lambda item: (item[0] != "base", item[0])) if k},
            "digest": self.digest,
        }


def align(block: TokenizerFields, base: Member, bricks: Sequence[Member], project: Path, cache: Path) -> AlignedVocabulary:
    """Build the output's vocabulary, write its tokenizer into the cache, and map every model's rows to it.

    Args:
        block: The recipe's `tokenizer`.
        base: The base.
        bricks: Checkpoint and adapter bricks.
        project: Where a .jinja file is looked for.
        cache: The project's cache.

    Errors: a brick whose tokenizer is not there, a token that no model has, a rule that names a token that a model lacks.
    """
    assert base.weights is not None
    tensors = vocabulary_tensors(base.weights.specs)
    members = [base, *sorted((b for b in bricks if b.weights is not None), key=lambda b: (b.key, b.name))]
    rows = [_rows(m.weights.specs, tensors, m.label) for m in members if m.weights is not None]
    warnings: list[str] = []
    base_tokens = read_tokens(base.path, base.label)
    tokens = [
        base_tokens,
        *(_tokens_of(m, n, base, base_tokens, rows[0], warnings) for m, n in zip(members[1:], rows[1:], strict=True)),
    ]
    known = [t.below(n) for t, n in zip(tokens, rows, strict=True)]
    chosen = base if block.source in ("base", "union") else next(b for b in bricks if b.name == block.source)
    if chosen.weights is None:
        chosen_tokens, chosen_rows = read_tokens(chosen.path, chosen.label), rows[0]
        chosen_rows = max(chosen_rows, max(chosen_tokens.ids.values(), default=0) + 1)
    else:
        chosen_tokens, chosen_rows = tokens[members.index(chosen)], rows[members.index(chosen)]
    additions = _additions(block, chosen_tokens, tokens, known)
    out_rows = max([chosen_rows, *(a.id + 1 for a in additions)])
    if block.pad_to_multiple_of:
        out_rows = -(-out_rows // block.pad_to_multiple_of) * block.pad_to_multiple_of
    out = {**chosen_tokens.below(out_rows), **{a.token: a.id for a in additions}}
    plan = row_plan(block, out, out_rows, [m.name for m in members], known, rows)
    special = special_ids(chosen.path, chosen.config, chosen_tokens)
    template = _template(block, base, bricks, project)
    generation = generation_config(base.path, chosen.path, special)
    donors = [m.path for m in members[1:]] if block.source == "union" else []
    files = json_digest([tokenizer_digests(chosen.path), [[a.token, a.id, a.flags] for a in additions], template, generation,
                         [tokenizer_digests(d) for d in donors]])  # fmt: skip
    path = cache / "tokenizers" / files
    if not path.is_dir():
        write_tokenizer(path, chosen.path, additions, donors, template, generation)
    digest = json_digest([block.model_dump(mode="json"), files, [[m.name, tokenizer_digests(m.path)] for m in members]])
    config = configured(base.config or {}, None if chosen is base else special, out_rows)
    return AlignedVocabulary(members, plan, frozenset(tensors), out, path, config, digest, warnings)


def _tokens_of(member: Member, rows: int, base: Member, base_tokens: Tokens, base_rows: int, warnings: list[str]) -> Tokens:
    if has_tokenizer(member.path):
        return base_tokens if same_file(member.path, base.path) else read_tokens(member.path, member.label)
    if rows != base_rows:
        raise WorkbenchError(
            f"{member.label}: {rows:,} rows of vocabulary, the base has {base_rows:,}, and no tokenizer in {member.path}",
            "Copy its tokenizer.json there: rows are aligned by token.",
        )
    warnings.append(f"{member.label}: no tokenizer in its directory; taken to have the base's")
    return base_tokens


def _additions(
    block: TokenizerFields, chosen: Tokens, tokens: Sequence[Tokens], known: Sequence[dict[str, int]]
) -> list[Addition]:
    """Tokens that the chosen tokenizer lacks, with the ids that follow its last: by their lowest id among the bricks."""
    wanted: dict[str, int] = {}
    if block.source == "union":
        for ids in known[1:]:
            for token, i in ids.items():
                if token not in chosen.ids:
                    wanted[token] = min(i, wanted.get(token, i))
    order = [t for t, _ in sorted(wanted.items(), key=lambda item: (item[1], item[0]))]
    order += [t for t in block.tokens if t not in chosen.ids and t not in wanted]
    first = max(chosen.ids.values(), default=-1) + 1
    flags = {t: f for found in reversed(tokens) for t, f in found.added.items()}
    return [Addition(t, first + i, flags.get(t, None if t in wanted else {})) for i, t in enumerate(order)]


def row_plan(
    block: TokenizerFields,
    out: Mapping[str, int],
    rows: int,
    names: Sequence[str],
    known: Sequence[dict[str, int]],
    sizes: Sequence[int],
) -> RowPlan:
    """Every model's rows in the output, by token string.

    A row without a token (padding) is a model's own row of that number, where that too has no token. What stands in for a row
    that a model lacks: the recipe's rule, else the base's row, else the only model's that has one, else the mean.

    Args:
        block: Rules for single tokens.
        out: Token -> row of the output.
        rows: Number of rows of the output.
        names: Names of the models, "base" first.
        known: Per model: token -> row.
        sizes: Per model: number of rows.
    """
    strings = list(out)
    ids = np.fromiter(out.values(), dtype=np.int64, count=len(out))
    has_token = np.zeros(rows, dtype=bool)
    has_token[ids] = True
    owned = []
    for mine, size in zip(known, sizes, strict=True):
        index = np.full(rows, -1, dtype=np.int64)
        free = np.zeros(rows, dtype=bool)
        free[: min(rows, size)] = True
        used = np.fromiter(mine.values(), dtype=np.int64, count=len(mine))
        free[used[used < rows]] = False
        free &= ~has_token
        index[free] = np.flatnonzero(free)
        index[ids] = np.fromiter((mine.get(t, -1) for t in strings), dtype=np.int64, count=len(strings))
        owned.append(index)
    have = np.stack(owned) >= 0
    count = have.sum(0)
    donor = np.where(have[0] | (count == 1), have.argmax(0), np.where(count > 1, MEAN, PAD)).astype(np.int64)
    donor_row = np.where(donor >= 0, np.stack(owned)[np.maximum(donor, 0), np.arange(rows)], 0)
    forced = np.zeros(rows, dtype=bool)
    for token, rule in block.tokens.items():
        row = out[token]
        forced[row] = rule.force
        if rule.source is not None:
            donor[row], donor_row[row] = _rule(token, rule.source, row, owned, names, known, sizes)
    if lost := [t for t, row in out.items() if donor[row] == PAD]:
        raise WorkbenchError(
            f"tokenizer: no model has a row for {lost[0]!r}" + (f" and {len(lost) - 1} other tokens" if lost[1:] else ""),
            f'Say where it comes from: tokens: {{"{lost[0]}": {{source: zero}}}} or {{source: {{model: base, token: "…"}}}}.',
        )
    return RowPlan(owned, forced, donor, donor_row, has_token)


def _rule(
    token: str, source: str | TokenRow, row: int, owned: Sequence[Index], names: Sequence[str], known: Sequence[dict[str, int]],
    sizes: Sequence[int],
) -> tuple[int, int]:  # fmt: skip
    """(donor, its row) of a token's rule."""
    where = f"tokenizer: tokens: {token!r}"
    if source == "zero":
        return ZERO, 0
    if source == "mean":
        if not any(index[row] >= 0 for index in owned):
            raise WorkbenchError(f"{where}: source mean, but no model has it", "Use `source: zero` or another token's row.")
        return MEAN, 0
    name = source if isinstance(source, str) else source.model
    if name not in names:
        raise WorkbenchError(
            f"{where}: '{name}' is no model with rows. {nearest(name, names)}", "Name base or a checkpoint brick.", 2
        )
    number = names.index(name)
    wanted = token if isinstance(source, str) else source.token
    if wanted is None:
        assert isinstance(source, TokenRow)
        assert source.token_id is not None
        if source.token_id >= sizes[number]:
            raise WorkbenchError(f"{where}: token_id {source.token_id}, but {name} has {sizes[number]} rows", None, 2)
        return number, source.token_id
    if wanted not in known[number]:
        raise WorkbenchError(f"{where}: {name} has no token {wanted!r}", "Name a model that has it, or `source: zero`.", 2)
    return number, known[number][wanted]


def _template(block: TokenizerFields, base: Member, bricks: Sequence[Member], project: Path) -> str | None:
    """The chat template that the block names; None keeps the chosen tokenizer's."""
    named = block.chat_template
    if named is None:
        return None
    member = next((m for m in (base, *bricks) if m.name == named), None)
    if member is not None:
        found = read_template(member.path)
        if found is None:
            raise WorkbenchError(f"tokenizer: chat_template: {member.label} has none in {member.path}", None, 2)
        return found
    if named.endswith(".jinja"):
        if not (project / named).is_file():
            raise WorkbenchError(f"tokenizer: chat_template: {named} does not exist", "Paths start at the project folder.", 2)
        return jsondoc.text_of(project / named, str(named))
    if "{" not in named:
        choices = ["base", *(b.name for b in bricks)]
        raise WorkbenchError(f"tokenizer: chat_template: '{named}' is no model. {nearest(named, choices)}",
                             "Name base, a brick, a .jinja file, or write the template itself.", 2)  # fmt: skip
    return named


def configured(config: dict[str, Any], special: dict[str, Any] | None, rows: int) -> dict[str, Any]:
    """config.json for the output's number of rows and, where given, its special tokens' ids; so too in the text model's part.

    An id that the base has and the chosen tokenizer does not becomes null: the number would mean another token.
    """
    inner = {k: configured(v, special, rows) for k, v in config.items() if k in TEXT_CONFIGS and isinstance(v, dict)}
    changed: dict[str, Any] = {"vocab_size": rows} if "vocab_size" in config or not inner else {}
    if special is not None:
        changed |= {key: special.get(key) for key in SPECIAL_IDS if key in config or (key in special and not inner)}
    return {**config, **changed, **inner}
