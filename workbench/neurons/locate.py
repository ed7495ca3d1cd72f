"""Knowledge neurons of a model's facts, with the proof: what suppressing and amplifying them changes, beside random neurons.

They do not tell where an edit works best (Hase et al. 2023, arXiv 2301.04213), so that nothing here chooses layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev

from workbench.activations.sets import NeuronSet
from workbench.bricks.card import BaseRecord
from workbench.bricks.neuron_sets import write_neuron_brick
from workbench.facts.published import read_facts
from workbench.ground.errors import WorkbenchError
from workbench.ground.events import Events, no_events, progress
from workbench.ground.files import file_digest
from workbench.ground.lazy import torch
from workbench.ground.results import JsonObject, Number
from workbench.neurons.attribution import fact_prompts, norm_behind
from workbench.neurons.fact_neurons import FACTORS, SHARE, LocatedFact, LocateSettings, locate_facts, union_of
from workbench.neurons.subject import Analysis, AnalyzedTexts, open_neurons
from workbench.run.opened import NamedModel
from workbench.scores.statistics import upper_t
from workbench.weights.device import exact

RECORD, ALL = "knowledge.json", "knowledge/all"
MADE_BY = "workbench analyze --facts"
COMPLETE = 0.02
"""Largest relative error of the sums of attributions that counts as complete."""
UNKNOWN = 0.01
"""Mean probability of the answers below which the model does not know the facts."""


class MeanChange(JsonObject):
    """Changes of probability as means over facts."""

    own: Number
    """Change of the facts' own answers."""
    random: Number
    """Change with random neurons."""
    others: Number | None
    """Change of the answers of other facts."""
    facts: int
    """Number of facts with neurons."""
    difference: Number
    """own - random."""
    low: Number | None
    """Lower end of its 95 % interval over facts; null with one fact."""
    high: Number | None
    """Upper end."""
    beyond: int
    """Number of facts whose neurons change the answer more than every random draw."""


class KnowledgeResult(Analysis):
    """Neurons that carry facts."""

    kind: str = "knowledge"
    """Kind of analysis."""
    settings: LocateSettings
    """Option -> its value."""
    facts: list[LocatedFact]
    """The facts."""
    neurons: int
    """Number of neurons that carry at least one fact."""
    unit: str
    """neurons or experts."""
    complete: int
    """Number of facts whose attributions add up to the change of probability within 2 %."""
    undone: bool
    """Whether a norm behind the feed-forward layers undoes the scaling of activations, so that attributions do not add up."""
    changes: dict[str, MeanChange]
    """suppressed, amplified -> mean changes of probability."""
    layers: dict[str, Number]
    """Layer -> share of the positive attributions, mean over facts."""


@dataclass(frozen=True)
class KnowledgeReport:
    """Knowledge neurons of facts, with the sets.

    Attributes:
        result: The result.
        sets: Fact id -> its neurons, for facts that have some.
        together: The neurons of all facts.
        reference: Directory or hub id of the model, or the name of its recipe.
    """

    result: KnowledgeResult
    sets: Mapping[str, NeuronSet]
    together: NeuronSet
    reference: str

    def write(self, out: Path) -> None:
        """Write knowledge.json, one set of neurons per fact below knowledge/facts/, and their union as knowledge/all."""
        out.mkdir(parents=True, exist_ok=True)
        result, data = self.result, self.result.data
        common = {"ranking": "integrated gradients", "data": data.file, "data_digest": data.digest}
        for fact in result.facts:
            if fact.set:
                own = {
                    "prompt": fact.prompt,
                    "answer": fact.answer,
                    "probability": fact.probability,
                    "attribution_error": fact.error,
                    "changes": {kind: change.to_dict() for kind, change in fact.changes.items()},
                    "settings": result.settings.to_dict(),
                }
                neurons = self.sets[fact.fact]
                neurons = replace(neurons, base=result.digest, evidence={**neurons.evidence, **common, **own})
                self._write_brick(out / fact.set, neurons, f"{fact.prompt!r} → {fact.answer!r}")
        if self.sets:
            every = replace(self.together, base=result.digest, evidence={**common, "facts": len(self.sets)})
            self._write_brick(out / ALL, every, f"{len(self.sets)} facts of {Path(data.file).name}")
        result.write(out / RECORD)

    def _write_brick(self, folder: Path, neurons: NeuronSet, what: str) -> None:
        skill = f"{neurons.size:,} {neurons.kind} that carry {what}"
        base = BaseRecord(id=self.reference, digest=self.result.digest)
        write_neuron_brick(folder, neurons, base, skill, made_by=MADE_BY, functions=("knowledge",))


