"""Knowledge neurons of a model's facts, beside the layers where a causal trace finds them.

Localization does not tell where an edit works best (Hase et al. 2023, arXiv 2301.04213): the report compares two views and chooses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workbench.emergent.knowledge import LocatedFact, LocateSettings, locate_facts
from workbench.emergent.locate import fact_prompts
from workbench.emergent.sites import find_sites
from workbench.errors import WorkbenchError
from workbench.events import Events, no_events, progress
from workbench.facts import read_facts
from workbench.lazy import torch
from workbench.library.neurons_bricks import live_float32
from workbench.library.trace import TraceTable, trace_table
from workbench.models.architecture import model_depth
from workbench.models.experts import has_experts
from workbench.models.tokenizer import load_tokenizer
from workbench.resolve.resolved import Resolved
from workbench.weights.device import exact

COMPLETE = 0.02
"""Largest relative error of the sums of attributions that counts as complete."""


@dataclass(frozen=True)
class KnowledgeReport:
    """Knowledge neurons of facts, with a trace of the same facts.

    Attributes:
        model: Name of the model.
        file: The facts file, as the user named it.
        settings: Settings of the attributions.
        facts: The facts with their neurons.
        trace: Trace of the same facts; None if they were not traced.
        note: Why they were not traced; empty if they were.
    """

    model: str
    file: str
    settings: LocateSettings
    facts: Sequence[LocatedFact]
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
        recovered, mine = self.trace.traces["feed_forward"].recovered, self.layers
        both = [layer for layer in mine if layer in recovered]
        sides = [rankdata([mine[layer] for layer in both]), rankdata([recovered[layer][place] for layer in both])]
        if len(both) < 2 or any(side.std() == 0 for side in sides):
            return None
        first, second = ((side - side.mean()) / side.std() for side in sides)
        return float((first * second).mean())

    def document(self) -> dict[str, Any]:
        """Return the report as plain data."""
        recovered = self.trace.traces["feed_forward"].recovered if self.trace else {}
        changes: dict[str, Any] = {}
        for kind in ("suppressed", "amplified"):
            measured = [fact.changes[kind] for fact in self.facts if kind in fact.changes]
            if measured:
                others = [change.others for change in measured if change.others is not None]
                changes[kind] = {
                    "own": _mean([change.own for change in measured]),
                    "random": _mean([change.random for change in measured]),
                    "others": _mean(others) if others else None,
                    "facts": len(measured),
                }
        return {
            "model": self.model,
            "file": self.file,
            "settings": asdict(self.settings),
            "facts": [fact.document() for fact in self.facts],
            "complete": self.complete,
            "changes": changes,
            "layers": {str(n): {"attribution": share, "trace": recovered.get(n)} for n, share in self.layers.items()},
            "agreement": {place: self.agreement(place) for place in ("last", "subject")},
            "note": self.note,
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def knowledge_report(
    resolved: Resolved,
    file: Path,
    shown: str,
    settings: LocateSettings | None = None,
    *,
    count: int = 10,
    device: torch.device,
    events: Events = no_events,
) -> KnowledgeReport:
    """Find the knowledge neurons of the first facts of a file, and trace the same facts.

    Args:
        resolved: The recipe, or a model as a recipe without steps.
        file: Facts file.
        shown: Its name in messages.
        settings: Settings of the attributions.
        count: Number of facts.
        device: Device of the model.
        events: Receives progress.

    Raises:
        WorkbenchError: If a fact cannot be tokenized or has not the answer that the settings ask for, or the model has no neurons.
    """
    settings = settings or LocateSettings()
    facts = read_facts(file, shown)[:count]
    name = resolved.recipe.name
    report = progress(events, "measure", name)
    model = live_float32(resolved, device, events)
    with exact(device):
        tokenizer = load_tokenizer(resolved.tokenizer_path)
        sites = find_sites(model, model_depth(model.config.to_dict()), device)
        prompts = [fact_prompts(model, tokenizer, fact, settings.answer) for fact in facts]
        located = locate_facts(model, sites, prompts, settings, progress=lambda done, of: report(done, of, "knowledge neurons"))
        experts = has_experts(model)
    del model
    trace, note = None, ""
    if experts:
        note = "not traced: layers route tokens to experts"
    elif bad := [fact for fact in facts if fact.subject is None]:
        note = f"not traced: {bad[0].place} has no subject"
    else:
        try:
            trace = trace_table(resolved, name, file, shown, count=count, device=device, events=events)
        except WorkbenchError as error:
            note = f"not traced: {error.message}"
    return KnowledgeReport(name, shown, settings, located, trace, note)
