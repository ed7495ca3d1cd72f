"""Second moments of the inputs of a feed-forward output projection on ordinary text: the metric in which an edit is small.

Ten vectors per input suffice for the mean of k kᵀ (FastMEMIT uses 10, ENCORE 5); ROME and MEMIT used 100,000 articles. Sums are
in float64 and saved periodically, so that an interrupted collection can continue.

At some layers an attention sink (the first token of a row, in some models also the first delimiter) has a vector that is hundreds
of times as long as any other; a strength relative to tr(C) is then relative to that one token. Such vectors are summed
separately. If they carry most of the trace, tr(C) excludes them; C still contains their directions, so that edits avoid them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from workbench.edit.inputs import statistics_texts
from workbench.edit.places.parts import Padded, Parts
from workbench.edit.places.passes import run
from workbench.facts.facts import joined
from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest
from workbench.ground.lazy import torch
from workbench.models.hooks import Stopped, hooked
from workbench.models.texts import BATCH_TOKENS, longest_row, read_texts, side_by_side
from workbench.steps import MethodContext
from workbench.weights.header import is_whole, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

PER_INPUT = 10
"""Default number of vectors per input of the projection."""
LENGTH = 256
"""Number of tokens per row of text."""
OUTLIER = 100.0
"""A vector may belong to a sink if its squared norm is above this multiple of the layer's median."""
SINKS_A_ROW = 2.0
"""Largest average number of sinks per row. Tokens that occur more often are not sinks, however long their vectors are."""
DOMINATES = 0.5
"""Sinks are excluded from tr(C) if they carry more than this share of it."""
_SAVE_EVERY = 60.0
_VERSION = 2


@dataclass(frozen=True)
class Moments:
    """The mean of k kᵀ over tokens, factored.

    Attributes:
        vectors: [d, d] eigenvectors in columns, float64.
        values: [d] eigenvalues, ascending, float64, not negative.
        tokens: Number of vectors in the mean.
        record: Entries for the card: tokens, source, key, and the part that is excluded from the trace, if any.
        trace: Mean squared norm of the vectors that are not sinks, if sinks dominate C; None: the sum of the eigenvalues.
    """

    vectors: Tensor
    values: Tensor
    tokens: int
    record: dict[str, object]
    trace: float | None = None

    @property
    def total(self) -> float:
        """Trace that strengths are relative to: tr(C) without dominating sinks."""
        return float(self.values.sum()) if self.trace is None else self.trace

    @property
    def scale(self) -> float:
        """Mean eigenvalue for that trace: total / d."""
        return float(self.values.mean()) if self.trace is None else self.trace / len(self.values)


def moments(
    context: MethodContext, parts: Parts, layers: Sequence[int], source: str | None, per_input: int
) -> dict[int, Moments]:
    """Return second moments of some layers, from the cache or from one pass over the text.

    Args:
        context: Model, tokenizer, cache and digests of the weights.
        parts: Parts of the model.
        layers: The layers.
        source: JSONL or plain text file, relative to the project; None: the text that comes with the package.
        per_input: Number of tokens per input of the projection.

    Raises:
        WorkbenchError: If the text is missing or too short.
    """
    texts, digest = statistics_source(context, source)
    places = {layer: _cache_path(context, parts, layer, digest, per_input) for layer in layers}
    missing = [layer for layer in layers if not is_whole(places[layer].with_suffix(".factors.safetensors"))]
    if missing:
        _collect(context, parts, {layer: places[layer] for layer in missing}, texts, per_input, source)
    return {layer: _load(places[layer], source) for layer in layers}


def statistics_source(context: MethodContext, source: str | None) -> tuple[list[str], str]:
    """Return the texts for statistics, and their digest."""
    if source is None:
        texts = statistics_texts()
    elif Path(source).suffix == ".jsonl":
        texts = [(t.prompt + joined(t.prompt, t.answer)).strip() for t in read_texts(context.project / source, source)]
    else:
        path = context.project / source
        if not path.is_file():
            raise WorkbenchError(
                f"{source}: the text file for statistics does not exist", "Paths are relative to the project folder."
            )
        texts = [part.strip() for part in jsondoc.text_of(path).split("\n\n") if part.strip()]
    return texts, json_digest(texts)


def _cache_path(context: MethodContext, parts: Parts, layer: int, digest: str, per_input: int) -> Path:
    """Return the cache path of a layer's moments.

    Its key covers the model without the tensors that do not affect the layer's inputs, the text and the number of tokens.
    """
    layout = context.layout.layout
    unread = {name for name in context.digests if (number := layout.layer(name)) is not None and number > layer}
    model = context.key_without({*unread, parts.tensors[layer]})
    key = json_digest([_VERSION, model, layer, digest, per_input, LENGTH])
    return context.cache / "moments" / key


