"""Forms of a result: their size before anything is written, what they refuse, and the hints after a run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import call
from worlds.jsonl import write_jsonl
from worlds.memory_world import FACTS, GRACE
from worlds.project import CPU, Project
from worlds.routing import write_prompts
from worlds.tiny import edit_json, files_of

from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.manifest import MANIFEST
from workbench.run.card import model_card
from workbench.run.device import Work
from workbench.run.directory import RunDirectory, list_runs
from workbench.run.execute import execute
from workbench.run.forms import FORMS, form_of
from workbench.run.kinds.grow import Grow
from workbench.run.kinds.merge import Merge
from workbench.run.opened import open_configuration, resolve_model
from workbench.run.record import RunBase, RunOutput

TWO = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: task_arithmetic}]\n"
ROUTED = "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{route: ridge, calibration: 'calibration/{brick}.jsonl'}]\n"


def output_of(document: dict[str, Any]) -> dict[str, Any]:
    output: dict[str, Any] = RunDirectory(Path(document["run"])).read_record().to_dict()["output"]
    return output


@pytest.fixture
def planned_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects a word for each step that is planned."""
    planned: list[str] = []
    for kind in (Merge, Grow):
        real = kind.plan_row
        monkeypatch.setattr(kind, "plan_row", lambda *a, real=real, **k: (planned.append(a[1].verb), real(*a, **k))[1])
    return planned


def test_run_plans_nothing(project: Project, cwd: Path, planned_steps: list[str]) -> None:
    project.write("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}, {grow: depth, blocks: 1, check: off}]\n")
    call("plan", "recipes/test.yaml")
    assert planned_steps == ["merge", "grow"]
    planned_steps.clear()
    call("run", "recipes/test.yaml", "--device", "cpu")
    assert planned_steps == []


@pytest.mark.parametrize(
    "text",
    [
        TWO,
        TWO + "output: {dtype: float32}\n",
        "steps: [{grow: depth, blocks: 1, check: off}]\n",
        TWO + "output: {form: adapter}\n",
        TWO + "output: {form: adapter, rank: 4}\n",
    ],
    ids=["checkpoint", "float32", "grown", "adapter", "truncated adapter"],
)
def test_the_size_is_known_before_the_result_is_written(project: Project, text: str, tmp_path: Path) -> None:
    resolved = project.resolve(text)
    expected = form_of(resolved).size(resolved)
    document = execute(resolved, project.path / "runs", Work(CPU)).to_dict()
    assert expected == output_of(document)["bytes"] > 0
    opened = resolve_model(document["run"], project.path)
    assert (opened.name, opened.resolved.recipe.name) == (Path(document["run"]).name, "model")
    elsewhere = resolve_model(document["run"], tmp_path).resolved
    assert elsewhere.recipe.project == tmp_path, "tasks and caches are those of the project that asks"
    assert elsewhere.base_digest == opened.resolved.base_digest


def test_a_base_is_named_at_its_commit() -> None:
    for name, revision, expected in (("base", None, "base"), ("org/x", "abc", "org/x@abc"), ("org/x@v1", "abc", "org/x@v1")):
        assert RunBase(id=name, revision=revision).reference == expected


