"""`push` against a hub on this machine: the files byte for byte, interruptions, licenses, and what is refused before anything is sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from worlds.commands import call, document, refused
from worlds.hub_server import TOKEN, CommandLine
from worlds.project import Project
from worlds.routing import write_prompts
from worlds.suites import lay_out_models
from worlds.tiny import edit_json, files_of, unseal
from worlds.upload_server import UploadServer

from workbench.ground.manifest import MANIFEST

MODEL = (
    "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: task_arithmetic}]\noutput: {dtype: float32, shard_size: 50KB}\n"
)
ADAPTER = "bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\noutput: {form: adapter}\n"
ROUTED = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{route: ridge, calibration: 'calibration/{brick}.jsonl'}]\n"
LICENCE = ("--license", "apache-2.0")


@pytest.fixture
def run(project: Project, cwd: Path) -> Path:
    """The directory of a finished run of `MODEL`, which is the working directory's."""
    return Path(project.run(MODEL, "sum.yaml")["run"])


def pushed(name: str, *options: str) -> dict[str, Any]:
    done: dict[str, Any] = document("push", name, "org/sum", *LICENCE, *options)
    return done


def to_send(result: Path) -> dict[str, bytes]:
    """The files of a result without its manifests, which hold for the card before it is sent."""
    return {name: data for name, data in files_of(result).items() if Path(name).name != MANIFEST}


def header(readme: bytes) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(readme.decode().split("---\n")[1])
    return found


