"""The document of `workbench analyze`: one answer to each question that was asked."""

from __future__ import annotations

from workbench.ground.results import Result, absent
from workbench.neurons.features import FeaturesResult
from workbench.neurons.functions import FunctionsResult
from workbench.neurons.locate import KnowledgeResult
from workbench.neurons.masking import SparsityResult
from workbench.neurons.partition import PartitionResult
from workbench.neurons.profiles import ProfilesResult


class NeuronsResult(Result):
    """Result of `analyze`: the answers to the questions that were asked."""

    functions: FunctionsResult | None = absent()
    """The neurons that serve each function."""
    chosen: ProfilesResult | None = absent()
    """What the neurons do that were asked for."""
    features: FeaturesResult | None = absent()
    """A dictionary's features beside the neurons of its layer."""
    sparsity: SparsityResult | None = absent()
    """How many neurons a token uses."""
    partition: PartitionResult | None = absent()
    """The neurons divided into experts."""
    knowledge: KnowledgeResult | None = absent()
    """The neurons that carry facts."""
