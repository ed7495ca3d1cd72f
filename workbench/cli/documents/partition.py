"""Document of `analyze partition`."""

from __future__ import annotations

from workbench.cli.documents.analyze import Analysis
from workbench.cli.documents.document import Document
from workbench.results import Number


class SelectorPointDocument(Document):
    """What is left with some experts of each token."""

    experts: int
    """Experts of a token, shared ones included."""
    used: Number
    """Their share of the neurons, in percent."""
    captured: Number
    """Share of the mass |activation| times norm of the output column that they have on held-out tokens, mean over layers."""
    loss: Number
    """Mean loss of held-out texts in nats per token."""
    rise: Number
    """Its rise over the dense model."""
    low: Number | None
    """Lower end of the rise's 95 % interval over tasks."""
    high: Number | None
    """Upper end."""


class SelectorCurveDocument(Document):
    """Losses of one selector."""

    selector: str
    """oracle, centroid, representative, ridge or mlp."""
    points: list[SelectorPointDocument]
    """What is left, by descending number of experts. Numbers below that of the shared experts are left out."""


class PartitionDocument(Analysis):
    """Result of `analyze partition`; the experts themselves are in partition/."""

    partition: str
    """Digest of the partition."""
    experts: int
    """Experts of a layer, shared ones included."""
    sizes: dict[str, int]
    """Layer -> neurons of an expert."""
    shared: dict[str, int]
    """Layer -> experts that serve every token."""
    difference: Number
    """Largest difference between the sum of all experts and the dense layer, relative to the layer's largest output."""
    loss: Number
    """Loss of the dense model on the held-out texts, in nats per token."""
    curves: list[SelectorCurveDocument]
    """Loss against the share of the experts that serve a token, by selector."""
