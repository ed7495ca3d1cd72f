"""Knowledge neurons of trained models."""

from __future__ import annotations

from pathlib import Path

import pytest
import scipy.stats

from worlds import people
from worlds.project import CPU, Project

from workbench.neurons.fact_neurons import LocateSettings
from workbench.neurons.locate import KnowledgeResult, analyze_facts
from workbench.run.opened import NamedModel


def report_of(project: Project, folder: Path) -> KnowledgeResult:
    facts = people.write_rows(project.path / "people.jsonl", 6)
    resolved = project.resolve(f"base: {folder}\n", "located.yaml")
    settings = LocateSettings(answer="own", steps=20, count=4)
    return analyze_facts(NamedModel("located", resolved), facts, "people.jsonl", settings, device=CPU).result


@pytest.mark.slow
def test_neurons_of_trained_facts(project: Project) -> None:
    """Suppressing them lowers the answer's probability by more than random neurons, and more than that of other facts."""
    found = report_of(project, people.PROMPT)
    assert len(found.facts) == 4
    assert found.complete == 4
    assert not found.undone
    assert found.data.warnings == []
    off = found.changes["suppressed"]
    assert off.own < -0.1
    assert off.own < off.random
    assert off.others is not None
    assert off.own < off.others
    gaps = [fact.changes["suppressed"].own - fact.changes["suppressed"].random for fact in found.facts]
    interval = scipy.stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert off.difference == pytest.approx(sum(gaps) / 4)
    assert (off.low, off.high) == pytest.approx((interval.low, interval.high))
    assert off.beyond == sum(f.changes["suppressed"].own < min(f.changes["suppressed"].drawn) for f in found.facts)
    assert sum(found.layers.values()) == pytest.approx(1, abs=1e-6)


def test_facts_that_the_model_does_not_know_are_warned_of(project: Project) -> None:
    path = project.path / "facts.jsonl"
    path.write_text('{"prompt": "w4 of w9 is", "target": "w7"}\n{"prompt": "w5 of w8 is", "target": "w3"}\n', "utf-8")
    resolved = project.resolve("steps: []\n", "plain.yaml")
    found = analyze_facts(NamedModel("plain", resolved), path, "facts.jsonl", LocateSettings(steps=5), device=CPU).result
    assert found.data.warnings[0].startswith("the model gives the facts' answers a mean probability below")
    assert len(found.facts) == 2
