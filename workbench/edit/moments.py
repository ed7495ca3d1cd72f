"""Second moments of what a feed-forward output projection reads on running text: the metric in which an edit is small.

10 vectors for each input suffice for the mean of k kᵀ (FastMEMIT takes 10, ENCORE 5); ROME and MEMIT took 100,000 articles. Sums are
kept in float64 and saved while they grow, so that an interrupted collection goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from workbench import jsondoc
from workbench.edit.bundled import statistics_texts
from workbench.edit.parts import Parts, Stopped, hooked
from workbench.edit.passes import run
from workbench.edit.rows import Padded, vocabulary_key
from workbench.errors import WorkbenchError
from workbench.merge.calibration import BATCH_TOKENS, longest_row, read_texts, side_by_side
from workbench.registry import MethodContext
from workbench.weights.digests import json_digest

PER_INPUT = 10
"""Vectors for each input of the projection."""
LENGTH = 256
"""Tokens of a row of text."""
_SAVE_EVERY = 60.0
_VERSION = 1


@dataclass(frozen=True)
class Moments:
    """The mean of k kᵀ over tokens, factored.

    Attributes:
        vectors: [d, d] eigenvectors in columns, float64.
        values: [d] eigenvalues, ascending, float64, not negative.
        tokens: Number of vectors in the mean.
        record: What cards say: tokens, source, key.
    """

    vectors: Tensor
    values: Tensor
    tokens: int
    record: dict[str, Any]

    @property
    def scale(self) -> float:
        """The mean eigenvalue: trace / d."""
        return float(self.values.mean())


def moments(
    context: MethodContext, parts: Parts, layers: Sequence[int], source: str | None, per_input: int
) -> dict[int, Moments]:
    """Second moments for some layers: from the cache, or collected in one pass over the text.

    Args:
        context: Model, tokenizer, cache, digests of the weights.
        parts: Where the layers are.
        layers: For which.
        source: A jsonl of texts or a plain text file, relative to the project; None for the text that comes with the package.
        per_input: Tokens for each input of the projection.

    Errors: too little text.
    """
    texts, digest = statistics_source(context, source)
    places = {layer: _place(context, parts, layer, digest, per_input) for layer in layers}
    missing = [layer for layer in layers if not places[layer].with_suffix(".factors.safetensors").is_file()]
    if missing:
        _collect(context, parts, {layer: places[layer] for layer in missing}, texts, per_input, source)
    return {layer: _load(places[layer], source) for layer in layers}


def statistics_source(context: MethodContext, source: str | None) -> tuple[list[str], str]:
    """Texts that statistics are taken on, and their digest."""
    if source is None:
        texts = statistics_texts()
    elif Path(source).suffix == ".jsonl":
        texts = [(t.prompt + " " + t.answer).strip() for t in read_texts(context.project / source, source)]
    else:
        path = context.project / source
        if not path.is_file():
            raise WorkbenchError(f"{source}: no such file of text for statistics", "Paths start at the project folder.")
        texts = [part.strip() for part in jsondoc.text_of(path).split("\n\n") if part.strip()]
    return texts, json_digest(texts)


def _place(context: MethodContext, parts: Parts, layer: int, digest: str, per_input: int) -> Path:
    """Where a layer's moments lie: keyed by the weights that decide its inputs, the text, the tokenizer and the number of tokens."""
    layout = context.layout.layout
    above = {name for name in context.digests if (number := layout.layer(name)) is not None and number > layer}
    weights = sorted((n, d) for n, d in context.digests.items() if n not in above and n != parts.tensors[layer])
    key = json_digest([_VERSION, weights, layer, digest, per_input, LENGTH, vocabulary_key(context)])
    return context.cache / "moments" / key


def _collect(
    context: MethodContext, parts: Parts, places: dict[int, Path], texts: Sequence[str], per_input: int, source: str | None
) -> None:
    """Run text through the layers up to the highest one and add up k kᵀ."""
    needed = per_input * max(parts.width(layer) for layer in places)
    rows = _enough(list(_rows(context, texts)), needed, per_input, source)
    what = f"statistics of layer{'s' if len(places) > 1 else ''} {', '.join(map(str, places))}"
    sums, done, row = _resume(places, parts, context.device)
    saved = time.monotonic()
    batch: list[list[int]] = []
    for number, tokens in enumerate(rows[row:], row):
        batch.append(tokens)
        if number + 1 == len(rows) or len(batch) * LENGTH >= BATCH_TOKENS:
            done += _add(parts, sums, batch, context.device)
            row, batch = number + 1, []
            context.progress(min(done, needed), needed, what)
            if time.monotonic() - saved > _SAVE_EVERY:
                _save_sums(places, sums, done, row)
                saved = time.monotonic()
    for layer, place in places.items():
        _factor(sums[layer] / done, done, place)


