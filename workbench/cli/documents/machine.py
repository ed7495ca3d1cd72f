"""Document of `experts`."""

from __future__ import annotations

from workbench.cli.documents.document import Document
from workbench.results import Number


class ExpertsDocument(Document):
    """Use of the experts of a mixture on some texts."""

    model: str
    """Recipe, run or model directory, as named on the command line."""
    texts: str
    """File of the texts."""
    samples: int
    """Number of texts that were read."""
    tokens: int
    """Number of tokens."""
    top_k: int
    """Number of experts that the router selects for each token."""
    layers: list[int]
    """Layers with experts, in ascending order."""
    usage: list[list[Number]]
    """By layer, share of all selections that each expert gets; a row adds up to 1."""
    mean: list[Number]
    """Mean share of each expert over the layers."""
    entropy: list[Number]
    """By layer, entropy of the experts' mean weights in bits."""