def stopped(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("text", [TWO + "output: {form: adapter}\n", GRACE, ROUTED], ids=["adapter", "memory", "router"])
def test_an_interrupted_write_is_written_again(text: str, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files of the result are there when it stops: none of them is in the way, and none stays that does not belong."""
    write_jsonl(project.path / "facts.jsonl", FACTS)
    write_prompts(project.path / "calibration", {"one": 0, "two": 1})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("workbench.run.execute.publish", stopped)
        project.run(text)
    (run,) = list_runs(project.path / "runs")
    assert not run.done
    left = {*files_of(run.partial)}
    for folder in ("memory", "adapters", "."):
        if (run.partial / folder).is_dir():
            (run.partial / folder / "stray").write_text("")
            break
    again = RunDirectory(Path(project.run(text)["run"]))
    assert again.harm(digests=True) == []
    assert {*files_of(again.result)} == left


def test_a_damaged_configuration_is_named(project: Project) -> None:
    write_jsonl(project.path / "facts.jsonl", FACTS)
    place = Path(project.run(GRACE)["directory"])
    edit_json(place / "configuration.json", base=None)
    for name in (place.parent / MANIFEST, place / MANIFEST):
        name.unlink(missing_ok=True)
    with pytest.raises(WorkbenchError, match=rf"^{re.escape(str(place / 'configuration.json'))}: "):
        open_configuration(place)


def test_a_configuration_has_the_size_of_its_checkpoint(project: Project) -> None:
    write_jsonl(project.path / "facts.jsonl", FACTS)
    for text, whole in ((GRACE, False), ("output: {dtype: float32}\n" + GRACE, True)):
        resolved = project.resolve(text)
        document = execute(resolved, project.path / "runs", Work(CPU)).to_dict()
        assert form_of(resolved).size(resolved) == output_of(document)["bytes"]
        assert (Path(document["directory"]) / "model").is_dir() is whole == (output_of(document)["bytes"] > 0)


def test_a_memory_is_not_lost_in_a_checkpoint(project: Project) -> None:
    """A saved configuration is resolved as a recipe without steps, whose form is a checkpoint."""
    write_jsonl(project.path / "facts.jsonl", FACTS)
    resolved = open_configuration(Path(project.run(GRACE)["directory"]))
    with pytest.raises(InvalidRecipeError, match="the result has a memory, which `form: checkpoint` cannot hold"):
        execute(resolved, project.path / "runs", Work(CPU)).to_dict()
    with pytest.raises(InvalidRecipeError, match="the result has a memory, which `form: adapter` cannot hold"):
        FORMS["adapter"].refuse(resolved)
    with pytest.raises(InvalidRecipeError, match="`form: configuration` needs a memory"):
        FORMS["configuration"].refuse(project.resolve(""))


def test_a_wrong_training_is_refused_before_earlier_steps_are_computed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.path / "texts.jsonl").write_text(json.dumps({"text": "w1 w2 w3"}) + "\n", "utf-8")
    monkeypatch.setattr(Merge, "apply", lambda *_: pytest.fail("a step is computed"))
    with pytest.raises(WorkbenchError, match="`parameters: routers` needs routers, but the step adds none"):
        project.run(
            "bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}, "
            "{grow: depth, blocks: 1, train: {data: texts.jsonl, parameters: routers}}]\n"
        )


def test_an_adapter_s_run_states_the_generation_settings_of_the_base_as_it_is(project: Project, llama: Path) -> None:
    """`push` finds the scores of a run by these settings, which are in no file of an adapter."""
    (project.path / "base").unlink()
    shutil.copytree(llama, project.path / "base")
    settings = project.path / "base" / "generation_config.json"
    recipe = TWO + "output: {form: adapter}\n"
    seen: dict[float, tuple[Path, str]] = {}
    for temperature in (0.9, 0.7, 1.0, 0.9):
        edit_json(settings, do_sample=False, temperature=temperature)
        run = Path(project.run(recipe)["run"])
        record = json.loads((run / "run.json").read_bytes())
        assert record["generation"] == ({"temperature": temperature} if temperature < 1 else {}), "1.0 is the default"
        assert seen.setdefault(temperature, (run, record["created"])) == (run, record["created"]), "the same settings: reused"
        assert project.resolve(recipe).stamp not in run.name
    settings.unlink()
    assert Path(project.run(recipe)["run"]) == seen[1.0][0], "no file is no settings"
    assert len({run for run, _ in seen.values()}) == 3


def test_a_card_says_what_the_result_is_of_its_base(project: Project) -> None:
    write_jsonl(project.path / "facts.jsonl", FACTS)
    write_prompts(project.path / "calibration", {"one": 0, "two": 1})
    record = {"versions": {"brick-workbench": "1", "torch": "2"}, "output": {"digest": "d"}}
    for text, relation in ((TWO, "merge"), (GRACE, "finetune"), (ROUTED, "adapter")):
        card = model_card(project.resolve(text + "description: Mine.\n"), record, "")
        assert f"\nbase_model_relation: {relation}\n" in card
        assert "\n# test\n\nMine.\n\n" in card


def test_what_is_said_of_an_adapter(project: Project, cwd: Path) -> None:
    resolved = project.resolve(TWO + "output: {form: adapter}\n")
    form = form_of(resolved)
    load = 'load:   PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "there")'
    serve = "serve:  vllm serve base --enable-lora --max-lora-rank {} --lora-modules test=there"
    whole = "{} tensors are saved whole (modules_to_save, biases); PEFT loads them, plain LoRA loaders do not: a, b, c"
    for fields, lines in (
        ({"plain": True, "rank": 12, "whole": []}, [load, serve.format(16)]),
        ({"plain": True, "rank": 512}, [load, serve.format(512)]),
        ({"plain": True, "rank": 513}, [load]),
        ({"plain": False, "rank": 4, "whole": ["a", "b", "c"]}, [whole.format(3), load]),
        ({"plain": False, "rank": 4, "whole": ["a", "b", "c", "d"]}, [whole.format(4) + " …", load]),
    ):
        assert form.hints("there", RunOutput.model_validate(fields), resolved) == lines
    output = RunOutput(rank=6, tensors={"a": 1, "b": 2}, bytes=1500, error=0.25)
    assert form.describe(output) == "rank 6, 2 tensors, 1.5 kB, relative error 2.5e-01"
    lacks = "the adapter of rank 6 lacks a part of the result: relative error 0.25; a larger rank keeps more"
    assert (form.warnings(output), form.warnings(RunOutput(rank=6, error=0.1))) == ([lacks], [])
    assert form_of(project.resolve(TWO)).describe(RunOutput(digest="0123456789abcdef")) == "configuration 0123456789ab"


def test_hints_after_a_run(project: Project, cwd: Path) -> None:
    write_jsonl(project.path / "facts.jsonl", FACTS)
    for text, lines in {
        TWO: ["load:   AutoModelForCausalLM.from_pretrained(", "serve:  vllm serve runs/"],
        TWO + "output: {form: adapter}\n": [
            "load:   PeftModel.from_pretrained(AutoModelForCausalLM",
            "serve:  vllm serve base --enable-lora",
        ],
        GRACE: ['load:   workbench.load("runs/', "facts:  workbench memory ls runs/"],
    }.items():
        project.write(text)
        result = call("run", "recipes/test.yaml", "--device", "cpu")
        assert Path(result.stdout.strip()).is_dir()
        assert [line for line in lines if line not in result.stderr] == []
