"""`analyze functions`: scores of every neuron for every function, the functions' sets, and files of both."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from workbench.bricks.card import BaseRecord
from workbench.bricks.neuron_sets import write_neuron_brick
from workbench.emergent.activations import PassItems, PassOptions, item_scores
from workbench.emergent.functions import FunctionScores, Settings, function_scores, histogram_labels
from workbench.emergent.labelled import Labelled
from workbench.emergent.lape import entropies, lape_sets
from workbench.emergent.nulls import ALPHA, DRAWS
from workbench.emergent.sets import NeuronSet, folder_name, write_set
from workbench.files import json_digest, write_json, write_text
from workbench.lazy import torch
from workbench.library.neurons_subject import NeuronSubject
from workbench.models.identity import computed_on
from workbench.tables import csv_records, data_frame
from workbench.weights.header import save_tensors

RECORD, TENSORS, SETS, CONTROL = "functions.json", "functions.safetensors", "sets", "controls/shuffled"
VERSION = 2  # of the record


@dataclass(frozen=True)
class FunctionAnalysis:
    """The functions of a model's neurons.

    Attributes:
        model: Name of the model.
        digest: Digest of the model.
        reference: Directory or hub id of the model, or the name of its recipe.
        file: File of labelled texts, as the user named it.
        data: The texts.
        scores: The scores.
        options: Options of the pass.
        tokens: Number of tokens that counted.
        exact: Whether scores are exact, and not those of histograms.
    """

    model: str
    digest: str
    reference: str
    file: str
    data: Labelled
    scores: FunctionScores
    options: PassOptions
    tokens: int
    exact: bool = True

    def document(self) -> dict[str, Any]:
        """Return the analysis without the neurons' own scores, as plain data."""
        scores = self.scores
        chosen = scores.sets("train")
        return {
            "version": VERSION,
            "kind": "functions",
            "model": self.model,
            "digest": self.digest,
            "data": {
                "file": self.file,
                "digest": self.data.digest,
                "items": len(self.data.items),
                "tokens": self.tokens,
                "left_out": {"several_functions": self.data.several, "labels_without_function": dict(self.data.unmapped)},
                "tasks": {f: {s: list(self.data.tasks(f, s)) for s in ("train", "heldout")} for f in scores.functions},
                "warnings": list(self.data.warnings),
            },
            "neurons": {str(site.layer): site.units for site in scores.sites},
            "unit": scores.sites[0].kind,
            "settings": {**asdict(scores.settings), **asdict(self.options)},
            "exact": self.exact,
            "test": {"tasks": len(self.data.all_tasks), "draws": DRAWS, "alpha": ALPHA},
            "functions": scores.summary(),
            "layers": {split: scores.by_layer(split) for split in ("train", "heldout")},
            "overlap": {a: {b: chosen[a].overlap(chosen[b]) for b in chosen} for a in chosen},
            "residents": int(sum(r.sum() for r in scores.residents)),
        }

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Return flat tables: `functions`, one row per function, and `layers`, one row per split, function and layer."""
        rows = []
        for row in self.scores.summary():
            features = {f"auc_{feature}": auc for feature, auc in row["confounders"].items()}
            rows.append({**{k: v for k, v in row.items() if k != "confounders"}, **features})
        layers = [{"split": split, **row} for split in ("train", "heldout") for row in self.scores.by_layer(split)]
        return {"functions": rows, "layers": layers}

    def to_pandas(self, table: str = "layers") -> Any:
        """Return a table as a data frame.

        Raises:
            WorkbenchError: If there is no such table, or pandas is not installed.
        """
        return data_frame(self.tables(), table)

    def neuron_sets(self) -> dict[str, NeuronSet]:
        """Return each function's set with its evidence."""
        rows = {row["function"]: row for row in self.scores.summary()}
        result = {}
        for name, chosen in self.scores.sets("train").items():
            evidence = {
                "data": self.file,
                "data_digest": self.data.digest,
                "measured": rows[name],
                "settings": asdict(self.scores.settings),
            }
            result[name] = NeuronSet(
                name,
                chosen.kind,
                chosen.units,
                chosen.indices,
                chosen.scores,
                self.digest,
                {"ranking": "average precision", **evidence},
            )
        return result

    def write(self, out: Path) -> None:
        """Write functions.json, functions.safetensors, CSV tables and the functions' sets below `sets/`."""
        out.mkdir(parents=True, exist_ok=True)
        scores = self.scores
        tensors: dict[str, torch.Tensor] = {}
        for number, site in enumerate(scores.sites):
            named = {f"ap.{split}": s.ap[number] for split, s in scores.splits.items()}
            named |= {
                "effect": scores.test.effects[number],
                "firing": scores.firing[number],
                "mean_abs": scores.means[number],
                "lape": entropies(scores.firing[number]),
            }
            tensors |= {
                f"{name}.{site.layer}": torch.from_numpy(np.ascontiguousarray(v, np.float32)) for name, v in named.items()
            }
            tensors[f"resident.{site.layer}"] = torch.from_numpy(scores.residents[number])
            tensors[f"found.{site.layer}"] = torch.from_numpy(scores.test.found[number])
        save_tensors(tensors, out / TENSORS, {"functions": "\n".join(scores.functions)})
        for name, rows in self.tables().items():
            write_text(out / f"{name}.csv", csv_records(rows))
        for name, neurons in self.neuron_sets().items():
            folder = out / SETS / folder_name(name)
            base = BaseRecord(id=self.reference, digest=self.digest)
            write_neuron_brick(folder, neurons, base, made_by="workbench analyze functions")
        for name, neurons in lape_sets(scores).items():
            if neurons.size:
                write_set(out / "lape" / folder_name(name), neurons)
        write_set(out / CONTROL, replace(scores.shuffled_set(), base=self.digest))
        write_json(out / RECORD, self.document(), indent=1)


def analyze_functions(
    subject: NeuronSubject, data: Labelled, shown: str, *, settings: Settings | None = None, options: PassOptions | None = None
) -> FunctionAnalysis:
    """Score every neuron for every function in one pass over the texts.

    An interrupted pass goes on where it stopped, as long as model, texts and options are the same.

    Args:
        subject: The model.
        data: The labelled texts.
        shown: Name of their file.
        settings: Settings of scores and sets.
        options: Options of the pass.

    Raises:
        WorkbenchError: If a prompt has no tokens, or `chat` is set and the tokenizer has no template.
    """
    settings, options = settings or Settings(), options or PassOptions()
    rows = subject.rows(data.items, options.chat)
    texts = [[row.tokens, row.prompt] for row in rows]
    units = [site.units for site in subject.sites]
    key = json_digest(
        [subject.digest, computed_on(subject.model.device), data.digest, texts, asdict(options), settings.seed, units, 4]
    )
    folder = subject.cache / "neurons" / key
    functions = torch.tensor([data.functions.index(item.function) for item in data.items])
    items = PassItems(rows, functions, torch.tensor(data.task_of_items), histogram_labels(data, settings))
    scores = item_scores(
        subject.model,
        subject.sites,
        items,
        folder,
        options,
        progress=lambda done, total: subject.tell(done, total, "activations"),
    )
    result = function_scores(scores, data, rows, settings)
    tokens = int(scores.statistics.tokens.sum())
    shutil.rmtree(folder)
    return FunctionAnalysis(
        subject.name, subject.digest, subject.reference, shown, data, result, options, tokens, scores.exact is not None
    )
