"""Groups of prompts that share a template, so that a fold can hold whole templates out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from workbench.lazy import torch
from workbench.route.features.tfidf import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

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

    Args:
        prompts: Prompts of one brick.

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


def folds(prompts: Sequence[str], count: int = FOLDS) -> tuple[Tensor, Tensor]:
    """Return the template and the fold of each prompt of one brick, with whole templates in a fold.

    Large templates are placed first, each into the smallest fold. If there are fewer templates than two, prompts are dealt out one by
    one instead, because no template can be held out.
    """
    groups = templates(prompts)
    sizes = torch.bincount(groups)
    if len(sizes) < 2:
        return groups, torch.arange(len(prompts)) % count
    filled = [0] * count
    place = torch.zeros(len(sizes), dtype=torch.long)
    for group in sorted(range(len(sizes)), key=lambda g: (-int(sizes[g]), g)):
        fold = min(range(count), key=lambda f: (filled[f], f))
        place[group] = fold
        filled[fold] += int(sizes[group])
    return groups, place[groups]