def test_a_dry_run_lists_the_files_and_asks_nothing(run: Path, hub: UploadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN")
    found = pushed(run.name, "--dry-run")
    local = to_send(run / "model")
    assert {file["path"]: file["bytes"] for file in found["files"] if file["path"] != "README.md"} == {
        path: len(content) for path, content in local.items() if path != "README.md"
    }
    assert found["bytes"] == sum(file["bytes"] for file in found["files"])
    assert (found["sent"], found["commit"], found["url"], found["changed"]) == (False, None, None, None)
    said = call("push", run.name, "org/sum", *LICENCE, "--dry-run", "--private", "--revision", "next").stdout
    assert "would go to org/sum, branch next, private if it is new: " in said
    assert said.rstrip().endswith("license apache-2.0; nothing was sent")
    assert hub.requests == []


def test_a_model_arrives_and_a_second_call_changes_nothing(run: Path, hub: UploadServer) -> None:
    local = to_send(run / "model")
    assert len([path for path in local if path.endswith(".safetensors")]) >= 3
    found = pushed(run.name, "--private")
    repository = hub.repositories["org/sum"]
    there = {path: content for path, content in repository.files().items() if path != ".gitattributes"}
    assert there.keys() == local.keys()
    assert {path for path in local if local[path] != there[path]} == {"README.md"}
    assert (found["commit"], found["changed"], found["url"]) == (repository.branches["main"], True, f"{hub.url}/org/sum")
    assert repository.private
    assert repository.messages[-1] == "sum, made with brick-workbench"
    before, after = header(local["README.md"]), header(there["README.md"])
    assert after == {**{key: before[key] for key in before if not key.startswith("base_model")}, "license": "apache-2.0"}
    assert there["README.md"].split(b"---\n", 2)[2] == local["README.md"].split(b"---\n", 2)[2]
    assert to_send(run / "model") == local, "the run stays as it is"
    written = {**repository.files(), **files_of(run)}
    assert not [path for path, content in written.items() if TOKEN.encode() in content]
    first = pushed(run.name)
    again = pushed(str(run / "model"))
    assert (again["commit"], again["changed"]) == (first["commit"], False)
    assert "unchanged, all files are in org/sum" in call("push", run.name, "org/sum", *LICENCE).stdout
    assert set(hub.put.values()) == {1}
    assert len(hub.repositories["org/sum"].commits) == 2


def test_an_interrupted_upload_sends_only_the_rest(run: Path, hub: UploadServer) -> None:
    hub.failing, hub.failing_after = 400, 1
    error = refused("push", run.name, "org/sum", *LICENCE)
    assert (error.message.startswith("org/sum: "), "not sent again" in str(error.hint)) == (True, True)
    assert "http" not in error.message.replace(hub.url, ""), "no signed address"
    assert list(hub.repositories["org/sum"].files()) == [".gitattributes"], "no commit without all files"
    assert sum(hub.put.values()) == 1
    hub.failing = None
    pushed(run.name)
    weights = [path for path in to_send(run / "model") if path.endswith(".safetensors")]
    assert len(hub.put) == len(weights)
    assert set(hub.put.values()) == {1}, "nothing came twice"
    there = hub.repositories["org/sum"].files()
    assert all(there[path] == (run / "model" / path).read_bytes() for path in weights)


def test_a_killed_process_goes_on(run: Path, hub: UploadServer, tmp_path: Path) -> None:
    hub.failing, hub.failing_after = 0, 1
    command = ("push", run.name, "org/sum", *LICENCE)
    CommandLine(hub.url, tmp_path / "home").kill_after(tmp_path, *command, until=hub.stuck)
    assert sum(hub.put.values()) == 1
    hub.failing = None
    pushed(run.name)
    assert set(hub.put.values()) == {1}


def test_an_adapter_names_its_base_on_the_hub(project: Project, cwd: Path, hub: UploadServer) -> None:
    run = Path(project.run(ADAPTER, "lora.yaml")["run"])
    local = to_send(run / "adapter")
    said = call("push", run.name, "org/lora", *LICENCE).stderr
    assert "add --base ORG/NAME" in said
    assert "as a brick: `org/lora`" in said
    config = json.loads(local["adapter_config.json"])
    assert json.loads(hub.repositories["org/lora"].files()["adapter_config.json"]) == {**config, "base_model_name_or_path": None}
    found = document("push", run.name, "org/lora", *LICENCE, "--base", "org/small")
    there = hub.repositories["org/lora"].files()
    assert found["base"] == "org/small"
    assert json.loads(there["adapter_config.json"]) == {
        **config,
        "base_model_name_or_path": "org/small",
    }
    assert header(there["README.md"])["base_model"] == ["org/small"]
    assert there["adapter_model.safetensors"] == local["adapter_model.safetensors"]
    assert "expected the hub id" in refused("push", run.name, "org/lora", *LICENCE, "--base", "../small").message


def test_a_routed_configuration_arrives_without_directories_of_this_machine(
    project: Project, cwd: Path, hub: UploadServer
) -> None:
    write_prompts(project.path / "calibration", {"one": 0, "two": 1}, count=16, templates=4)
    run = Path(project.run(ROUTED, "routed.yaml")["run"])
    call("push", run.name, "org/routed", *LICENCE, "--base", "org/small")
    there, local = hub.repositories["org/routed"].files(), to_send(run / "configuration")
    assert there.keys() - {".gitattributes"} == local.keys()
    differing = {path for path in local if there[path] != local[path]}
    assert differing == {
        "README.md",
        "configuration.json",
        *(f"adapters/{name}/{file}" for name in ("one", "two") for file in ("README.md", "adapter_config.json")),
    }
    base = json.loads(there["configuration.json"])["base"]
    assert (base["id"], base["path"]) == ("org/small", "org/small")
    assert not [path for path, content in there.items() if str(project.path.resolve()).encode() in content]


@pytest.mark.parametrize("damage", ["tensor", "config", "unfinished", "adapter", "missing"])
def test_damaged_and_unfinished_runs_are_refused_before_any_request(
    damage: str, project: Project, cwd: Path, hub: UploadServer
) -> None:
    text = ADAPTER if damage == "adapter" else MODEL
    run = Path(project.run(text, "sum.yaml")["run"])
    if damage == "tensor":
        file = sorted((run / "model").glob("*.safetensors"))[1]
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    elif damage == "config":
        edit_json(run / "model" / "config.json", rms_norm_eps=0.5)
    elif damage == "adapter":
        edit_json(run / "adapter" / "adapter_config.json", lora_alpha=77)
    elif damage == "unfinished":
        edit_json(run / "run.json", status="started")
    else:
        sorted((run / "model").glob("*.safetensors"))[0].unlink()
    error = refused("push", run.name, "org/sum", *LICENCE)
    expected = {
        "tensor": "safetensors: expected SHA-256",
        "config": "config.json: expected",
        "unfinished": "is not finished",
        "adapter": "adapter_config.json: expected",
        "missing": "model-00001",
    }
    assert expected[damage] in error.message
    assert hub.requests == []


def test_no_network_no_token_and_tokens_that_may_not_write(run: Path, hub: UploadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused("push", run.name, "org/sum", *LICENCE)
    assert (error.message, error.exit_code) == ("HF_HUB_OFFLINE is set, so nothing can be sent to the hub", 1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    error = refused("push", run.name, "org/sum", *LICENCE)
    assert "there is no token" in error.message
    assert "hf auth login" in str(error.hint)
    monkeypatch.undo()
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "repository", "expected"),
    [
        ("hf_wrong", "org/sum", "the hub refuses the token"),
        ("hf_reader", "org/sum", "the token may only read"),
        (TOKEN, "other/sum", "does not let the owner of the token write there (status 403)"),
    ],
)
def test_what_the_hub_refuses(
    token: str, repository: str, expected: str, run: Path, hub: UploadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.roles["hf_reader"] = "read"
    monkeypatch.setenv("HF_TOKEN", token)
    error = refused("push", run.name, repository, *LICENCE)
    assert expected in error.message
    assert "hf auth login" in str(error.hint)
    assert token not in f"{error.message}{error.hint}"
    assert hub.repositories == {}
    assert hub.put == {}


def test_metadata_that_the_hub_refuses_is_shown(run: Path, hub: UploadServer) -> None:
    error = refused("push", run.name, "org/sum", "--license", "gpl-3.0")
    assert '"license" must be one of' in error.message
    assert list(hub.repositories["org/sum"].files()) == [".gitattributes"]


@pytest.mark.parametrize("name", ["sum", "org/sum/x", "org/-sum", "org/a..b", "../sum", "org/sum.git", "org/s um"])
def test_ids_that_are_none(name: str, cwd: Path) -> None:
    error = refused("push", "any", name, "--dry-run")
    assert (error.exit_code, "ORG/NAME" in error.message) == (2, True)


def test_existing_repositories(run: Path, hub: UploadServer) -> None:
    pushed(run.name)
    error = refused("push", run.name, "org/sum", *LICENCE, "--private")
    assert "exists and is public" in error.message
    other = {"model.safetensors": b"old", "README.md": b"old", "LICENSE": b"text", "notes.txt": b"mine"}
    hub.repositories["org/sum"].commit("main", {".gitattributes": b"", **other}, "by hand")
    error = refused("push", run.name, "org/sum", *LICENCE)
    assert error.message == "org/sum has files of another model: model.safetensors; nothing was sent"
    assert hub.repositories["org/sum"].messages[-1] == "by hand"
    found = pushed(run.name, "--replace")
    there = hub.repositories["org/sum"].files()
    assert found["deleted"] == ["model.safetensors"]
    assert there.keys() == to_send(run / "model").keys() | {".gitattributes", "LICENSE", "notes.txt"}
    assert (there["LICENSE"], there["notes.txt"]) == (b"text", b"mine")


def test_a_branch(run: Path, hub: UploadServer) -> None:
    found = pushed(run.name, "--revision", "next")
    repository = hub.repositories["org/sum"]
    assert list(repository.files("main")) == [".gitattributes"]
    assert repository.branches["next"] == found["commit"]
    assert set(repository.files("next")) >= set(to_send(run / "model"))
    assert pushed(run.name, "--revision", "next")["changed"] is False


def licensed(project: Project, **licences: str) -> str:
    """A run whose inputs have licenses; returns its name."""
    for name, licence in licences.items():
        place = project.path / "licensed" / name
        place.mkdir(parents=True)
        source = project.path / "base" if name == "base" else project.path / "bricks" / name
        for file in source.iterdir():
            (place / file.name).symlink_to(file.resolve())
        (place / "README.md").unlink(missing_ok=True)
        (place / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    text = "base: licensed/base\nbricks: {one: licensed/one}\nsteps: [{merge: task_arithmetic}]\n"
    return Path(project.run(text, "licensed.yaml")["run"]).name


def test_the_license_of_all_inputs_is_that_of_the_result(project: Project, cwd: Path, hub: UploadServer) -> None:
    name = licensed(project, base="MIT", one="mit")
    assert document("push", name, "org/sum")["license"] == "mit"
    assert header(hub.repositories["org/sum"].files()["README.md"])["license"] == "mit"


@pytest.mark.parametrize(
    ("base", "one", "expected"),
    [
        ("mit", "apache-2.0", "the licenses of the inputs differ: base mit, brick 'one' apache-2.0"),
        ("mit", "other", "brick 'one': unknown license (other)"),
        ("cc-by-nd-4.0", "cc-by-nd-4.0", "base: the license allows no derivatives (cc-by-nd-4.0)"),
    ],
)
def test_licenses_that_do_not_decide_need_consent(
    base: str, one: str, expected: str, project: Project, cwd: Path, hub: UploadServer
) -> None:
    name = licensed(project, base=base, one=one)
    error = refused("push", name, "org/sum")
    assert expected in error.message
    assert "--license NAME" in str(error.hint)
    assert hub.requests == []
    assert document("push", name, "org/sum", "--yes")["license"] == "other"
    assert header(hub.repositories["org/sum"].files()["README.md"])["license"] == "other"
    call("push", name, "org/sum", "--license", "My-Own-1.0")
    card = header(hub.repositories["org/sum"].files()["README.md"])
    assert (card["license"], card["license_name"]) == ("other", "My-Own-1.0")


def test_runs_of_earlier_versions_state_no_licenses(run: Path, hub: UploadServer) -> None:
    unseal(run)
    edit_json(run / "run.json", licences=None, data_licences=None)
    assert "states no licenses" in refused("push", run.name, "org/sum").message
    assert hub.requests == []
    pushed(run.name)


@pytest.mark.parametrize("form", ["checkpoint", "adapter"])
def test_scores_of_the_store_are_on_the_card(
    form: str, project: Project, cwd: Path, hub: UploadServer, score_once: Callable[[Project, str], None]
) -> None:
    lay_out_models(project)
    text = f"bricks: {{one: bricks/one}}\nsteps: [{{merge: task_arithmetic}}]\noutput: {{form: {form}}}\neval: [mini]\n"
    project.write(text, "scored.yaml")
    call("eval", "scored", "--no-controls")
    run = Path(document("run", "recipes/scored.yaml")["run"])
    local = next(run.glob("*/README.md")).read_text("utf-8")
    assert "## Scores" not in local, "the run was made after its scores"
    call("push", run.name, "org/scored", *LICENCE)
    there = hub.repositories["org/scored"].files()["README.md"]
    scores = document("eval", "scored", "--no-controls")["configurations"][0]["tasks"]["mini"]["acc"]
    assert f"| mini | acc | 60 | {scores['value']:.3f} [{scores['low']:.3f}, {scores['high']:.3f}] |" in there.decode()
    assert header(there)["model-index"][0]["name"] == "scored"
    results = {(one.dataset_type, one.metric_type): one.metric_value for one in ModelCard(there.decode()).data.eval_results}
    assert results["mini", "acc"] == round(scores["value"], 6)
