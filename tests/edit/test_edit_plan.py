"""What `plan` says of edits: the work, about how long, nothing where the cache has the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from worlds.commands import call, document
from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project

from workbench.ground.errors import duration
from workbench.run.compose import compose
from workbench.run.costs import FLOPS_PER_SECOND, TRANSFORMERS
from workbench.run.plan import plan
from workbench.run.teaching import check_efficacy
from workbench.vocabulary.tokens import reading_bytes
from workbench.weights import digests
from workbench.weights.header import Entry

PARAMETERS = 64 * 32 + 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32) + 32  # the tiny llama
TUNE = "{id: tune, edit: finetune, facts: facts.jsonl, epochs: 3, batch_size: 2, learning_rate: 0.05}"


@pytest.fixture
def facts(project: Project) -> Project:
    rows = [{"prompt": "{subject} is", "subject": f"w{i} of w{i + 9}", "target": "w3"} for i in range(5)]
    write_jsonl(project.path / "facts.jsonl", rows)
    return project


def test_tokens_become_seconds(facts: Project) -> None:
    """Statistics of 10 tokens for each of 48 inputs; of each fact's values 4 rows of 12 tokens, a quarter of 40 steps."""
    found = plan(facts.resolve("steps: [{edit: memit, facts: facts.jsonl, layers: [0, 1], steps: 40}]\n"), facts.path / "runs")
    row = found.steps[0].to_dict()
    assert row["cost"]["work"] == {"facts": 5, "statistics": 480, "sweep": 0, "values": 2 * 5 * 4 * 12 * 10}
    assert row["cost"]["tokens"] == 480 + 4800
    assert row["seconds"] == round(2 * PARAMETERS * 5280 / FLOPS_PER_SECOND, 1)
    more = plan(facts.resolve("steps: [{edit: memit, facts: facts.jsonl, tokens_per_input: 100000}]\n"), facts.path / "runs")
    assert (cost := more.steps[0].to_dict()["cost"])["sweep"] == {"layers": 4, "facts": 8}
    assert cost["work"] == {"facts": 5, "statistics": 4_800_000, "sweep": 4 * 8 * 12 * 15, "values": 5 * 4 * 12 * 15}
    assert more.seconds - found.seconds == pytest.approx(more.steps[0].to_dict()["seconds"] - row["seconds"], abs=0.15)


def test_plan_prints_a_line_for_each_edit(facts: Project, cwd: Path) -> None:
    """Also for those of recipes among the bricks; the numbers are those of `--json`."""
    facts.write("steps: [{id: solve, edit: emmet, facts: facts.jsonl, tokens_per_input: 100000}]\n", "inner.yaml")
    facts.write(f"bricks: {{told: {{recipe: recipes/inner.yaml}}}}\nsteps: [{{merge: average}}, {TUNE}]\n", "outer.yaml")
    shown = call("plan", "outer").stdout
    planned = document("plan", "outer")
    (inner,) = planned["steps"][0]["edits"]
    seconds = duration(inner["seconds"])
    assert (
        f"told.solve: sweep of 4 layers x 8 facts, statistics of 4,800,000 tokens, values of 5 facts: about {seconds} on one core\n"
        in shown
    )
    assert "tune: at most 9 optimizer steps on 5 facts: about 0 s on one core\n" in shown
    assert planned["seconds"] > inner["seconds"]


def test_a_plan_reads_no_tensor(facts: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the base is read, not to look an edit, a training or a router up in the cache, either."""
    routed = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{route: ridge, calibration: 'prompts-{brick}.jsonl'}]\n"
    for brick in ("one", "two"):
        write_jsonl(facts.path / f"prompts-{brick}.jsonl", [{"prompt": f"{brick} w{i}"} for i in range(8)])

    digest = digests.entry_digest

    def read(entry: Entry) -> str:
        assert entry.file.parent.name != "base", f"{entry.file} was read"
        return digest(entry)

    monkeypatch.setattr(digests, "entry_digest", read)
    for text in ("steps: [{edit: memit, facts: facts.jsonl}]\n", f"steps: [{TUNE}]\n", routed):
        found = plan(facts.resolve(text), facts.path / "runs")
        assert found.cached == []
        assert found.key is None


def test_what_the_cache_has_costs_nothing(facts: Project) -> None:
    text = f"steps: [{TUNE}]\n"
    assert "cost" in plan(facts.resolve(text), facts.path / "runs").steps[0].to_dict()
    compose(facts.resolve(text), CPU)
    found = plan(facts.resolve(text), facts.path / "runs")
    assert found.cached == ["tune"]
    assert found.steps[0].cost is None
    composition = compose(facts.resolve(text), CPU)
    counted = check_efficacy(facts.resolve(text), composition, CPU)
    assert counted["tune"].facts == len(composition.taught[0].facts) > 0
    parameters = sum(spec.numel for spec in composition.model.weights.specs.values())
    after = plan(facts.resolve(text), facts.path / "runs").peak_bytes
    tokenizer = reading_bytes(facts.path / "base")
    assert found.peak_bytes - after == 8 * parameters + tokenizer + TRANSFORMERS, "its facts are asked for once, on a live model"
    nested = "bricks: {told: {recipe: recipes/test.yaml}}\nsteps: [{merge: average}]\n"
    assert "edits" not in plan(facts.resolve(nested, "outer.yaml"), facts.path / "runs").steps[0].to_dict()


def test_durations() -> None:
    assert [duration(s) for s in (0.2, 89, 91, 3600, 7500)] == ["0 s", "89 s", "2 min", "60 min", "2 h 5 min"]
