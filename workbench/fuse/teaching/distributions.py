"""The most probable next tokens of a live model at every place of some texts, in files of bounded size, which an interrupted pass continues."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.fuse.teaching.alignment import Reading
from workbench.lazy import no_grad, torch
from workbench.models.hooks import head_sees
from workbench.models.texts import batch_limit, by_length, side_by_side
from workbench.train.run import quiet, reproducible
from workbench.weights.header import save_tensors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel


SHARD_BYTES = 32 * 2**20
"""Largest size of a file, unless a single row is larger."""
_CACHED = 2


@dataclass(eq=False)
class Shards:
    """Arrays that are cut into rows along their first axis.

    Attributes:
        place: Directory of the files.
        sizes: Length of each row.
        width: Bytes per element of a row, over all arrays.
        limit: Largest size of a file in bytes.
    """

    place: Path
    sizes: Sequence[int]
    width: int
    limit: int = SHARD_BYTES
    _read: dict[int, Mapping[str, NDArray[np.generic]]] = field(default_factory=dict, init=False, repr=False)
    _where: list[tuple[int, int]] = field(default_factory=list, init=False, repr=False)
    parts: list[range] = field(default_factory=list, init=False)
    """Rows of each file."""

    def __post_init__(self) -> None:
        start, filled = 0, 0
        for number, size in enumerate(self.sizes):
            if filled and (filled + size) * self.width > self.limit:
                self.parts.append(range(start, number))
                start, filled = number, 0
            self._where.append((len(self.parts), filled))
            filled += size
        self.parts.append(range(start, len(self.sizes)))

    def missing(self) -> list[int]:
        """Return the numbers of the files that are not written yet, or are damaged."""
        return [number for number in range(len(self.parts)) if self._load(number) is None]

    def write(self, number: int, compute: Callable[[range], Mapping[str, Tensor]]) -> None:
        """Compute the rows of one file and write it; an interruption leaves no part of it.

        Args:
            number: Number of the file.
            compute: Returns the arrays of some rows, one row after another.
        """
        save_tensors(compute(self.parts[number]), self._file(number))
        self._read.pop(number, None)

    def row(self, number: int) -> dict[str, NDArray[np.generic]]:
        """Return the arrays of one row."""
        shard, start = self._where[number]
        if shard not in self._read:
            while len(self._read) >= _CACHED:
                self._read.pop(next(iter(self._read)))
            arrays = self._load(shard)
            assert arrays is not None, self._file(shard)
            self._read[shard] = arrays
        return {name: array[start : start + self.sizes[number]] for name, array in self._read[shard].items()}

    def _file(self, number: int) -> Path:
        return self.place / f"{number:05}.safetensors"

    def _load(self, number: int) -> Mapping[str, NDArray[np.generic]] | None:
        """Read one file; return None if it does not exist, is damaged or has another number of elements."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            arrays: Mapping[str, NDArray[np.generic]] = load_file(self._file(number))
        except (FileNotFoundError, SafetensorError):
            return None
        length = sum(self.sizes[row] for row in self.parts[number])
        return arrays if arrays and all(len(array) == length for array in arrays.values()) else None


VERSION = 1
"""Version of the computation, part of the keys of cached files."""
_LOGITS = 2**26
"""Largest number of logits of a forward pass, in which a batch of 512 tokens and 128,000 tokens of vocabulary fits."""


@dataclass(frozen=True, eq=False)
class Pass:
    """A pass of one model over all texts.

    Attributes:
        readings: The texts in the model's tokens.
        longest: Largest number of tokens that the model reads; the rest of a longer text has no distributions.
        k: Number of tokens kept of a distribution.
        place: Directory of the files.
    """

    readings: Sequence[Reading]
    longest: int
    k: int
    place: Path

    def places(self, number: int) -> range:
        """Return the indices of the tokens of a text after which a distribution is kept."""
        reading = self.readings[number]
        return range(reading.first, max(reading.first, min(len(reading.ids), self.longest)))

    def shards(self) -> Shards:
        """Return the files with `ids` (int32) and `probabilities` (float32), [place, k], and `nll`, [place].

        `nll` is −log p of the text's next token in nats, and 0 at its end.
        """
        return Shards(self.place, [len(self.places(n)) for n in range(len(self.readings))], 8 * self.k + 4)


