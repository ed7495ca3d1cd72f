"""Fuse steps in recipes: what they teach, what they record, and what they refuse."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from worlds.fused import nats, text
from worlds.jsonl import write_jsonl
from worlds.project import Project
from worlds.tiny import edit_json, save_adapter, save_model, tensors_of

from workbench.evaluate.lineup import lineup
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import read_json
from workbench.recipe.recipe import load_recipe
from workbench.run.plan import plan

FIELDS = "data: texts.jsonl, steps: 60, batch_size: 4, learning_rate: 1.0e-2, warmup: 2"


def recipe(fields: str, bricks: str = "knows: knows", teachers: str = "knows") -> str:
    return f"base: base\nbricks: {{{bricks}}}\nsteps:\n- {{id: taught, {fields}, teachers: [{teachers}], {FIELDS}}}\n"


def run(school: Project, fields: str) -> tuple[Path, dict[str, Any]]:
    document = school.run(recipe(fields))
    path = Path(document["run"])
    record = read_json(path / "run.json")
    assert record is not None
    return path / "model", record["steps"][0]


def test_a_teacher_with_other_tokens_helps_on_texts_that_were_not_trained_on(school: Project) -> None:
    """Twelve texts show few of the words that may follow a word; the teacher's distributions show all of them."""
    held_out = [text(seed) for seed in range(2000, 2010)]
    alone, record = run(school, "fuse: mince, weight: 0")
    assert "fused" not in record["training"]
    assert not (school.path / ".workbench" / "teachers").exists()
    taught, record = run(school, "fuse: mince, weight: 0.5")
    found = record["training"]["fused"]
    assert found["models"]["knows"]["share"] > 0.9  # the teacher predicts the texts better than the random base
    assert found["models"]["knows"]["loss"] < found["models"]["base"]["loss"]
    assert found["models"]["knows"]["aligned"] == round(12 * 12 / found["learned"], 4)  # where one of the twelve words ends
    losses = [nats(place, held_out) for place in (alone, taught)]
    assert losses[1] < 0.9 * losses[0]


def test_a_step_is_the_same_after_its_cached_files_are_gone(school: Project) -> None:
    first, _ = run(school, "fuse: avgce, by: span, weight: 0.5, with_base: false, method: lora")
    before = {f.name: f.read_bytes() for f in first.iterdir()}
    for folder in ("teachers", "bricks"):
        shutil.rmtree(school.path / ".workbench" / folder)
    shutil.rmtree(school.path / "runs")
    second, _ = run(school, "fuse: avgce, by: span, weight: 0.5, with_base: false, method: lora")
    assert {f.name: f.read_bytes() for f in second.iterdir()} == before


def test_adapters_and_recipes_on_other_bases_teach(school: Project) -> None:
    save_adapter(school.path / "base", school.path / "lora", seed=1)
    school.write("base: knows\nsteps: []\n", "knowing.yaml")
    bricks = "lora: lora, knowing: {recipe: recipes/knowing.yaml}"
    text = recipe("fuse: avgce, by: span", bricks, "lora, knowing").replace("steps: 60", "steps: 2")
    record = read_json(Path(school.run(text)["run"]) / "run.json")
    assert record is not None
    found = record["steps"][0]["training"]["fused"]
    assert list(found["models"]) == ["base", "lora", "knowing"]
    assert [found["models"][name]["aligned"] for name in ("base", "lora")] == [1.0, 1.0]
    assert found["models"]["knowing"]["aligned"] == round(12 * 12 / found["learned"], 4)
    assert sum(model["share"] for model in found["models"].values()) == pytest.approx(1, abs=1e-3)
    assert found["models"]["lora"]["loss"] != found["models"]["base"]["loss"]


def test_replayed_rows_are_learned_without_a_teacher(school: Project) -> None:
    write_jsonl(school.path / "replay.jsonl", [{"prompt": text(5), "completion": text(6, 3)}])
    path, record = run(school, "fuse: mince, replay: replay.jsonl, replay_share: 0.5")
    assert record["training"]["replayed"] == 120
    assert tensors_of(path)


def test_teachers_are_no_part_of_merges_and_controls(school: Project) -> None:
    shutil.copytree((school.path / "base").resolve(), school.path / "other")
    edit_json(school.path / "other" / "config.json", rms_norm_eps=1e-5)
    steps = f"steps:\n- merge: average\n- {{fuse: mince, teachers: [knows], {FIELDS}}}\n"
    file = school.write(f"bricks: {{other: other, knows: knows}}\n{steps}")
    loaded = load_recipe(file)
    assert loaded.used_bricks(loaded.steps[0]) == ["other"]
    assert loaded.teachers == ["knows"]
    assert [entry.name for entry in lineup([loaded])] == ["base", "other", "test"]


def test_a_plan_shows_the_teachers(school: Project) -> None:
    planned, half, alone, only = (
        plan(school.resolve(recipe(f"fuse: mince{weight}")), school.path / "runs")
        for weight in ("", ", weight: 0.5", ", weight: 0", ", weight: 1")
    )
    assert alone.read_bytes < half.read_bytes == only.read_bytes == planned.read_bytes, "with weight 0 no teacher runs"
    row = planned.steps[0].to_dict()
    assert row["fuse"] == "mince"
    assert row["bricks"] == {"knows": "checkpoint"}
    assert row["cost"]["train_steps"] == 60


@pytest.mark.parametrize(
    ("fields", "teachers", "message"),
    [
        ("fuse: mince, top_k: 0", "knows", "top_k"),
        ("fuse: mince, weight: 1.5", "knows", "weight"),
        ("fuse: mince, by: word", "knows", "by"),
        ("fuse: avgce", "", "teachers"),
        ("fuse: avgce", "knows, knows", "listed twice"),
        ("fuse: avgce", "know", r"teachers\.0: no brick 'know'"),
        ("fuse: average", "knows", "average"),
        ("fuse: mince, held_out: missing.jsonl", "knows", "missing.jsonl"),
    ],
)
def test_bad_fields_are_refused(school: Project, fields: str, teachers: str, message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        school.resolve(recipe(fields, teachers=teachers))


def test_bad_teachers_are_refused_before_any_model_runs(school: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.fuse.teaching.kind._live", lambda *_: pytest.fail("a model was loaded"))
    shutil.copytree((school.path / "base").resolve(), school.path / "copy")
    shutil.copytree((school.path / "knows").resolve(), school.path / "silent")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (school.path / "silent" / file).unlink()
    save_model(school.path / "words")  # a tokenizer of other words: only the ends of texts are aligned
    cases = {
        "base": "is the base itself",
        "copy": "same weights as the model that is trained",
        "silent": "has no tokenizer",
        "words": r"at 12 of \d+ learned tokens \(2.9%\); expected 5% or more",
    }
    for name, message in cases.items():
        with pytest.raises(WorkbenchError, match=message):
            school.run(recipe("fuse: mince", f"{name}: {name}", name))
    block = recipe("fuse: mince") + "tokenizer: {source: union}\n"
    with pytest.raises(WorkbenchError, match="cannot have teachers"):
        school.run(block)