def _collect(
    context: MethodContext, parts: Parts, places: dict[int, Path], texts: Sequence[str], per_input: int, source: str | None
) -> None:
    """Run text through the layers up to the highest one and sum k kᵀ."""
    needed = per_input * max(parts.width(layer) for layer in places)
    rows = _first_rows(list(token_rows(context, texts)), needed, per_input, source)
    label = f"statistics of layer{'s' if len(places) > 1 else ''} {', '.join(map(str, places))}"
    sums, row = _resume(places, parts, context.device)
    last_save = time.monotonic()
    batch: list[list[int]] = []
    for number, tokens in enumerate(rows[row:], row):
        batch.append(tokens)
        if number + 1 == len(rows) or len(batch) * LENGTH >= BATCH_TOKENS:
            done = _add_batch(parts, sums, batch, context.device)
            row, batch = number + 1, []
            context.progress(min(done, needed), needed, label)
            if time.monotonic() - last_save > _SAVE_EVERY:
                _save_sums(places, sums, row)
                last_save = time.monotonic()
    for layer, file in places.items():
        _save_factors(sums[layer], len(rows), file)


def _first_rows(rows: list[list[int]], needed: int, per_input: int, source: str | None) -> list[list[int]]:
    """Return the first rows that hold `needed` tokens."""
    total = 0
    for number, row in enumerate(rows, 1):
        total += len(row)
        if total >= needed:
            return rows[:number]
    raise WorkbenchError(
        f"statistics: {source or 'the bundled text'} has {total:,} tokens, expected {needed:,} ({per_input} for each of "
        f"{needed // per_input:,} inputs)",
        "Set `statistics` to a file with more text (JSONL or plain text), or lower `tokens_per_input`.",
    )


def token_rows(context: MethodContext, texts: Sequence[str]) -> Iterator[list[int]]:
    """Yield rows of at most LENGTH tokens, text after text; a rest of one token is left out."""
    longest = longest_row(context.layout.config, LENGTH)
    for text in texts:
        tokens: list[int] = context.tokenizer(text)["input_ids"]
        for start in range(0, len(tokens), longest):
            if len(tokens) - start > 1:
                yield tokens[start : start + longest]


@dataclass
class MomentSums:
    """Sums over the vectors of a layer.

    Attributes:
        rest: Σ k kᵀ [d, d] over vectors that are not outliers, float64.
        outliers: The same over vectors whose squared norm is above `OUTLIER` medians.
        counts: Number of vectors, number of outliers, and number of outliers at the first position of a row.
        median: Median squared norm in the first batch; 0 before it.
    """

    rest: Tensor
    outliers: Tensor
    counts: list[int]
    median: float

    @classmethod
    def empty(cls, width: int, device: torch.device) -> MomentSums:
        """Return sums without vectors."""
        rest, outliers = (torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(2))
        return cls(rest, outliers, [0, 0, 0], 0.0)

    def add(self, keys: Tensor, first: Tensor) -> None:
        """Add vectors [n, d], float32.

        Args:
            keys: The vectors.
            first: [n], whether a vector belongs to the first token of a row.
        """
        norms = keys.double().square().sum(1)
        if not self.counts[0]:
            self.median = float(norms.median())
        is_outlier = norms > OUTLIER * self.median
        if bool(is_outlier.any()):
            # In float32 sums with such long vectors, the products of all other vectors would be lost.
            outliers, keys = keys[is_outlier].double(), keys[~is_outlier]
            self.outliers += outliers.T @ outliers
        self.rest += (keys.T @ keys).to(self.rest)
        self.counts = [
            self.counts[0] + len(norms),
            self.counts[1] + int(is_outlier.sum()),
            self.counts[2] + int((is_outlier & first).sum()),
        ]

    def left_out(self, rows: int) -> tuple[int, int, float] | None:
        """Return the sinks that are excluded from the trace; None if there are none.

        Args:
            rows: Number of rows of text.

        Returns:
            Number of sinks, number of those at the start of a row, and their share of tr(C).
        """
        ordinary, of_sinks = float(self.rest.trace()), float(self.outliers.trace())
        if not of_sinks or self.counts[1] > SINKS_A_ROW * rows or of_sinks <= DOMINATES * (ordinary + of_sinks):
            return None
        return self.counts[1], self.counts[2], of_sinks / (ordinary + of_sinks)