def analyze_facts(
    model: NamedModel,
    file: Path,
    shown: str,
    settings: LocateSettings | None = None,
    *,
    device: torch.device,
    events: Events = no_events,
) -> KnowledgeReport:
    """Find the knowledge neurons of the first facts of a file.

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
        tell = progress(events, "measure", subject.name)
        prompts = [fact_prompts(subject.model, subject.tokenizer, fact, settings.answer) for fact in facts]
        answers = [subject.tokenizer.decode(list(wordings[0].answer)) for wordings in prompts]
        texts = [(fact.text, answer) for fact, answer in zip(facts, answers, strict=True)]
        located, sets = locate_facts(
            subject.model, subject.sites, prompts, texts, settings, progress=lambda done, of: tell(done, of, "knowledge neurons")
        )
        undone = norm_behind(subject.model, subject.sites[0], prompts[0][0].tokens)
        together = union_of("all", sets.values(), subject.sites)
    layers = {int(layer): sum(f.layers[layer] for f in located) / len(located) for layer in located[0].layers}
    result = KnowledgeResult(
        model=subject.name,
        digest=subject.digest,
        data=AnalyzedTexts(
            file=shown, digest=file_digest(file), items=len(located), warnings=_warnings(located, settings, undone)
        ),
        settings=settings,
        facts=located,
        neurons=together.size,
        unit=together.kind,
        complete=sum(fact.error <= COMPLETE for fact in located),
        undone=undone,
        changes={kind: change for kind in FACTORS if (change := mean_change(kind, located)) is not None},
        layers={str(layer): share for layer, share in layers.items()},
    )
    return KnowledgeReport(result, sets, together, subject.reference)


def _warnings(facts: Sequence[LocatedFact], settings: LocateSettings, undone: bool) -> list[str]:
    """Return what the attributions of these facts cannot show, as sentences without a full stop."""
    count, found = len(facts), []
    if sum(fact.probability for fact in facts) / count < UNKNOWN:
        found.append(
            f"the model gives the facts' answers a mean probability below {UNKNOWN:g}, so it does not know them; --answer own "
            "attributes the answers that it gives"
        )
    if wrong := sum(fact.error > COMPLETE for fact in facts):
        worst = max(fact.error for fact in facts)
        why = (
            "a norm behind the feed-forward output undoes the scaling down to almost zero, where the probability jumps, and integrated "
            "gradients miss that jump. Only the suppressed and amplified neurons are evidence here"
            if undone
            else f"more than --steps {settings.steps} bring the sums closer"
        )
        found.append(
            f"the attributions of {wrong} of {count} facts do not add up to the change of probability (largest "
            f"relative error {worst:.2g}): {why}"
        )
    if empty := sum(not fact.neurons for fact in facts):
        found.append(f"{empty} of {count} facts have no neuron that {100 * SHARE:g} % of their wordings keep")
    return found


def mean_change(kind: str, facts: Sequence[LocatedFact]) -> MeanChange | None:
    """Return the mean change of probability over facts beside that of random neurons; None if no fact has neurons.

    The interval of the paired difference uses Student's t over facts.

    Args:
        kind: "suppressed" or "amplified".
        facts: The facts.
    """
    measured = [fact.changes[kind] for fact in facts if kind in fact.changes]
    if not measured:
        return None
    others = [change.others for change in measured if change.others is not None]
    gaps, sign = [change.own - change.random for change in measured], -1 if FACTORS[kind] < 1 else 1
    half = upper_t(0.025, len(gaps) - 1) * stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    return MeanChange(
        own=_mean([change.own for change in measured]),
        random=_mean([change.random for change in measured]),
        others=_mean(others) if others else None,
        facts=len(measured),
        difference=_mean(gaps),
        low=None if half is None else _mean(gaps) - half,
        high=None if half is None else _mean(gaps) + half,
        beyond=sum(all(sign * (change.own - drawn) > 0 for drawn in change.drawn) for change in measured),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
