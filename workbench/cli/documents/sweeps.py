"""Document of the sweeps in a comparison."""

from __future__ import annotations

from workbench.cli.documents.document import Document
from workbench.results import Number


class SweepDimensionDocument(Document):
    """A field that a sweep varies."""

    name: str
    """Name of the field, such as "mix.lambda"."""
    label: str
    """Short name in tables and charts."""
    values: list[bool | int | float | str | list[str]]
    """The values in the order of the recipe."""
    number: bool
    """Whether the values have places on an axis: numbers, or lists of different numbers of bricks."""
    seed: bool
    """Whether the field is a seed, over which scores are averaged."""


class SweepMeasure(Document):
    """A level that is given for each point."""

    key: str
    """"mean" or "retention", the key in `levels`."""
    text: str
    """Description of the level."""
    share: bool
    """Whether the level lies in [0, 1]."""
    lower: bool
    """Whether lower is better."""
    baseline: Number | None
    """The baseline's level; null if the baseline was not scored on all tasks."""


class SweepLevel(Document):
    """A level of a point with its 95 % interval."""

    value: Number
    """The level; with several seeds the mean over them."""
    low: Number | None
    """Lower end of the interval; null if it is infinite. With several seeds it covers the spread between seeds and that of items."""
    high: Number | None
    """Upper end of the interval."""
    between: Number | None
    """Standard deviation between seeds; null for a single one."""


class SweepPointDocument(Document):
    """A combination of values, without the seed."""

    values: dict[str, bool | int | float | str | list[str]]
    """Field -> value. Fields that the point's method does not have are absent."""
    configurations: list[str]
    """Names of its configurations, one for each seed."""
    levels: dict[str, SweepLevel | None]
    """Key of a measure -> level; null if a configuration was not scored on all tasks."""


class SweepDocument(Document):
    """A recipe that stands for several configurations."""

    name: str
    """Name of the recipe."""
    dimensions: list[SweepDimensionDocument]
    """The fields that it varies."""
    measures: list[SweepMeasure]
    """Mean over skills and retention, as far as the suites have such tasks."""
    points: list[SweepPointDocument]
    """The scored combinations of values."""
    missing: list[str]
    """Names of configurations without scores."""
