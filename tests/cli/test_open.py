"""`workbench open` says what things of other tools are; the commands that it prints work, and errors that meet such a thing name them."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from worlds.commands import call, document, refused, run
from worlds.project import Project
from worlds.tiny import edit_json
from worlds.trainers import FILES, TREES

from workbench.ground.foreign_names import retyped

FOREIGN = ("git", "mlx_lm.convert", "mlx_lm.fuse", "lm_eval")
"""Programs of other machines and of the network, which no test runs."""


def opened(*args: str, usable: bool = True) -> Any:
    return json.loads(call("open", *args, "--json", code=0 if usable else 1).stdout)


def work(command: str, project: Project) -> None:
    """Run a printed command, or plan what it needs a terminal for."""
    words = shlex.split(command)
    if words[0] == "python" and words[1] == "-c" and any(tool in words[2] for tool in ("megatron.bridge", "nemo.collections")):
        compile(words[2], "printed", "exec")
    elif words[0] == "python" and words[1] == "-c":
        with Path(words[4] if words[3:] else "/dev/null").open("w") as stream, contextlib.redirect_stdout(stream):
            exec(compile(words[2], "printed", "exec"), {})
    elif words[0] == "accelerate":
        from accelerate.commands.merge import merge_command, merge_command_parser

        merge_command(merge_command_parser().parse_args(words[2:]))
    elif words[:3] == ["python", "-m", "deepspeed.utils.zero_to_fp32"]:
        assert (project.path / words[3] / "zero_to_fp32.py").is_file()
    elif words[:4] == ["python", "-m", "verl.model_merger", "merge"]:
        assert (project.path / words[words.index("--local_dir") + 1] / "huggingface" / "config.json").is_file()
    elif words[:2] == ["python", "convert_llama_nemo_to_hf.py"]:
        assert (project.path / words[3]).is_file()
    elif words[0] == "workbench":
        run(*["plan" if word == "chat" else "base" if word == "BASE" else word for word in words[1:]], code=(0, 3))
        if words[1:3] == ["recipe", "new"]:
            assert document("plan", words[3])["problems"] == []
    else:
        assert words[0] in FOREIGN


@pytest.mark.parametrize("name", TREES)
def test_a_folder_of_another_tool(name: str, project: Project, cwd: Path) -> None:
    """It is understood, what is printed works, and a recipe with the folder as a brick is planned or gets the same hint."""
    lay_out, kind, says, usable = TREES[name]
    lay_out(cwd, cwd / name)
    thing = opened(name, usable=usable)
    assert (thing["kind"], thing["says"], thing["name"]) == (kind, says, name)
    assert (thing["problem"] is None) == usable
    assert name in "".join(thing["commands"]) or not thing["commands"] or kind == "lm-eval"
    plan = ("plan", str(project.write(f"bricks: {{mine: {name}}}\nsteps: [{{merge: task_arithmetic}}]\n")))
    if usable:
        assert document(*plan)["problems"] == []
    else:
        error = refused(*plan)
        assert error.exit_code == 1
        assert (thing["commands"][0] if thing["commands"] else thing["problem"].rpartition(". ")[2]) in (error.hint or "")
    for command in thing["commands"]:
        work(command, project)


@pytest.mark.parametrize(
    ("tree", "inner", "line"),
    [
        (
            "global_step_40",
            "actor/huggingface",
            "--backend fsdp --local_dir global_step_40/actor --target_dir global_step_40/actor-hf",
        ),
        (
            "verl-megatron",
            "actor/dist_ckpt",
            "--backend megatron --tie-word-embedding --local_dir verl-megatron/actor --target_dir",
        ),
        ("nemo2", "weights", "llm.export_ckpt(path=Path('nemo2'), target='hf', output_path=Path('nemo2-hf'))"),
        ("iter_0000020", "", "export_ckpt('iter_0000020', 'iter_0000020-hf')"),
    ],
)
def test_shards_of_a_trainer_are_converted_as_a_whole(tree: str, inner: str, line: str, project: Project, cwd: Path) -> None:
    """A folder within a save names the save, and accelerate's command for FSDP is not printed for Megatron's shards.

    Source: verl docs/advance/checkpoint.rst, Megatron-Bridge docs/bridge-guide.md, NeMo nemo/collections/llm/api.py.
    """
    TREES[tree][0](cwd, cwd / tree)
    if (cwd / tree / "actor").is_dir():
        edit_json(cwd / tree / "actor" / "huggingface" / "config.json", tie_word_embeddings=True)
    for name in {tree, f"{tree}/{inner}".rstrip("/")}:
        assert line.replace("'", "") in opened(name, usable=False)["commands"][0].replace("'", "").replace('"', "")


@pytest.mark.parametrize("name", ["old-peft", "old-transformers", "fsdp"])
def test_what_a_printed_command_converts_is_the_same_model(name: str, project: Project, cwd: Path) -> None:
    TREES[name][0](cwd, cwd / name)
    work(opened(name, usable=False)["commands"][0], project)
    made = {"old-peft": "old-peft", "old-transformers": "old-transformers-safetensors", "fsdp": "fsdp-merged"}[name]
    if name == "fsdp":
        shutil.copyfile(cwd / "base" / "config.json", cwd / made / "config.json")
    assert opened(made)["kind"] == ("adapter" if name == "old-peft" else "checkpoint")
    reference = "bricks/one" if name == "old-peft" else "bricks/full"
    recipe = "bricks: {{mine: {}}}\nsteps: [{{merge: task_arithmetic}}]\noutput: {{dtype: float32}}\n"
    ours, theirs = project.tensors(recipe.format(made)), project.tensors(recipe.format(reference))
    assert ours.keys() == theirs.keys()
    assert all(ours[tensor].equal(theirs[tensor]) for tensor in theirs)


@pytest.mark.parametrize("name", FILES)
def test_a_file(name: str, project: Project, cwd: Path) -> None:
    content, kind, says, usable = FILES[name]
    (cwd / "got").mkdir()
    (cwd / "got" / name).write_text(content)
    thing = opened(f"got/{name}", usable=usable)
    assert (thing["kind"], thing["says"], thing["problem"] is None) == (kind, says, usable)
    runs = kind not in ("suite", "training", "pickle", "recipe", "texts", "task") and name != "moe.yaml"
    for command in thing["commands"][: int(runs)]:
        work(command, project)
    if name == "items.csv":
        assert [json.loads(line) for line in (cwd / "got/items.jsonl").read_text().splitlines()] == [
            {"question": "w1?", "answer": "w2"}
        ]


MET: dict[str, tuple[str, Sequence[str], int, str, str]] = {
    # what: (file of FILES, command, exit code, message, hint)
    "mergekit as a recipe": ("config.yml", ["run", "{}"], 2, "expected a recipe, found a file for mergekit", "workbench recipe import {} -o recipes/config.yaml"),
    "suite as a recipe": ("suite.yaml", ["plan", "{}"], 2, "expected a recipe, found a suite of tasks", "workbench suite show {}"),
    "facts as a recipe": ("facts.jsonl", ["run", "{}"], 2, "expected a recipe, found a file of facts", "workbench facts check {}"),
    "training as a recipe": ("lora.yml", ["run", "{}"], 2, "found a configuration of axolotl", "workbench open ./outputs/out"),
    "recipe as a suite": ("recipe.yaml", ["eval", "base", "--suite", "{}"], 2, "expected a suite, found a recipe", "workbench plan {}"),
    "recipe as facts": ("recipe.yaml", ["facts", "check", "{}"], 1, "expected a file of facts, found a recipe", "workbench plan {}"),
    "table as facts": ("items.csv", ["facts", "check", "{}"], 1, "found a table of comma-separated values", "csv.DictReader"),
    "list as items": ("items.json", ["suite", "new", "x", "--data", "{}", "--kind", "exact", "--base", "base"], 1, "expected a file of items, found a JSON list", "json.load(open"),
    "table as items": ("items.csv", ["suite", "new", "x", "--data", "{}", "--kind", "exact", "--base", "base"], 1, "found a table", "> got/items.jsonl"),
    "recipe for mergekit": ("recipe.yaml", ["recipe", "import", "{}"], 2, "expected a file for mergekit, found a recipe", "workbench plan {}"),
    "pickle as a model": ("weights.pt", ["plan", "{}"], 2, "expected a recipe, found a pickle file", "only for files that you trust"),
    "pointer as a model": ("model.safetensors", ["plan", "{}"], 2, "found a Git LFS pointer", "git -C got lfs pull"),
    "facts in YAML as items": ("facts.yaml", ["suite", "new", "x", "--data", "{}", "--kind", "exact", "--base", "base"], 1, "expected a file of items, found a file of facts", "workbench facts check {}"),
    "mergekit as results": ("config.yml", ["scores", "import", "{}"], 1, "expected results of lm-eval, found a file for mergekit", "workbench recipe import {}"),
    "list of items as facts": ("items.json", ["facts", "check", "{}"], 1, "expected a text in 'prompt'", "A fact is "),
    "facts as a brick": ("facts.jsonl", ["brick", "show", "{}"], 1, "Found a file of facts", "workbench facts check {}"),
    "facts as results": ("facts.jsonl", ["scores", "import", "{}"], 1, "facts.jsonl", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", MET)
def test_a_command_that_meets_another_thing_says_what_it_is(case: str, project: Project, cwd: Path) -> None:
    name, command, code, message, hint = MET[case]
    (cwd / "got").mkdir()
    (cwd / "got" / name).write_text(FILES[name][0])
    error = refused(*(word.format(f"got/{name}") for word in command))
    assert message in error.message
    assert hint.format(f"got/{name}") in (error.hint or "")
    assert error.exit_code == code


NAMES = {
    "https://huggingface.co/org/name": "org/name",
    "https://huggingface.co/org/name/tree/main": "org/name",
    "http://www.huggingface.co/org/name/tree/v1?x=1": "org/name@v1",
    "hf.co/org/name/": "org/name",
    "hf://org/name": "org/name",
    "https://hf.co/org/name/blob/main/config.json": "org/name",
    "https://hf.co/org/name/resolve/abc/model.safetensors": "org/name@abc",
    "file:///models/my%20llama": "/models/my llama",
    "file:models/llama": "models/llama",
    "file://localhost/m": "/m",
    r"C:\Users\me\llama": "/mnt/c/Users/me/llama",
    "d:/llama": "/mnt/d/llama",
    r"models\llama": "models/llama",
    "org/name": None,
    "https://huggingface.co/datasets/org/name": None,
    "https://huggingface.co/org": None,
    "models/llama": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_other_systems(name: str, project: Project, cwd: Path) -> None:
    """`open` takes them; every other command says what to type."""
    assert retyped(name) == NAMES[name]
    if NAMES[name] is not None:
        assert NAMES[name] in str(refused("plan", name))
        error = refused("plan", str(project.write(f"base: '{name}'\nsteps: []\n")))
        assert error.hint == f"Write {NAMES[name]}."
    if NAMES[name] == "org/name" and name != "org/name":
        assert opened(name)["name"] == "org/name"


def test_places_of_this_project(project: Project, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs, models, names, `~`, the hub's cache; what is not there gets the nearest place, what is unknown is said to be."""
    project.write("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\n", "mine.yaml")
    made = document("run", "mine")["run"]
    assert opened(made)["kind"] == "run"
    assert opened("mine")["kind"] == "recipe"
    assert opened(f"file://{cwd}/bricks/one")["kind"] == "adapter"
    monkeypatch.setenv("HOME", str(cwd))
    assert opened("~/bricks/full")["kind"] == "checkpoint"
    assert opened(".")["kind"] == "project"
    assert "a file of an adapter" in opened("bricks/one/adapter_config.json", usable=False)["says"]
    assert refused("open", "bricks/oen").hint == "Did you mean 'bricks/one'?"
    assert refused("open", "./brikcs/one").hint == "Did you mean 'bricks/one'?"
    (cwd / "empty").mkdir()
    assert "of no kind that is known here" in refused("open", "empty").message
    shutil.copytree(cwd / "bricks" / "one", cwd / "outer" / "inner")
    (cwd / "outer" / "notes").mkdir()
    for brick, meant in (("outer/notes", None), ("outer", "outer/inner"), ("./outer/iner", "outer/inner")):
        error = refused("plan", str(project.write(f"bricks: {{b: {brick}}}\nsteps: [{{merge: average}}]\n")))
        assert (meant or "Expected a PEFT adapter") in (error.hint or "")


