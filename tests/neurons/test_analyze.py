"""`analyze` on a tiny model: its files and page, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from worlds.commands import call, document, refused
from worlds.dictionaries import random_autoencoder
from worlds.jsonl import write_jsonl
from worlds.project import Project


def rows(functions: tuple[str, ...] = ("low", "high"), tasks: int = 4, each: int = 3) -> list[dict[str, Any]]:
    """Words of one part of the vocabulary for each function."""
    return [
        {
            "prompt": " ".join(f"w{20 * f + (7 * t + 3 * i + k) % 20}" for k in range(6)),
            "response": "w1 w2",
            "function": name,
            "task": f"{name}{t}",
        }
        for f, name in enumerate(functions)
        for t in range(tasks)
        for i in range(each)
    ]


@pytest.fixture
def world(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(project.path)
    write_jsonl(project.path / "texts.jsonl", rows())
    return project


def test_functions_get_a_verdict_pages_tables_and_sets(world: Project) -> None:
    printed = document("analyze", "base", "--data", "texts.jsonl", "-o", "found")
    found = world.path / "found"
    assert set(printed) == {"functions", "warnings"}
    answer = printed["functions"]
    assert json.loads((found / "functions.json").read_text("utf-8")) == answer
    for row in answer["functions"]:
        own = answer["ablation"]["functions"].index(row["function"])
        assert row["change"] == answer["ablation"]["changes"][own][own]
        assert row["matched"][0] == answer["ablation"]["controls"]["matched"]["changes"][own][own]
        assert len(set(row["matched"])) == 5
        assert row["found"] == sum(row["found_layers"].values())
        assert row["verdict"] == ("found" if row["found"] else "not found")
        assert row["tasks"] == 4
    assert answer["test"]["planned"]["4"] == pytest.approx(answer["functions"][0]["smallest_effect"])
    page = (found / "index.html").read_text("utf-8")
    assert all(f'<section id="{name}">' in page for name in ("functions", "ablation", "scores"))
    assert (found / "layers.csv").read_text("utf-8").startswith("split,function,layer,best,top,mean\n")
    assert (found / "ablation.csv").read_text("utf-8").startswith("sets,removed,evaluated,change,low,high\nset,low,low,")
    card = yaml.safe_load((found / "sets" / "low" / "brick.yaml").read_text("utf-8"))
    assert (card["kind"], card["functions"], card["base"]["digest"]) == ("neurons", ["low"], answer["digest"])
    shown = document("brick", "show", str(found / "sets" / "low"))
    assert shown["neurons"]["size"] == sum(layer["size"] for layer in shown["neurons"]["layers"].values())


def test_each_function_has_a_page_of_its_neurons(world: Project) -> None:
    call("analyze", "base", "--data", "texts.jsonl", "-o", "found")
    profiles = json.loads((world.path / "found" / "profiles.json").read_text("utf-8"))
    for name in ("low", "high"):
        page = (world.path / "found" / f"{name}.html").read_text("utf-8")
        own = [p for p in profiles["neurons"] if name in p["functions"]]
        assert len(own) >= 5
        assert all(f'id="n-{p["layer"]}-{p["neuron"]}"' in page for p in own)
        assert [item["prompt"] in page for item in profiles["flipped"][name]] == [True] * 3
    assert '<a href="low.html">low</a>' in (world.path / "found" / "index.html").read_text("utf-8")


def test_a_function_may_be_called_like_another_page(world: Project) -> None:
    write_jsonl(world.path / "named.jsonl", rows(functions=("Index", "chosen")))
    call("analyze", "base", "--data", "named.jsonl", "-o", "found")
    found = world.path / "found"
    assert '<section id="functions">' in (found / "index.html").read_text("utf-8")
    assert all(f'href="{name}_.html"' in (found / "index.html").read_text("utf-8") for name in ("index", "chosen"))
    assert "<h1>Index in " in (found / "index_.html").read_text("utf-8")
    assert not (found / "chosen.html").exists()


def test_a_neuron_is_looked_at(world: Project) -> None:
    printed = document("analyze", "base", "--data", "texts.jsonl", "-o", "found", "--neuron", "1.3", "--neuron", "0.2")
    assert [(p["layer"], p["neuron"]) for p in printed["chosen"]["neurons"]] == [(1, 3), (0, 2)]
    page = (world.path / "found" / "chosen.html").read_text("utf-8")
    assert 'id="n-1-3"' in page
    assert 'href="chosen.html#n-1-3"' in (world.path / "found" / "index.html").read_text("utf-8")
    for name, message in (
        ("7", "expected LAYER.NEURON"),
        ("9.1", "no such neuron; it has layers 0, 1"),
        ("1.99999", "in layer 1"),
    ):
        error = refused("analyze", "base", "--data", "texts.jsonl", "--neuron", name)
        assert message in error.message
        assert error.exit_code == 2


def test_a_dictionary_stands_beside_the_neurons_of_its_layer(world: Project) -> None:
    width = json.loads((world.path / "base" / "config.json").read_text("utf-8"))["hidden_size"]
    random_autoencoder(world.path / "sae", width)
    command = ("analyze", "base", "--data", "texts.jsonl", "-o", "found", "--dictionary")
    printed = document(*command, "sae")["features"]
    assert json.loads((world.path / "found" / "features.json").read_text("utf-8")) == printed
    assert printed["dictionary"]["layer"] == 1
    assert [one["family"] for one in printed["families"]] == ["neurons", "features", "random", "random_encoder", "singular"]
    page = (world.path / "found" / "index.html").read_text("utf-8")
    assert '<section id="features">' in page
    assert "At equal count, the dictionary&#39;s features" in page
    assert "no dictionary" in refused(*command, "nowhere").message
    random_autoencoder(world.path / "wide", width + 1)
    assert f"{width + 1}" in refused(*command, "wide").message


def test_the_project_s_texts_are_the_default(world: Project) -> None:
    error = refused("analyze", "base")
    assert error.message.startswith("evals/abilities.jsonl: this project has no labelled texts")
    assert "--data" in (error.hint or "")
    (world.path / "evals").mkdir(exist_ok=True)
    (world.path / "texts.jsonl").rename(world.path / "evals" / "abilities.jsonl")
    assert document("analyze", "base", "--sparsity")["sparsity"]["data"]["file"] == "evals/abilities.jsonl"


def test_several_questions_share_a_page(world: Project) -> None:
    options = ("base", "--data", "texts.jsonl", "-o", "found")
    printed = document("analyze", *options, "--sparsity", "--partition", "kmeans", "--experts", "4")
    assert set(printed) == {"sparsity", "partition", "warnings"}
    page = (world.path / "found" / "index.html").read_text("utf-8")
    assert all(f'<section id="{name}">' in page for name in ("sparsity", "partition"))


def test_a_recipe_s_result_is_analyzed(world: Project) -> None:
    world.write("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic, bricks: {one: 3.0}}]\n", "merged.yaml")
    base, merged = (
        document("analyze", model, "--data", "texts.jsonl", "-o", f"of-{i}")["functions"]
        for i, model in enumerate(("base", "recipes/merged.yaml"))
    )
    assert base["digest"] != merged["digest"]
    assert base["layers"] != merged["layers"]


def test_functions_may_have_any_name(world: Project) -> None:
    """Names become folders inside the results, and two names of one folder are refused."""
    write_jsonl(world.path / "named.jsonl", rows(functions=("Ethics and Moral", "../outside")))
    before = set(world.path.iterdir())
    call("analyze", "base", "--data", "named.jsonl", "-o", "found")
    assert sorted(p.name for p in (world.path / "found" / "sets").iterdir()) == ["ethics-and-moral", "outside"]
    assert {p.name for p in set(world.path.iterdir()) - before} <= {"found", ".workbench"}
    assert yaml.safe_load((world.path / "found" / "sets" / "outside" / "brick.yaml").read_text("utf-8"))["functions"] == [
        "../outside"
    ]
    assert (world.path / "found" / "outside.html").is_file()
    write_jsonl(world.path / "same.jsonl", rows(functions=("math", "Math")))
    assert "differ only in case or signs" in refused("analyze", "base", "--data", "same.jsonl").message


def test_a_memory_has_no_neurons(world: Project) -> None:
    write_jsonl(world.path / "facts.jsonl", [{"prompt": "{subject} is", "subject": "w3", "target": "w4"}])
    world.write("bricks: {}\nsteps: [{edit: memory, facts: facts.jsonl, min_efficacy: 0}]\n", "remembers.yaml")
    assert "ends in a memory" in refused("analyze", "recipes/remembers.yaml", "--data", "texts.jsonl").message


def test_one_task_per_function_has_no_power(world: Project) -> None:
    """The terminal, the document and the page say so, and how many tasks would have."""
    write_jsonl(world.path / "one.jsonl", rows(tasks=1, each=8))
    result = call("analyze", "base", "--data", "one.jsonl", "-o", "found")
    assert "has one task" in result.stderr
    assert result.stdout.count("no power") == 4, "a sentence and a row of each function"
    stored = json.loads((world.path / "found" / "functions.json").read_text("utf-8"))
    assert [(row["verdict"], row["smallest_effect"]) for row in stored["functions"]] == [("no power", None)] * 2
    assert (stored["test"]["tasks"], stored["test"]["planned"]["4"] > stored["test"]["planned"]["12"]) == (2, True)
    page = (world.path / "found" / "index.html").read_text("utf-8")
    assert "low: no power. With 1 task, no effect is large enough to be told from the wording of a task." in page


def test_a_result_of_an_older_version_is_left_off_the_page(world: Project) -> None:
    call("analyze", "base", "--data", "texts.jsonl", "-o", "found")
    path = world.path / "found" / "functions.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "version": 1, "test": None}), "utf-8")
    result = call("analyze", "base", "--data", "texts.jsonl", "-o", "found", "--sparsity")
    assert "so the page leaves it out; analyze the model again" in " ".join(result.stderr.split())
    page = (world.path / "found" / "index.html").read_text("utf-8")
    assert '<section id="sparsity">' in page
    assert '<section id="functions">' not in page


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({}, True),
        ({"digest": "another model"}, False),
        ({"data": {"file": "texts.jsonl", "digest": "earlier"}}, False),
        ({"data": {"file": "others.jsonl", "digest": "earlier"}}, True),
    ],
)
def test_a_page_joins_analyses_of_one_model_and_one_content_of_a_file(
    changed: dict[str, Any], shown: bool, world: Project
) -> None:
    options = ("base", "--data", "texts.jsonl", "-o", "found")
    call("analyze", *options, "--partition", "kmeans", "--experts", "4")
    path = world.path / "found" / "partition.json"
    stored = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**stored, **changed, "data": stored["data"] | changed.get("data", {})}), "utf-8")
    call("analyze", *options)
    page = (world.path / "found" / "index.html").read_text("utf-8")
    assert '<section id="functions">' in page
    assert ('<section id="partition">' in page) is shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(function=None), "expected the function as text"),
        (lambda r: r.update(prompt=" "), "expected a text in 'prompt'"),
    ],
)
def test_bad_rows_are_named(world: Project, change: Any, message: str) -> None:
    texts = rows()
    change(texts[4])
    write_jsonl(world.path / "bad.jsonl", texts)
    error = refused("analyze", "base", "--data", "bad.jsonl")
    assert message in error.message
    assert "bad.jsonl:5" in error.message
    assert not Path("runs", "neurons").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--experts", "4"), "--experts is read by --partition, which was not asked"),
        (("--steps", "4", "--sparsity"), "--steps is read by --facts, which was not asked"),
        (("--share", "0.1", "--neuron", "0.1"), "--share is read by the main question alone, which was not asked"),
        (("--facts", "facts.jsonl"), "--data is read by a question about labelled texts, which was not asked"),
    ],
)
def test_options_that_no_question_reads_are_refused(world: Project, options: tuple[str, ...], message: str) -> None:
    error = refused("analyze", "base", "--data", "texts.jsonl", *options)
    assert (error.message, error.exit_code) == (message, 2)


def test_a_missing_file_is_an_error_before_any_work(world: Project) -> None:
    assert "no such file" in refused("analyze", "base", "--data", "missing.jsonl").message
