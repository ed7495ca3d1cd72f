"""Which neurons serve a function: scores of all neurons, a test of single ones, the functions' sets switched off, and files of these."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from workbench.activations.labelled import SPLITS, Labelled, Split, TextPart, folder_name
from workbench.activations.sets import NeuronSet
from workbench.bricks.card import BaseRecord
from workbench.bricks.neuron_sets import write_neuron_brick
from workbench.ground.files import json_digest, write_text
from workbench.ground.lazy import torch
from workbench.ground.results import JsonObject, Measured, Number
from workbench.ground.tables import csv_records
from workbench.models.identity import computed_on
from workbench.neurons.ablation import Ablation, ablate_functions, flipped_items, judged_items, matched_changes
from workbench.neurons.function_scores import FunctionScores, function_scores, item_scores
from workbench.neurons.profiles import Chosen, ProfilesResult, profile_neurons
from workbench.neurons.statistics import ALPHA, DRAWS, POWER
from workbench.neurons.subject import Analysis, AnalyzedTexts, LeftOutTexts, NeuronSubject
from workbench.weights.header import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

RECORD, TENSORS, SETS, PROFILES = "functions.json", "functions.safetensors", "sets", "profiles.json"
PROFILED = 5
"""Neurons of each function that are looked at, those with the largest effects."""
TOP_MILLE = 0.005
"""The paper's second curve: the score that five in a thousand neurons of a layer exceed."""
_KEY = 6  # version of the stored pass
Verdict: TypeAlias = Literal["found", "not found", "no power"]


class FunctionSettings(JsonObject):
    """What the paper leaves open. The other choices are the ones that measured best."""

    share: Number = 0.05
    """Share of the neurons of each layer in a function's set."""
    seed: int = 0
    """Seed of the test's draws."""
    part: TextPart = "prompt"
    """Tokens that count: those of the prompt, or of prompt and response."""
    chat: bool = False
    """Whether prompts are put into the tokenizer's chat template."""


class TaskTestRecord(JsonObject):
    """The test of single neurons, over the tasks of both splits."""

    tasks: int
    """Number of tasks."""
    draws: int = DRAWS
    """Number of assignments of tasks to functions."""
    alpha: Number = ALPHA
    """Probability that any neuron of the model is found for any function that it does not serve."""
    power: Number = POWER
    """Share of the neurons with the effects `smallest_effect` and `planned` that are found."""
    planned: dict[str, Measured]
    """Tasks a function -> smallest effect that would be found with so many tasks of every function; null if none."""


class FunctionRow(JsonObject):
    """What is known about the neurons of one function."""

    function: str
    """The function."""
    verdict: Verdict
    """`found`; `not found`, although an effect of `smallest_effect` would have been; or `no power`, since the tasks are too few to find any."""
    tasks: int
    """Number of its tasks, of both splits."""
    found: int
    """Neurons that the test finds."""
    found_layers: dict[str, int]
    """Layer -> neurons that the test finds; layers without any are left out."""
    largest_effect: Number
    """Largest effect of a neuron: root of its mean activation on the function's tasks above that on other tasks, in standard deviations
    over tasks."""
    smallest_effect: Number | None
    """Effect of which 90 % of the neurons would be found; null if the tasks are too few to find any."""
    change: Measured
    """Change of the function's own perplexity on held-out tasks when its set is switched off, as a share; null if infinite."""
    low: Measured
    """Lower end of its 95 % interval over tasks."""
    high: Measured
    """Upper end."""
    matched: list[Measured]
    """The same change with random neurons of the same mean activation, for each draw."""
    best_median: Number
    """Median over layers of the best neuron's average precision."""
    best_max: Number
    """Largest average precision."""
    top: Number
    """Score that 5 in 1000 neurons of a layer exceed, mean over layers."""
    mean: Number
    """Mean over all neurons."""
    prevalence: Number
    """Share of the function's texts, the expected score of a random neuron."""
    overlap: Number
    """Share of the set that the held-out tasks choose too."""
    overlap_others: Number
    """The same with the sets that held-out tasks choose for other functions."""
    chance_overlap: Number
    """Overlap of random sets."""
    confounders: dict[str, Number]
    """Feature of the texts (length, language, template) -> its AUC for the function."""


