"""Alignment of models with different vocabularies, by token string, to the vocabulary that the recipe chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ground import jsondoc
from workbench.ground.errors import InvalidRecipeError, WorkbenchError, nearest
from workbench.ground.files import json_digest
from workbench.ground.lazy import np
from workbench.models.architecture import vocabulary_tensors
from workbench.vocabulary.aligned import VERSION as MADE_VERSION
from workbench.vocabulary.aligned import AlignedVocabulary, Donor, MadeRows, Member, counterparts
from workbench.vocabulary.fields import TokenizerFields, TokenRow
from workbench.vocabulary.files import (
    Addition,
    configured,
    generation_config,
    read_template,
    special_ids,
    tokenizer_digests,
    write_tokenizer,
)
from workbench.vocabulary.tokens import Tokens, has_tokenizer, read_tokens, same_file, shared_rows, spelling
from workbench.weights.row_alignment import MADE, MEAN, PAD, ZERO, RowPlan
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from workbench.weights.row_alignment import Index

_VERSION = 2
"""Version of what follows from an alignment; part of the keys of all recipes that have one. 2: rows of one model's tokens stay as they are along arcs."""
_RULES = {None: PAD, "omp": MADE, "mean": PAD, "zero": ZERO}
"""`missing` -> the substitute of a row that no model has."""


def _rows(specs: Mapping[str, TensorSpec], tensors: Sequence[str], label: str) -> int:
    """Return the number of rows of a model's vocabulary, including padding; raise WorkbenchError if it is not the same everywhere."""
    sizes = {specs[name].shape[0] if name in specs else 0: name for name in tensors}
    if len(sizes) > 1 or 0 in sizes:
        rows = ", ".join(f"{name} has {count or 'no'} rows" for count, name in sorted(sizes.items()))
        raise WorkbenchError(
            f"{label}: {rows}; expected one row per token in {', '.join(tensors)}",
            "A checkpoint brick needs the same tensors as the base: tie or untie its embeddings as in the base. An adapter needs the rows of "
            "all of them: save it with save_embedding_layers=True. If it only gives its tokenizer, write `missing: omp` in the block.",
        )
    return next(iter(sizes))


