"""Stored scores that a user wants compared, and results in Python with tables and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from workbench.api.subjects import Listener, Opened, Request, imported_scores, open_subjects
from workbench.ground.errors import LeftOut, WorkbenchError
from workbench.ground.tables import as_html, data_frame

if TYPE_CHECKING:
    from workbench.compare.comparison import Comparison
    from workbench.compare.differences import Difference
    from workbench.compare.recommend import Recommendation
    from workbench.compare.swept import Sweep
    from workbench.ground.results import Result as Document
    from workbench.scores.store import Scores, ScoreStore


HEIGHT = 720
"""Height of a page in a notebook, in pixels."""


def in_notebook(page: str) -> str:
    """Return an HTML page as a frame for a notebook; the page keeps its own style and its policy of loading nothing."""
    frame = f'width="100%" height="{HEIGHT}" style="border: 0" sandbox="allow-scripts"'
    return f'<iframe srcdoc="{as_html(page)}" {frame}></iframe>'


class Result:
    """Base of results that have flat tables and a page."""

    @property
    def document(self) -> dict[str, Any]:
        """The content of the page's JSON file."""
        return self._shown().to_dict()

    def tables(self) -> dict[str, list[dict[str, object]]]:
        """Return flat tables by name; a table is one mapping per row."""
        raise NotImplementedError

    def to_pandas(self, table: str | None = None) -> Any:
        """Return a table as a data frame.

        Args:
            table: Name of the table; default: the first one.

        Raises:
            WorkbenchError: If there is no such table, or pandas is not installed.
        """
        tables = self.tables()
        return data_frame(tables, next(iter(tables)) if table is None else table)

    def save(self, path: str | Path) -> list[Path]:
        """Write the page as HTML, Markdown and JSON, and return their paths.

        Args:
            path: The HTML file, such as reports/mine.html; the others go beside it.
        """
        written: list[Path] = self._pages().render(self._shown(), Path(path))
        return written

    def _shown(self) -> Document:
        """Return what the pages show."""
        raise NotImplementedError

    def _pages(self) -> ModuleType:
        """Return the package with `render` and `page_text` for what is shown."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return in_notebook(self._pages().page_text(self._shown()))


@dataclass(frozen=True, repr=False)
class ComparedScores(Result):
    """Scores of configurations and their comparison, which `workbench report` shows.

    Attributes:
        comparison: The comparison.
        scores: The scores by configuration and suite.
        left_out: Configurations that are skipped, with reasons.
        pair: The two configurations that were asked for, if these were exactly two; the rows then compare the second with the first.
        pair_rows: Rows of that pair.
    """

    comparison: Comparison
    scores: Sequence[Scores]
    left_out: Sequence[LeftOut] = ()
    pair: tuple[str, str] | None = None
    pair_rows: Sequence[Difference] = ()

    @property
    def baseline(self) -> str:
        """Name of the configuration that the others are compared with."""
        return self.pair[0] if self.pair else self.comparison.baseline

    @property
    def rows(self) -> list[Difference]:
        """One row per configuration and task: the difference from the baseline, its interval and its verdict."""
        rows = self.pair_rows if self.pair else self.comparison.rows
        return [row for row in rows if row.configuration != self.baseline]

    @property
    def recommendation(self) -> Recommendation | None:
        """The configuration to ship and the reasons; None if no configuration is compared."""
        return self.comparison.recommendation

    def tables(self) -> dict[str, list[dict[str, object]]]:
        """Return flat tables: `rows` as above; `scores`, one row per configuration, task and metric; `configurations`."""
        scores = [
            {
                "configuration": s.configuration.name,
                "suite": s.suite,
                "task": task,
                "metric": metric,
                "n": result.n,
                "value": value.value,
                "low": value.low,
                "high": value.high,
            }
            for s in self.scores
            for task, result in s.tasks.items()
            for metric, value in result.metrics.items()
        ]
        fields = ("name", "role", "digest", "recipe", "parameters", "bytes", "seconds")
        configurations = []
        for one in self.comparison.configurations:
            mean = one.mean
            level = {"mean": mean and mean.value, "low": mean and mean.low, "high": mean and mean.high}
            configurations.append({**{key: getattr(one, key) for key in fields}, **level})
        return {"rows": [row.to_dict() for row in self.rows], "scores": scores, "configurations": configurations}

    def __repr__(self) -> str:
        names = [one.name for one in self.comparison.configurations]
        return f"<{len(names)} configurations against {self.baseline}: {', '.join(names)}>"

    def _shown(self) -> Comparison:
        return self.comparison

    def _pages(self) -> ModuleType:
        from workbench import report

        return report


@dataclass(frozen=True)
class StoredScores:
    """Stored scores of configurations that are compared.

    Attributes:
        scores: The scores, controls included.
        store: The store that holds them.
        project: The project.
        named: Names of the configurations without controls.
        baseline: Name of the baseline; None if the suite decides.
        left_out: Configurations that are skipped, with reasons.
        pair: The two configurations that are asked for, if these are exactly two and no baseline is named.
        sweeps: Sweeps whose points are among the configurations.
    """

    scores: Sequence[Scores]
    store: ScoreStore
    project: Path
    named: Sequence[str]
    baseline: str | None
    left_out: list[LeftOut]
    pair: tuple[str, str] | None = None
    sweeps: Sequence[Sweep] = ()

    @property
    def suite_baseline(self) -> str:
        """Name of the baseline that the first suite declares."""
        from workbench.compare.tables import suites_of

        return next(iter(suites_of(self.store, self.scores, {}).values())).baseline

    def compared(self, command: str) -> Comparison:
        """Compare all configurations with the baseline.

        Args:
            command: Command line that makes the comparison again.
        """
        from workbench.compare.compare import compare

        return compare(self.store, self.scores, baseline=self.baseline, project=self.project, command=command, sweeps=self.sweeps)

    def paired(self, whole: Comparison, command: str) -> Comparison:
        """Compare the second one of the pair with the first one; without a pair, return the comparison of all."""
        from workbench.compare.compare import compare

        if self.pair is None or self.pair[0] == whole.baseline:
            return whole
        return compare(self.store, self.scores, baseline=self.pair[0], project=self.project, command=command)


def find_scores(request: Request, baseline: str | None = None, listener: Listener | None = None) -> StoredScores:
    """Find the stored scores of some configurations. Some that are invalid or not scored are left out.

    Args:
        request: Recipes, models, or runs imported under a suite.
        baseline: Name of the baseline; default: the suite's, or the first of imported runs.
        listener: Who is told what is left out.

    Raises:
        WorkbenchError: If the baseline, or every configuration, is not scored.
    """
    listener = listener or Listener()
    if imported := imported_scores(request):
        from workbench.scores.imported import differing_versions

        scores, store, project = imported
        for warning in differing_versions(scores):
            listener.warn(warning)
        named = [s.configuration.name for s in scores]
        pair = (named[0], named[1]) if baseline is None and len(named) == 2 else None
        return StoredScores(scores, store, project, named, baseline or named[0], [], pair)
    return _of(open_subjects(request, listener, skip=True), request, baseline, listener)


def _of(opened: Opened, request: Request, baseline: str | None, listener: Listener) -> StoredScores:
    """Return the stored scores of opened configurations."""
    from workbench.compare.warnings import tokenizer_warnings
    from workbench.evaluate.scoring import stored

    left_out = list(opened.left_out)
    named = [e.name for e in opened.entries if e.role == "configuration"]
    against = opened.baseline(baseline)
    scores, missing = stored(opened.entries, opened.plans, opened.store, against)
    on = f"not scored yet on {', '.join(p.suite.suite for p in opened.plans)}"
    base = against or "base"
    if lacking := [name for name in missing if name in named or name == base]:
        earlier = opened.store.elsewhere(opened.plans, lacking)
        if base in lacking or not {*named} - {*lacking, base}:
            raise WorkbenchError(f"{on}: {', '.join(lacking)}{earlier}", request.eval_command)
        listener.warn(f"left out: {', '.join(lacking)} ({on}{earlier})")
        left_out += [LeftOut(name, on + earlier, request.eval_command) for name in lacking]
        scores = [s for s in scores if s.configuration.name not in lacking]
    for warning in tokenizer_warnings(scores):
        listener.warn(warning)
    pair = None if baseline or left_out else opened.pair(request.names)
    return StoredScores(scores, opened.store, opened.project, named, against, left_out, pair, opened.sweeps)
