"""Document of `analyze locate`."""

from __future__ import annotations

from workbench.cli.documents.analyze import Analysis
from workbench.cli.documents.document import Document
from workbench.results import Number


class LocatedNeuron(Document):
    """A neuron, or an expert, that carries a fact."""

    layer: int
    """Its layer."""
    neuron: int
    """Its index in the layer."""
    score: Number
    """Mean attribution over the fact's wordings."""


class ChangeDocument(Document):
    """Relative changes of probability when a fact's neurons are suppressed or amplified."""

    own: Number
    """Change of the fact's answer: (P after - P before) / P before."""
    random: Number
    """The same for equally many random neurons of the same layers, as a mean over draws."""
    others: Number | None
    """Change of the answers of the other facts; null if there are none."""
    drawn: list[Number]
    """Change of the fact's answer by each random draw."""


class LocatedFactDocument(Document):
    """A fact with the neurons that carry it."""

    fact: str
    """Id of the fact."""
    prompt: str
    """Its prompt."""
    answer: str
    """The attributed answer."""
    probability: Number
    """Mean probability of the answer over the fact's wordings."""
    error: Number
    """Largest relative error of the sums of attributions over wordings; 0 if they add up to the change of probability."""
    neurons: list[LocatedNeuron]
    """Its neurons, those with the largest attributions first."""
    layers: dict[str, Number]
    """Layer -> its share of the positive attributions."""
    changes: dict[str, ChangeDocument]
    """suppressed, amplified -> changes of probability; empty if the fact has no neurons."""
    set: str | None
    """Directory of the set of its neurons, relative to the results; null if it has none."""


class MeanChangeDocument(Document):
    """Changes of probability as means over facts."""

    own: Number
    """Change of the facts' own answers."""
    random: Number
    """Change with random neurons."""
    others: Number | None
    """Change of the answers of other facts."""
    facts: int
    """Number of facts with neurons."""
    difference: Number
    """own - random."""
    low: Number | None
    """Lower end of its 95 % interval over facts; null with one fact."""
    high: Number | None
    """Upper end."""
    beyond: int
    """Number of facts whose neurons change the answer more than every random draw."""


class LayerShareDocument(Document):
    """Two views on a layer."""

    attribution: Number
    """Share of the positive attributions."""
    trace: dict[str, Number] | None
    """Traced tokens (subject, subject_last, last) -> share of the answer's probability that restoring the feed-forward output recovers."""


class KnowledgeDocument(Analysis):
    """Result of `analyze locate`."""

    facts: list[LocatedFactDocument]
    """The facts."""
    neurons: int
    """Number of neurons that carry at least one fact."""
    unit: str
    """neurons or experts."""
    complete: int
    """Number of facts whose attributions add up to the change of probability within 2 %."""
    undone: bool
    """Whether a norm behind the feed-forward layers undoes the scaling of activations, so that attributions do not add up."""
    changes: dict[str, MeanChangeDocument]
    """suppressed, amplified -> mean changes of probability."""
    layers: dict[str, LayerShareDocument]
    """Layer -> attributions beside a causal trace."""
    agreement: dict[str, Number | None]
    """Traced tokens -> rank correlation over layers of attributions and trace; null without a trace."""
    note: str
    """Why there is no trace; empty if there is one."""
