"""`brick advise`: overlaps beside the definition, each regime, contradictions, stored scores, the recipe that it writes, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worlds.commands import call, document, refused
from worlds.project import Project
from worlds.suites import clustered_suite
from worlds.tiny import baked, edit_json, save_adapter, save_model, tensors_of

from workbench.advice import pools
from workbench.advice.evidence import scored_before
from workbench.api.naming import load_named
from workbench.api.scoring import compare
from workbench.ground import yamldoc
from workbench.resolve.resolve import resolve
from workbench.scores.store import ScoreStore


@pytest.fixture
def folder(project: Project, cwd: Path) -> Path:
    """A project that is the working directory, with texts of the bricks, and an adapter `small` whose delta is a tenth of `two`."""
    from safetensors.torch import load_file, save_file

    (project.path / "more" / "small").mkdir(parents=True)
    made = project.path / "bricks" / "two"
    (project.path / "more" / "small" / "adapter_config.json").write_bytes((made / "adapter_config.json").read_bytes())
    tensors = load_file(made / "adapter_model.safetensors")
    save_file(
        {n: t * 0.1 if "lora_B" in n else t for n, t in tensors.items()},
        project.path / "more" / "small" / "adapter_model.safetensors",
    )
    rows = [{"prompt": f"say w{i}", "completion": f"w{i + 1}"} for i in range(10)]
    other = [{"prompt": f"Say  w{i}", "completion": f"w{i + 1 if i < 2 else i + 20}"} for i in range(9)]
    for name, lines in (("one", rows), ("two", other), ("three", [{"prompt": "tell", "completion": "w1"}])):
        (project.path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return project.path


def advice(*names: str, **files: str) -> Any:
    """The document of `brick advise` on the base of the project."""
    texts = [part for name, file in files.items() for part in ("--texts", f"{name}={file}")]
    return document("brick", "advise", *names, "--base", "base", *texts, "--json")


def matrices(folder: Path, brick: str) -> dict[str, np.ndarray]:
    """The deltas of the layers' matrices, with the adapter merged by PEFT."""
    base = tensors_of(folder / "base")
    tuned = tensors_of(folder / "bricks" / brick) if brick == "full" else baked(folder / "base", folder / "bricks" / brick)
    names = [n for n, t in base.items() if t.dim() == 2 and ".layers." in n]
    return {n: (tuned[n].double() - base[n].double()).numpy() for n in names}


def test_numbers_are_those_of_the_definitions(folder: Path) -> None:
    """RV and cosine of a checkpoint and two adapters, whose deltas are recomputed dense."""
    found = advice("one", "two", "full")
    deltas = {name: matrices(folder, name) for name in ("one", "two", "full")}
    for pair in found["pairs"]:
        one, two = deltas[pair["one"]], deltas[pair["two"]]
        changed = [n for n in one if one[n].any() or two[n].any()]
        values = [_rv(one[n], two[n]) for n in changed]
        assert pair["rv"] == pytest.approx(np.mean(values), rel=2e-2)  # PEFT's merge is rounded to bfloat16
    weights = {row["name"]: row["weight"] for row in found["bricks"]}
    by_pair = {frozenset((p["one"], p["two"])): p["rv"] for p in found["pairs"]}
    for name, weight in weights.items():
        assert weight == pytest.approx(1 / (1 + sum(rv for names, rv in by_pair.items() if name in names)))


def _rv(one: np.ndarray, two: np.ndarray) -> float:
    own, other = (np.linalg.norm(x.T @ x) for x in (one, two))
    return float(np.linalg.norm(one.T @ two) ** 2 / (own * other)) if own and other else 0.0


# -- regimes


