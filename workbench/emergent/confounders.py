"""Plain features of texts that could tell functions apart without any ability: length, language, wording."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workbench.emergent.labelled import Item, ItemRow
from workbench.emergent.nulls import labels_of
from workbench.emergent.ranking import Ranked


def confounders(items: Sequence[Item], rows: Sequence[ItemRow], functions: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return how well plain features of the texts tell each function from the others: AUC [functions] by feature.

    `length` is the number of the prompt's tokens, `language` the share of letters outside ASCII, and `template` the share of the function's items
    among the other items that begin with the same three words.
    """
    labels = labels_of(items, functions)
    starts = [" ".join(re.findall(r"\w+", item.prompt.lower())[:3]) for item in items]
    same = np.array([[a == b for b in starts] for a in starts])
    np.fill_diagonal(same, False)
    counts = np.maximum(same.sum(1), 1)
    features: dict[str, NDArray[np.float64]] = {
        "length": np.array([row.prompt for row in rows], float),
        "language": np.array([_foreign(item.prompt) for item in items]),
    }
    result = {name: Ranked.of(values[:, None]).auc(labels)[:, 0] for name, values in features.items()}
    result["template"] = np.array([float(Ranked.of((same @ label / counts)[:, None]).auc(label[None])[0, 0]) for label in labels])
    return result


def _foreign(text: str) -> float:
    letters = [c for c in text if c.isalpha()]
    return sum(not c.isascii() for c in letters) / max(1, len(letters))
