"""Training runs on the hub: the revisions of a repository as the checkpoints of a window."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from worlds.hub_server import CommandLine, HubServer, commit_of
from worlds.project import Project
from worlds.tiny import save_adapter, save_finetuned

WINDOW = "base: base\nbricks: {{run: {{checkpoints: {name}, {window}}}}}\nsteps: [{{merge: task_arithmetic}}]\n"
# As EleutherAI/pythia-160m (stepN), allenai/OLMo-2 (stageK-stepN-tokensMB) and a Trainer with hub_strategy="every_save" name them.
TAGS = ("step1000", "step64", "step512")
OLMO = ("stage1-step150-tokens1B", "stage1-step1000-tokens5B")
TITLES = ("Training in progress, step 500", "Training in progress, step 1000")


@pytest.fixture(scope="module")
def server(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A hub with three runs: full models as tags, and adapters as commits of which no tag names one."""
    top = tmp_path_factory.mktemp("repositories")
    with HubServer() as hub:
        for name, revisions in (("org/pythia", TAGS), ("org/olmo", OLMO), ("org/lora", TITLES)):
            places = {}
            for number, revision in enumerate(revisions):
                place = top / name / revision
                if name == "org/lora":
                    save_adapter(llama, place, seed=40 + number, r=2 + number, lora_alpha=4)
                else:
                    save_finetuned(llama, place, seed=30 + number)
                places[revision] = place
            hub.revisions[name], hub.repositories[name] = places, places[revisions[0]]
        yield hub


@pytest.fixture
def workbench(server: HubServer, tmp_path: Path) -> Iterator[CommandLine]:
    command = CommandLine(server.url, tmp_path / "home")
    yield command
    command.close()


def test_tags_average_in_the_order_of_their_steps(
    project: Project, server: HubServer, workbench: CommandLine, tmp_path: Path
) -> None:
    """Also offline, once they are cached; each revision stands in the record with its commit."""
    recipe = str(project.write(WINDOW.format(name="org/pythia", window="last: 2") + "output: {dtype: float32}\n", "window.yaml"))
    code, out, err = workbench(project.path, "plan", recipe)
    assert code == 0, err
    assert "average of 2 of 3 checkpoints in org/pythia, steps 512, 1000 of the hub, equal weights" in out + err
    code, out, err = workbench(project.path, "run", recipe, "--json", "--device", "cpu")
    assert code == 0, err
    got = load_file(project.path / json.loads(out)["model"] / "model.safetensors")
    one, two = (load_file(server.revisions["org/pythia"][f"step{step}"] / "model.safetensors") for step in (512, 1000))
    for name, tensor in got.items():
        torch.testing.assert_close(tensor.double(), (one[name].double() + two[name].double()) / 2, rtol=0, atol=1e-6)
    offline = CommandLine("http://127.0.0.1:9", tmp_path / "home", offline=True)
    try:
        code, again, err = offline(
            project.path, "plan", str(project.write(WINDOW.format(name="org/pythia", window="from: 512"))), "--json"
        )
    finally:
        offline.close()
    assert code == 0, err
    assert "average of 2 of 2 checkpoints in org/pythia, steps 512, 1000" in " ".join(json.loads(again)["warnings"])


def test_stages_and_commits(project: Project, server: HubServer, workbench: CommandLine) -> None:
    code, out, err = workbench(project.path, "plan", str(project.write(WINDOW.format(name="org/olmo", window="decay: sqrt"))))
    assert code == 0, err
    assert "steps 150, 1000 of the hub, weights 0.293, 0.707" in out + err
    text = WINDOW.format(name="org/lora", window="last: 2") + "output: {form: adapter, rank: 5}\n"
    code, out, err = workbench(project.path, "run", str(project.write(text, "lora.yaml")), "--json", "--device", "cpu")
    assert code == 0, err
    made = json.loads((project.path / json.loads(out)["run"] / "run.json").read_text("utf-8"))
    sources = made["inputs"]["bricks"]["run"]["bricks"]
    assert {name: (brick["kind"], brick["revision"]) for name, brick in sources.items()} == {
        f"step-{step}": ("adapter", commit_of(f"org/lora@{title}")) for step, title in zip((500, 1000), TITLES, strict=True)
    }


@pytest.mark.parametrize(
    ("name", "window", "message"),
    [
        ("org/pythia", "last: 4", "last: 4, but 3 checkpoints are in the window; there are steps 64, 512, 1000"),
        ("org/nothing", "last: 2", "brick 'run': no such directory or hub repository: org/nothing"),
        ("org/plain", "last: 2", "org/plain has no checkpoints of a training run: revisions such as checkpoint-500"),
        ("org/twice", "last: 2", "org/twice has step 500 twice: step500, checkpoint-500"),
    ],
)
def test_bad_repositories(
    name: str, window: str, message: str, project: Project, server: HubServer, workbench: CommandLine, llama: Path
) -> None:
    server.repositories |= {"org/plain": llama, "org/twice": llama}
    server.revisions["org/twice"] = {"step500": llama, "checkpoint-500": llama}
    code, out, err = workbench(project.path, "plan", str(project.write(WINDOW.format(name=name, window=window))))
    assert (code, out) == (2, "") or code == 1, err
    assert message in err
    shutil.rmtree(project.path / "runs", ignore_errors=True)
