"""`analyze functions`: scores of every neuron for every function, the functions' sets, and files of both."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import AliasChoices, Field

from workbench.activations.labelled import SPLITS, Labelled, Split, TextPart, folder_name
from workbench.activations.sets import NeuronSet
from workbench.bricks.card import BaseRecord
from workbench.bricks.neuron_sets import write_neuron_brick
from workbench.files import json_digest, write_text
from workbench.lazy import torch
from workbench.models.identity import computed_on
from workbench.neurons.function_scores import FunctionScores, function_scores, item_scores
from workbench.neurons.statistics import ALPHA, DRAWS
from workbench.neurons.subject import Analysis, AnalyzedTexts, LeftOutTexts, NeuronSubject
from workbench.results import Number, Part
from workbench.tables import csv_records
from workbench.weights.header import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

RECORD, TENSORS, SETS = "functions.json", "functions.safetensors", "sets"
TOP_MILLE = 0.005
"""The paper's second curve: the score that five in a thousand neurons of a layer exceed."""
_KEY = 5  # version of the stored pass


class FunctionSettings(Part):
    """What the paper leaves open. The other choices are the ones that measured best."""

    share: Number = 0.05
    """Share of the neurons of each layer in a function's set."""
    seed: int = 0
    """Seed of the test's draws."""
    part: TextPart = "prompt"
    """Tokens that count: those of the prompt, or of prompt and response."""
    chat: bool = False
    """Whether prompts are put into the tokenizer's chat template."""


class TaskTestRecord(Part):
    """The test of single neurons, over the tasks of both splits."""

    tasks: int
    """Number of tasks."""
    draws: int = DRAWS
    """Number of assignments of tasks to functions."""
    alpha: Number = ALPHA
    """Probability that any neuron of the model is found for any function that it does not serve."""


class FunctionRow(Part):
    """Scores of all neurons for one function."""

    function: str
    """The function."""
    best_median: Number
    """Median over layers of the best neuron's average precision."""
    best_max: Number
    """Largest average precision."""
    layers_above_08: int = Field(
        serialization_alias="layers_above_0.8", validation_alias=AliasChoices("layers_above_0.8", "layers_above_08")
    )
    """Layers whose best neuron exceeds 0.8."""
    top: Number
    """Score that 5 in 1000 neurons of a layer exceed, mean over layers."""
    mean: Number
    """Mean over all neurons."""
    prevalence: Number
    """Share of the function's texts, the expected score of a random neuron."""
    found: int
    """Neurons that the test finds."""
    largest_effect: Number
    """Largest effect of a neuron: root of its mean activation on the function's tasks above that on other tasks, in standard deviations
    over tasks."""
    smallest_effect: Number | None
    """Effect from which a neuron is found; null if the tasks are too few to find any."""
    overlap: Number
    """Share of the set that the held-out tasks choose too."""
    overlap_others: Number
    """The same with the sets that held-out tasks choose for other functions."""
    chance_overlap: Number
    """Overlap of random sets."""
    confounders: dict[str, Number]
    """Feature of the texts (length, language, template) -> its AUC for the function."""


class LayerScore(Part):
    """Scores of a function in one layer."""

    function: str
    """The function."""
    layer: int
    """The layer."""
    best: Number
    """Best score."""
    top: Number
    """Score that 5 in 1000 neurons exceed."""
    mean: Number
    """Mean score."""


class FunctionsResult(Analysis):
    """Result of `analyze functions`; the neurons' own scores are in functions.safetensors."""

    version: Literal[2] = 2  # type: ignore[assignment]
    """Version of the document."""
    kind: str = "functions"
    """Kind of analysis."""
    settings: FunctionSettings
    """Option -> its value."""
    neurons: dict[str, int]
    """Layer -> number of its neurons or experts."""
    unit: str
    """neurons or experts."""
    test: TaskTestRecord
    """The test of single neurons."""
    functions: list[FunctionRow]
    """Scores by function."""
    layers: dict[str, list[LayerScore]]
    """Split -> scores by function and layer."""
    overlap: dict[str, dict[str, Number]]
    """Function -> function -> share of the neurons that are in both sets."""
    residents: int
    """Neurons that are among the most active ones of their layer on every function."""


@dataclass(frozen=True)
class FunctionAnalysis:
    """The functions of a model's neurons.

    Attributes:
        result: The result.
        scores: The scores of all neurons.
        sets: Function -> its set, chosen on the train tasks.
        reference: Directory or hub id of the model, or the name of its recipe.
    """

    result: FunctionsResult
    scores: FunctionScores
    sets: dict[str, NeuronSet]
    reference: str

    def write(self, out: Path) -> None:
        """Write functions.json, functions.safetensors, CSV tables and the functions' sets below `sets/`."""
        out.mkdir(parents=True, exist_ok=True)
        save_tensors(_tensors(self.scores), out / TENSORS, {"functions": "\n".join(self.scores.functions)})
        plain = self.result.to_dict()
        rows = [row | {f"auc_{k}": auc for k, auc in row.pop("confounders").items()} for row in plain["functions"]]
        layers = [{"split": split, **row} for split, of in plain["layers"].items() for row in of]
        for name, table in (("functions", rows), ("layers", layers)):
            write_text(out / f"{name}.csv", csv_records(table))
        settings, data = self.result.settings, self.result.data
        measured = {row.function: row.to_dict() for row in self.result.functions}
        for name, neurons in self.sets.items():
            evidence = {"ranking": "average precision", "data": data.file, "data_digest": data.digest, "measured": measured[name]}
            full = replace(neurons, base=self.result.digest, evidence={**evidence, "settings": settings.to_dict()})
            base = BaseRecord(id=self.reference, digest=self.result.digest)
            write_neuron_brick(out / SETS / folder_name(name), full, base, made_by="workbench analyze functions")
        self.result.write(out / RECORD)


