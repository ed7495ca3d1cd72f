"""The result of a search, which `search --json` prints, search.json holds and reports show."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, SerializerFunctionWrapHandler, WithJsonSchema, model_serializer

from workbench.compare.comparison import Comparison
from workbench.ground.results import JsonObject, Number, Result, absent
from workbench.recipe.fields import Choices, Range, Value

RESULT = "search.json"
"""Name of the file with the result, in the folder of the search."""
TestedPart = Literal["control", "found", "random"]


class HalfCounts(JsonObject):
    """Numbers for the two halves of the items."""

    search: int
    """Number for the items that candidates are searched on."""
    test: int
    """Number for the items that only the best candidates are tested on."""


class ObjectiveRow(JsonObject):
    """An objective of a search: a mean of metrics."""

    name: str
    """Name of the objective."""
    lower: bool
    """Whether lower scores are better."""
    terms: list[list[str]]
    """The averaged metrics, each as [suite, task, metric]."""
    items: HalfCounts
    """Numbers of items."""
    clusters: HalfCounts
    """Numbers of clusters."""


class ControlRow(JsonObject):
    """A control of a search, scored on all search items."""

    name: str
    """Name of the control."""
    role: str
    """"base", "brick", "average" or "configuration"."""
    scores: list[Number]
    """Score on search items by objective."""
    intervals: list[list[Number] | None]
    """By objective, 95 % interval [low, high] of the paired difference from the best control, around that control's score; null
    without an error estimate."""


class Loss(JsonObject):
    """What a candidate loses on a guarded task against the base, on search items."""

    task: str
    """Name of the task."""
    loss: Number
    """Loss in the metric's units; negative for a gain."""
    tolerance: Number | None
    """Largest loss that counts as safe; null if the suite gives none for this metric."""
    # It is harmful if it exceeds the tolerance; without a tolerance, if the paired interval lies beyond 0.
    harmful: bool
    """Whether the loss excludes the candidate."""


class TrialRow(JsonObject):
    """A candidate of a search."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    arm: Literal["search", "random"]
    """"search" for a candidate of the sampler, "random" for one of the random baseline."""
    number: int
    """Number within its arm, from 0."""
    name: str
    """Name of the candidate, such as "trial-7"."""
    values: dict[str, Value]
    """Dimension -> value."""
    scores: list[Number] | None
    """Score on search items by objective; an estimate for a candidate that was stopped early; null for one that failed."""
    digest: str | None = None
    """Digest of the candidate's weights."""
    stage: int | None = None
    """Stage at which scoring ended, from 0."""
    stopped: bool | None = None
    """Whether scoring was stopped early, because another configuration is better."""
    items: int | None = None
    """Number of items that were scored."""
    beaten_by: str | None = None
    """Configuration that stopped the candidate."""
    seconds: dict[str, Number] | None = None
    """Part of the work -> wall time in seconds; "all" is the total."""
    error: str | None = None
    """Error of a candidate that failed."""
    intervals: list[list[Number] | None] | None = None
    """Intervals as for controls, for a candidate that was scored on all search items."""
    guarded: list[Loss] | None = None
    """Losses on guarded tasks, for a candidate that was scored on all search items."""

    @model_serializer(mode="wrap")
    def _as_recorded(self, handler: SerializerFunctionWrapHandler):  # type: ignore[no-untyped-def]
        """Leave out the fields that the candidate's record lacks. A return type would replace the schema of the class."""
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}

    @property
    def failed(self) -> bool:
        """True if the candidate could not be scored."""
        return self.scores is None

    @property
    def complete(self) -> bool:
        """True if the candidate was scored on all search items."""
        return self.scores is not None and not self.stopped

    @property
    def harmful(self) -> bool:
        """True if the candidate loses too much on a guarded task."""
        return any(loss.harmful for loss in self.guarded or ())

    @property
    def random(self) -> bool:
        """True if the candidate was drawn at random."""
        return self.arm == "random"

    @property
    def duration(self) -> float | None:
        """Wall time in seconds; None if it was not recorded."""
        return (self.seconds or {}).get("all")

    def interval(self, index: int) -> tuple[float, float] | None:
        """Return the interval under one objective, or None."""
        ends = self.intervals[index] if self.intervals else None
        return None if ends is None else (ends[0], ends[1])


class Unbeaten(JsonObject):
    """A configuration that no candidate beats."""

    name: str
    """Name of the configuration."""
    role: str
    """Role of a control, or "random"."""
    search: list[Number]
    """Score on search items by objective."""
    test: list[Number]
    """Score on test items by objective."""


