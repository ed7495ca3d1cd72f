"""Changed items: items whose score differs from the baseline's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from workbench.compare.tables import Table
from workbench.scores.store import Configuration
from workbench.scores.suite import MARGIN


def flips(tasks: Sequence[Table], base: Configuration, c: Configuration) -> list[dict[str, Any]]:
    """Return the items whose primary metric differs from the baseline's, with both answers.

    Contrasts, ratios of sums and margins are skipped: nearly every item differs there, or the item is already listed under its task.
    """
    changed = []
    for t in tasks:
        if c.digest not in t.values or t.contrast or t.ratio or t.metric == MARGIN:
            continue
        for i in np.flatnonzero(t.values[c.digest] != t.values[base.digest]).tolist():
            before, after = (
                {k: t.rows[d][i].get(k) for k in ("response", "metrics", "loglikelihoods")} for d in (base.digest, c.digest)
            )
            item = {k: t.items[i].get(k) for k in ("task", "id", "cluster", "prompt", "gold", "choices")}
            changed.append({**item, "baseline": before, "configuration": after})
    return changed