def measure(
    work: Pass,
    shards: Shards,
    live: Callable[[], PreTrainedModel],
    device: torch.device,
    progress: Callable[[int, int, str], None],
) -> None:
    """Write the distributions of a model on all texts. What an earlier, interrupted call has written is kept.

    The numbers do not depend on where the call was interrupted, because a file's batches are made of its texts alone.

    Args:
        work: The texts.
        shards: The files, as returned by `Pass.shards`.
        live: Loads the model, if a file is missing.
        device: Device of the model.
        progress: Callback that takes (done, total, text).
    """
    missing = shards.missing()
    if not missing:
        return
    gc.collect()  # reference cycles keep the previous model alive
    with quiet(), reproducible(0):
        model = live()
        for done, number in enumerate(missing):
            progress(done, len(missing), "distributions of texts")
            shards.write(number, lambda rows: _arrays(model, work, rows, device))
    progress(len(missing), len(missing), "distributions of texts")


@no_grad
def _arrays(model: Any, work: Pass, rows: range, device: torch.device) -> Mapping[str, Tensor]:
    """Return the arrays of some texts, one text after another."""
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    tokens = {n: work.readings[n].ids[: work.longest].tolist() for n in rows if len(work.places(n))}
    limit = max(1, min(batch_limit(device), _LOGITS // model.config.get_text_config().vocab_size))
    numbers = list(tokens)
    for index in by_length([len(tokens[n]) for n in numbers], limit):
        found |= _batch(model, work, [numbers[i] for i in index], tokens, device)
    k = work.k
    empty = (torch.zeros(0, k, dtype=torch.int32), torch.zeros(0, k), torch.zeros(0))
    parts = [found.get(n, empty) for n in rows]
    return {name: torch.cat([part[i] for part in parts]) for i, name in enumerate(("ids", "probabilities", "nll"))}


def _batch(
    model: Any, work: Pass, rows: Sequence[int], tokens: Mapping[int, list[int]], device: torch.device
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Return (ids, probabilities, nll) of the texts of one forward pass."""
    batch = side_by_side([tokens[n] for n in rows], device)
    width = batch.tokens.shape[1]
    kept = [work.places(n) for n in rows]
    places = torch.tensor([i * width + place for i, part in enumerate(kept) for place in part], device=device)
    head = model.get_output_embeddings()
    with head_sees(head, places):
        logits = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits[0].float()
    if not bool(torch.isfinite(logits).all()):
        raise WorkbenchError(
            f"{type(model).__name__}: its logits are not finite on the training texts, so it cannot teach",
            "Check that its files are complete: `workbench brick show DIR`.",
        )
    logs = logits.log_softmax(-1)
    values, ids = logs.topk(min(work.k, logs.shape[1]))
    short = work.k - values.shape[1]  # a vocabulary of fewer than k tokens
    ids = torch.nn.functional.pad(ids, (0, short)).int().cpu()
    probabilities = torch.nn.functional.pad(values.exp(), (0, short)).cpu()
    following = [token for n, part in zip(rows, kept, strict=True) for token in [*tokens[n][part.start + 1 : part.stop], 0]]
    nll = -logs.gather(1, torch.tensor(following, device=device)[:, None])[:, 0].cpu()
    found, start = {}, 0
    for n, part in zip(rows, kept, strict=True):
        stop = start + len(part)
        nll[stop - 1] = 0.0  # nothing follows the last token
        found[n] = (ids[start:stop], probabilities[start:stop], nll[start:stop])
        start = stop
    return found
