"""`analyze locate`: knowledge neurons of a model's facts, beside the layers where a causal trace finds them.

Localization does not tell where an edit works best (Hase et al. 2023, arXiv 2301.04213): the report compares two views and chooses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import stdev
from typing import Any

from workbench.bricks.card import BaseRecord
from workbench.bricks.neuron_sets import write_neuron_brick
from workbench.emergent.knowledge import FACTORS, LocatedFact, LocateSettings, locate_facts, union_of
from workbench.emergent.locate import fact_prompts, norm_behind
from workbench.emergent.sets import NeuronSet, folder_name
from workbench.errors import WorkbenchError
from workbench.events import Events, no_events, progress
from workbench.facts import Fact, read_facts
from workbench.files import file_digest, write_json
from workbench.lazy import torch
from workbench.library.neurons_subject import NeuronSubject, open_neurons
from workbench.library.trace import TraceTable, trace_table
from workbench.models.hooks import has_experts
from workbench.run.opened import NamedModel
from workbench.scores.statistics import upper_t
from workbench.weights.device import exact

RECORD, SETS, ALL = "knowledge.json", "knowledge/facts", "knowledge/all"
MADE_BY = "workbench analyze locate"
COMPLETE = 0.02
"""Largest relative error of the sums of attributions that counts as complete."""
UNKNOWN = 0.01
"""Mean probability of the answers below which the model does not know the facts."""


@dataclass(frozen=True)
class KnowledgeReport:
    """Knowledge neurons of facts, with a trace of the same facts.

    Attributes:
        model: Name of the model.
        digest: Digest of the model.
        reference: Directory or hub id of the model, or the name of its recipe.
        file: The facts file, as the user named it.
        file_digest: Its digest.
        settings: Settings of the attributions.
        facts: The facts with their neurons.
        together: The neurons of all facts.
        asked: Fact id -> the fact's prompt and its answer, as texts.
        undone: Whether a norm behind the feed-forward layers undoes the scaling of activations.
        trace: Trace of the same facts; None if they were not traced.
        note: Why they were not traced; empty if they were.
    """

    model: str
    digest: str
    reference: str
    file: str
    file_digest: str
    settings: LocateSettings
    facts: Sequence[LocatedFact]
    together: NeuronSet
    asked: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    undone: bool = False
    trace: TraceTable | None = None
    note: str = ""

    @property
    def layers(self) -> dict[int, float]:
        """Layer -> its share of the positive attributions, as a mean over facts."""
        return {layer: sum(f.layers[layer] for f in self.facts) / len(self.facts) for layer in self.facts[0].layers}

    @property
    def complete(self) -> int:
        """Number of facts whose attributions add up to the change of probability within 2 %."""
        return sum(fact.error <= COMPLETE for fact in self.facts)

    @property
    def warnings(self) -> list[str]:
        """What the attributions of these facts cannot show, as sentences without a full stop."""
        count, found = len(self.facts), []
        if sum(fact.probability for fact in self.facts) / count < UNKNOWN:
            found.append(
                f"the model gives the facts' answers a mean probability below {UNKNOWN:g}, so it does not know them; --answer own "
                "attributes the answers that it gives"
            )
        if self.complete < count:
            worst = max(fact.error for fact in self.facts)
            why = (
                "a norm behind the feed-forward output undoes the scaling down to almost zero, where the probability jumps, and integrated "
                "gradients miss that jump. Only the suppressed and amplified neurons are evidence here"
                if self.undone
                else f"more than {self.settings.steps} steps (--steps) bring the sums closer"
            )
            found.append(
                f"the attributions of {count - self.complete} of {count} facts do not add up to the change of probability (largest "
                f"relative error {worst:.2g}): {why}"
            )
        if empty := sum(not fact.neurons.size for fact in self.facts):
            found.append(
                f"{empty} of {count} facts have no neuron that {100 * self.settings.share:g} % of their wordings keep; a smaller --share "
                "keeps more"
            )
        return found

    def agreement(self, place: str = "last") -> float | None:
        """Return the rank correlation over layers of attributions with what restoring feed-forward outputs recovers.

        Args:
            place: Traced tokens, "last", "subject" or "subject_last".

        Returns:
            Spearman's correlation; None without a trace, or if one side is the same in all layers.
        """
        from scipy.stats import rankdata

        if self.trace is None:
            return None
        recovered, mine = self.trace.recovered("feed_forward"), self.layers
        both = [layer for layer in mine if layer in recovered]
        sides = [rankdata([mine[layer] for layer in both]), rankdata([recovered[layer][place] for layer in both])]
        if len(both) < 2 or any(side.std() == 0 for side in sides):
            return None
        first, second = ((side - side.mean()) / side.std() for side in sides)
        return float((first * second).mean())

    def document(self) -> dict[str, Any]:
        """Return the report as plain data."""
        recovered = self.trace.recovered("feed_forward") if self.trace else {}
        folders = self.folders()
        facts = []
        for fact in self.facts:
            prompt, answer = self.asked.get(fact.fact, ("", ""))
            facts.append({**fact.document(), "prompt": prompt, "answer": answer, "set": folders.get(fact.fact)})
        return {
            "version": 1,
            "kind": "knowledge",
            "model": self.model,
            "digest": self.digest,
            "data": {"file": self.file, "digest": self.file_digest, "items": len(self.facts), "warnings": self.warnings},
            "settings": asdict(self.settings),
            "facts": facts,
            "neurons": self.together.size,
            "unit": self.together.kind,
            "complete": self.complete,
            "undone": self.undone,
            "changes": {kind: summary for kind in FACTORS if (summary := self.summary(kind)) is not None},
            "layers": {str(n): {"attribution": share, "trace": recovered.get(n)} for n, share in self.layers.items()},
            "agreement": {place: self.agreement(place) for place in ("last", "subject")},
            "note": self.note,
        }

    def summary(self, kind: str) -> dict[str, Any] | None:
        """Return the mean change of probability over facts beside that of random neurons; None if no fact has neurons.

        The interval of the paired difference uses Student's t over facts.

        Args:
            kind: "suppressed" or "amplified".
        """
        measured = [fact.changes[kind] for fact in self.facts if kind in fact.changes]
        if not measured:
            return None
        others = [change.others for change in measured if change.others is not None]
        gaps, sign = [change.own - change.random for change in measured], -1 if FACTORS[kind] < 1 else 1
        half = upper_t(0.025, len(gaps) - 1) * stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
        return {
            "own": _mean([change.own for change in measured]),
            "random": _mean([change.random for change in measured]),
            "others": _mean(others) if others else None,
            "facts": len(measured),
            "difference": _mean(gaps),
            "low": None if half is None else _mean(gaps) - half,
            "high": None if half is None else _mean(gaps) + half,
            "beyond": sum(all(sign * (change.own - drawn) > 0 for drawn in change.drawn) for change in measured),
        }

    def folders(self) -> dict[str, str]:
        """Return fact id -> folder of its set inside the results. Facts without neurons have none."""
        result: dict[str, str] = {}
        for fact in self.facts:
            if fact.neurons.size:
                name, number = folder_name(fact.fact), 1
                while (folder := f"{SETS}/{name}{f'-{number}' if number > 1 else ''}") in result.values():
                    number += 1
                result[fact.fact] = folder
        return result

    def write(self, out: Path) -> None:
        """Write knowledge.json, one set of neurons per fact below knowledge/facts/, and their union as knowledge/all."""
        out.mkdir(parents=True, exist_ok=True)
        folders = self.folders()
        for fact in self.facts:
            if folder := folders.get(fact.fact):
                prompt, answer = self.asked.get(fact.fact, (fact.fact, ""))
                neurons = replace(fact.neurons, base=self.digest, evidence={**fact.neurons.evidence, **self._evidence(fact)})
                self._write_brick(out / folder, neurons, f"{prompt!r} → {answer!r}")
        if folders:
            settings = {"ranking": "integrated gradients", "data": self.file, "data_digest": self.file_digest}
            every = replace(self.together, base=self.digest, evidence={**settings, "facts": len(folders)})
            self._write_brick(out / ALL, every, f"{len(folders)} facts of {Path(self.file).name}")
        write_json(out / RECORD, self.document(), indent=1)

    def _evidence(self, fact: LocatedFact) -> dict[str, Any]:
        prompt, answer = self.asked.get(fact.fact, ("", ""))
        return {
            "ranking": "integrated gradients",
            "data": self.file,
            "data_digest": self.file_digest,
            "prompt": prompt,
            "answer": answer,
            "probability": fact.probability,
            "attribution_error": fact.error,
            "changes": fact.document()["changes"],
            "settings": asdict(self.settings),
        }

    def _write_brick(self, folder: Path, neurons: NeuronSet, what: str) -> None:
        skill = f"{neurons.size:,} {neurons.kind} that carry {what}"
        base = BaseRecord(id=self.reference, digest=self.digest)
        write_neuron_brick(folder, neurons, base, skill, made_by=MADE_BY, functions=("knowledge",))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def knowledge_report(
    model: NamedModel,
    file: Path,
    shown: str,
    settings: LocateSettings | None = None,
    *,
    device: torch.device,
    events: Events = no_events,
) -> KnowledgeReport:
    """Find the knowledge neurons of the first facts of a file, and trace the same facts.

    Args:
        model: The model.
        file: Facts file.
        shown: Name of the file in messages.
        settings: Settings of the attributions.
        device: Device of the model.
        events: Receives progress.

    Raises:
        WorkbenchError: If a fact cannot be tokenized or has not the answer that the settings ask for, or the model has no neurons.
    """
    settings = settings or LocateSettings()
    facts = read_facts(file, shown)[: settings.count]
    if settings.answer == "target_true" and (bad := [fact for fact in facts if fact.target_true is None]):
        raise WorkbenchError(f"{bad[0].place}: the fact has no 'target_true'", "Add it, or attribute another answer.")
    with exact(device):
        subject = open_neurons(model, device, events)
        report, experts = _located(subject, facts, shown, settings), has_experts(subject.model)
    report = replace(report, file_digest=file_digest(file))
    del subject
    if experts:
        return replace(report, note="not traced: layers route tokens to experts")
    if bad := [fact for fact in facts if fact.subject is None]:
        return replace(report, note=f"not traced: {bad[0].place} has no subject")
    try:
        trace = trace_table(model, file, shown, count=settings.count, device=device, events=events)
        return replace(report, trace=trace)
    except WorkbenchError as error:
        return replace(report, note=f"not traced: {error.message}")


def _located(subject: NeuronSubject, facts: Sequence[Fact], shown: str, settings: LocateSettings) -> KnowledgeReport:
    """Find the neurons of facts in a live model."""
    tell = progress(subject.events, "measure", subject.name)
    prompts = [fact_prompts(subject.model, subject.tokenizer, fact, settings.answer) for fact in facts]
    located = locate_facts(
        subject.model, subject.sites, prompts, settings, progress=lambda done, of: tell(done, of, "knowledge neurons")
    )
    asked = {
        fact.id: (fact.text, subject.tokenizer.decode(list(wordings[0].answer)))
        for fact, wordings in zip(facts, prompts, strict=True)
    }
    undone = norm_behind(subject.model, subject.sites[0], prompts[0][0].tokens)
    return KnowledgeReport(
        subject.name,
        subject.digest,
        subject.reference,
        shown,
        "",
        settings,
        located,
        union_of("all", located, subject.sites),
        asked,
        undone,
    )
