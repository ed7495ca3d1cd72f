"""`route add`, `route rm` and `route ls`: the router is that of a fit with the other bricks, and a change is whole or not there."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.commands import call, document, refused
from worlds.encoders import sentence_encoder
from worlds.project import Project
from worlds.routing import prompts, write_prompts

import workbench
from workbench.ground.manifest import harm
from workbench.run import rerouting
from workbench.run.opened import resolve_model
from workbench.run.routers import SavedRouter

NAMES = ("one", "two", "three")
CARD = "version: 1\nname: NAME\nkind: adapter\nbase:\n  id: base\nscores: []\n"


def recipe(names: tuple[str, ...], method: str = "ridge") -> str:
    bricks = ", ".join(f"{name}: bricks/{name}" for name in names)
    return f"bricks: {{{bricks}}}\nsteps: [{{route: {method}, calibration: 'calibration/{{brick}}.jsonl', samples: 16}}]\n"


@pytest.fixture
def world(project: Project, cwd: Path) -> Project:
    linked = project.path / "bricks"
    target = linked.resolve()
    linked.unlink()
    for name in NAMES:
        shutil.copytree(target / name, linked / name)
        (linked / name / "brick.yaml").write_text(CARD.replace("NAME", name), "utf-8")
    write_prompts(project.path / "calibration", {"one": 0, "two": 1, "three": 2}, count=16, templates=8)
    return project


def configuration(project: Project, names: tuple[str, ...], method: str = "ridge") -> Path:
    """The configuration of a recipe with some bricks."""
    return Path(project.run(recipe(names, method), f"{method[:5]}-{'-'.join(names)}.yaml")["run"]) / "configuration"


def added(place: Path, name: str = "three", *options: str) -> dict[str, Any]:
    file = f"calibration/{name}.jsonl"
    found: dict[str, Any] = document("route", "add", str(place), name, "--calibration", file, "--device", "cpu", *options)
    return found


def same(place: Path, expected: Path) -> None:
    """Both routers have the same numbers, and choose and answer alike."""
    one, two = (SavedRouter(path) for path in (place, expected))
    assert one.record.record == two.record.record
    assert one.record.settings == two.record.settings
    assert one.record.tensors == two.record.tensors
    assert [row.to_dict() for row in one.record.bricks] == [row.to_dict() for row in two.record.bricks]
    assert one.calibration().keys() == two.calibration().keys()
    tokenizer = workbench.load_tokenizer(str(place))
    tokens = tokenizer([text for number in range(3) for text in prompts(number, seed=1)], return_tensors="pt")
    logits = [workbench.load(str(path))(**tokens).logits for path in (place, expected)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("method", ["ridge", "centroid", "ridge, encoder: encoders/small", "centroid, encoder: encoders/small"])
def test_a_brick_added_or_removed_gives_the_router_of_the_recipe_with_it_or_without(world: Project, method: str) -> None:
    sentence_encoder(world.path / "encoders" / "small")
    place, whole = configuration(world, ("one", "two"), method), configuration(world, NAMES, method)
    change = added(place)
    assert (change["action"], change["brick"]) == ("add", "three")
    same(place, whole)
    assert not harm(place.parent, digests=True), "the run is sealed again"
    assert (place / "adapters" / "three" / "adapter_model.safetensors").is_file()
    document("route", "rm", str(place), "three")
    same(place, configuration(world, ("one", "two"), method))
    assert not (place / "adapters" / "three").exists()
    assert len(list(place.glob("*.safetensors"))) == 2
    document("route", "rm", str(whole), "one")
    same(whole, configuration(world, ("two", "three"), method))
    assert not harm(whole.parent, digests=True)


def test_the_base_does_not_run_where_the_card_has_the_states(world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    place, whole = configuration(world, ("one", "two")), configuration(world, NAMES)
    document("route", "measure", "three", "--calibration", "calibration/three.jsonl", "--device", "cpu")
    monkeypatch.setattr(rerouting, "live_model", lambda *_: pytest.fail("the base is loaded"))
    added(place)
    one, two = SavedRouter(place).record, SavedRouter(whole).record
    assert (one.record, one.tensors) == (two.record, two.tensors)


def test_a_sentence_encoder_is_part_of_the_router(world: Project) -> None:
    folder = sentence_encoder(world.path / "encoders" / "small")
    place = configuration(world, NAMES, "ridge, encoder: encoders/small")
    plain = configuration(world, NAMES)
    one, two = (workbench.load(str(path)).routing for path in (place, plain))
    rows = workbench.load_tokenizer(str(place))(prompts(1, seed=2))["input_ids"]
    with_it, without = one.decide(rows), two.decide(rows)
    assert not torch.allclose(with_it.confidence, without.confidence)
    assert [row["chosen"] for row in document("route", "explain", str(place), prompts(1, seed=2)[0])["tokens"]]
    settings = SavedRouter(place).record.settings
    assert settings["encoder"] == {"path": "encoders/small", "digest": one.router.encoder.digest}
    assert "encoder" not in SavedRouter(plain).record.settings
    (folder / "model.safetensors").rename(folder / "moved")
    error = refused("route", "explain", str(place), "text")
    assert "sentence encoder encoders/small: model.safetensors is missing" in error.message
    error = refused("run", str(world.path / "recipes" / "ridge-one-two-three.yaml"), "--set", "0.encoder=encoders/other")
    assert "encoders/other" in error.message


def test_list_says_what_was_changed(world: Project, tmp_path: Path) -> None:
    place = configuration(world, ("one", "two"))
    assert resolve_model(str(place), tmp_path).resolved.recipe.project == tmp_path, "another project scores it with its own tasks"
    added(place, "three", "--description", "sums")
    document("route", "rm", str(place), "one")
    found = document("route", "ls", str(place.parent))
    assert [(row["name"], row["prompts"], row["description"]) for row in found["bricks"]] == [
        ("two", 16, None),
        ("three", 16, "sums"),
    ]
    assert [(row["action"], row["brick"]) for row in found["changes"]] == [("add", "three"), ("rm", "one")]
    text = call("route", "ls", str(place)).output
    assert "added three" in text
    assert "removed one" in text


@pytest.mark.parametrize("action", ["add", "rm"])
def test_a_change_that_is_cut_off_leaves_the_earlier_router(world: Project, action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = configuration(world, ("one", "two") if action == "add" else NAMES)
    before = workbench.load(str(place)).routing.bricks

    def cut(*_args: Any, **_more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("workbench.run.routers.write_json", cut)
        call(
            "route",
            action,
            str(place),
            "three",
            *(["--calibration", "calibration/three.jsonl"] if action == "add" else []),
            code=130,
        )
    assert workbench.load(str(place)).routing.bricks == before
    document("route", action, str(place), "three", *(["--calibration", "calibration/three.jsonl"] if action == "add" else []))
    assert ("three" in workbench.load(str(place)).routing.bricks) == (action == "add")
    assert not harm(place.parent, digests=True)


def test_a_changed_router_is_exported(world: Project, tmp_path: Path) -> None:
    place = configuration(world, NAMES)
    document("route", "rm", str(place), "three")
    document("export", str(place), "--for", "vllm", "--served-base", "base", "-o", str(tmp_path / "served"), "--device", "cpu")
    assert SavedRouter(tmp_path / "served").router.bricks == ("one", "two")
    assert sorted(file.name for file in (tmp_path / "served" / "adapters").iterdir()) == ["one", "two"]


def test_what_a_failed_change_leaves_goes_with_the_next_command(world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    place = configuration(world, NAMES)

    remove = shutil.rmtree

    def fail(folder: Path, *args: Any, **more: Any) -> None:
        if Path(folder).name == "three":
            raise OSError(errno.EIO, "Input/output error")
        remove(folder, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(rerouting.shutil, "rmtree", fail)
        with pytest.raises(OSError, match="Input/output error"):
            rerouting.remove_brick(place, "three")
    assert (place / "adapters" / "three").is_dir()
    assert "the router has no brick 'three'" in refused("route", "rm", str(place), "three").message
    assert sorted(file.name for file in (place / "adapters").iterdir()) == ["one", "two"]
    assert not harm(place.parent, digests=True)
    same(place, configuration(world, ("one", "two")))


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["add", "PLACE", "one"], "the router has a brick 'one' already", "NAME="),
        (["add", "PLACE", "no-such"], "no brick 'no-such'", "brick ls"),
        (["rm", "PLACE", "three"], "the router has no brick 'three'", "one, two"),
        (["rm", "PLACE", "two"], "without 'two' there is one brick, and nothing to choose among", "merge: linear"),
        (["add", "PLACE", "bad name=three"], "'bad name': a brick's name must consist of lower-case letters", "NAME="),
        (["ls", "base"], "base has no router", "route step"),
    ],
)
def test_what_cannot_be_done_is_refused(world: Project, words: list[str], message: str, hint: str) -> None:
    place = configuration(world, ("one", "two"))
    more = ["--calibration", "calibration/three.jsonl"] if words[0] == "add" else []
    before = (place / "routing.json").read_bytes()
    error = refused("route", *(str(place) if word == "PLACE" else word for word in words), *more)
    assert message in error.message
    assert hint in str(error.hint)
    assert (place / "routing.json").read_bytes() == before


def test_a_router_of_words_is_fitted_by_its_recipe_alone(world: Project) -> None:
    error = refused("route", "rm", str(configuration(world, NAMES, "text")), "one")
    assert "its router has no states to be fitted on again: `text` reads none" in error.message


def test_a_brick_of_another_model_and_changed_states_are_refused(world: Project) -> None:
    place = configuration(world, ("one", "two"))
    file = place / "calibration.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    error = refused("route", "add", str(place), "three", "--calibration", "calibration/three.jsonl")
    assert "calibration.safetensors" in error.message
    assert "is not the one that routing.json was written with" in error.message
