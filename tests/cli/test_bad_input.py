"""Bad input, as a new user would give it: each case with the message and the exit code that it gets, before any work."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from worlds.commands import call
from worlds.project import Project
from worlds.suites import mini_suite

from workbench.cli.app import app
from workbench.ground.errors import WorkbenchError
from workbench.recipe.recipe import load_recipe

GOOD = """
bricks: {one: bricks/one, two: bricks/two}
steps:
  - id: mix
    merge: task_arithmetic
"""


def own(project: Project, brick: str, name: str = "mine") -> Path:
    """A copy of a session brick that a case may damage."""
    place = project.path / name
    shutil.copytree(project.path / "bricks" / brick, place)
    return place


def damage_header(project: Project) -> None:
    file = own(project, "full") / "model.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def truncate(project: Project) -> None:
    file = own(project, "full") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def change(
    project: Project, edit: Callable[[dict[str, torch.Tensor]], None], brick: str = "full", file: str = "model.safetensors"
) -> None:
    path = own(project, brick) / file
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def put_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def classify(project: Project) -> None:
    """A fine-tune as a classifier, whose class uses a tensor that the base lacks."""
    set_config(project, architectures=["LlamaForSequenceClassification"])
    path = project.path / "mine" / "model.safetensors"
    save_file({**load_file(path), "score.weight": torch.zeros(2, 32)}, path, metadata={"format": "pt"})


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = torch.cat([tensors["model.embed_tokens.weight"]] * 2)


def half_pair(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(k for k in tensors if k.endswith("lora_B.weight"))]


def point_outside(project: Project) -> None:
    place = own(project, "full")
    names = list(load_file(place / "model.safetensors"))
    (place / "model.safetensors").rename(project.path / "outside.safetensors")
    (place / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "../outside.safetensors")})
    )


def pickles_only(project: Project) -> None:
    place = own(project, "full")
    (place / "model.safetensors").rename(place / "pytorch_model.bin")


def set_config(project: Project, **fields: object) -> None:
    file = own(project, "full") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def set_adapter(project: Project, **fields: object) -> None:
    file = own(project, "one") / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def nothing(_project: Project) -> None:
    pass


def unknown_task(project: Project) -> None:
    file = project.path / "evals" / "suites" / "mini.yaml"
    file.write_text(file.read_text().replace("[mini]", "[mni]"))


def twin(project: Project) -> None:
    project.write(GOOD + "    lambda: 0.5\nname: test\n", "twin.yaml")


def missing_shard(project: Project) -> None:
    place = own(project, "full")
    (place / "model.safetensors").rename(place / "model-00001-of-00002.safetensors")
    parts = {
        name: f"model-0000{1 + i % 2}-of-00002.safetensors"
        for i, name in enumerate(load_file(place / "model-00001-of-00002.safetensors"))
    }
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))


MINE = "bricks: {mine: mine}\nsteps: [{merge: average}]\n"
CASES: dict[str, tuple[Callable[[Project], object], str, list[str], int, str]] = {
    # what: (preparation, recipe, command, exit code, message)
    "misspelt field": (nothing, GOOD + "    lamda: 2\n", ["run"], 2, r"test.yaml:\d+:5 steps.0.lamda: unknown field. Did you mean 'lambda'"),
    "unknown method": (nothing, GOOD.replace("task_arithmetic", "tiez"), ["run"], 2, r"unknown merge method 'tiez'. Did you mean 'ties'"),
    "unknown top-level field": (nothing, GOOD + "basis: x\n", ["plan"], 2, r"basis: unknown field. Did you mean 'base'"),
    "density beyond 1": (nothing, GOOD.replace("task_arithmetic", "ties\n    density: 1.7"), ["run"], 2, r"density: expected a share between 0 and 1, found 1.7"),
    "duplicate key": (nothing, GOOD + "seed: 1\nseed: 2\n", ["run"], 2, r"duplicate key 'seed' \(first at line"),
    "not YAML": (nothing, GOOD + "  - [\n", ["run"], 2, r"test.yaml:\d+:\d+ not valid YAML"),
    "two verbs": (nothing, "steps: [{merge: average, edit: finetune}]\n", ["run"], 2, r"expected exactly one of merge, edit, grow, fuse, route; found merge and edit"),
    "unknown brick in a step": (nothing, GOOD + "    bricks: {tow: 1}\n", ["run"], 2, r"no brick 'tow' under `bricks`. Did you mean 'two'"),
    "merge of nothing": (nothing, "steps: [{merge: average}]\n", ["run"], 2, r"average merges bricks, but the recipe has none"),
    "weights that sum to zero": (nothing, GOOD.replace("task_arithmetic", "linear\n    bricks: {one: 1, two: -1}"), ["run"], 1, r"the weights sum to 0"),
    "where that matches nothing": (nothing, GOOD + "    where: {include: ['*.nope.*']}\n", ["run"], 2, r"steps.0.where: include '\*.nope.\*' matches no tensor of the base"),
    "layers that are no slice": (nothing, GOOD + "    where: {layers: all}\n", ["run"], 2, r"expected a slice of layers such as '4:20'"),
    "recipe file missing": (nothing, GOOD, ["run", "recipes/tset.yaml"], 2, r"recipes/tset.yaml: no such file"),
    "base missing": (nothing, "base: bass\n" + GOOD, ["run"], 1, r"base: no such directory: bass"),
    "model+lora as base": (nothing, "base: base+bricks/one\n" + GOOD, ["run"], 1, r"base\+bricks/one names a model and an adapter(.|\n)*base: \{adapter: bricks/one, on: base\}"),
    "model+lora as brick": (nothing, "base: base\n" + GOOD.replace("one: bricks/one", "one: base+bricks/one"), ["run"], 1, r"Write bricks/one if base is the recipe's base"),
    "starter base not fetched": (nothing, "base: bricks/starter/base\n" + GOOD, ["run"], 1, r"the starter base \(bricks/starter/base\) is not downloaded yet"),
    "base that is an adapter": (nothing, "base: bricks/one\n" + GOOD, ["run"], 1, r"base: bricks/one is a LoRA adapter"),
    "brick missing": (nothing, GOOD.replace("bricks/two", "bricks/tow"), ["run"], 1, r"brick 'two': no such directory: bricks/tow"),
    "brick of another kind": (nothing, GOOD.replace("bricks/two", "{checkpoint: bricks/two}"), ["run"], 1, r"bricks/two is an adapter, but the recipe says checkpoint"),
    "empty brick directory": (lambda p: (p.path / "mine").mkdir(), MINE, ["run"], 1, r"mine holds neither adapter_config.json nor a checkpoint"),
    "pickle only": (pickles_only, MINE, ["run"], 1, r"has pickle files only \(pytorch_model.bin\), which are never opened"),
    "damaged header": (damage_header, MINE, ["run"], 1, r"not a safetensors file"),
    "truncated file": (truncate, MINE, ["run"], 1, r"bytes, but its header describes .* \(truncated\?\)"),
    "index pointing outside": (point_outside, MINE, ["run"], 1, r"names a file outside its directory \('../outside.safetensors'\)"),
    "NaN in a brick": (lambda p: change(p, put_nan), MINE, ["run"], 1, r"brick 'mine': model.layers.1.mlp.up_proj.weight holds nan at \[3, 5\]"),
    "missing tensor": (lambda p: change(p, drop), MINE, ["run"], 1, r"lacks model.layers.1.mlp.up_proj.weight"),
    "stray tensor": (classify, MINE, ["run"], 1, r"has score.weight that the base does not"),
    "vocabulary mismatch": (lambda p: change(p, widen), MINE, ["run"], 1, r"model.embed_tokens.weight has 128 rows for 64 tokens, the base's 64 for 64 tokens"),
    "quantised checkpoint": (lambda p: set_config(p, quantization_config={"quant_method": "gptq"}), MINE, ["run"], 1, r"quantized weights \(gptq\)"),
    "custom code": (lambda p: set_config(p, model_type="mine", auto_map={"AutoModel": "x.Y"}), MINE, ["run"], 1, r"requires custom code \(auto_map\), which is never executed"),
    "half an adapter pair": (lambda p: change(p, half_pair, "one", "adapter_model.safetensors"), MINE, ["run"], 1, r"has lora_A, but no lora_B"),
    "DoRA without magnitudes": (lambda p: set_adapter(p, use_dora=True), MINE, ["run"], 1, r"mlp.down_proj has no lora_magnitude_vector, but the configuration sets use_dora"),
    "another tuner": (lambda p: set_adapter(p, peft_type="C3A"), MINE, ["run"], 1, r"peft_type C3A; expected LORA"),
    "PiSSA without conversion": (lambda p: set_adapter(p, init_lora_weights="pissa"), MINE, ["run"], 1, r"refers to a base minus its initial factors"),
    "recipe that needs itself": (nothing, "bricks: {me: {recipe: recipes/test.yaml}}\nsteps: [{merge: average}]\n", ["run"], 2, r"recipe recipes/test.yaml uses itself"),
    "facts missing": (nothing, "steps: [{edit: finetune, facts: fcats.jsonl}]\n", ["run"], 2, r"fcats.jsonl does not exist"),
    "facts not JSON": (lambda p: (p.path / "f.jsonl").write_text('{"prompt": "a", "target": "b"}\nnope\n'), "steps: [{edit: finetune, facts: f.jsonl}]\n", ["run"], 1, r"f.jsonl:2: not JSON"),
    "grow beyond the model": (nothing, "steps: [{grow: depth, blocks: 40}]\n", ["plan"], 2, r"`blocks: 40` for a model of 4 layers"),
    "--set of an unknown step": (nothing, GOOD, ["run", "recipes/test.yaml", "--set", "mxi.lambda=1"], 2, r"no step or field 'mxi'. Did you mean 'mix'"),
    "unknown device": (nothing, GOOD, ["run", "recipes/test.yaml", "--device", "tpu"], 2, r"--device tpu: expected auto, cpu, cuda or cuda:N"),
    "output directory in use": (nothing, GOOD, ["run", "recipes/test.yaml", "-o", "recipes"], 1, r"-o recipes: exists and is not an empty directory"),
    "no suite named": (nothing, GOOD, ["eval"], 2, r"the recipe has no suite to score"),
    "unknown suite": (nothing, GOOD, ["eval", "recipes/test.yaml", "--suite", "strater"], 1, r"unknown suite 'strater'"),
    "compare before eval": (nothing, GOOD + "eval: [mini]\n", ["compare"], 1, r"not scored yet on mini"),
    "report before eval": (nothing, GOOD + "eval: [mini]\n", ["report"], 1, r"not scored yet: test"),
    "unknown run": (nothing, GOOD, ["runs", "show", "nope"], 1, r"no run 'nope'"),
    "unknown explained method": (nothing, GOOD, ["methods", "tie"], 2, r"unknown method 'tie'. Did you mean 'ties'"),
    "unknown brick to show": (nothing, GOOD, ["brick", "show", "oen"], 1, r"no brick 'oen': expected a directory, or a name in bricks/. Did you mean 'one'"),
    "training without settings": (nothing, GOOD, ["brick", "train", "bricks/one"], 1, r"no train.yaml"),
    "starter from a wrong file": (nothing, GOOD, ["brick", "fetch", "--from", "recipes/test.yaml"], 1, r"sha256 of the model is .*, expected b179c95"),
    "starter from a missing file": (nothing, GOOD, ["brick", "fetch", "--from", "nope.whl"], 1, r"--from nope.whl: .*No such file"),
    "method in capitals": (nothing, GOOD.replace("task_arithmetic", "TIES"), ["run"], 2, r"unknown merge method 'TIES'. Did you mean 'ties'"),
    "merge key": (nothing, "seed: &x {a: 1}\n" + GOOD.replace("- id: mix", "- <<: *x"), ["run"], 2, r"test.yaml:\d+:5 merge keys \(<<\) are not read"),
    "percent in place of a share": (nothing, GOOD.replace("task_arithmetic", "ties\n    density: 20%"), ["run"], 2, r"density: expected a valid number, found '20%'"),
    "weights as a list": (nothing, GOOD + "    bricks: [0.5, 0.5]\n", ["run"], 2, r"expected brick names, or a mapping of brick names to weights; found 0.5"),
    "step ids twice": (nothing, GOOD + "  - {id: mix, merge: linear}\n", ["run"], 2, r"two steps have the id 'mix'"),
    "sweep over no field": (nothing, GOOD + "sweep: {mix.lamda: [0.1, 0.2]}\n", ["plan"], 2, r"sweep.mix.lamda: no method of its step has a field 'lamda'"),
    "name read as a Boolean": (nothing, GOOD + "name: no\n", ["run"], 2, r"name: expected a valid string, found False"),
    "brick read as a Boolean": (nothing, GOOD.replace("one:", "no:"), ["run"], 2, r"YAML reads the key no as bool"),
    "name with a slash": (nothing, GOOD + "name: my/run\n", ["run"], 2, r"name: expected lower-case letters, digits and"),
    "suite with an unknown task": (unknown_task, GOOD, ["eval", "recipes/test.yaml", "--suite", "mini"], 1, r"unknown task 'mni'"),
    "two recipes of one name": (twin, GOOD + "eval: [mini]\n", ["eval", "recipes/test.yaml", "recipes/twin.yaml"], 1, r"two different configurations are called 'test' \(recipes/test.yaml and recipes/twin.yaml\)"),
    "a recipe as a plain brick": (nothing, GOOD.replace("bricks/two", "recipes/test.yaml"), ["run"], 1, r"brick 'two': recipes/test.yaml is a recipe, expected a directory; Write `{recipe: recipes/test.yaml}`\."),
    "a missing shard": (missing_shard, MINE, ["run"], 1, r"names model-00002-of-00002.safetensors, which is missing"),
    "ship before eval": (nothing, GOOD + "eval: [mini]\n", ["ship", "mini"], 1, r"nothing is scored yet"),
    "a folder among the recipes": (lambda p: (p.path / "recipes" / "folder.yaml").mkdir(), GOOD + "eval: [mini]\n", ["ship", "mini"], 1, r"nothing is scored yet"),
    "a repository without an owner": (nothing, GOOD, ["push", "recipes/test.yaml", "name", "--dry-run"], 2, r"'name': expected the id of a repository"),
    "a branch with a space": (nothing, GOOD, ["push", "recipes/test.yaml", "a/b", "--revision", "a b", "--dry-run"], 2, r"--revision 'a b': expected the name of a branch"),
    "new recipe, brick with a slash": (nothing, GOOD, ["recipe", "new", "n", "--brick", "a/b=bricks/one"], 2, r"--brick a/b=…: expected a name of its own, of a-z"),
    "new recipe, a brick twice": (nothing, GOOD, ["recipe", "new", "n", "--brick", "a=bricks/one", "--brick", "a=bricks/two"], 2, r"--brick a=…: expected a name of its own"),
    "new recipe over an old one": (nothing, GOOD, ["recipe", "new", "recipes/test.yaml"], 1, r"recipes/test.yaml: already exists"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, project: Project, cwd: Path) -> None:
    prepare, recipe, command, code, message = CASES[case]
    mini_suite(project)
    prepare(project)
    project.write(recipe)
    before = {p for p in project.path.rglob("*") if ".workbench" not in p.parts}
    result = CliRunner().invoke(app, [*command, "recipes/test.yaml"] if len(command) == 1 else command)
    assert isinstance(result.exception, WorkbenchError), result.output + str(result.exception)
    told = f"{result.exception.message}; {result.exception.hint}"
    assert re.search(message, told), told
    assert result.exception.exit_code == code
    assert not list(project.path.glob("runs/*/model")), "nothing is written that could be taken for a result"
    assert {p for p in before if not p.exists()} == set(), "nothing is lost"


def test_a_new_recipe_names_what_was_typed(project: Project, cwd: Path) -> None:
    """Also paths that YAML would cut or read otherwise."""
    (project.path / "base #2").symlink_to((project.path / "base").resolve())
    call("recipe", "new", "mine", "--base", "base #2", "--brick", "a=it: is", "--suite", "no", "--task", "on")
    fields = load_recipe(project.path / "recipes" / "mine.yaml").fields
    assert (fields.base, fields.bricks["a"].target) == ("base #2", "it: is")
    assert [item if isinstance(item, str) else item.tasks for item in fields.eval] == ["no", ("on",)]


def test_errors_have_message_hint_and_exit_code(project: Project) -> None:
    project.write(GOOD.replace("bricks/two", "bricks/tow"))
    command = [sys.executable, "-m", "workbench", "run", "recipes/test.yaml"]
    result = subprocess.run(command, cwd=project.path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "error: brick 'two': no such directory: bricks/tow" in result.stderr
    assert "hint: Did you mean 'bricks/two'?" in result.stderr
    assert "Traceback" not in result.stderr
    (project.path / "recipes" / "loop.yaml").symlink_to("loop.yaml")
    result = subprocess.run([*command[:-1], "recipes/loop.yaml"], cwd=project.path, capture_output=True, text=True, check=False)
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert "recipes/loop.yaml" in result.stderr
