"""Character n-grams of texts, weighted by TF-IDF: the features of `text` and of templates.

The numbers are those of scikit-learn's TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5)), which is no dependency.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.lazy import torch

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
