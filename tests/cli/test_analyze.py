"""`analyze` on a tiny model: its files and page, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from worlds.commands import call, document, refused
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


def test_all_writes_tables_sets_and_one_page(world: Project) -> None:
    printed = document("analyze", "all", "base", "--data", "texts.jsonl", "-o", "found")
    found = world.path / "found"
    assert set(printed) == {"functions", "sparsity", "ablation"}
    for name in ("functions", "sparsity", "ablation"):
        assert json.loads((found / f"{name}.json").read_text("utf-8"))["digest"] == printed[name]["digest"]
    page = (found / "index.html").read_text("utf-8")
    assert all(f'<section id="{name}">' in page for name in ("functions", "sparsity", "ablation"))
    assert (found / "layers.csv").read_text("utf-8").startswith("split,function,layer,best,top,mean\n")
    card = yaml.safe_load((found / "sets" / "low" / "brick.yaml").read_text("utf-8"))
    assert (card["kind"], card["functions"], card["base"]["digest"]) == ("neurons", ["low"], printed["functions"]["digest"])
    shown = document("brick", "show", str(found / "sets" / "low"))
    assert shown["neurons"]["size"] == sum(layer["size"] for layer in shown["neurons"]["layers"].values())


def test_ablate_takes_the_sets_of_the_same_model_and_texts(world: Project) -> None:
    error = refused("analyze", "ablate", "base", "--data", "texts.jsonl", "-o", "found")
    assert "no functions.json" in error.message
    assert "analyze functions" in (error.hint or "")
    call("analyze", "functions", "base", "--data", "texts.jsonl", "-o", "found")
    write_jsonl(world.path / "others.jsonl", rows(each=2))
    assert "chosen on other texts" in refused("analyze", "ablate", "base", "--data", "others.jsonl", "-o", "found").message
    world.write("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\n", "merged.yaml")
    assert "another model" in refused("analyze", "ablate", "recipes/merged.yaml", "--data", "texts.jsonl", "-o", "found").message
    table = document("analyze", "ablate", "base", "--data", "texts.jsonl", "-o", "found", "--items", "2")
    assert table["functions"] == ["low", "high"]
    assert set(table["controls"]) == {"random", "matched"}
    assert all(row[0] == row[0] for row in table["changes"])


def test_a_recipe_s_result_is_analyzed(world: Project) -> None:
    world.write("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic, bricks: {one: 3.0}}]\n", "merged.yaml")
    base, merged = (
        document("analyze", "functions", model, "--data", "texts.jsonl", "-o", f"of-{i}")
        for i, model in enumerate(("base", "recipes/merged.yaml"))
    )
    assert base["digest"] != merged["digest"]
    assert base["layers"] != merged["layers"]


def test_functions_may_have_any_name(world: Project) -> None:
    """Names become folders inside the results, and two names of one folder are refused."""
    write_jsonl(world.path / "named.jsonl", rows(functions=("Ethics and Moral", "../outside")))
    before = set(world.path.iterdir())
    call("analyze", "functions", "base", "--data", "named.jsonl", "-o", "found")
    assert sorted(p.name for p in (world.path / "found" / "sets").iterdir()) == ["ethics-and-moral", "outside"]
    assert {p.name for p in set(world.path.iterdir()) - before} <= {"found", ".workbench"}
    assert yaml.safe_load((world.path / "found" / "sets" / "outside" / "brick.yaml").read_text("utf-8"))["functions"] == [
        "../outside"
    ]
    table = document("analyze", "ablate", "base", "--data", "named.jsonl", "-o", "found", "--items", "2")
    assert table["functions"] == ["Ethics and Moral", "../outside"]
    write_jsonl(world.path / "same.jsonl", rows(functions=("math", "Math")))
    assert "differ only in case or signs" in refused("analyze", "functions", "base", "--data", "same.jsonl").message


def test_a_memory_has_no_neurons(world: Project) -> None:
    write_jsonl(world.path / "facts.jsonl", [{"prompt": "{subject} is", "subject": "w3", "target": "w4"}])
    world.write("bricks: {}\nsteps: [{edit: memory, facts: facts.jsonl, min_efficacy: 0}]\n", "remembers.yaml")
    assert "ends in a memory" in refused("analyze", "functions", "recipes/remembers.yaml", "--data", "texts.jsonl").message


def test_one_task_per_function_has_no_power(world: Project) -> None:
    """The table, the document and the page say so, instead of "none"."""
    write_jsonl(world.path / "one.jsonl", rows(tasks=1, each=8))
    result = call("analyze", "functions", "base", "--data", "one.jsonl", "-o", "found")
    assert "has one task" in result.stderr
    assert result.stdout.count("no power") == 3, "the sentence and both rows"
    stored = json.loads((world.path / "found" / "functions.json").read_text("utf-8"))
    assert [row["smallest_effect"] for row in stored["functions"]] == [None, None]
    assert stored["test"]["tasks"] == 2
    page = (world.path / "found" / "index.html").read_text("utf-8")
    assert "For low and high the test has no power: it needs more tasks." in page


def test_a_result_of_an_older_version_is_left_off_the_page(world: Project) -> None:
    call("analyze", "functions", "base", "--data", "texts.jsonl", "-o", "found")
    path = world.path / "found" / "functions.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "version": 1, "test": None}), "utf-8")
    options = ("base", "--data", "texts.jsonl", "-o", "found", "--items", "2")
    assert "functions.json: version" in refused("analyze", "ablate", *options).message
    result = call("analyze", "sparsity", *options)
    assert "Run `workbench analyze functions` again" in " ".join(result.stderr.split())
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
    call("analyze", "partition", *options, "--experts", "4")
    path = world.path / "found" / "partition.json"
    stored = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**stored, **changed, "data": stored["data"] | changed.get("data", {})}), "utf-8")
    call("analyze", "functions", *options)
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
    error = refused("analyze", "functions", "base", "--data", "bad.jsonl")
    assert message in error.message
    assert "bad.jsonl:5" in error.message
    assert not Path("runs", "neurons").exists()


def test_bad_options_are_errors_before_any_work(world: Project) -> None:
    assert "expected numbers" in refused("analyze", "sparsity", "base", "--data", "texts.jsonl", "--mask", "30,half").message
    assert "between 0 and 100" in refused("analyze", "sparsity", "base", "--data", "texts.jsonl", "--mask", "30,130").message
    assert "no such file" in refused("analyze", "functions", "base", "--data", "missing.jsonl").message