def _add_batch(parts: Parts, sums: dict[int, MomentSums], rows: list[list[int]], device: torch.device) -> int:
    """Add a batch; return the number of tokens so far."""
    padded_rows, empty = side_by_side(rows, device), torch.zeros(0, dtype=torch.long)
    batch = Padded(padded_rows.tokens, padded_rows.mask, empty, empty, empty, empty)
    not_padding = batch.mask.flatten().bool()
    first = (batch.mask.cumsum(1) == 1).flatten()[not_padding]
    highest = max(sums)

    def add(layer: int, _module: Any, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].reshape(-1, args[0].shape[-1])
        if len(inputs) != len(not_padding):
            raise WorkbenchError(
                f"layer {layer}: the projection reads {len(inputs)} inputs for {len(not_padding)} tokens; expected one for each token",
                "This architecture can be merged, but not edited.",
            )
        sums[layer].add(inputs[not_padding].float(), first)
        if layer == highest:
            raise Stopped

    with torch.no_grad(), ExitStack() as hooks:
        for layer in sums:
            hooks.enter_context(hooked(parts.out(layer), before=partial(add, layer)))
        run(parts, batch)
    return sums[highest].counts[0]


def _resume(places: dict[int, Path], parts: Parts, device: torch.device) -> tuple[dict[int, MomentSums], int]:
    """Return the sums so far and the next row, from an interrupted collection if all layers are at the same row."""
    saved: dict[int, tuple[MomentSums, int, int]] = {}
    for layer, place in places.items():
        file = place.with_suffix(".sums.safetensors")
        if is_whole(file):
            with safe_open(file, "pt") as stored:
                row, *counts = stored.get_tensor("progress").tolist()
                rest, outliers = (stored.get_tensor(name).to(device) for name in ("rest", "outliers"))
                saved[layer] = MomentSums(rest, outliers, counts, float(stored.get_tensor("median"))), counts[0], row
    progress = {(tokens, row) for _, tokens, row in saved.values()}
    if len(saved) == len(places) and len(progress) == 1:
        ((_, next_row),) = progress
        return {layer: sums for layer, (sums, _, _) in saved.items()}, next_row
    return {layer: MomentSums.empty(parts.width(layer), device) for layer in places}, 0


def _save_sums(places: dict[int, Path], sums: dict[int, MomentSums], row: int) -> None:
    for layer, place in places.items():
        layer_sums = sums[layer]
        tensors = {
            "rest": layer_sums.rest.cpu(),
            "outliers": layer_sums.outliers.cpu(),
            "progress": torch.tensor([row, *layer_sums.counts]),
            "median": torch.tensor(layer_sums.median, dtype=torch.float64),
        }
        save_tensors(tensors, place.with_suffix(".sums.safetensors"))


def _save_factors(sums: MomentSums, rows: int, place: Path) -> None:
    """Save eigenvectors and eigenvalues, and delete the sums."""
    tokens, outliers, _ = sums.counts
    mean = (sums.rest + sums.outliers) / tokens
    if not bool(torch.isfinite(mean).all()):
        raise WorkbenchError("statistics: inputs of the projection are not finite on this text", "Check the base's weights.")
    values, vectors = torch.linalg.eigh(mean)
    tensors = {"vectors": vectors.contiguous().cpu(), "values": values.clamp(min=0).cpu(), "tokens": torch.tensor(tokens)}
    if left_out := sums.left_out(rows):
        numbers = [*left_out, float(sums.rest.trace()) / (tokens - outliers)]
        tensors["left_out"] = torch.tensor(numbers, dtype=torch.float64)
    save_tensors(tensors, place.with_suffix(".factors.safetensors"))
    place.with_suffix(".sums.safetensors").unlink(missing_ok=True)


def _load(place: Path, source: str | None) -> Moments:
    with safe_open(place.with_suffix(".factors.safetensors"), "pt") as file:
        vectors, values, tokens = (file.get_tensor(name) for name in ("vectors", "values", "tokens"))
        numbers = file.get_tensor("left_out").tolist() if "left_out" in file.keys() else None  # noqa: SIM118  no mapping
    record: dict[str, object] = {"tokens": int(tokens), "text": source or "bundled", "key": place.name}
    if numbers is None:
        return Moments(vectors, values, int(tokens), record)
    vectors_out, first, share, trace = numbers
    record["left_out"] = {"vectors": int(vectors_out), "first": int(first), "share": round(share, 6)}
    return Moments(vectors, values, int(tokens), record, trace)
