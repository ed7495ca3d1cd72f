"""The results file of lm-eval that stands beside samples of the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.scores.suite import SHARE, metric_of
from workbench.scores.tasks import AGGREGATIONS, LOWER

_HIGHER = {"mcc", "chrf++", "bypass", "acc_all", "score"}  # of lm-eval's, beside shares
_LOWER = {*LOWER, "wer", "cer", "mse", "mae", "error", "edit_distance"}  # lm-eval's, and names that its registry does not have


@dataclass(frozen=True)
class Reported:
    """What lm-eval's results file of the same run says about a task; empty without a file.

    Attributes:
        file: The file.
        version: Version of lm-eval.
        values: Value by "metric,filter".
        aggregations: Name of the aggregation by metric, or the source text of a task's own function.
        higher: Whether higher is better, by metric, where the file says so.
    """

    file: Path | None = None
    version: str | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    aggregations: Mapping[str, str] = field(default_factory=dict)
    higher: Mapping[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, task: str, file: Path, document: Mapping[str, object]) -> Reported:
        """Read a results file, which may hold anything."""

        def part(*names: str) -> Mapping[str, object]:
            found: Any = document
            for name in names:
                found = found.get(name) if isinstance(found, dict) else None
            return found if isinstance(found, dict) else {}

        listed = part("configs", task).get("metric_list")
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        version = document.get("lm_eval_version")
        return cls(
            file,
            str(version) if version else None,
            {name: float(v) for name, v in part("results", task).items() if isinstance(v, (int, float)) and "," in name},
            {str(entry.get("metric")): str(entry["aggregation"]) for entry in entries if entry.get("aggregation")},
            {name: value for name, value in part("higher_is_better", task).items() if isinstance(value, bool)},
        )

    def aggregation(self, metric: str) -> str:
        """Return the name of a metric's aggregation: that of the file, else lm-eval's default."""
        return self.aggregations.get(metric, AGGREGATIONS.get(metric, "mean"))

    def is_higher(self, metric: str) -> bool | None:
        """Return whether higher values of a metric are better, by the file or else by the metric's name; None if neither tells."""
        name = metric_of(metric)
        known = True if name in _HIGHER or SHARE.fullmatch(name) else False if name in _LOWER else None
        return self.higher.get(name, known)
