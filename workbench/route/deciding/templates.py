"""Character n-grams of texts, weighted by TF-IDF, and groups of prompts that share a template, so that a fold can hold whole templates out.

The numbers are those of scikit-learn's TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5)), which is no dependency.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.ground.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


SHORTEST, LONGEST = 2, 5


@dataclass(frozen=True)
class Vocabulary:
    """N-grams with their weights.

    Attributes:
        columns: N-gram -> its column.
        idf: [n-grams], float64, ln((1 + texts) / (1 + texts with the n-gram)) + 1.
    """

    columns: dict[str, int]
    idf: Tensor

    @classmethod
    def of(cls, texts: Sequence[str]) -> Vocabulary:
        """Return all n-grams of some texts, in alphabetical order."""
        frequency = Counter(gram for text in texts for gram in set(ngrams(text)))
        grams = sorted(frequency)
        counts = torch.tensor([frequency[gram] for gram in grams], dtype=torch.float64)
        return cls({gram: i for i, gram in enumerate(grams)}, ((1 + len(texts)) / (1 + counts)).log() + 1)

    def rows(self, texts: Sequence[str]) -> Any:
        """Return a sparse matrix [text, n-gram] (scipy, CSR, float64) with rows of length 1; an unknown n-gram counts nothing."""
        import numpy as np
        from scipy.sparse import csr_matrix

        idf = self.idf.tolist()
        values: list[float] = []
        columns: list[int] = []
        starts = [0]
        for text in texts:
            counts = Counter(self.columns[gram] for gram in ngrams(text) if gram in self.columns)
            row = [(column, count * idf[column]) for column, count in sorted(counts.items())]
            norm = sum(value * value for _, value in row) ** 0.5
            columns += [column for column, _ in row]
            values += [value / norm for _, value in row]
            starts.append(len(values))
        parts = (np.array(values, dtype=np.float64), np.array(columns, dtype=np.int64), np.array(starts, dtype=np.int64))
        return csr_matrix(parts, shape=(len(texts), len(self.columns)))

    def known(self, texts: Sequence[str]) -> Tensor:
        """Return the share of each text's length, as a vector of all its n-grams, that known n-grams have [text], from 0 to 1.

        An unknown n-gram has the weight of one that no text of the vocabulary has, ln 2 above the largest.
        """
        idf, most = self.idf.tolist(), float(self.idf.max()) + math.log(2)
        shares = []
        for text in texts:
            squares = [0.0, 0.0]
            for gram, count in Counter(ngrams(text)).items():
                column = self.columns.get(gram)
                squares[column is not None] += (count * (most if column is None else idf[column])) ** 2
            shares.append(math.sqrt(squares[1] / sum(squares)) if any(squares) else 0.0)
        return torch.tensor(shares, dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """Return the vocabulary as tensors for a file."""
        text = "\n".join(self.columns).encode()
        return {"ngrams": torch.frombuffer(bytearray(text), dtype=torch.uint8).clone(), "idf": self.idf}

    @classmethod
    def read(cls, ngrams_tensor: Tensor, idf: Tensor) -> Vocabulary:
        """Return the vocabulary from the tensors of a file; see `tensors`."""
        grams = bytes(ngrams_tensor.tolist()).decode().split("\n")
        return cls({gram: i for i, gram in enumerate(grams)}, idf)


def ngrams(text: str) -> Iterator[str]:
    """Yield the n-grams of a text's words in lower case, each word between two spaces; a shorter word counts once."""
    for word in text.lower().split():
        padded = f" {word} "
        for size in range(SHORTEST, LONGEST + 1):
            yield padded[:size]
            if len(padded) <= size:
                break
            for start in range(1, len(padded) - size + 1):
                yield padded[start : start + size]


FOLDS = 5
"""Number of folds."""
ALIKE = 0.7
"""Largest mean cosine distance of n-grams within a template."""
FIRST, LAST = 4, 3
"""Number of words at the start and at the end of a prompt that are compared: what lies between is mostly content."""


def templates(prompts: Sequence[str]) -> Tensor:
    """Return the template of each prompt, as numbers from 0.

    Prompts are clustered by the character n-grams of their first and last words (cosine distance, average linkage), with all digits
    made equal. Clusters may hold several similar templates: a coarse cluster costs some training prompts, while a template in two folds would hide how a router
    does on a new one.

    Returns:
        [prompt], int64.
    """
    if len(prompts) == 1:
        return torch.zeros(1, dtype=torch.long)
    from scipy.cluster.hierarchy import fcluster, linkage

    masked = [re.sub(r"\d", "0", _ends(prompt)) for prompt in prompts]
    rows = Vocabulary.of(masked).rows(masked)
    cosine = (rows @ rows.T).toarray()
    first, second = torch.triu_indices(len(prompts), len(prompts), 1).numpy()
    distances = (1 - cosine[first, second]).clip(min=0)
    tree = linkage(distances, method="average")
    return torch.from_numpy(fcluster(tree, ALIKE, criterion="distance").astype("int64")) - 1


def _ends(prompt: str) -> str:
    """Return the words at both ends of a prompt."""
    words = prompt.split()
    return " ".join(words if len(words) <= FIRST + LAST else [*words[:FIRST], *words[-LAST:]])


def folds(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the template and the fold of each prompt of one brick, with whole templates in a fold.

    Large templates are placed first, each into the smallest fold. If there are fewer templates than two, prompts are dealt out one by
    one instead, because no template can be held out.
    """
    groups = templates(prompts)
    sizes = torch.bincount(groups)
    if len(sizes) < 2:
        return groups, torch.arange(len(prompts)) % FOLDS
    filled = [0] * FOLDS
    place = torch.zeros(len(sizes), dtype=torch.long)
    for group in sorted(range(len(sizes)), key=lambda g: (-int(sizes[g]), g)):
        fold = min(range(FOLDS), key=lambda f: (filled[f], f))
        place[group] = fold
        filled[fold] += int(sizes[group])
    return groups, place[groups]