def _tensors(scores: FunctionScores) -> dict[str, Tensor]:
    """Return the scores of all neurons by name and layer."""
    tensors: dict[str, Tensor] = {}
    for number, (site, resident) in enumerate(zip(scores.sites, scores.residents(), strict=True)):
        named = {f"ap.{split}": s.ap[number] for split, s in scores.splits.items()}
        named |= {"effect": scores.test.effects[number], "firing": scores.firing[number], "mean_abs": scores.means[number]}
        tensors |= {f"{name}.{site.layer}": torch.from_numpy(np.ascontiguousarray(v, np.float32)) for name, v in named.items()}
        tensors[f"resident.{site.layer}"] = torch.from_numpy(resident)
        tensors[f"found.{site.layer}"] = torch.from_numpy(scores.test.found[number])
    return tensors


def analyze_functions(subject: NeuronSubject, texts: Labelled, settings: FunctionSettings | None = None) -> FunctionAnalysis:
    """Score every neuron for every function in one pass over the texts.

    An interrupted pass goes on where it stopped, as long as model, texts and settings are the same.

    Args:
        subject: The model.
        texts: The labelled texts.
        settings: The settings.

    Raises:
        WorkbenchError: If a prompt has no tokens, or `chat` is set and the tokenizer has no template.
    """
    settings = settings or FunctionSettings()
    rows = subject.rows(texts.items, settings.chat)
    encoded = [[row.tokens, row.prompt] for row in rows]
    units = [site.units for site in subject.sites]
    key = json_digest([subject.digest, computed_on(subject.model.device), texts.digest, encoded, settings.part, units, _KEY])
    folder = subject.cache / "neurons" / key
    functions = torch.tensor([texts.functions.index(item.function) for item in texts.items])
    found = item_scores(
        subject.model,
        subject.sites,
        rows,
        (functions, torch.tensor(texts.task_of_items)),
        folder,
        settings.part,
        progress=lambda done, total: subject.tell(done, total, "activations"),
    )
    scores = function_scores(found, texts, rows, settings.seed)
    shutil.rmtree(folder)
    sets = scores.sets(settings.share)
    result = FunctionsResult(
        model=subject.name,
        digest=subject.digest,
        data=AnalyzedTexts(
            file=texts.file,
            digest=texts.digest,
            items=len(texts.items),
            tokens=int(found.sums["tokens"].sum()),
            left_out=LeftOutTexts(several_functions=texts.several),
            tasks={f: {s: list(texts.tasks(f, s)) for s in SPLITS} for f in texts.functions},
            warnings=list(texts.warnings),
        ),
        settings=settings,
        neurons={str(site.layer): site.units for site in scores.sites},
        unit=scores.sites[0].kind,
        test=TaskTestRecord(tasks=len(texts.all_tasks)),
        functions=function_rows(scores, sets, settings.share),
        layers={split: layer_scores(scores, split) for split in SPLITS},
        overlap={a: {b: sets[a].overlap(sets[b]) for b in sets} for a in sets},
        residents=int(sum(resident.sum() for resident in scores.residents())),
    )
    return FunctionAnalysis(result, scores, sets, subject.reference)


def layer_scores(scores: FunctionScores, split: Split = "train") -> list[LayerScore]:
    """Return, for each function and layer, the best score, the score that 5 in 1000 neurons exceed, and the mean."""
    return [
        LayerScore(
            function=name,
            layer=site.layer,
            best=float(ap[number].max()),
            top=float(np.quantile(ap[number], 1 - TOP_MILLE)),
            mean=float(ap[number].mean()),
        )
        for number, name in enumerate(scores.functions)
        for site, ap in zip(scores.sites, scores.splits[split].ap, strict=True)
    ]


def function_rows(scores: FunctionScores, chosen: dict[str, NeuronSet], share: float) -> list[FunctionRow]:
    """Return one row per function: scores, neurons that the test finds, overlap of the two splits' sets, confounders.

    Args:
        scores: The scores.
        chosen: Function -> its set.
        share: Share of the neurons of each layer in a set.
    """
    train, test = scores.splits["train"], scores.test
    judged = scores.sets(share, "heldout")
    rows = []
    for number, name in enumerate(scores.functions):
        best = np.array([ap[number].max() for ap in train.ap])
        others = [chosen[name].overlap(judged[other]) for other in scores.functions if other != name]
        smallest = float(test.smallest[number])
        row = FunctionRow(
            function=name,
            best_median=float(np.median(best)),
            best_max=float(best.max()),
            layers_above_08=int((best > 0.8).sum()),
            top=float(np.mean([np.quantile(ap[number], 1 - TOP_MILLE) for ap in train.ap])),
            mean=float(np.concatenate([ap[number] for ap in train.ap]).mean()),
            prevalence=float(train.prevalence[number]),
            found=sum(int(found[number].sum()) for found in test.found),
            largest_effect=max(float(effects[number].max()) for effects in test.effects),
            smallest_effect=smallest if np.isfinite(smallest) else None,
            overlap=chosen[name].overlap(judged[name]),
            overlap_others=float(np.mean(others)),
            chance_overlap=share,
            confounders={feature: float(auc[number]) for feature, auc in scores.confounders.items()},
        )
        rows.append(row)
    return rows