def test_one_brick_and_copies(folder: Path) -> None:
    """A copy and a negation of an adapter, by their weights."""
    from safetensors.torch import load_file, save_file

    own = folder / "more"
    for name, factor in (("copy", 1.0), ("negative", -1.0), ("nothing", 0.0)):
        (own / name).mkdir(parents=True)
        (own / name / "adapter_config.json").write_bytes((folder / "bricks" / "one" / "adapter_config.json").read_bytes())
        tensors = load_file(folder / "bricks" / "one" / "adapter_model.safetensors")
        save_file({n: t * factor if "lora_B" in n else t for n, t in tensors.items()}, own / name / "adapter_model.safetensors")
    assert advice("one")["regime"] == "single"
    assert advice("one", "more/copy")["regime"] == "same"
    assert advice("one", "more/negative")["regime"] == "opposed"
    assert advice("one", "more/negative")["pairs"][0]["rv"] == pytest.approx(1)
    nothing = advice("more/nothing", "one")
    assert (nothing["regime"], nothing["step"]) == ("single", None)
    assert nothing["says"] == "Nothing to merge: nothing does not change the base."
    found = advice("more/negative", "one", "more/copy", "more/small", "more/nothing")
    assert {row["name"]: row["because"].partition(":")[0] for row in found["left_out"]} == {
        "nothing": "does not change the base",
        "copy": "is the same brick as one",
        "negative": "points against one (cosine -1.00)",
    }
    assert set(found["step"]["bricks"]) == {"one", "small"}


# -- bricks that are left out, norms


def test_unequal_norms_are_warned_of_and_weighted(folder: Path) -> None:
    """The written recipe has weights that are inversely proportional to the norms, and a sweep whose points are valid."""
    found = advice("one", "more/small")
    norms = {row["name"]: row["relative_norm"] for row in found["bricks"]}
    weights = found["step"]["bricks"]
    assert norms["one"] * weights["one"] == pytest.approx(norms["small"] * weights["small"], rel=1e-3)
    assert f"one is {norms['one'] / norms['small']:.1f} times as long as that of small" in found["warnings"][0]
    call("brick", "advise", "one", "more/small", "--base", "base", "--write", "recipes/even.yaml")
    recipe = yamldoc.load(folder / "recipes" / "even.yaml").data
    assert recipe["steps"][0]["bricks"] == weights
    assert recipe["sweep"] == {"mix.lambda": found["sweep"]} == {"mix.lambda": [0.5, 1, 1.5, 2]}
    assert len(document("plan", "recipes/even.yaml", "--device", "cpu", "--json")) == 4
    assert advice("one", "two")["warnings"] == []
    assert pools.lambdas({"merge": "tsv", "weights": "auto", "bricks": ["a", "b"]}) == (0.6, 0.8, 1)
    assert pools.equalized({"merge": "average"}, {"a": 0.5, "b": 2}) == {
        "merge": "task_arithmetic",
        "bricks": {"a": 0.25, "b": 1},
    }


# -- contradictions


def test_contradictions_are_found_in_texts(folder: Path) -> None:
    """Nine prompts are shared but for case and spaces; two of them have the same answer. The other brick shares none."""
    found = advice("one", "two", "three", one="one.jsonl", two="two.jsonl", three="three.jsonl")
    shared = {(p["one"], p["two"]): p["shared"] for p in found["pairs"]}
    assert (shared["one", "two"]["prompts"], shared["one", "two"]["different"]) == (9, 7)
    assert shared["one", "two"]["example"] == ["say w2", "w3", "w22"]
    assert shared["one", "three"]["prompts"] == 0
    assert (found["regime"], found["step"]) == ("contradicting", None)
    assert any("route" in reason for reason in found["reasons"])
    printed = call("brick", "advise", "one", "two", "--base", "base", "--texts", "one=one.jsonl", "--texts", "two=two.jsonl")
    assert "'say w2': one 'w3', two 'w22'" in printed.stdout
    assert "No merge resolves this" in printed.stdout


def test_advice_on_texts(folder: Path) -> None:
    found = advice("one", "two", one="one.jsonl")
    assert found["pairs"][0]["shared"] is None
    assert any("Contradictions of two" in line and "--texts two=FILE.jsonl" in line for line in found["unknown"])
    named = ("brick", "advise", "one", "more/small", "--base", "base", "--json", "--texts", "one=one.jsonl")
    all_have, one_lacks = document(*named, "--texts", "small=three.jsonl"), document(*named)
    assert all_have["step"] == one_lacks["step"]
    assert all_have["step"]["merge"] == "tsv"
    assert any("featcal" in reason for reason in all_have["reasons"])
    assert not any("featcal" in reason for reason in one_lacks["reasons"])


# -- the recipe and stored scores


