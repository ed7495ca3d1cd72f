"""`analyze functions --beside`: which functions' sets of neurons survive a merge, beside the base and each brick alone on it.

Every model chooses its sets on the same train tasks. A set is judged on the held-out tasks, in the model that chose it and in the merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from workbench.activations.labelled import Labelled
from workbench.activations.sets import NeuronSet
from workbench.errors import UsageError, WorkbenchError
from workbench.events import Events, no_events
from workbench.lazy import torch
from workbench.neurons.functions import (
    ComparedFunction,
    ComparedModel,
    ComparedSet,
    ComparisonSettings,
    FunctionAnalysis,
    MergedFunctions,
    analyze_functions,
    layer_scores,
)
from workbench.neurons.statistics import Floats
from workbench.neurons.subject import analyzed, open_neurons
from workbench.recipe.recipe import Recipe
from workbench.resolve.resolve import resolve
from workbench.run.opened import NamedModel

RECORD = "beside.json"


@dataclass(frozen=True)
class _ModelSets:
    """The sets of one model and the scores of all its neurons, without the live model.

    Attributes:
        model: The model.
        units: Layer -> number of its neurons.
        sets: Function -> set chosen on the train tasks.
        scores: Function -> layer -> average precision of every neuron on the held-out tasks [units].
        top: Function -> held-out score that 5 in 1000 neurons of a layer exceed, mean over layers.
    """

    model: ComparedModel
    units: Mapping[str, int]
    sets: Mapping[str, NeuronSet]
    scores: Mapping[str, Mapping[int, Floats]]
    top: Mapping[str, float]

    def mean_score(self, function: str, neurons: NeuronSet) -> float:
        """Return the mean held-out score of a set's neurons in this model."""
        values = [self.scores[function][layer][index.numpy()] for layer, index in neurons.indices.items()]
        return float(np.concatenate(values).mean())


def _sets_of(analysis: FunctionAnalysis, model: ComparedModel) -> _ModelSets:
    """Return the sets and scores of an analysis."""
    scores, heldout = analysis.scores, analysis.scores.splits["heldout"]
    layers, rows = [site.layer for site in scores.sites], layer_scores(scores, "heldout")
    of_function = {
        function: {layer: ap[number].copy() for layer, ap in zip(layers, heldout.ap, strict=True)}
        for number, function in enumerate(scores.functions)
    }
    top = {f: float(np.mean([row.top for row in rows if row.function == f])) for f in scores.functions}
    return _ModelSets(model, analysis.result.neurons, analysis.sets, of_function, top)


def check_merge(model: NamedModel) -> None:
    """Check that a recipe has bricks, and that its result has the neurons of its base.

    Raises:
        WorkbenchError: If it has no bricks or grows the model.
    """
    name, resolved = model.name, model.resolved
    if not resolved.parents:
        raise UsageError(f"--beside: {name} has no bricks, so there is nothing beside it", "Name a recipe that merges bricks.")
    if grown := [step for step in resolved.recipe.steps if step.verb == "grow"]:
        raise UsageError(
            f"--beside: step '{grown[0].id or grown[0].verb}' of {name} grows the model, so its neurons are not those of the base",
            "Leave out --beside.",
        )


def compare_functions(
    model: NamedModel, merged: FunctionAnalysis, texts: Labelled, *, device: torch.device, events: Events = no_events
) -> MergedFunctions:
    """Analyze the base and each brick alone, with weight 1 on the base, like the merge.

    Args:
        model: The merge; see `check_merge`.
        merged: The analysis of its result.
        texts: The texts of that analysis.
        device: Device of the models, which are loaded one after the other.
        events: Receives progress.

    Raises:
        WorkbenchError: If a brick has other neurons.
    """
    result, resolved = merged.result, model.resolved
    merge = _sets_of(merged, ComparedModel(name=result.model, role="merge", digest=result.digest))
    models = []
    for number, name in enumerate(["base", *resolved.parents]):
        alone = resolve(_alone(resolved.recipe, name if number else None))
        subject = open_neurons(NamedModel(name, alone), device, events)
        analysis = analyze_functions(subject, texts, result.settings)
        own = ComparedModel(name=name, role="brick" if number else "base", digest=analysis.result.digest)
        models.append(_sets_of(analysis, own))
        del subject, analysis
        if models[-1].units != merge.units:
            raise WorkbenchError(f"--beside: {name} has other numbers of neurons than {result.model}", "Leave out --beside.")
    models.append(merge)
    functions = [
        ComparedFunction(function=function, models=[_compared(one, function, merge, models[0]) for one in models])
        for function in merge.sets
    ]
    return MergedFunctions(
        model=result.model,
        digest=result.digest,
        data=analyzed(texts, len(texts.items)),
        settings=ComparisonSettings(share=result.settings.share),
        models=[one.model for one in models],
        functions=functions,
    )


def _compared(model: _ModelSets, function: str, merge: _ModelSets, base: _ModelSets) -> ComparedSet:
    """Return a function's set in one model, compared with those of the merge and of the base."""
    chosen = model.sets[function]
    return ComparedSet(
        model=model.model.name,
        top=model.top[function],
        score=model.mean_score(function, chosen),
        score_in_merge=merge.mean_score(function, chosen),
        in_merge=chosen.overlap(merge.sets[function]),
        in_base=chosen.overlap(base.sets[function]),
    )


def _alone(recipe: Recipe, brick: str | None) -> Recipe:
    """Return the base alone, or with one brick at weight 1."""
    if brick is None:
        return recipe.derive("base", [], [])
    return recipe.derive(brick, [{"merge": "task_arithmetic", "bricks": {brick: 1.0}}], [brick])
