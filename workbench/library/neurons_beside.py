"""`analyze functions --beside`: which functions' sets of neurons survive a merge, beside the base and each brick alone on it.

Every model chooses its sets on the same train tasks. A set is judged on the held-out tasks, in the model that chose it and in the merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from workbench.emergent.activations import PassOptions
from workbench.emergent.functions import Settings
from workbench.emergent.labelled import Labelled
from workbench.emergent.sets import NeuronSet
from workbench.errors import UsageError, WorkbenchError
from workbench.events import Events, no_events
from workbench.files import write_json
from workbench.lazy import torch
from workbench.library.neurons_functions import FunctionAnalysis, analyze_functions
from workbench.library.neurons_subject import open_neurons
from workbench.recipe.recipe import Recipe
from workbench.resolve.resolve import resolve
from workbench.run.opened import NamedModel

RECORD = "beside.json"
Role = Literal["base", "brick", "merge"]


@dataclass(frozen=True)
class ModelSets:
    """The sets of one model and the scores of all its neurons, without the live model.

    Attributes:
        name: Name of the model.
        role: Base, brick alone on the base, or result of the recipe.
        digest: Digest of the model.
        units: Layer -> number of its neurons.
        sets: Function -> set chosen on the train tasks.
        scores: Function -> layer -> average precision of every neuron on the held-out tasks [units].
        top: Function -> held-out score that 5 in 1000 neurons of a layer exceed, mean over layers.
    """

    name: str
    role: Role
    digest: str
    units: Mapping[int, int]
    sets: Mapping[str, NeuronSet]
    scores: Mapping[str, Mapping[int, NDArray[np.float64]]]
    top: Mapping[str, float]

    @classmethod
    def of(cls, analysis: FunctionAnalysis, name: str, role: Role) -> ModelSets:
        """Return the sets and scores of an analysis."""
        scores, heldout = analysis.scores, analysis.scores.splits["heldout"]
        layers = [site.layer for site in scores.sites]
        by_layer = scores.by_layer("heldout")
        return cls(
            name,
            role,
            analysis.digest,
            {site.layer: site.units for site in scores.sites},
            scores.sets("train"),
            {
                function: {layer: ap[number].copy() for layer, ap in zip(layers, heldout.ap, strict=True)}
                for number, function in enumerate(scores.functions)
            },
            {f: float(np.mean([row["top"] for row in by_layer if row["function"] == f])) for f in scores.functions},
        )

    def mean_score(self, function: str, neurons: NeuronSet) -> float:
        """Return the mean held-out score of a set's neurons in this model."""
        values = [self.scores[function][layer][index.numpy()] for layer, index in neurons.indices.items()]
        return float(np.concatenate(values).mean())


@dataclass(frozen=True)
class FunctionsBeside:
    """The functions' sets of a merge beside those of its base and bricks.

    Attributes:
        models: Base, bricks, merge.
        file: File of labelled texts, as the user named it.
        data: The texts.
        share: Share of the neurons in a set: the overlap of random sets.
    """

    models: Sequence[ModelSets]
    file: str
    data: Labelled
    share: float

    def document(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        merge, base = self.models[-1], self.models[0]
        functions = []
        for function in merge.sets:
            rows = [
                {
                    "model": model.name,
                    "top": model.top[function],
                    "score": model.mean_score(function, model.sets[function]),
                    "score_in_merge": merge.mean_score(function, model.sets[function]),
                    "in_merge": model.sets[function].overlap(merge.sets[function]),
                    "in_base": model.sets[function].overlap(base.sets[function]),
                }
                for model in self.models
            ]
            functions.append({"function": function, "models": rows})
        return {
            "version": 1,
            "kind": "beside",
            "model": merge.name,
            "digest": merge.digest,
            "data": {
                "file": self.file,
                "digest": self.data.digest,
                "items": len(self.data.items),
                "warnings": list(self.data.warnings),
            },
            "settings": {"share": self.share},
            "models": [{"name": m.name, "role": m.role, "digest": m.digest} for m in self.models],
            "functions": functions,
        }

    def write(self, out: Path) -> None:
        """Write beside.json."""
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RECORD, self.document(), indent=1)


def check_beside(model: NamedModel) -> None:
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


def functions_beside(
    model: NamedModel,
    merged: FunctionAnalysis,
    *,
    settings: Settings | None = None,
    options: PassOptions | None = None,
    device: torch.device,
    events: Events = no_events,
) -> FunctionsBeside:
    """Analyze the base and each brick alone, with weight 1 on the base, like the merge.

    Args:
        model: The merge.
        merged: The analysis of its result.
        settings: Settings of that analysis.
        options: Its options of the pass.
        device: Device of the models, which are loaded one after the other.
        events: Receives progress.

    Raises:
        WorkbenchError: If the recipe has no bricks or grows the model, or a brick has other neurons.
    """
    check_beside(model)
    resolved = model.resolved
    merge = ModelSets.of(merged, merged.model, "merge")
    models = []
    for number, name in enumerate(["base", *resolved.parents]):
        alone = resolve(_alone(resolved.recipe, name if number else None))
        subject = open_neurons(NamedModel(name, alone), device, events)
        analysis = analyze_functions(subject, merged.data, merged.file, settings=settings, options=options)
        models.append(ModelSets.of(analysis, name, "brick" if number else "base"))
        del subject, analysis
        if models[-1].units != merge.units:
            raise WorkbenchError(f"--beside: {name} has other numbers of neurons than {merge.name}", "Leave out --beside.")
    return FunctionsBeside((*models, merge), merged.file, merged.data, merged.scores.settings.share)


def _alone(recipe: Recipe, brick: str | None) -> Recipe:
    """Return the base alone, or with one brick at weight 1."""
    if brick is None:
        return recipe.derive("base", [], [])
    return recipe.derive(brick, [{"merge": "task_arithmetic", "bricks": {brick: 1.0}}], [brick])