def test_recipes_of_advice_run_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The written recipe is valid, gives an adapter, and says why; a second call does not overwrite it."""
    call("brick", "advise", "one", "more/small", "--base", "base", "--write", "recipes/mix.yaml")
    text = (folder / "recipes" / "mix.yaml").read_text("utf-8")
    assert text.startswith("# workbench eval recipes/mix.yaml\n# ")
    record = json.loads(call("run", "recipes/mix.yaml[lambda=1]", "--device", "cpu", "--json").stdout)
    assert list(Path(record["run"]).rglob("adapter_model.safetensors"))
    error = refused("brick", "advise", "one", "more/small", "--base", "base", "--write", "recipes/mix.yaml")
    assert "already exists" in error.message
    assert (folder / "recipes" / "mix.yaml").read_text("utf-8") == text
    # The paths in the recipe start from its project, not from the working directory; a directory outside it stays absolute.
    (folder / "inner").mkdir()
    outside = folder.parent / f"{folder.name}-outside"
    outside.symlink_to(folder / "more" / "small", target_is_directory=True)
    other = folder.parent / f"{folder.name}-other" / "recipes"
    other.mkdir(parents=True)
    monkeypatch.chdir(folder / "inner")
    names = ("../more/small", str((folder / "bricks" / "one").resolve()))
    call("brick", "advise", *names, "--base", "../base", "--write", "../recipes/near.yaml")
    call("brick", "advise", *names, "--base", "../base", "--write", str(other / "far.yaml"))
    near = yamldoc.load(folder / "recipes" / "near.yaml").data
    assert near["bricks"]["small"] == "more/small"
    for file in (folder / "recipes" / "near.yaml", other / "far.yaml"):
        assert resolve(load_named(f"{file}[lambda=1]")).bricks.keys() == {"small", "one"}


def test_what_does_not_count_and_where_no_recipe_is_written(folder: Path) -> None:
    """Two adapters on one layer each: their smallest layer is one that they change, and not 0 of the others."""
    for name, seed in (("left", 5), ("right", 6)):
        save_adapter(folder / "base", folder / "more" / name, seed=seed, layers_to_transform=[1])
    found = advice("more/left", "more/right", "one")
    pair = next(p for p in found["pairs"] if {p["one"], p["two"]} == {"left", "right"})
    assert pair["rv_lowest_layer"] == pair["rv_highest_layer"] == pytest.approx(pair["rv"])
    assert pair["rv"] > 0
    texts = ("--texts", "one=one.jsonl", "--texts", "two=two.jsonl")
    error = refused("brick", "advise", "one", "two", "--base", "base", *texts, "--write", "recipes/no.yaml")
    assert "contradict each other" in error.message
    assert not (folder / "recipes" / "no.yaml").exists()


def test_stored_scores_of_the_same_bricks_are_listed(
    project: Project, cwd: Path, score_once: Callable[[Project, str], None]
) -> None:
    """The best of the recipes with these bricks; another set of bricks, or another size of one, has no evidence."""
    clustered_suite(project)
    project.write(
        "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: linear, bricks: {one: 3, two: 1}}]\neval: [mini]\n",
        "tilt.yaml",
    )
    score_once(project, "tilt")
    found = advice("one", "two")["scored_before"]
    store = ScoreStore(project.path / "runs" / "scores")
    documents = [json.loads(p.read_text("utf-8")) for p in store.root.glob("*/*.json") if p.name != "plan.json"]
    mixed = {d["configuration"]["name"]: d for d in documents if len(d["configuration"]["parents"]) == 2}
    assert {row["name"] for row in found} == set(mixed)
    assert [row["value"] for row in found] == sorted((row["value"] for row in found), reverse=True)
    report = compare("tilt").comparison
    for row in found:
        own = report.configuration(row["name"])
        assert own is not None
        assert own.mean is not None
        assert row["value"] == own.mean.value
    settings = {row["name"]: (row["settings"], f"{100 * row['value']:.1f}".replace("-", "\N{MINUS SIGN}")) for row in found}
    assert settings["tilt"][0] == "linear (bricks {one: 3.0, two: 1.0})"
    printed = call("brick", "advise", "one", "two", "--base", "base").stdout
    assert f"scored here: tilt, {settings['tilt'][0]}: {settings['tilt'][1]} on suite mini, mean over 1 skill, " in printed
    sizes = dict(mixed["tilt"]["configuration"]["bricks"])
    assert scored_before(store, sizes)
    assert scored_before(store, {**sizes, "one": sizes["one"] + 1}) == []
    assert advice("one", "two", "three")["scored_before"] == []
    for path in store.root.glob("*/plan.json"):
        record = json.loads(path.read_text("utf-8"))
        tasks = {task: {**about, "lower": [about["primary"]]} for task, about in record["tasks"].items()}
        for change in ({"partial": True}, {"tasks": tasks}):
            path.write_text(json.dumps({**record, **change}), "utf-8")
            assert scored_before(store, sizes) == []


# -- a recipe instead of bricks


def test_recipes_and_commands_name_their_bricks(folder: Path) -> None:
    """The advice on a recipe is that on the bricks of its merges, under their names in the recipe, from any folder; `plan` names the command."""
    text = "version: 1\nbase: base\nbricks: {left: bricks/one, right: more/small, unused: bricks/two}\n"
    step = "steps: [{merge: ties, bricks: [left, right]}]\n"
    (folder / "recipes" / "pair.yaml").write_text(text + step, "utf-8")
    found = document("brick", "advise", "recipes/pair.yaml", "--json")
    (pair,) = found["pairs"]
    assert (pair["one"], pair["two"]) == ("left", "right")
    assert pair["rv"] == advice("one", "more/small")["pairs"][0]["rv"]
    planned = call("plan", "recipes/pair.yaml", "--device", "cpu")
    assert "advice: workbench brick advise recipes/pair.yaml" in planned.stdout + planned.stderr
    printed = call("brick", "advise", "recipes/pair.yaml")
    assert "workbench brick advise recipes/pair.yaml --write recipes/NAME.yaml" in printed.stdout + printed.stderr
    printed = call("brick", "advise", "one", "more/small", "--base", "base")
    assert "workbench brick advise one more/small --base base --write recipes/NAME.yaml" in printed.stdout + printed.stderr


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("base: base\n", "no step merges bricks"),
        (
            "base: {adapter: bricks/one, on: base}\nbricks: {a: bricks/two}\nsteps: [{merge: average}]\n",
            "a model with an adapter",
        ),
        ("base: base\nbricks: {a: recipes/plain.yaml, b: bricks/one}\nsteps: [{merge: average}]\n", "'a' is a recipe"),
    ],
)
def test_recipes_that_cannot_be_advised_on(folder: Path, lines: str, says: str) -> None:
    (folder / "recipes" / "plain.yaml").write_text("version: 1\nbase: base\n", "utf-8")
    (folder / "recipes" / "odd.yaml").write_text("version: 1\n" + lines, "utf-8")
    assert says in refused("brick", "advise", "recipes/odd.yaml").message
    assert "stands alone" in refused("brick", "advise", "recipes/odd.yaml", "one").message


# -- bad input


def test_bad_input(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def message(*arguments: str) -> str:
        return refused("brick", "advise", *arguments).message

    assert message("one", "one", "--base", "base") == "brick 'one' is named twice"
    assert "no brick 'nosuch'" in message("one", "nosuch", "--base", "base")
    assert "--texts x" in message("one", "two", "--base", "base", "--texts", "x")
    assert "no such brick" in message("one", "two", "--base", "base", "--texts", "six=one.jsonl")
    assert "missing.jsonl" in message("one", "two", "--base", "base", "--texts", "one=missing.jsonl")
    other = tmp_path_factory.mktemp("other")
    deep = save_model(other / "deep", layers=6, dtype=torch.float32)
    save_adapter(deep, other / "far", seed=9)
    assert "far" in message("one", str(other / "far"), "--base", "base")
    card = {"version": 1, "name": "elsewhere", "kind": "adapter", "base": {"id": "org/other", "digest": "0" * 32}}
    save_adapter(folder / "base", other / "elsewhere", seed=9)
    (other / "elsewhere" / "brick.yaml").write_text(json.dumps(card), "utf-8")
    assert "elsewhere" in message("one", str(other / "elsewhere"), "--base", "base")
    edit_json(other / "far" / "adapter_config.json", r=0)
    refused("brick", "advise", "one", str(other / "far"), "--base", "base")
