"""What a recommendation is made of: the candidates with everything that decides about them, and the decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from workbench.compare.differences import Difference
from workbench.compare.leaders import MeanDifference
from workbench.errors import size

CANDIDATES = ("base", "brick", "average", "configuration")
"""Roles of candidates. The other controls (facts in the prompt, fine-tuning, an adapter) are made for a comparison and are not shipped."""
UNGUARDED, BASELINE = "no guarded task", "baseline"
_SHIPPABLE = ("safe", UNGUARDED, BASELINE)
_CLEARLY = 0.9  # a result counts as smaller if it has less than this share of the other one's bytes


@dataclass(frozen=True)
class Standing:
    """A candidate: a configuration, brick, average or base that was scored on all skill tasks.

    Attributes:
        name: Its name.
        mean: Mean over skills, corrected for chance.
        guarded: "safe", "not shown safe" or "worse" over all guarded tasks; "no guarded task"; "baseline" for the baseline itself.
        unsafe: Rows of guarded tasks on which it is worse or not shown safe.
        lost: Names of tasks that are not guarded and on which it is worse than the baseline.
        above: Its difference from the baseline; None for the baseline itself.
        form: Form in which `run` writes it: checkpoint, adapter or configuration; None if not known.
        bytes: Bytes that `run` writes, or of the brick's own files, else those of the weights as a checkpoint; None if not known.
        bricks: Number of bricks that it is made from.
        role: Its role, one of `CANDIDATES`.
    """

    name: str
    mean: float
    guarded: str
    unsafe: tuple[Difference, ...] = ()
    lost: tuple[str, ...] = ()
    above: MeanDifference | None = None
    form: str | None = None
    bytes: int | None = None
    bricks: int = 0
    role: str = "configuration"

    @property
    def better(self) -> bool:
        """True if it is better than the baseline, or is the baseline."""
        return self.above is None or self.above.verdict == "better"

    @property
    def recommendable(self) -> bool:
        """True if it is better than the baseline and safe on every guarded task."""
        return self.better and self.guarded in _SHIPPABLE

    def cheaper(self, other: Standing) -> str:
        """Return in which way it costs less than another candidate, as a predicate; empty if it does not.

        Bytes count first, if they differ by a tenth or more; then the number of bricks.
        """
        if self.bytes is not None and other.bytes is not None:
            if self.bytes < _CLEARLY * other.bytes:
                return f"smaller ({size(self.bytes)} against {size(other.bytes)})"
            if other.bytes < _CLEARLY * self.bytes:
                return ""
        if 0 < self.bricks < other.bricks:
            return f"made from fewer bricks ({self.bricks} against {other.bricks})"
        return ""


@dataclass(frozen=True)
class Decision:
    """The recommended configuration, or why there is none.

    Attributes:
        baseline: Name of the baseline.
        chosen: The recommended candidate, if there is one.
        closest: The candidate that misses least, if none is recommended.
        cause: Why none is recommended, whose clause stands in `advice.py`.
        ranked: All candidates, the highest mean first.
        leaders: Names of the leaders, the highest mean first.
        beside: Differences from the chosen, or closest, candidate of the other leaders and of all that are not shown to be worse than it.
        equal_to: Name of the candidate with the highest mean to which the chosen one is equivalent, if it is another one.
        harmful: Guarded task -> bricks that are worse on it alone.
        guarded: Names of the guarded tasks.
        controls: Controls that are no candidates -> mean over skills.
        members: Number of members of the families of pairs: candidates, baseline, and what was looked at before.
        pairs: Number of their pairs.
        looked_at: Number of members that were looked at before on the same items and are not in the comparison.
    """

    baseline: str
    chosen: Standing | None = None
    closest: Standing | None = None
    cause: str | None = None
    ranked: tuple[Standing, ...] = ()
    leaders: tuple[str, ...] = ()
    beside: tuple[MeanDifference, ...] = ()
    equal_to: str | None = None
    harmful: Mapping[str, Sequence[str]] = field(default_factory=dict)
    guarded: tuple[str, ...] = ()
    controls: Mapping[str, float] = field(default_factory=dict)
    members: int = 0
    pairs: int = 0
    looked_at: int = 0
