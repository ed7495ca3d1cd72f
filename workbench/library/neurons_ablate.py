"""`analyze ablate`: what every function loses when the neurons of one function, or those of a control, are switched off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.emergent.ablate import controls, overlaps
from workbench.emergent.labelled import Counted, Item, Labelled
from workbench.emergent.ranges import ablate_between, activation_moments
from workbench.emergent.sets import NeuronSet, folder_name, read_set
from workbench.errors import UsageError, WorkbenchError
from workbench.files import read_json, write_json, write_text
from workbench.lazy import torch
from workbench.library.neurons_ablation import AblationTable, Damage, ablation, ablation_table
from workbench.library.neurons_functions import CONTROL, SETS, TENSORS
from workbench.library.neurons_functions import RECORD as FUNCTIONS
from workbench.library.neurons_sparsity import some_of_each_task
from workbench.library.neurons_subject import NeuronSubject
from workbench.tables import csv_records

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "ablation.json"


@dataclass(frozen=True)
class AblationOptions:
    """Options of the ablations; part of the record.

    Attributes:
        items: Held-out items of each task whose perplexity is measured.
        draws: Number of random sets, and of sets matched by activation.
        seed: Seed of the draws.
        between: Ends of a range, in standard deviations around each neuron's mean activation on the texts of its function; the sets are
            also switched off within this range alone. None leaves it out.
    """

    items: int = 10
    draws: int = 1
    seed: int = 0
    between: tuple[float, float] | None = None


@dataclass(frozen=True)
class StoredSets:
    """What `analyze functions` has written about the same model.

    Attributes:
        sets: The functions' sets.
        shuffled: The set that a shuffled label chooses.
        means: Layer -> mean |activation| of every neuron [units].
        data: Digest of the texts that chose the sets.
        settings: Settings of the analysis that chose them.
    """

    sets: Mapping[str, NeuronSet]
    shuffled: NeuronSet
    means: Mapping[int, Tensor]
    data: str
    settings: Mapping[str, Any]


def read_sets(folder: Path, subject: NeuronSubject) -> StoredSets:
    """Read the sets of a directory of `analyze functions`.

    Raises:
        WorkbenchError: If the directory has no such analysis, or it is that of another model.
    """
    again = f"Run `workbench analyze functions` on {subject.name} first."
    record = read_json(folder / FUNCTIONS, digest=str, data=dict, functions=list, settings=dict)
    if record is None:
        raise WorkbenchError(f"{folder}: no {FUNCTIONS} of `analyze functions`", again)
    if record["digest"] != subject.digest:
        raise WorkbenchError(
            f"{folder}: the sets were chosen on another model ({record['digest'][:12]}; {subject.name} is {subject.digest[:12]})",
            again,
        )
    sets = {row["function"]: read_set(folder / SETS / folder_name(row["function"])) for row in record["functions"]}
    from safetensors.torch import load_file

    tensors = load_file(folder / TENSORS)
    means = {site.layer: tensors[f"mean_abs.{site.layer}"].mean(0) for site in subject.sites}
    return StoredSets(sets, read_set(folder / CONTROL), means, str(record["data"].get("digest")), record["settings"])


@dataclass(frozen=True)
class AblationAnalysis:
    """The ablations of a model's functions.

    Attributes:
        model: Name of the model.
        digest: Digest of the model.
        file: File of labelled texts, as the user named it.
        data: The texts.
        table: The damage with its controls.
        share: Share of the neurons in a set.
        options: The options.
        overlap: Mean overlap of two functions' sets, and its expected value for random sets.
        between: Damage by the sets when they are switched off within the range of the options; None without a range.
    """

    model: str
    digest: str
    file: str
    data: Labelled
    table: AblationTable
    share: float
    options: AblationOptions
    overlap: tuple[float, float]
    between: Damage | None = None

    def document(self) -> dict[str, Any]:
        """Return the analysis as plain data."""
        return {
            "version": 1,
            "kind": "ablation",
            "model": self.model,
            "digest": self.digest,
            "data": {
                "file": self.file,
                "digest": self.data.digest,
                "items": self.table.items,
                "warnings": list(self.data.warnings),
            },
            "settings": asdict(self.options),
            "share": self.share,
            "overlap": {"mean": self.overlap[0], "chance": self.overlap[1]},
            **self.table.document(),
            **({"between": {"range": list(self.options.between or ()), **self.between.document()}} if self.between else {}),
        }

    def write(self, out: Path) -> None:
        """Write ablation.json and the matrices as ablation.csv."""
        out.mkdir(parents=True, exist_ok=True)
        tables = {"set": self.table.damage, **{kind: control.damage for kind, control in self.table.controls.items()}}
        tables |= {"between": self.between} if self.between else {}
        rows = [
            {
                "sets": kind,
                "removed": f,
                "evaluated": g,
                "change": float(d.changes[i, j]),
                "low": float(d.low[i, j]),
                "high": float(d.high[i, j]),
            }
            for kind, d in tables.items()
            for i, f in enumerate(d.functions)
            for j, g in enumerate(d.functions)
        ]
        write_text(out / "ablation.csv", csv_records(rows))
        write_json(out / RECORD, self.document(), indent=1)


def analyze_ablation(
    subject: NeuronSubject, data: Labelled, shown: str, stored: StoredSets, options: AblationOptions | None = None
) -> AblationAnalysis:
    """Switch off each function's set and its controls, and measure the perplexity of every function's held-out items.

    Args:
        subject: The model.
        data: The labelled texts.
        shown: Name of their file.
        stored: The sets, chosen on the train tasks of the same texts.
        options: The options.

    Raises:
        WorkbenchError: If the sets were chosen on other texts, or a function has no set.
    """
    options = options or AblationOptions()
    if options.between and not options.between[0] < options.between[1]:
        raise UsageError(f"between {options.between[0]:g} and {options.between[1]:g}: expected a low end below the high end")
    if stored.data != data.digest:
        raise WorkbenchError(
            f"{shown}: the sets were chosen on other texts, so that items of this file may have chosen them",
            "Run `workbench analyze functions` with this file first.",
        )
    items = some_of_each_task(data.of("heldout"), options.items)
    sets = [stored.sets[name] for name in data.functions]
    compared = controls(
        subject.sites,
        sets,
        [stored.means[site.layer] for site in subject.sites],
        shuffled=(stored.shuffled,),
        draws=options.draws,
        seed=options.seed,
    )
    table = ablation(
        subject.model,
        subject.sites,
        items,
        subject.rows(items),
        sets,
        compared,
        lambda done, total: subject.tell(done, total, "ablations"),
    )
    between = _within(subject, data, items, sets, stored, options) if options.between else None
    return AblationAnalysis(subject.name, subject.digest, shown, data, table, _share(sets), options, _overlap(sets), between)


def _within(
    subject: NeuronSubject,
    data: Labelled,
    items: Sequence[Item],
    sets: Sequence[NeuronSet],
    stored: StoredSets,
    options: AblationOptions,
) -> Damage:
    """Switch off each set within a range of its neurons' activations on the train texts of its function."""
    assert options.between is not None
    own = data.of("train")
    moments = activation_moments(
        subject.model,
        subject.sites,
        subject.rows(own, stored.settings.get("chat", False)),
        [data.functions.index(item.function) for item in own],
        Counted(stored.settings.get("part", "prompt"), stored.settings.get("skip", 1)),
        progress=lambda done, total: subject.tell(done, total, "activations"),
    )
    bounds = [moments.bounds(neurons, number, options.between) for number, neurons in enumerate(sets)]
    result = ablate_between(
        subject.model,
        subject.sites,
        subject.rows(items),
        sets,
        bounds,
        progress=lambda done, total: subject.tell(done, total, "ablations within the range"),
    )
    return ablation_table(result, items, data.functions).damage


def _share(sets: Sequence[NeuronSet]) -> float:
    return sum(neurons.share for neurons in sets) / len(sets)


def _overlap(sets: Sequence[NeuronSet]) -> tuple[float, float]:
    found = overlaps(sets)
    others = ~torch.eye(len(sets), dtype=torch.bool)
    return float(found.shares[others].mean()), float(found.chance[others].mean())