class LayerScore(JsonObject):
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
    """Neurons by function; the neurons' own scores are in functions.safetensors."""

    version: Literal[3] = 3  # type: ignore[assignment]
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
    ablation: Ablation
    """What every function loses when a function's set is switched off."""


@dataclass(frozen=True)
class FunctionAnalysis:
    """The functions of a model's neurons.

    Attributes:
        result: The result.
        scores: The scores of all neurons.
        sets: Function -> its set, chosen on the train tasks.
        profiles: What the neurons with the largest effects do.
        reference: Directory or hub id of the model, or the name of its recipe.
    """

    result: FunctionsResult
    scores: FunctionScores
    sets: dict[str, NeuronSet]
    profiles: ProfilesResult
    reference: str

    def write(self, out: Path) -> None:
        """Write functions.json, functions.safetensors, CSV tables and the functions' sets below `sets/`."""
        out.mkdir(parents=True, exist_ok=True)
        save_tensors(_tensors(self.scores), out / TENSORS, {"functions": "\n".join(self.scores.functions)})
        plain = self.result.to_dict()
        rows = [row | {f"auc_{k}": auc for k, auc in row.pop("confounders").items()} for row in plain["functions"]]
        layers = [{"split": split, **row} for split, of in plain["layers"].items() for row in of]
        for row in rows:
            row["matched"] = " ".join(f"{change:.6g}" for change in row["matched"] if change is not None)
            row["found_layers"] = " ".join(f"{layer}:{count}" for layer, count in row["found_layers"].items())
        for name, table in (("functions", rows), ("layers", layers), ("ablation", self._damage())):
            write_text(out / f"{name}.csv", csv_records(table))
        settings, data = self.result.settings, self.result.data
        measured = {row.function: row.to_dict() for row in self.result.functions}
        for name, neurons in self.sets.items():
            evidence = {"ranking": "average precision", "data": data.file, "data_digest": data.digest, "measured": measured[name]}
            full = replace(neurons, base=self.result.digest, evidence={**evidence, "settings": settings.to_dict()})
            base = BaseRecord(id=self.reference, digest=self.result.digest)
            write_neuron_brick(out / SETS / folder_name(name), full, base)
        self.profiles.write(out / PROFILES)
        self.result.write(out / RECORD)

    def _damage(self) -> list[dict[str, object]]:
        """Return the damage matrices of the sets and their controls, a row for each cell."""
        ablation = self.result.ablation
        return [
            {"sets": kind, "removed": f, "evaluated": g, "change": d.changes[i][j], "low": d.low[i][j], "high": d.high[i][j]}
            for kind, d in {"set": ablation, **ablation.controls}.items()
            for i, f in enumerate(d.functions)
            for j, g in enumerate(d.functions)
        ]


def _tensors(scores: FunctionScores) -> dict[str, Tensor]:
    """Return the scores of all neurons by name and layer."""
    tensors: dict[str, Tensor] = {}
    for number, site in enumerate(scores.sites):
        named = {f"ap.{split}": s.ap[number] for split, s in scores.splits.items()}
        named |= {"effect": scores.test.effects[number], "mean_abs": scores.means[number]}
        tensors |= {f"{name}.{site.layer}": torch.from_numpy(np.ascontiguousarray(v, np.float32)) for name, v in named.items()}
        tensors[f"found.{site.layer}"] = torch.from_numpy(scores.test.found[number])
    return tensors