def _enough(rows: list[list[int]], needed: int, per_input: int, source: str | None) -> list[list[int]]:
    """The first rows that hold so many tokens. Errors, before any of them is run: too few."""
    total = 0
    for number, row in enumerate(rows, 1):
        total += len(row)
        if total >= needed:
            return rows[:number]
    raise WorkbenchError(
        f"statistics: {source or 'the bundled text'} has {total:,} tokens, expected {needed:,} ({per_input} for each of "
        f"{needed // per_input:,} inputs)",
        "Name more text in `statistics: FILE` (a jsonl of texts or a plain text), or set `tokens_per_input` lower.",
    )


def _rows(context: MethodContext, texts: Sequence[str]) -> Iterator[list[int]]:
    """Rows of at most LENGTH tokens, text after text."""
    longest = longest_row(context.layout.config, LENGTH)
    for text in texts:
        tokens: list[int] = context.tokenizer(text)["input_ids"]
        for start in range(0, len(tokens), longest):
            if len(tokens) - start > 1:
                yield tokens[start : start + longest]


def _add(parts: Parts, sums: dict[int, Tensor], rows: list[list[int]], device: torch.device) -> int:
    """Add a batch; returns its tokens."""
    side, none = side_by_side(rows, device), torch.zeros(0, dtype=torch.long)
    batch = Padded(side.tokens, side.mask, none, none, none, none)
    real = batch.mask.flatten().bool()
    highest = max(sums)
    if len(sums) == 1:
        _one(parts, highest, sums, real, batch)
    else:
        handles = [parts.out(layer).register_forward_pre_hook(_adder(sums, layer, real)) for layer in sums if layer != highest]
        try:
            _one(parts, highest, sums, real, batch)
        finally:
            for handle in handles:
                handle.remove()
    return int(real.sum())


def _one(parts: Parts, highest: int, sums: dict[int, Tensor], real: Tensor, batch: Padded) -> None:
    add = _adder(sums, highest, real)

    def last(module: Any, args: tuple[Tensor, ...]) -> None:
        add(module, args)
        raise Stopped

    with torch.no_grad(), hooked(parts.out(highest), before=last):
        run(parts, batch)


def _adder(sums: dict[int, Tensor], layer: int, real: Tensor) -> Any:
    def add(_module: Any, args: tuple[Tensor, ...]) -> None:
        keys = args[0].reshape(-1, args[0].shape[-1])[real].float()
        sums[layer] += (keys.T @ keys).to(sums[layer])

    return add


def _resume(places: dict[int, Path], parts: Parts, device: torch.device) -> tuple[dict[int, Tensor], int, int]:
    """Sums so far, tokens in them, and the next row: from files of an interrupted collection where all layers have the same."""
    found: dict[int, tuple[Tensor, int, int]] = {}
    for layer, place in places.items():
        file = place.with_suffix(".sums.safetensors")
        if file.is_file():
            with safe_open(file, "pt") as stored:
                done, row = stored.get_tensor("progress").tolist()
                found[layer] = stored.get_tensor("sum").to(device), done, row
    if len(found) == len(places) and len({f[1:] for f in found.values()}) == 1:
        done, row = next(iter(found.values()))[1:]
        return {layer: f[0] for layer, f in found.items()}, done, row
    return (
        {layer: torch.zeros(parts.width(layer), parts.width(layer), dtype=torch.float64, device=device) for layer in places},
        0,
        0,
    )


def _save_sums(places: dict[int, Path], sums: dict[int, Tensor], done: int, row: int) -> None:
    for layer, place in places.items():
        _save({"sum": sums[layer].cpu(), "progress": torch.tensor([done, row])}, place.with_suffix(".sums.safetensors"))


def _factor(mean: Tensor, tokens: int, place: Path) -> None:
    """Eigenvectors and eigenvalues, kept; the sums are no longer needed."""
    if not bool(torch.isfinite(mean).all()):
        raise WorkbenchError("statistics: what the projection reads is not finite on this text", "Check the base's weights.")
    values, vectors = torch.linalg.eigh(mean)
    _save(
        {"vectors": vectors.contiguous().cpu(), "values": values.clamp(min=0).cpu(), "tokens": torch.tensor(tokens)},
        place.with_suffix(".factors.safetensors"),
    )
    place.with_suffix(".sums.safetensors").unlink(missing_ok=True)


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    save_file(tensors, partial)
    partial.rename(file)


def _load(place: Path, source: str | None) -> Moments:
    with safe_open(place.with_suffix(".factors.safetensors"), "pt") as file:
        vectors, values, tokens = (file.get_tensor(name) for name in ("vectors", "values", "tokens"))
    return Moments(vectors, values, int(tokens), {"tokens": int(tokens), "text": source or "bundled", "key": place.name})