def align(block: TokenizerFields, base: Member, bricks: Sequence[Member], project: Path, cache: Path) -> AlignedVocabulary:
    """Build the output's vocabulary, write its tokenizer into the cache, and map every model's rows to it.

    Raises:
        WorkbenchError: If a needed tokenizer is missing, a token has no row in any model, or a rule names a token that a model lacks.
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
    token_rows = [t.below(n) for t, n in zip(tokens, rows, strict=True)]
    chosen = base if block.source in ("base", "union") else next(b for b in bricks if b.name == block.source)
    if chosen.donor is not None:
        chosen_tokens = read_tokens(chosen.path, chosen.label)
        chosen_rows = _rows(chosen.donor.specs, vocabulary_tensors(chosen.donor.specs, chosen.label), chosen.label)
        token_rows = [
            {
                token: i
                for token, i in shared_rows(
                    t,
                    spelling(m.path, m.label) if has_tokenizer(m.path) else spelling(base.path, base.label),
                    chosen_tokens,
                    spelling(chosen.path, chosen.label),
                ).items()
                if i < n
            }
            for m, t, n in zip(members, tokens, rows, strict=True)
        ]
    elif chosen.weights is None:
        chosen_tokens, chosen_rows = read_tokens(chosen.path, chosen.label), rows[0]
        chosen_rows = max(chosen_rows, max(chosen_tokens.ids.values(), default=0) + 1)
    else:
        chosen_tokens, chosen_rows = tokens[members.index(chosen)], rows[members.index(chosen)]
    # What the chosen tokenizer lacks, in the order of the lowest ids in the bricks, gets ids after its last one.
    missing: dict[str, int] = {}
    if block.source == "union":
        for ids in token_rows[1:]:
            for token, i in ids.items():
                if token not in chosen_tokens.ids:
                    missing[token] = min(i, missing.get(token, i))
    order = [t for t, _ in sorted(missing.items(), key=lambda item: (item[1], item[0]))]
    order += [t for t in block.tokens if t not in chosen_tokens.ids and t not in missing]
    first = max(chosen_tokens.ids.values(), default=-1) + 1
    flags = {t: f for vocabulary in reversed(tokens) for t, f in vocabulary.added.items()}
    additions = [Addition(t, first + i, flags.get(t, None if t in missing else {})) for i, t in enumerate(order)]
    out_rows = max([chosen_rows, *(a.id + 1 for a in additions)])
    if block.pad_to_multiple_of:
        out_rows = -(-out_rows // block.pad_to_multiple_of) * block.pad_to_multiple_of
    out = {**chosen_tokens.below(out_rows), **{a.token: a.id for a in additions}}
    plan = row_plan(block, out, out_rows, [m.name for m in members], token_rows, rows)
    special = special_ids(chosen.path, chosen.config, chosen_tokens)
    template = _template(block, base, bricks, project)
    generation = generation_config(base.path, chosen.path, special)
    donors = [m.path for m in members[1:]] if block.source == "union" else []
    files = json_digest(
        [
            tokenizer_digests(chosen.path),
            [[a.token, a.id, a.flags] for a in additions],
            template,
            generation,
            [tokenizer_digests(d) for d in donors],
            kind := (base.config or {}).get("model_type"),
        ]
    )
    path = cache / "tokenizers" / files
    write_tokenizer(path, chosen.path, additions, donors, template, generation, kind)
    words: list[Any] = [_VERSION, block.model_dump(mode="json"), files, [[m.name, tokenizer_digests(m.path)] for m in members]]
    config = configured(base.config or {}, None if chosen is base else special, out_rows)
    donor = None
    if chosen.donor is not None and block.missing is not None:
        made = _made(block.k, chosen, chosen_tokens.below(chosen_rows), plan, tensors, cache) if block.missing == "omp" else None
        donor = Donor(chosen.name, block.missing, made)
        words += [MADE_VERSION] if made else []
    return AlignedVocabulary(members, plan, frozenset(tensors), out, path, config, json_digest(words), warnings, donor)


def _made(k: int, donor: Member, ids: Mapping[str, int], plan: RowPlan, tensors: Sequence[str], cache: Path) -> MadeRows:
    """Return the rows that are made of rows of shared tokens."""
    assert donor.donor is not None
    rows = np.flatnonzero(plan.donor == MADE)
    has_row = np.zeros(plan.rows, dtype=bool)
    has_row[list(ids.values())] = True
    shared = np.flatnonzero(has_row & (plan.own[0] >= 0))
    if len(shared) < k:
        raise WorkbenchError(
            f"tokenizer: base and {donor.label} share {len(shared):,} tokens, but each of {len(rows):,} rows is to be made of {k}",
            "Write a smaller `k`, or `missing: mean`. Rows that are made of so few others say little.",
        )
    names = counterparts(tensors, vocabulary_tensors(donor.donor.specs, donor.label))
    return MadeRows(donor.donor, names, rows, shared, plan.own[0][shared], k, plan.rows, cache)


def _tokens_of(member: Member, rows: int, base: Member, base_tokens: Tokens, base_rows: int, warnings: list[str]) -> Tokens:
    """Return a brick's tokens; without a tokenizer of its own, the base's, if the numbers of rows agree."""
    if has_tokenizer(member.path):
        return base_tokens if same_file(member.path, base.path) else read_tokens(member.path, member.label)
    if rows != base_rows:
        raise WorkbenchError(
            f"{member.label}: it has {rows:,} vocabulary rows, the base {base_rows:,}, and there is no tokenizer in {member.path}",
            "Copy its tokenizer.json there, because rows are aligned by token.",
        )
    warnings.append(f"{member.label}: no tokenizer in its directory; the base's is assumed")
    return base_tokens


def row_plan(
    block: TokenizerFields,
    out: Mapping[str, int],
    rows: int,
    names: Sequence[str],
    token_rows: Sequence[dict[str, int]],
    sizes: Sequence[int],
) -> RowPlan:
    """Map the rows of every model to those of the output, by token string.

    A padding row of the output is the model's own row with the same number, if that is a padding row too. A row that a model lacks is
    replaced by the row of the recipe's rule, else by the base's, else by that of the only model that has the token, else by the mean.

    Raises:
        WorkbenchError: If a token has no row in any model, or if a rule is invalid.
    """
    strings = list(out)
    ids = np.fromiter(out.values(), dtype=np.int64, count=len(out))
    has_token = np.zeros(rows, dtype=bool)
    has_token[ids] = True
    owned = []
    for model_rows, size in zip(token_rows, sizes, strict=True):
        index = np.full(rows, -1, dtype=np.int64)
        is_padding = np.zeros(rows, dtype=bool)
        is_padding[: min(rows, size)] = True
        used = np.fromiter(model_rows.values(), dtype=np.int64, count=len(model_rows))
        is_padding[used[used < rows]] = False
        is_padding &= ~has_token
        index[is_padding] = np.flatnonzero(is_padding)
        index[ids] = np.fromiter((model_rows.get(t, -1) for t in strings), dtype=np.int64, count=len(strings))
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
            donor[row], donor_row[row] = _rule(token, rule.source, row, owned, names, token_rows, sizes)
    without_row = [t for t, row in out.items() if donor[row] == PAD]
    if without_row and block.missing is not None:
        donor[[out[t] for t in without_row]] = _RULES[block.missing]
    elif without_row:
        raise WorkbenchError(
            f"tokenizer: no model has a row for {without_row[0]!r}"
            + (f" and {len(without_row) - 1} other tokens" if without_row[1:] else ""),
            f'Add a rule for it: tokens: {{"{without_row[0]}": {{source: zero}}}} or {{source: {{model: base, token: "…"}}}}.',
        )
    return RowPlan(owned, forced, donor, donor_row, has_token)


def _rule(
    token: str,
    source: str | TokenRow,
    row: int,
    owned: Sequence[Index],
    names: Sequence[str],
    token_rows: Sequence[dict[str, int]],
    sizes: Sequence[int],
) -> tuple[int, int]:
    """Return (donor, row of the donor) for a token's rule."""
    where = f"tokenizer: tokens: {token!r}"
    if source == "zero":
        return ZERO, 0
    if source == "mean":
        if not any(index[row] >= 0 for index in owned):
            raise WorkbenchError(
                f"{where}: source mean, but no model has the token", "Use `source: zero` or another token's row."
            )
        return MEAN, 0
    name = source if isinstance(source, str) else source.model
    if name not in names:
        raise InvalidRecipeError(
            f"{where}: '{name}' is not a model with vocabulary rows. {nearest(name, names)}", "Name base or a checkpoint brick."
        )
    number = names.index(name)
    row_token = token if isinstance(source, str) else source.token
    if row_token is None:
        assert isinstance(source, TokenRow)
        assert source.token_id is not None
        if source.token_id >= sizes[number]:
            raise InvalidRecipeError(f"{where}: token_id {source.token_id}, but {name} has {sizes[number]} rows")
        return number, source.token_id
    if row_token not in token_rows[number]:
        raise InvalidRecipeError(
            f"{where}: {name} has no token {row_token!r}", "Name a model that has the token, or write `source: zero`."
        )
    return number, token_rows[number][row_token]


def _template(block: TokenizerFields, base: Member, bricks: Sequence[Member], project: Path) -> str | None:
    """Return the chat template that the recipe names; None keeps the chosen tokenizer's."""
    setting = block.chat_template
    if setting is None:
        return None
    member = next((m for m in (base, *bricks) if m.name == setting), None)
    if member is not None:
        template = read_template(member.path)
        if template is None:
            raise InvalidRecipeError(f"tokenizer: chat_template: {member.label} has no chat template in {member.path}")
        return template
    if setting.endswith(".jinja"):
        if not (project / setting).is_file():
            raise InvalidRecipeError(
                f"tokenizer: chat_template: {setting} does not exist", "Paths start at the project directory."
            )
        return jsondoc.text_of(project / setting, str(setting))
    if "{" not in setting:
        choices = ["base", *(b.name for b in bricks)]
        raise InvalidRecipeError(
            f"tokenizer: chat_template: '{setting}' is not a model. {nearest(setting, choices)}",
            "Write base, the name of a brick, a .jinja file, or the template itself.",
        )
    return setting
