"""Stored scores that a user wants compared, and their comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.api.subjects import Listener, Opened, Request, imported_scores, open_subjects
from workbench.errors import LeftOut, WorkbenchError

if TYPE_CHECKING:
    from workbench.compare.compare import Comparison
    from workbench.compare.sweeps import Sweep
    from workbench.scores.store import Scores, ScoreStore


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
        """Compare the second one of the pair with the first one; without a pair, return the comparison of all.

        Args:
            whole: The comparison of all configurations.
            command: Command line that makes the comparison again.
        """
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
