"""The seal of results: alterations that `runs verify` finds, commands that notice a harmed run, and changes that are sealed again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from worlds.commands import call, document, refused
from worlds.project import Project
from worlds.tiny import edit_json, files_of

import workbench
from workbench.ground.errors import GateFailedError
from workbench.ground.manifest import MANIFEST, changing, harm, publish_sealed, read_manifest, reusable, seal, sha256_of

MODEL = (
    "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: task_arithmetic}]\noutput: {dtype: float32, shard_size: 50KB}\n"
)


@pytest.fixture
def run(project: Project, cwd: Path) -> Path:
    """A finished run, relative to the working directory, and its recipe `sum`."""
    return Path(project.run(MODEL, "sum.yaml")["run"]).relative_to(cwd)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def permute(file: Path) -> None:
    """Exchange the ids of two words, which changes no size."""
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [word for word, number in vocabulary.items() if number in (12, 13)]
    text = file.read_text().replace(f'"{first}"', '"\x00"').replace(f'"{second}"', f'"{first}"').replace('"\x00"', f'"{second}"')
    file.write_text(text)


def shard(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[1]


ALTERATIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "permuted tokenizer": (lambda model: permute(model / "tokenizer.json"), "tokenizer.json: expected SHA-256"),
    "deleted tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json: expected"),
    "generation config": (
        lambda model: (model / "generation_config.json").write_text('{"do_sample": true, "temperature": 9.0}'),
        "generation_config.json: expected",
    ),
    "chat template": (
        lambda model: (model / "chat_template.json").write_text("{}"),
        "chat_template.json: expected no such file",
    ),
    "pickle": (
        lambda model: (model / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01."),
        "pytorch_model.bin: expected no such file",
    ),
    "second safetensors": (
        lambda model: save_file(load_file(shard(model)), model / "model.safetensors"),
        "model.safetensors: expected no such file",
    ),
    "edited card": (lambda model: (model / "README.md").open("a").write("Better than all.\n"), "README.md: expected"),
    "flipped byte": (lambda model: flip(shard(model)), "of-"),
    "truncated model": (lambda model: shard(model).write_bytes(shard(model).read_bytes()[:-9]), "found"),
    "config": (lambda model: edit_json(model / "config.json", rms_norm_eps=0.5), "config.json: expected"),
    "deleted model": (lambda model: shutil.rmtree(model), "model: expected a folder, found nothing"),
    "hidden file": (lambda model: (model / ".x.py").write_text("1"), ".x.py: expected no such file"),
    "file in a new folder": (lambda model: _deep(model), "onnx/model.onnx: expected no such file"),
    "deleted manifest of the model": (lambda model: (model / MANIFEST).unlink(), f"model/{MANIFEST}: expected"),
    "deleted manifest of the run": (lambda model: (model.parent / MANIFEST).unlink(), f"{MANIFEST}: expected the manifest"),
    "damaged manifest": (lambda model: (model / MANIFEST).write_text("{"), "expected a manifest, found a damaged file"),
    "record": (lambda model: edit_json(model.parent / "run.json", seed=7), "run.json: expected"),
    "recipe": (lambda model: (model.parent / "recipe.yaml").open("a").write("# x\n"), "recipe.yaml: expected"),
}


def _deep(model: Path) -> None:
    (model / "onnx").mkdir()
    (model / "onnx" / "model.onnx").write_bytes(b"x")


@pytest.mark.parametrize("name", ALTERATIONS)
def test_runs_verify_finds_every_alteration_and_its_hint_makes_the_run_again(name: str, run: Path) -> None:
    alter, expected = ALTERATIONS[name]
    call("runs", "verify", run.name)
    alter(run / "model")
    error = refused("runs", "verify", run.name)
    assert expected in error.message
    assert error.exit_code == 3
    remove = ["rm", run.name] if "runs rm NAME" in str(error.hint) else []
    if remove:
        call("runs", *remove, "--yes")
    call("run", "recipes/sum.yaml")
    call("runs", "verify", run.name)


COMMANDS: dict[str, tuple[str, ...]] = {
    "runs verify": ("runs", "verify", "{name}"),
    "doctor": ("doctor",),
    "eval": ("eval", "{run}", "--suite", "none"),
    "eval of the model's folder": ("eval", "{run}/model", "--suite", "none"),
    "chat": ("chat", "{name}"),
    "chat with the model's folder": ("chat", "{run}/model"),
    "export": ("export", "{name}", "--for", "vllm", "-o", "served"),
    "export of the model's folder": ("export", "{run}/model", "--for", "vllm", "-o", "served"),
    "push": ("push", "{name}", "org/sum", "--license", "mit", "--dry-run"),
    "brick show": ("brick", "show", "{run}/model"),
    "plan with it as the base": ("plan", "recipes/on.yaml"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("harmed", ["truncated model", "pickle"])
def test_commands_notice_a_harmed_run(command: str, harmed: str, run: Path, project: Project) -> None:
    alter, expected = ALTERATIONS[harmed]
    alter(run / "model")
    project.write(f"base: {run}/model\nsteps: []\n", "on.yaml")
    words = [word.format(name=run.name, run=run) for word in COMMANDS[command]]
    if command == "doctor":
        result = call(*words, code=3)
        assert f"{run.name}: " in result.stdout
        assert expected in result.stdout
    else:
        assert expected in refused(*words).message


def test_runs_ls_shows_a_harmed_run(run: Path) -> None:
    ALTERATIONS["deleted tokenizer"][0](run / "model")
    assert [row["status"] for row in document("runs", "ls")] == ["broken"]
    assert "model/tokenizer.json: expected" in call("runs", "ls").stderr


@pytest.mark.parametrize("harmed", ["truncated model", "pickle", "deleted model", "deleted manifest of the run", "record"])
@pytest.mark.parametrize("to", [(), ("-o", "mine")])
def test_the_same_run_makes_a_broken_one_again(harmed: str, to: tuple[str, ...], run: Path) -> None:
    whole = files_of(run / "model")
    alter, expected = ALTERATIONS[harmed]
    alter(run / "model")
    broken = {name: data for name, data in files_of(run).items() if not name.startswith(".")}
    said = call("run", "recipes/sum.yaml", *to).stderr
    assert "finished before, but " in said
    assert expected in said
    assert f"moved to runs/broken/{run.name}, and made again" in said
    assert files_of(Path("runs/broken") / run.name) == broken, "nothing is lost"
    made = files_of(run / "model")
    assert {name: made[name] for name in whole if name != MANIFEST} == {n: d for n, d in whole.items() if n != MANIFEST}
    assert harm(run, digests=True) == []
    assert [row["name"] for row in document("runs", "ls")] == [run.name]
    assert not to or harm(Path("mine"), digests=True) == []
    assert "finished before: nothing to do" in call("run", "recipes/sum.yaml").stderr


def test_a_copy_is_sealed_by_itself(run: Path) -> None:
    call("run", "recipes/sum.yaml", "-o", "mine")
    assert files_of(Path("mine")) == files_of(run / "model")
    flip(shard(Path("mine")))
    assert [str(one).split(":")[0] for one in harm(Path("mine"), digests=True)] == [shard(Path("mine")).name]
    assert "expected SHA-256" in refused("export", "mine", "--for", "vllm", "-o", "served").message
    (Path("mine") / "x.txt").touch()
    with pytest.raises(GateFailedError, match=r"x\.txt: expected no such file"):
        workbench.load("mine", device="cpu")


def test_a_run_of_an_earlier_version_is_read_and_said_to_be_unsealed(run: Path, cwd: Path) -> None:
    for manifest in (run / MANIFEST, run / "model" / MANIFEST):
        manifest.unlink()
    record = json.loads((run / "run.json").read_text())
    del record["manifest"]
    (run / "run.json").write_text(json.dumps(record))
    told = "an earlier version wrote this run without"
    for words in (["runs", "ls"], ["run", "recipes/sum.yaml"], ["chat", run.name], ["runs", "verify", run.name]):
        assert told in call(*words).stderr, words
    assert "1 without" in call("doctor", code=(0, 3)).stdout
    assert "tensors are as recorded; nothing else could be compared" in call("runs", "verify", run.name).stderr
    flip(shard(run / "model"))
    assert "tensors differ from the record" in refused("runs", "verify", run.name).message


def test_the_manifest_has_the_sha256_of_all_files_however_it_was_computed(run: Path) -> None:
    """Weights are hashed while they are written, other files at the end, run.json before it is written."""
    for folder in (run, run / "model"):
        sealed = read_manifest(folder)
        assert sealed
        assert {name: entry[1] for name, entry in sealed.files.items()} == {n: sha256_of(folder / n) for n in sealed.files}


def test_changes_are_sealed_again_and_an_interrupted_one_is_open(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("1")
    (tmp_path / "log").write_text("1")
    seal(tmp_path)
    with changing(tmp_path, ["log", "new"]):
        (tmp_path / "log").write_text("12")
        (tmp_path / "new").write_text("3")
        assert harm(tmp_path, digests=True) == [], "another process that looks now"
        interrupted = (tmp_path / MANIFEST).read_bytes()
    assert harm(tmp_path, digests=True) == []
    (tmp_path / "new").write_text("4")
    assert [one.file for one in harm(tmp_path, digests=True)] == ["new"]
    (tmp_path / MANIFEST).write_bytes(interrupted)  # as a killed process leaves it
    assert harm(tmp_path, digests=True) == []
    (tmp_path / "kept").write_text("2")
    assert [one.file for one in harm(tmp_path, digests=True)] == ["kept"]
    with changing(tmp_path, ["log"]):
        pass
    assert (read_manifest(tmp_path) or None).open == []  # type: ignore[union-attr]
    assert [one.file for one in harm(tmp_path, digests=True)] == ["kept"], "what was not open is not sealed again"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", ".", "", 7])
@pytest.mark.parametrize("field", ["files", "parts", "open"])
def test_a_manifest_that_names_files_outside_is_damaged(name: Any, field: str, tmp_path: Path) -> None:
    content = {"version": 1, "files": {}, "parts": [], "open": [], field: [name]}
    if field == "files":
        content["files"] = {str(name): {"bytes": 1e400 if name == 7 else 1, "sha256": ""}}
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    assert [one.found for one in harm(tmp_path)] == ["a damaged file"]


def test_an_edited_card_stops_only_what_compares_contents_until_it_is_accepted(run: Path) -> None:
    (run / "model" / "README.md").open("a").write("Mine.\n")
    assert "finished before: nothing to do" in call("run", "recipes/sum.yaml").stderr
    assert [row["status"] for row in document("runs", "ls")] == ["done"]
    push = ("push", run.name, "org/sum", "--license", "mit", "--dry-run")
    for words in (("runs", "verify", run.name), push):
        error = refused(*words)
        assert "model/README.md: expected" in error.message
        assert f"workbench runs verify {run.name} --accept FILE" in str(error.hint)
    with changing(run / "model", ["README.md"]):  # as `eval` does
        pass
    assert [one.file for one in harm(run, digests=True)] == ["model/README.md"], "a change does not hide another one"
    call("runs", "verify", run.name, "--accept", "model/README.md")
    call(*push)
    assert "no such file of" in refused("runs", "verify", run.name, "--accept", "model/none").message


def test_a_broken_result_in_a_cache_is_moved_aside_and_made_again(tmp_path: Path) -> None:
    place = tmp_path / "edits" / "key"

    def made(text: str) -> None:
        partial = tmp_path / f"partial-{text}"
        partial.mkdir()
        (partial / "edit.json").write_text(text)
        publish_sealed(partial, place)

    place.parent.mkdir()
    assert not reusable(place, "edit.json")
    made("1")
    made("2")
    assert (place / "edit.json").read_text() == "1", "another process was first"
    assert reusable(place, "edit.json")
    (place / "edit.json").write_text("broken")
    assert not reusable(place, "edit.json")
    made("3")
    assert (place / "edit.json").read_text() == "3"
    assert (tmp_path / "edits" / "broken" / "key" / "edit.json").read_text() == "broken"
    (place / "edit.json").write_text("4")
    assert reusable(place, "edit.json")
    assert not reusable(place, "edit.json", digests=True), "a copy of it would be sealed as it is"
    made("5")
    assert (place / "edit.json").read_text() == "5"