class TestedRow(JsonObject):
    """A configuration that was scored on test items."""

    name: str
    """Name of the configuration."""
    part: TestedPart
    """"control"; "found" for the winner or a member of the Pareto front; "random" for the best random candidate."""
    digest: str
    """Digest of its weights."""
    search: list[Number]
    """Score on search items by objective."""
    test: list[Number]
    """Score on test items by objective."""
    optimism: list[Number]
    """By objective, by how much the search items overrate the configuration: difference from the best control on search items
    minus the difference on test items."""
    same_as: str | None
    """Control with the same weights."""


class ShownGap(JsonObject):
    """A paired difference of an objective, higher is better."""

    diff: Number
    """Difference from the best control."""
    low: Number | None
    """Lower end of the 95 % interval; null if it is infinite."""
    high: Number | None
    """Upper end of the interval; null if it is infinite."""
    p: Number
    """Two-sided p value of "no difference"."""
    clusters: int
    """Number of clusters of the task with the fewest."""


class CandidateVerdict(JsonObject):
    """A candidate against the best control on one objective."""

    objective: str
    """Name of the objective."""
    test: ShownGap
    """Difference on test items."""
    search: ShownGap
    """Difference on search items."""
    verdict: Literal["better", "worse", "cannot tell", "no item changed"]
    """Verdict on test items."""
    reason: str | None
    """Reason of the verdict "cannot tell"."""
    optimism: Number
    """Difference on search items minus the difference on test items."""


class SearchTest(JsonObject):
    """The test of the best candidates on items that no candidate has seen."""

    baseline: str
    """Name of the best control."""
    rows: list[TestedRow]
    """Tested configurations, controls first."""
    against: dict[str, list[CandidateVerdict]]
    """Candidate -> verdict by objective."""
    comparison: Annotated[Comparison, WithJsonSchema({"type": "object", "additionalProperties": True})]
    """Comparison by task, as in the JSON file that `report` writes."""


class SearchState(Result):
    """A search with its controls and its finished candidates."""

    version: Literal[1]
    """Version of the format."""
    name: str
    """Name of the recipe."""
    key: str
    """Digest of everything that decides scores."""
    directory: str
    """Folder of the search, relative to the project."""
    command: str | None
    """Command that runs the search again; null for a recipe without a file."""
    sampler: str
    """Name of the sampler."""
    seed: int
    """Seed of the sampler."""
    objectives: list[ObjectiveRow]
    """The objectives."""
    space: dict[str, Range | Choices]
    """Dimension -> its range or choices."""
    items: HalfCounts
    """Numbers of items over all tasks."""
    stages: list[int]
    """Numbers of items after which a poor candidate can be stopped."""
    controls: list[ControlRow]
    """Base, bricks alone, their average, and other controls."""
    trials: list[TrialRow]
    """Finished candidates, in order."""
    importances: dict[str, dict[str, Number]]
    """Objective -> dimension -> share of the variation in scores that it explains; empty after few candidates."""
    winner: str | None
    """The best candidate; null with several objectives, or if no candidate beats the controls."""
    recipes: dict[str, str]
    """Candidate -> recipe file that was written for it, relative to the project."""
    best_control: str
    """The control with the best scores on search items."""
    unbeaten: list[Unbeaten] | None = absent()
    """Configurations that no candidate beats, if there is no winner."""
    front: list[str] | None = absent()
    """Members of the Pareto front, with several objectives."""
    hypervolume: list[Number] | None = absent()
    """Area that the Pareto front covers after each complete candidate, with two objectives; empty with more."""
    guarded: list[str] | None = absent()
    """What the search and the test found on guarded tasks: what is excluded, and verdicts of the winners other than safe."""
    warnings: list[str]
    """Warnings about the search."""


class SearchResult(SearchState):
    """The result of a search, which is also written to search.json in its folder."""

    test: SearchTest
    """The test on other items."""

    @classmethod
    def migrate(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Add what the comparison of an older search lacks."""
        test = data.get("test")
        if isinstance(test, dict) and isinstance(comparison := test.get("comparison"), dict):
            return {**data, "test": {**test, "comparison": Comparison.migrate(comparison)}}
        return data


class SearchProgress(JsonObject):
    """The progress of a search."""

    done: int
    """Number of finished candidates."""
    total: int | None
    """Number of candidates of the whole search; None if only time limits them."""


class GrowingSearch(SearchState):
    """A search in progress, which has no winner, recipes or test yet."""

    progress: SearchProgress
    """Number of finished candidates and of all."""