def test_hub_ids(project: Project, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in the cache is looked at there, and its commands name the id; of another one the commands are those that would read it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cwd / "hub"))
    snapshot = cwd / "hub" / "models--org--tuned" / "snapshots" / ("3f" * 20)
    shutil.copytree(cwd / "bricks" / "one", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    thing = opened("https://huggingface.co/org/tuned")
    assert (thing["name"], thing["kind"]) == ("org/tuned", "adapter")
    assert thing["says"].endswith(", in the hub's cache")
    words = shlex.split(thing["commands"][0])
    assert (words[3], words[-1]) == ("use-tuned", "tuned=org/tuned")
    assert opened("org/other@v1")["commands"] == ["workbench plan org/other@v1", "workbench chat org/other@v1"]


def test_a_run_as_a_brick_names_its_model(project: Project, cwd: Path) -> None:
    project.write("bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\n", "mine.yaml")
    made = document("run", "mine")["run"]
    error = refused("plan", str(project.write(f"bricks: {{b: {made}}}\nsteps: [{{merge: average}}]\n")))
    assert error.hint == f"Did you mean '{made}/model'?"


# -- names that wrappers of a training leave in files


def renamed(project: Project, brick: str, file: str, pattern: str, by: str) -> None:
    """mine/: a brick with other names in its file."""
    shutil.copytree(project.path / "bricks" / brick, project.path / "mine")
    tensors = load_file(project.path / "mine" / file)
    other = {re.sub(pattern, by, name): tensor for name, tensor in tensors.items()}
    assert other.keys() != tensors.keys()
    save_file(other, project.path / "mine" / file, metadata={"format": "pt"})


WRAPPED = {
    "torch.compile": ("full", "^", "_orig_mod."),
    "compiled layers": ("full", r"(layers\.\d+\.)", r"\1_orig_mod."),
    "DDP": ("full", "^", "module."),
    "both": ("full", "^", "module._orig_mod."),
    "FSDP": ("full", r"(layers\.\d+\.)", r"_fsdp_wrapped_module.\1"),
    "checkpointed": ("full", r"(mlp\.)", r"\1_checkpoint_wrapped_module."),
    "compiled adapter": ("one", r"(base_model\.model\.)", r"\1_orig_mod."),
    "raw adapter": ("one", r"(lora_[AB])\.weight", r"\1.default.weight"),
    "DDP adapter": ("one", "^", "module."),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_names_of_wrappers_are_read_as_those_of_the_model(case: str, project: Project, cwd: Path) -> None:
    """The result and the brick's digest are those of the same file with the model's own names."""
    brick, pattern, by = WRAPPED[case]
    renamed(project, brick, "model.safetensors" if brick == "full" else "adapter_model.safetensors", pattern, by)
    recipe = "bricks: {{b: {}}}\nsteps: [{{merge: task_arithmetic, lambda: 0.7}}]\n"
    ours, theirs = project.resolve(recipe.format("mine")), project.resolve(recipe.format(f"bricks/{brick}"))
    assert ours.digests == theirs.digests
    first, second = project.tensors(recipe.format("mine"), None), project.tensors(recipe.format(f"bricks/{brick}"), None)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_prefixes_that_may_be_the_model_s_own_stay(project: Project, cwd: Path) -> None:
    """Two tensors that would have one name are refused, and `module.` is kept if another name does not begin with it."""
    renamed(project, "full", "model.safetensors", r"^model\.norm", "module.model.norm")
    error = refused("plan", str(project.write("bricks: {b: mine}\nsteps: [{merge: average}]\n")))
    assert "its tensors begin with 'module.' where the base's begin with ''" in error.message
    file = project.path / "mine" / "model.safetensors"
    tensors = load_file(file)
    tensors["_orig_mod.model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    error = refused("plan", str(project.write("bricks: {b: mine}\nsteps: [{merge: average}]\n")))
    assert "are both model.layers.0.mlp.up_proj.weight, without the prefixes of a training" in error.message


# -- the command line


WORDS = {
    "merge r.yaml": "workbench run r.yaml",
    "train mine": "workbench brick train mine --data FILE",
    "score r": "workbench eval r --suite NAME",
    "generate r": "workbench chat r",
    "convert m": "workbench open m",
    "mergekit-yaml c.yml out": "workbench recipe import c.yml -o RECIPE",
    "lm_eval --model hf": "workbench eval RECIPE --suite NAME",
    "rnu r.yaml": "'run'",
}


@pytest.mark.parametrize("line", WORDS)
def test_words_of_other_tools(line: str) -> None:
    said = call(*line.split(), code=2).stderr
    assert f"No such command '{line.split()[0]}'. Did you mean" in said
    assert WORDS[line] in said


WRITTEN = {
    "no version": ("base: b\nsteps: []\n", "Add the line `version: 1`."),
    "list of bricks": (
        "version: 1\nbase: b\nbricks: [bricks/one, org/Two]\nsteps: []\n",
        "Write `bricks: {one: bricks/one, two: org/Two}`.",
    ),
    "list of names": (
        "version: 1\nbase: b\nbricks: [{a: x}, {b: {adapter: y}}]\nsteps: []\n",
        "Write `bricks: {a: x, b: {adapter: y}}`.",
    ),
    "one step": ("version: 1\nbase: b\nsteps: {merge: ties, density: 0.2}\n", "Write `steps: [{merge: ties, density: 0.2}]`."),
    "named steps": ("version: 1\nbase: b\nsteps: {mix: {merge: ties}}\n", "Write `steps: [{id: mix, merge: ties}]`."),
    "tabs": ("version: 1\nbase: b\nsteps:\n\t- merge: ties\n", r"Replace the tabs: `sed -i 's/\t/  /g' recipes/mine.yaml`"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_a_recipe_s_error_shows_the_line_to_write(case: str, project: Project, cwd: Path) -> None:
    text, hint = WRITTEN[case]
    Path("recipes/mine.yaml").write_text(text)
    error = refused("plan", "mine")
    assert hint in (error.hint or "")
    assert error.exit_code == 2


def test_duplicates_are_dropped_on_request(project: Project, cwd: Path) -> None:
    rows = [{"question": "w1?", "answer": "w2"}, {"question": "w3?", "answer": "w4"}, {"question": "w1?", "answer": "w2"}]
    Path("items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    new = ["suite", "new", "mine", "--data", "items.jsonl", "--kind", "exact", "--base", "base"]
    assert "--drop-duplicates keeps the first row" in (refused(*new).hint or "")
    made = json.loads(run(*new, "--drop-duplicates", "--json", code=3).stdout)
    assert (made["items"], made["dropped"]) == (2, 1)
