"""`analyze ablate`: what every function loses when the neurons of one function, or those of a control, are switched off; and `analyze all`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.activations.labelled import Labelled, folder_name
from workbench.activations.sets import NeuronSet, read_set
from workbench.errors import WorkbenchError
from workbench.files import write_text
from workbench.neurons.controls import ablate, controls, mean_overlap
from workbench.neurons.damage import DamageTable, ItemGroups, damage_table
from workbench.neurons.functions import RECORD as FUNCTIONS
from workbench.neurons.functions import SETS, TENSORS, FunctionsResult, analyze_functions
from workbench.neurons.masking import SparsityResult, analyze_sparsity
from workbench.neurons.subject import Analysis, NeuronSubject, analyzed, some_of_each_task
from workbench.results import Number, Part, Result
from workbench.tables import csv_records

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "ablation.json"


class AblationSettings(Part):
    """Settings of the ablations."""

    items: int = 10
    """Held-out items of each task whose perplexity is measured."""
    draws: int = 1
    """Number of random sets, and of sets matched by activation."""


class SetOverlap(Part):
    """Overlap of two functions' sets."""

    mean: Number
    """Mean over pairs of functions."""
    chance: Number
    """Its value for random sets."""


class AblationResult(Analysis, DamageTable):
    """Result of `analyze ablate`."""

    kind: str = "ablation"
    """Kind of analysis."""
    settings: AblationSettings
    """Option -> its value."""
    share: Number
    """Share of the neurons in a set."""
    overlap: SetOverlap
    """Mean overlap of two sets, and its value by chance."""

    def save(self, out: Path) -> None:
        """Write ablation.json and the matrices as ablation.csv."""
        out.mkdir(parents=True, exist_ok=True)
        rows = [
            {"sets": kind, "removed": f, "evaluated": g, "change": d.changes[i][j], "low": d.low[i][j], "high": d.high[i][j]}
            for kind, d in {"set": self, **self.controls}.items()
            for i, f in enumerate(d.functions)
            for j, g in enumerate(d.functions)
        ]
        write_text(out / "ablation.csv", csv_records(rows))
        self.write(out / RECORD)


@dataclass(frozen=True)
class StoredSets:
    """What `analyze functions` has written about the same model.

    Attributes:
        sets: The functions' sets.
        means: Layer -> mean |activation| of every neuron [units].
        data: Digest of the texts that chose the sets.
    """

    sets: Mapping[str, NeuronSet]
    means: Mapping[int, Tensor]
    data: str


def read_sets(folder: Path, subject: NeuronSubject) -> StoredSets:
    """Read the sets of a directory of `analyze functions`.

    Raises:
        WorkbenchError: If the directory has no such analysis, or it is that of another model.
    """
    again = f"Run `workbench analyze functions` on {subject.name} first."
    try:
        record = FunctionsResult.read(folder / FUNCTIONS, again)
    except FileNotFoundError:
        raise WorkbenchError(f"{folder}: no {FUNCTIONS} of `analyze functions`", again) from None
    if record.digest != subject.digest:
        raise WorkbenchError(
            f"{folder}: the sets were chosen on another model ({record.digest[:12]}; {subject.name} is {subject.digest[:12]})",
            again,
        )
    sets = {row.function: read_set(folder / SETS / folder_name(row.function)) for row in record.functions}
    from safetensors.torch import load_file

    tensors = load_file(folder / TENSORS)
    means = {site.layer: tensors[f"mean_abs.{site.layer}"].mean(0) for site in subject.sites}
    return StoredSets(sets, means, record.data.digest)


def analyze_ablation(
    subject: NeuronSubject, texts: Labelled, stored: StoredSets, settings: AblationSettings | None = None
) -> AblationResult:
    """Switch off each function's set and its controls, and measure the perplexity of every function's held-out items.

    Args:
        subject: The model.
        texts: The labelled texts.
        stored: The sets, chosen on the train tasks of the same texts.
        settings: The settings.

    Raises:
        WorkbenchError: If the sets were chosen on other texts, or a function has no set.
    """
    settings = settings or AblationSettings()
    if stored.data != texts.digest:
        raise WorkbenchError(
            f"{texts.file}: the sets were chosen on other texts, so that items of this file may have chosen them",
            "Run `workbench analyze functions` with this file first.",
        )
    items = some_of_each_task(texts.of("heldout"), settings.items)
    sets = [stored.sets[name] for name in texts.functions]
    ItemGroups.of(items, texts.functions)  # raises before the passes
    compared = controls(subject.sites, sets, [stored.means[site.layer] for site in subject.sites], draws=settings.draws)
    result = ablate(
        subject.model,
        subject.sites,
        subject.rows(items),
        [*sets, *(control.neurons for control in compared)],
        progress=lambda done, total: subject.tell(done, total, "ablations"),
    )
    table = damage_table(result, items, texts.functions, compared)
    mean, chance = mean_overlap(sets)
    return AblationResult(
        **dict(table),
        model=subject.name,
        digest=subject.digest,
        data=analyzed(texts, table.items),
        settings=settings,
        share=sum(neurons.share for neurons in sets) / len(sets),
        overlap=SetOverlap(mean=mean, chance=chance),
    )


class EverythingResult(Result):
    """Result of `analyze all`."""

    functions: FunctionsResult
    """Scores of neurons for functions."""
    sparsity: SparsityResult
    """Sparsity of activations."""
    ablation: AblationResult
    """Damage by switching sets off."""


def analyze_everything(subject: NeuronSubject, texts: Labelled, out: Path) -> EverythingResult:
    """Run the analyses of functions, sparsity and ablations with their defaults, and write their files.

    Args:
        subject: The model.
        texts: The labelled texts.
        out: Directory of the results.
    """
    functions = analyze_functions(subject, texts)
    functions.write(out)
    sparsity = analyze_sparsity(subject, texts)
    sparsity.save(out)
    ablation = analyze_ablation(subject, texts, read_sets(out, subject))
    ablation.save(out)
    return EverythingResult(functions=functions.result, sparsity=sparsity, ablation=ablation)