def analyze_functions(subject: NeuronSubject, texts: Labelled, settings: FunctionSettings | None = None) -> FunctionAnalysis:
    """Score every neuron for every function in one pass over the texts, and switch the functions' sets off.

    An interrupted pass goes on where it stopped, as long as model, texts and settings are the same.

    Args:
        subject: The model.
        texts: The labelled texts.
        settings: The settings.

    Raises:
        WorkbenchError: If a prompt has no tokens, or `chat` is set and the tokenizer has no template.
    """
    settings = settings or FunctionSettings()
    judged = judged_items(texts)
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
    active = [torch.from_numpy(means.mean(0)) for means in scores.means]
    ablation, lost = ablate_functions(subject, judged, sets, active, settings.seed)
    matched = matched_changes(subject, judged, sets, active, (ablation, lost), settings.seed)
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
        test=TaskTestRecord(
            tasks=len(texts.all_tasks), planned={str(tasks): effect for tasks, effect in scores.test.planned.items()}
        ),
        functions=function_rows(scores, sets, settings.share, ablation, matched),
        layers={split: layer_scores(scores, split) for split in SPLITS},
        overlap={a: {b: sets[a].overlap(sets[b]) for b in sets} for a in sets},
        ablation=ablation,
    )
    profiles = profile_neurons(subject, texts, _largest(scores), flipped_items(subject, judged, sets, lost))
    return FunctionAnalysis(result, scores, sets, profiles, subject.reference)


def _largest(scores: FunctionScores) -> list[Chosen]:
    """Return the neurons with the largest effects of each function, each once."""
    starts = np.cumsum([0, *(site.units for site in scores.sites)])
    effects, found = (np.concatenate(of_sites, 1) for of_sites in (scores.test.effects, scores.test.found))
    functions: dict[int, dict[str, float]] = {}
    for number, name in enumerate(scores.functions):
        for unit in np.argsort(-effects[number])[:PROFILED].tolist():
            functions.setdefault(unit, {})[name] = float(effects[number, unit])
    chosen = []
    for unit, of_unit in functions.items():
        site = int(np.searchsorted(starts, unit, "right")) - 1
        serves = any(found[scores.functions.index(name), unit] for name in of_unit)
        chosen.append(Chosen((site, unit - int(starts[site])), of_unit, serves))
    return chosen


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


def function_rows(
    scores: FunctionScores, chosen: dict[str, NeuronSet], share: float, ablation: Ablation, matched: dict[str, list[float]]
) -> list[FunctionRow]:
    """Return one row per function: the verdict, neurons that the test finds, what the set's loss does, and scores.

    Args:
        scores: The scores.
        chosen: Function -> its set.
        share: Share of the neurons of each layer in a set.
        ablation: What every function loses when the sets are switched off.
        matched: Function -> what it loses without random neurons of equal activation, by draw.
    """
    train, test = scores.splits["train"], scores.test
    judged = scores.sets(share, "heldout")
    rows = []
    for number, name in enumerate(scores.functions):
        best = np.array([ap[number].max() for ap in train.ap])
        others = [chosen[name].overlap(judged[other]) for other in scores.functions if other != name]
        smallest = float(test.smallest[number])
        found = {str(site.layer): int(of[number].sum()) for site, of in zip(scores.sites, test.found, strict=True)}
        total = sum(found.values())
        row = FunctionRow(
            function=name,
            verdict="found" if total else "not found" if np.isfinite(smallest) else "no power",
            tasks=int(test.sizes[number]),
            found=total,
            found_layers={layer: count for layer, count in found.items() if count},
            largest_effect=max(float(effects[number].max()) for effects in test.effects),
            smallest_effect=smallest if np.isfinite(smallest) else None,
            change=ablation.changes[number][number],
            low=ablation.low[number][number],
            high=ablation.high[number][number],
            matched=matched[name],
            best_median=float(np.median(best)),
            best_max=float(best.max()),
            top=float(np.mean([np.quantile(ap[number], 1 - TOP_MILLE) for ap in train.ap])),
            mean=float(np.concatenate([ap[number] for ap in train.ap]).mean()),
            prevalence=float(train.prevalence[number]),
            overlap=chosen[name].overlap(judged[name]),
            overlap_others=float(np.mean(others)),
            chance_overlap=share,
            confounders={feature: float(auc[number]) for feature, auc in scores.confounders.items()},
        )
        rows.append(row)
    return rows
