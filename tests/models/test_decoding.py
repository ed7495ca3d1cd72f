"""Generation settings are part of what a configuration is, where a task asks for texts, and only there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import call, document, refused
from worlds.jsonl import write_jsonl
from worlds.local_tasks import asks_for_texts
from worlds.project import Project
from worlds.suites import clustered_suite
from worlds.tiny import edit_json, save_finetuned

from workbench.ground.errors import WorkbenchError
from workbench.models.identity import DEFAULTS, generation_settings, identity
from workbench.scores.store import ScoreStore, stored_in

TEXTS = asks_for_texts(
    "texts",
    "texts.jsonl",
    """\
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
)


def test_settings_equal_to_defaults_do_not_count() -> None:
    from transformers import GenerationConfig

    theirs = GenerationConfig()._get_default_generation_params()
    assert {key: theirs[key] for key in DEFAULTS} == dict(DEFAULTS)
    assert identity("a" * 32, {}, "") == "a" * 32
    assert len({identity("a" * 32, s, t) for s in ({}, {"top_k": 1}, {"top_k": 2}) for t in ("", "b", "c")}) == 9


@pytest.mark.parametrize(
    ("given", "config", "expected"),
    [
        (None, {"eos_token_id": 2}, {}),
        ({"eos_token_id": 2, "bos_token_id": 1, "transformers_version": "5.1"}, {"eos_token_id": 2}, {}),
        ({"eos_token_id": [2], "temperature": 1.0, "do_sample": False, "pad_token_id": 9}, {"eos_token_id": 2}, {}),
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 2}, {"eos_token_id": [2, 7]}),
        ({"repetition_penalty": 1.5, "eos_token_id": 2}, {"eos_token_id": 2}, {"repetition_penalty": 1.5}),
        ({"eos_token_id": 2}, {"eos_token_id": 2, "repetition_penalty": 1.3}, {"repetition_penalty": None}),
        ({"eos_token_id": 2}, {"text_config": {"eos_token_id": 2}}, {}),
        ({"suppress_tokens": [5]}, {}, {"suppress_tokens": [5]}),
    ],
)
def test_settings_that_decide_texts(given: Any, config: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    if given is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(given))
    assert generation_settings(tmp_path, config) == expected


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"top_k": ')
    with pytest.raises(WorkbenchError, match=r"generation_config\.json: not JSON"):
        generation_settings(tmp_path, {})


@pytest.fixture
def world(project: Project, cwd: Path) -> Project:
    """Two folders with equal weights, one of which forbids the tokens that the other writes; a suite of texts, one of choices."""
    clustered_suite(project)
    evals = project.path / "evals"
    rows = [{"id": str(i), "cluster": str(i % 20), "prompt": f"word{i} word{i + 1}", "answer": "x"} for i in range(24)]
    write_jsonl(evals / "tasks/texts.jsonl", rows)
    (evals / "tasks/texts.yaml").write_text(TEXTS)
    (evals / "suites/texts.yaml").write_text("suite: texts\ntasks: [texts]\n")
    save_finetuned(project.path / "base", project.path / "models/plain", seed=4)
    shutil.copy(project.path / "base/tokenizer_config.json", project.path / "models/plain")
    shutil.copytree(project.path / "models/plain", project.path / "models/other")
    (project.path / "models/other/generation_config.json").write_text(json.dumps({"eos_token_id": 2, "repetition_penalty": 9.0}))
    return project


def texts_of(project: Project, digest: str) -> list[str]:
    store = ScoreStore(project.path / "runs/scores")
    stored = (scores for folder in store.root.glob("texts-*") for scores in stored_in(folder))
    scores = next(scores for scores in stored if scores.configuration.digest == digest)
    return [row["response"] for row in store.rows(scores)["texts"]]


def test_equal_weights_with_other_generation_settings_have_scores_of_their_own(world: Project) -> None:
    document("eval", "models/plain", "--suite", "texts")
    early = refused("report", "models/plain", "models/other", "--suite", "texts")
    assert early.message == "left out: other", "it has equal weights and no scores yet"
    found = document("eval", "models/plain", "models/other", "--suite", "texts")
    plain, other = found["configurations"]
    assert (plain["name"], other["name"]) == ("plain", "other")
    assert plain["digest"] != other["digest"]
    mine, theirs = texts_of(world, plain["digest"]), texts_of(world, other["digest"])
    assert sum(a != b for a, b in zip(mine, theirs, strict=True)) >= 12
    call("report", "models/plain", "models/other", "--suite", "texts")
    shown = json.loads(Path("reports/report.json").read_text("utf-8"))
    assert [(c["name"], c["aliases"]) for c in shown["configurations"]] == [("plain", []), ("other", [])]


def test_choices_are_scored_once_for_both(world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    document("eval", "models/plain", "--suite", "mini")

    monkeypatch.setattr("workbench.run.materialize.materialize", lambda *_: pytest.fail("scored again"))
    found = document("eval", "models/plain", "models/other", "--suite", "mini")
    assert [c["name"] for c in found["configurations"]] == ["plain", "other"]
    assert found["configurations"][0]["tasks"] == found["configurations"][1]["tasks"]
    assert found["configurations"][0]["digest"] != found["configurations"][1]["digest"]
    assert len(list((world.path / "runs/scores").glob("mini-*/*.jsonl.gz"))) == 2  # items, and one file of rows
    call("report", "models/plain", "models/other", "--suite", "mini")
    shown = json.loads(Path("reports/report.json").read_text("utf-8"))
    assert [r["verdict"] for r in shown["rows"]] == ["no item changed"]
    assert [c["aliases"] for c in shown["configurations"]] == [[], []]


def test_a_run_writes_and_records_the_bases_settings(world: Project) -> None:
    """The output inherits the base's file; another one is another run."""
    base = world.path / "models/plain"
    recipe = "base: models/plain\nbricks: {other: models/other}\nsteps: [{merge: average}]\n"
    first = world.run(recipe)
    assert json.loads((Path(first["run"]) / "run.json").read_text())["generation"] == {}
    given = {"eos_token_id": json.loads((base / "config.json").read_text())["eos_token_id"], "top_k": 3}
    (base / "generation_config.json").write_text(json.dumps(given))
    second = world.run(recipe)
    assert second["run"] != first["run"]
    assert second["configuration"] == first["configuration"]  # the weights
    assert json.loads((Path(second["run"]) / "run.json").read_text())["generation"] == {"top_k": 3}
    assert json.loads((Path(second["model"]) / "generation_config.json").read_text()) == given
    edit_json(base / "generation_config.json", pad_token_id=1)  # decides no text, but it is copied
    third = world.run(recipe)
    assert third["run"] != second["run"]
    assert third["configuration"] == second["configuration"]
