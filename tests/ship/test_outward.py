"""Nothing that leaves the machine names the folder that all models, projects and runs of these tests lie in: every byte is searched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from worlds.commands import call, document
from worlds.jsonl import write_jsonl
from worlds.memory_world import FACTS
from worlds.neuron_sets import random_set
from worlds.project import Project
from worlds.routing import write_prompts
from worlds.tiny import edit_json, files_of, save_adapter
from worlds.upload_server import UploadServer

from workbench.bricks.card import BaseRecord, without_paths
from workbench.bricks.neuron_sets import write_neuron_brick

CANARY = "brevik canary_1"
"""A name with a space and with a letter that Markdown escapes."""
MERGE = "steps: [{merge: task_arithmetic}]\n"
RECIPES = {
    "checkpoint": MERGE,
    "adapter": f"{MERGE}output: {{form: adapter}}\n",
    "routed": "steps: [{route: ridge, calibration: 'ROOT/data/{brick}.jsonl'}]\n",
    "memory": "steps: [{edit: memory, facts: ROOT/data/facts.jsonl, encoder: ROOT/home/models/base, min_efficacy: 0, threshold: 0.9}]\n",
    "grace": "steps: [{edit: grace, facts: ROOT/data/facts.jsonl, layer: 1, min_efficacy: 0}]\n",
    "edited": "steps: [{edit: finetune, facts: ROOT/data/facts.jsonl, epochs: 1, min_efficacy: 0}]\n",
    "edit": "steps: [{edit: finetune, facts: ROOT/data/facts.jsonl, form: lora, epochs: 1, min_efficacy: 0}]\noutput: {form: adapter}\n",
    "grown": "steps: [{grow: depth, blocks: 2}]\n",
    "neurons": "steps: [{merge: average, where: {neurons: ROOT/home/models/math}}]\n",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Iterator[Project]:
    """A project whose inputs lie in a home outside of it; recipes, cards and configurations name them by absolute paths."""
    root = tmp_path_factory.mktemp("work") / CANARY
    project, models = Project(root / "project"), root / "home" / "models"
    (project.path / "recipes").mkdir(parents=True)
    base = shutil.copytree(llama, models / "base")
    edit_json(base / "config.json", _name_or_path=str(base))
    edit_json(base / "tokenizer_config.json", name_or_path=str(base))
    for seed, name in enumerate(("one", "two")):
        brick = save_adapter(base, models / name, seed=seed)
        assert f"base_model: {base}" in (brick / "README.md").read_text("utf-8"), "PEFT names the base in its card"
        card = {
            "version": 1,
            "name": name,
            "kind": "adapter",
            "base": {"id": str(base)},
            "training": {"data": f"{root}/data/x.jsonl"},
        }
        (brick / "brick.yaml").write_text(yaml.safe_dump({**card, "skill": f"answers {name}", "licence": "MIT"}), "utf-8")
    write_neuron_brick(models / "math", random_set(base), BaseRecord(id=str(base)))
    write_prompts(root / "data", {"one": 0, "two": 1}, count=16, templates=4)
    write_jsonl(root / "data" / "facts.jsonl", FACTS)
    for name, steps in RECIPES.items():
        bricks = (
            ""
            if name in ("memory", "grace", "edited", "edit", "grown")
            else "bricks: {one: ROOT/home/models/one, two: ~/models/two}\n"
        )
        text = f"description: Made in {root}/project.\nbase: ROOT/home/models/base\n{bricks}{steps}"
        project.write(text.replace("ROOT", f"{root}"), f"{name}.yaml")
    with pytest.MonkeyPatch.context() as patch, chdir(project.path):
        patch.setenv("HOME", str(root / "home"))
        yield project


@pytest.fixture(scope="module")
def run_of(world: Project) -> Callable[[str], Path]:
    """Return the directory of a recipe's run, which is made once."""
    return lambda name: Path(document("run", name, "--device", "cpu", "--quiet")["run"])


