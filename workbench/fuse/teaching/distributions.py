"""Read texts with teachers: align their tokens with those of the trained model, and keep the most probable next tokens at every place.

Distributions stand in files of bounded size, which an interrupted pass continues.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.facts.facts import joined
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import no_grad, np, torch
from workbench.models.hooks import head_sees
from workbench.models.prompts import encode_pair
from workbench.models.texts import batch_limit, by_length, side_by_side
from workbench.train.run import quiet, reproducible
from workbench.vocabulary.tokens import Tokens, checked_tokenizer, read_tokens, respelled, shared_rows, spelling
from workbench.weights.header import save_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    from workbench.models.texts import Text


@dataclass(frozen=True, eq=False)
class Reading:
    """A text as tokens of one tokenizer.

    Attributes:
        ids: Token ids, after the special tokens that the tokenizer puts in front of a text.
        ends: Number of characters of the text up to the end of each token; 0 for special tokens in front.
        first: Index of the token that predicts the first token of the completion, or of a text without a prompt.
    """

    ids: NDArray[np.int64]
    ends: NDArray[np.int64]
    first: int


class Vocabulary:
    """A tokenizer, and the text that each of its tokens stands for.

    Args:
        path: Directory of the tokenizer.
        label: The model's name in messages.

    Raises:
        WorkbenchError: If there is no tokenizer, or it cannot tell where its tokens are in a text.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label
        self.tokens: Tokens = read_tokens(path, label)
        self.spell = spelling(path, label)
        self.tokenizer: Any = checked_tokenizer(path, label)
        self.size = max(self.tokens.ids.values(), default=-1) + 1
        self.pieces: list[bytes | None] = [None] * self.size
        """Bytes of each token; None for special tokens."""
        for token, i in self.tokens.ids.items():
            flags = self.tokens.added.get(token)
            if flags is None:
                self.pieces[i] = self.spell(token)
            elif not flags.get("special", True):  # such as runs of spaces, which are added as they stand in texts
                self.pieces[i] = token.encode()
        if not getattr(self.tokenizer, "is_fast", False):
            raise WorkbenchError(
                f"{label}: its tokenizer in {path} does not say where its tokens are in a text, which the alignment of tokens needs",
                "Save it as tokenizer.json: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).",
            )

    def read(self, text: Text) -> Reading:
        """Return a text as tokens. A prompt and its completion are one text, as in training."""
        continuation = joined(text.prompt, text.answer) if text.prompt else text.answer
        pair = encode_pair(self.tokenizer, text.prompt, continuation)
        assert pair.offsets is not None  # fast tokenizers have offsets
        ends = np.maximum.accumulate(np.array([end for _, end in pair.offsets], dtype=np.int64))
        return Reading(np.array(pair.tokens, dtype=np.int64), ends, max(len(pair.prompt) - 1, 0))


def sync_points(
    one: Reading, pieces: list[bytes | None], other: Reading, other_pieces: list[bytes | None]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the tokens of two readings that end at the same character, before text that both spell alike.

    Of several tokens that end at one character, such as the bytes of a letter, only the last one counts. The next tokens must begin
    with the same bytes: one tokenizer may have read a space already, or write capitals as small letters, and its distribution is
    then about another text. At the end of the text there is no next token.

    Args:
        one: The text in one tokenizer's tokens.
        pieces: Bytes of each of its tokens by id.
        other: The text in another tokenizer's tokens.
        other_pieces: Bytes of each of its tokens by id.

    Returns:
        Indices into the tokens of both readings, increasing.
    """
    last, other_last = _last_of_each_end(one.ends), _last_of_each_end(other.ends)
    _, found, other_found = np.intersect1d(one.ends[last], other.ends[other_last], assume_unique=True, return_indices=True)
    i, j = last[found], other_last[other_found]
    same = [_alike(_next(one, a, pieces), _next(other, b, other_pieces)) for a, b in zip(i.tolist(), j.tolist(), strict=True)]
    keep = np.array(same, dtype=bool)
    return i[keep], j[keep]


def _last_of_each_end(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the index of the last token of each end."""
    return np.flatnonzero(np.append(ends[1:] != ends[:-1], True)) if len(ends) else np.zeros(0, dtype=np.int64)


def _next(reading: Reading, place: int, pieces: list[bytes | None]) -> bytes | None:
    """Return the bytes of the token after a place; nothing at the end, and None for a special token."""
    return pieces[reading.ids[place + 1]] if place + 1 < len(reading.ids) else b""


def _alike(one: bytes | None, other: bytes | None) -> bool:
    """Return whether two next tokens begin with the same bytes, or both texts end."""
    if one is None or other is None:
        return False
    return one == other or (bool(one) and bool(other) and (one.startswith(other) or other.startswith(one)))


NONE = -1
"""Stands for a token that the other vocabulary cannot begin to write."""


def token_map(teacher: Vocabulary, pivot: Vocabulary) -> NDArray[np.int64]:
    """Return for each token of a teacher the token that the trained model would read first in its text.

    A token that both have is mapped to itself, and the end of a text to the end of a text. Other special tokens, and texts that no
    token begins, are mapped to `NONE`.

    Args:
        teacher: The teacher's vocabulary.
        pivot: The vocabulary of the model that is trained.

    Returns:
        Ids of the trained model, [token of the teacher].
    """
    found = np.full(teacher.size, NONE, dtype=np.int64)
    first_tokens = _FirstTokens(pivot)
    for i, text in enumerate(teacher.pieces):
        if text:
            found[i] = first_tokens.first_token(text)
    for token, row in shared_rows(pivot.tokens, pivot.spell, teacher.tokens, teacher.spell).items():
        found[teacher.tokens.ids[token]] = row
    ends = [vocabulary.tokenizer.eos_token_id for vocabulary in (teacher, pivot)]
    if None not in ends:
        found[ends[0]] = ends[1]
    return found


class _FirstTokens:
    """The first token of a text in the middle of another one.

    Args:
        vocabulary: The vocabulary.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._spell, self._pieces, self._ids = vocabulary.spell, vocabulary.pieces, vocabulary.tokens.ids
        self._model = vocabulary.tokenizer.backend_tokenizer.model
        # Of several tokens with one text, such as a letter and its byte, the last one is the ordinary one: bytes come first.
        self._by_text = {text: i for i, text in enumerate(self._pieces) if text}

    def first_token(self, text: bytes) -> int:
        """Return the first token that the tokenizer writes a text with; `NONE` if no token begins the text.

        The tokenizer's model splits the text. If it cannot, because the text has parts of a character, or if its first token is
        another text, such as that of an unknown character, the longest token that begins the text is taken.
        """
        if text in self._by_text:
            return self._by_text[text]
        written = respelled(self._spell, text)
        if written:
            tokens = self._model.tokenize(written)
            piece = self._pieces[tokens[0].id] if tokens else None
            if piece and text.startswith(piece):
                return int(tokens[0].id)
        return next((self._by_text[text[:n]] for n in range(len(text), 0, -1) if text[:n] in self._by_text), NONE)


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
