"""Model cards: scores of finished runs, metadata that the hub reads, licences of base, bricks and their data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from worlds.commands import call, document, refused
from worlds.project import Project
from worlds.suites import lay_out_models
from worlds.tiny import save_adapter

from workbench.ground.manifest import MANIFEST


@pytest.fixture
def world(project: Project, cwd: Path) -> Project:
    """A project with 60 items in 20 clusters, a recipe, and two models beside it."""
    return lay_out_models(project)


def card_of(run: dict[str, str]) -> Path:
    return Path(run["model"] or run["adapter"]) / "README.md"


def test_eval_puts_scores_into_the_card_of_the_finished_run(world: Project, score_once: Callable[[Project, str], None]) -> None:
    from huggingface_hub import ModelCard

    score_once(world, "mean")
    ran = document("run", "recipes/mean.yaml")
    card = card_of(ran)
    seal = card.with_name(MANIFEST)
    before, others = card.read_text("utf-8"), {p: p.read_bytes() for p in card.parent.iterdir() if p not in (card, seal)}
    assert "Scores" not in before
    said = call("eval", "mean")
    assert f"scores added to {card}" in said.stderr
    after = card.read_text("utf-8")

    stored = {c["name"]: c for c in document("eval", "mean")["configurations"]}
    acc = stored["mean"]["tasks"]["mini"]["acc"]
    row = next(r for r in json.loads(call("compare", "mean", "--json", code=(0, 3)).stdout)["rows"]
               if r["configuration"] in ("mean", "average"))  # fmt: skip
    expected = (f"| mini | acc | 60 | {acc['value']:.3f} [{acc['low']:.3f}, {acc['high']:.3f}] | {row['baseline_value']:.3f} | "
                f"{row['diff']:+.3f} [{row['low_adj']:+.3f}, {row['high_adj']:+.3f}] | {row['verdict']} |")  # fmt: skip
    assert expected in after

    loaded = ModelCard.load(card)
    assert loaded.data.model_name == "mean"
    assert {r.metric_type for r in loaded.data.eval_results} == set(stored["mean"]["tasks"]["mini"]) - {"n"}
    result = next(r for r in loaded.data.eval_results if r.metric_type == "acc")
    assert (result.task_type, result.dataset_type) == ("text-generation", "mini")
    assert result.metric_value == pytest.approx(acc["value"], abs=1e-6)
    head = yaml.safe_load(after.split("---\n")[1])
    index = head.pop("model-index")
    assert head == yaml.safe_load(before.split("---\n")[1])
    assert index[0]["name"] == "mean"
    assert (
        re.sub(r"\n<!-- scores:begin -->.*<!-- scores:end -->\n", "", after.split("---\n", 2)[2], flags=re.DOTALL)
        == before.split("---\n", 2)[2]
    )

    call("eval", "mean")
    assert card.read_text("utf-8") == after, "an earlier section is replaced"
    assert {p: p.read_bytes() for p in card.parent.iterdir() if p not in (card, seal)} == others
    call("runs", "verify", Path(ran["run"]).name)


def test_hand_written_text_stays_and_other_scores_replace_the_section(
    world: Project, score_once: Callable[[Project, str], None]
) -> None:
    score_once(world, "mean")
    ran = document("run", "recipes/mean.yaml")
    call("eval", "mean")
    card = card_of(ran)
    first = card.read_text("utf-8")
    edited = (
        first.replace("tags:\n", "tags:   # mine\n").replace("## Recipe", "Written by hand.\n\n## Recipe")
        + "\n## After\n\nlast\n"
    )
    card.write_text(edited, "utf-8")
    call("eval", "mean", "--no-controls")
    again = card.read_text("utf-8")
    assert again.count("## Scores") == again.count("model-index:") == 1
    assert "verdict" not in again, "without controls there is nothing to compare with"
    for kept in ("tags:   # mine\n", "Written by hand.\n\n## Recipe", "\n## After\n\nlast\n"):
        assert kept in again


def test_partial_scores_and_other_configurations_stay_out(world: Project) -> None:
    ran = document("run", "recipes/mean.yaml")
    before = card_of(ran).read_text("utf-8")
    assert "scores added to" not in call("eval", "mean", "--limit", "20").stderr
    assert "scores added to" not in call("eval", "mean", "--set", "seed=3", "--set", "steps=[]").stderr
    record = Path(ran["run"]) / "run.json"
    record.write_text(record.read_text("utf-8").replace(ran["configuration"], "f" * 32))
    assert "scores added to" not in call("eval", "mean").stderr
    assert card_of(ran).read_text("utf-8") == before


def test_adapter_outputs_get_scores_too(world: Project) -> None:
    text = (
        "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: task_arithmetic}]\noutput: {form: adapter}\neval: [mini]\n"
    )
    world.write(text, "lora.yaml")
    ran = document("run", "recipes/lora.yaml")
    call("eval", "lora")
    assert "| mini | acc | 60 |" in card_of(ran).read_text("utf-8")
    call("runs", "verify", Path(ran["run"]).name)


def licensed(project: Project, name: str, card: str | None, readme: str | None = None) -> str:
    place = project.path / "mine" / name
    save_adapter(project.path / "base", place, seed=7)
    if card is not None:
        (place / "brick.yaml").write_text(f"version: 1\nname: {name}\nkind: adapter\nbase: {{id: base}}\n{card}")
    if readme is not None:
        (place / "README.md").write_text(f"---\nlicense: {readme}\n---\n")
    return f"mine/{name}"


def test_a_run_that_is_done_says_that_licenses_have_changed(project: Project, cwd: Path) -> None:
    licensed(project, "mine", "licence: MIT\ndata_licences: {org/web: cc0-1.0}\n")
    project.write("bricks: {mine: mine/mine}\nsteps: [{merge: average}]\n", "one.yaml")
    name = Path(document("run", "recipes/one.yaml")["run"]).name
    assert call("run", "recipes/one.yaml").stderr.splitlines()[0].endswith("finished before: nothing to do")
    licensed(project, "mine", "licence: cc-by-nc-4.0\ndata_licences: {org/web: cc0-1.0, org/news: unknown}\n")
    said = call("run", "recipes/one.yaml").stderr
    assert "nothing to do; licenses have changed (mine cc-by-nc-4.0, mine: org/news unknown)" in said
    call("runs", "rm", name, "--yes")
    assert "cc-by-nc-4.0" in card_of(document("run", "recipes/one.yaml")).read_text("utf-8")


def test_require_license_names_what_is_missing(project: Project, cwd: Path) -> None:
    base = project.path / "licensed-base"
    base.mkdir()
    for file in (project.path / "base").iterdir():
        (base / file.name).symlink_to(file)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    licensed(project, "free", "licence: MIT\ntraining: {data: train.jsonl}\ndata_licences: {org/corpus: cc-by-4.0}\n")
    licensed(project, "plain", None)
    licensed(project, "closed", None, "cc-by-nc-4.0")
    licensed(project, "fed", "licence: MIT\ndata_licences: {org/forum: cc-by-nc-sa-4.0, org/web: unknown, org/free: cc0-1.0}\n")
    licensed(
        project, "words", "licence: noncommercial\ndata_licences: {a: non-commercial, b: cc-by-nd-4.0, c: x-research, d: other}\n"
    )

    def recipe(*names: str, base: str = "licensed-base") -> str:
        bricks = ", ".join(f"{n}: mine/{n}" for n in names)
        return str(project.write(f"base: {base}\nbricks: {{{bricks}}}\nsteps: [{{merge: average}}]\n", "lic.yaml"))

    error = refused("run", recipe("free", "plain", "closed", "fed", "words", base="base"), "--require-license")
    assert error.exit_code == 1
    assert error.message.removeprefix("--require-license: ").split("; ") == [
        "base: unknown license (unknown)",
        "brick 'plain': unknown license (unknown)",
        "brick 'closed': restricted license (cc-by-nc-4.0)",
        "brick 'words': restricted license (noncommercial)",
        "brick 'fed', data org/forum: restricted license (cc-by-nc-sa-4.0)",
        "brick 'fed', data org/web: unknown license (unknown)",
        "brick 'words', data a: restricted license (non-commercial)",
        "brick 'words', data b: restricted license (cc-by-nd-4.0)",
        "brick 'words', data c: restricted license (x-research)",
        "brick 'words', data d: unknown license (other)",
    ]
    assert not (project.path / "runs").exists()
    project.write("base: licensed-base\nbricks: {free: mine/free}\nsteps: [{merge: average}]\n", "inner.yaml")
    outer = "base: licensed-base\nbricks: {inner: {recipe: recipes/inner.yaml}, fed: mine/fed}\nsteps: [{merge: average}]\n"
    error = refused("run", str(project.write(outer, "outer.yaml")), "--require-license")
    assert "inner" not in error.message
    ran = document("run", recipe("free"), "--require-license")
    text = card_of(ran).read_text("utf-8")
    assert "| `free` | train.jsonl | mit |" in text
    assert "| `free` | org/corpus | cc-by-4.0 |" in text
