"""The server's numbers in Prometheus' text format.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate

BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of a histogram's buckets, in seconds."""
Row = tuple[str, Mapping[str, str], float]
"""Suffix of the name, labels and value of a line."""
KIND = "text/plain; version=0.0.4"
"""Media type of the format."""


class Histogram:
    """How often something took how long."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(BOUNDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._sum += seconds

    def rows(self) -> Iterator[Row]:
        """Yield suffix, labels and value of each line."""
        counts = list(accumulate(self._counts))
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), counts, strict=True):
            yield "_bucket", {"le": bound}, count
        yield "_sum", {}, self._sum
        yield "_count", {}, counts[-1]


class Answers:
    """What was answered.

    Attributes:
        statuses: Address and status -> number of answers; addresses that the server has not are "other".
        seconds: How long answers took, streams to their end.
        first: How long requests waited for their first token.
    """

    def __init__(self) -> None:
        self.statuses: Counter[tuple[str, str]] = Counter()
        self.seconds, self.first = Histogram(), Histogram()

    def text(self, acted: Mapping[str, int]) -> str:
        """Return the numbers, with the number of texts that each brick has written."""
        statuses = sorted(dict(self.statuses).items())
        rows: list[Row] = [("", {"path": path, "status": status}, float(count)) for (path, status), count in statuses]
        found = family("answers_total", "counter", "Answers; statuses from 400 on are refusals and failures.", rows)
        found += family("answer_seconds", "histogram", "Time of an answer, of a stream to its end.", self.seconds.rows())
        found += family("first_token_seconds", "histogram", "Time to the first token of a request.", self.first.rows())
        texts: list[Row] = [("", {"brick": name}, float(count)) for name, count in sorted(dict(acted).items())]
        return found + family(
            "texts_total", "counter", "Texts of each brick; `base`: no brick, `model`: there is no router.", texts
        )


def family(name: str, kind: str, told: str, rows: Iterator[Row] | list[Row]) -> str:
    """Return the lines of one kind of numbers."""
    lines = [f"# HELP workbench_{name} {told}", f"# TYPE workbench_{name} {kind}"]
    for suffix, labels, value in rows:
        inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"workbench_{name}{suffix}{f'{{{inside}}}' if inside else ''} {value:.15g}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