def naming(files: dict[str, bytes]) -> list[str]:
    """The files that name the folder, whole or in part."""
    words = (b"brevik", b"canary", b"home/models", b"~/models")
    return [path for path, data in files.items() if any(word in data for word in words)]


@pytest.mark.parametrize("base", [None, "org/small"])
@pytest.mark.parametrize("name", RECIPES)
def test_no_byte_that_is_pushed_names_a_directory(
    name: str, base: str | None, world: Project, run_of: Callable[[str], Path], hub: UploadServer
) -> None:
    run = run_of(name)
    options = ("push", str(run), f"org/{name}", "--license", "apache-2.0", *(("--base", base) if base else ()))
    dry = document(*options, "--dry-run")
    assert ("encoder is not sent: others need it as the folder base where" in call(*options).stderr) == (name == "memory")
    there = {path: data for path, data in hub.repositories[f"org/{name}"].files().items() if path != ".gitattributes"}
    assert naming(there) == []
    local = {path: data for path, data in files_of(run / run_result(run)).items() if not path.endswith("workbench-manifest.json")}
    assert there.keys() == local.keys()
    differing = {path for path in local if there[path] != local[path]}
    assert {file["path"] for file in dry["files"] if file["diff"]} == differing
    assert dry["card"].encode() == there["README.md"]
    for path in differing & {path for path in local if path.endswith("adapter_config.json")}:
        assert json.loads(there[path])["base_model_name_or_path"] == base
    header = check_card(there["README.md"].decode())
    assert (header.base_model, header.license) == ([base] if base else None, "apache-2.0")


def run_result(run: Path) -> str:
    return next(part for part in ("model", "adapter", "configuration") if (run / part).is_dir())


def check_card(text: str) -> ModelCardData:
    """Read a card as huggingface_hub does, and check what it can check without the net."""
    card = ModelCard(text)
    header: ModelCardData = card.data
    again = ModelCard(str(card)).data
    assert again.to_dict() == header.to_dict()
    assert header.license in (None, "apache-2.0", "mit", "other")
    assert header.library_name in ("peft", "transformers")
    assert header.get("base_model_relation") in ("merge", "adapter", "finetune") or not header.base_model
    assert all(isinstance(tag, str) for tag in header.tags)
    assert all(isinstance(result, EvalResult) for result in header.eval_results or [])
    return header


@pytest.mark.parametrize("name", RECIPES)
def test_cards_are_fit_for_others_when_they_are_written(name: str, run_of: Callable[[str], Path]) -> None:
    """A user who sends the folder by other means sends its card as it is."""
    run = run_of(name)
    text = (run / run_result(run) / "README.md").read_text("utf-8")
    assert naming({"README.md": text.encode()}) == []
    assert "Made in project." in text
    assert check_card(text).base_model is None


@pytest.mark.parametrize(
    ("name", "server"),
    [
        *((name, server) for name in ("checkpoint", "adapter", "routed", "bricks") for server in ("vllm", "sglang", "llama.cpp")),
        ("routed", "semantic-router"),
    ],
)
def test_no_byte_of_an_export_names_a_directory(
    name: str, server: str, world: Project, run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    target = "routed" if name == "bricks" else str(run_of(name))
    options = ["--served-base", "org/small"] if name != "checkpoint" and server != "llama.cpp" else []
    call("export", target, "--for", server, *options, "-o", str(tmp_path / "out"), "--tokens", "2")
    assert naming(files_of(tmp_path / "out")) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: /data/models/base\n", "base: base\n"),
        ("see /p/q/bricks/one, /p/q and /p/q/x.", "see bricks/one, q and x."),
        ("base: /my models/a b\n", "base: a b\n"),
        ("[a](~/models/x) ../../other/y ~anna/z", "[a](x) y z"),
        ("https://hf.co/org/name and/or 1/2/3 bricks/one ./a/b a.b/c/d <b></b> /think", None),
    ],
)
def test_paths_in_texts(text: str, expected: str | None) -> None:
    assert without_paths(text, Path("/p/q"), {"base": "/my models/a b"}) == (text if expected is None else expected)
