"""Edit bricks: exact where they were solved, a delta with a word on it elsewhere, solved again by `edit rebase`; bricks like any other."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds.commands import call, document
from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project
from worlds.tiny import edit_json, files_of, save_model, tensors_of, unseal

from workbench.bricks.hub import HEADERS
from workbench.cli.app import main
from workbench.ground.errors import WorkbenchError
from workbench.recipe.recipe import load_recipe
from workbench.resolve.resolve import resolve
from workbench.run.compose import compose
from workbench.run.opened import NamedModel
from workbench.upkeep.rebase import read_edit, rebase

MEMIT = (
    "{id: facts, edit: memit, facts: facts.jsonl, statistics: texts.jsonl, tokens_per_input: 20, contexts: 0, lambda: 0.001, layers: [1], "
    "position: prompt_last}"
)
MIX = "{id: mix, merge: task_arithmetic, bricks: {one: 0.5, two: 0.5}}"
HEAD = "bricks: {one: bricks/one, two: bricks/two}\n"


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the first test, with which the others do not solve the edit of `edited` again."""
    return tmp_path_factory.mktemp("solved") / "cache"


@pytest.fixture
def edited(project: Project, solved: Path) -> Project:
    """A project with 6 facts, text for statistics, and `bricks/facts` solved on its base."""
    words = random.Random(0)
    rows = [{"id": f"f{i}", "prompt": "{subject} is", "subject": f"w{i} of w{i + 10}", "target": f"w{i + 30}"} for i in range(6)]
    write_jsonl(project.path / "facts.jsonl", rows)
    texts = [" ".join(words.choice(("is", "of", *(f"w{i}" for i in range(60)))) for _ in range(60)) for _ in range(60)]
    (project.path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    linked = project.path / "bricks"
    target = linked.resolve()
    linked.unlink()
    linked.mkdir()
    for brick in target.iterdir():
        (linked / brick.name).symlink_to(brick)
    if solved.exists():
        shutil.copytree(solved, project.path / ".workbench")
    document = project.run(f"steps: [{MEMIT}]\n", "edit.yaml")
    if not solved.exists():
        shutil.copytree(project.path / ".workbench", solved)
    (linked / "facts").symlink_to(Path(document["run"]) / "edits" / "facts")
    return project


def record(brick: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((brick / "edit.json").read_text("utf-8"))
    return found


def says(project: Project, brick: str) -> float:
    """Share of facts that greedy generation gives with a brick added on top of the merge."""
    from transformers import AutoTokenizer

    from workbench.run.materialize import materialize

    text = f"bricks: {{one: bricks/one, two: bricks/two, {brick}: bricks/{brick}}}\n"
    resolved = project.resolve(
        text + f"steps: [{MIX}, {{merge: task_arithmetic, bricks: {{{brick}: 1.0}}}}]\noutput: {{dtype: float32}}\n"
    )
    model, tokenizer = materialize(resolved, CPU), AutoTokenizer.from_pretrained(project.path / "base")
    right: list[bool] = []
    for line in (project.path / "facts.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        prompt = torch.tensor([tokenizer(row["prompt"].replace("{subject}", row["subject"]))["input_ids"]])
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=1)
        right.append(tokenizer.decode(made[0, prompt.shape[1] :]).strip() == row["target"])
    return sum(right) / len(right)


def test_rebased_brick_is_exact_as_the_last_step(edited: Project) -> None:
    """Solved on a merge, the brick says all its facts there; added as a last step it gives the weights that were measured."""
    onto = edited.resolve(HEAD + f"steps: [{MIX}]\n", "mix.yaml")
    out = edited.path / "bricks" / "rebased"
    found = rebase(edited.path / "bricks" / "facts", NamedModel("mix", onto), out, device=CPU)
    assert found.said.after == 1.0
    assert found.said.without == 0.0
    assert found.said.before == says(edited, "facts"), "the old brick on the merge, as a recipe gives it"
    assert says(edited, "rebased") == 1.0
    assert found.not_said == []
    old, new = record(edited.path / "bricks" / "facts"), record(out)
    assert (new["base"], new["step"], new["method"], new["seed"]) == (old["base"], old["step"], old["method"], old["seed"])
    assert new["solved_on"] == found.solved_on != old["solved_on"]
    assert new["rebased"]["solved_on"] == old["solved_on"]
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "brick.yaml",
        "edit.json",
        "facts.jsonl",
        "keys.safetensors",
    } == set(files_of(out))

    both = "bricks: {one: bricks/one, two: bricks/two, facts: bricks/%s}\n"
    top = "{merge: task_arithmetic, bricks: {facts: 1.0}}"
    resolved = edited.resolve(both % "rebased" + f"steps: [{MIX}, {top}]\n")
    assert resolved.warnings == ()
    again = edited.tensors(HEAD + f"steps: [{MIX}, {MEMIT}]\n")
    here = edited.tensors(both % "rebased" + f"steps: [{MIX}, {top}]\n")
    for name, tensor in again.items():  # an edit step there gives the same
        torch.testing.assert_close(here[name], tensor, atol=1e-6, rtol=0)
    (warning,) = edited.resolve(both % "facts" + f"steps: [{MIX}, {top}]\n").warnings
    assert warning.startswith(
        "brick 'facts': an edit, which was not solved on the weights that step 'merge-task_arithmetic-1' adds it to."
    )


def test_rebased_bricks_are_listed_checked_and_merged(edited: Project) -> None:
    """A step that takes all bricks has to list them once the edit brick is there; the weights are the same, and so is their key."""
    onto = edited.resolve(HEAD + "steps: [{id: mix, merge: average}]\n")
    found = rebase(edited.path / "bricks" / "facts", NamedModel("mix", onto), edited.path / "bricks" / "mean", device=CPU)
    assert found.unlisted == ["mix"]
    text = "bricks: {one: bricks/one, two: bricks/two, facts: bricks/mean}\n"
    steps = "steps: [{id: mix, merge: average, bricks: [one, two]}, {merge: task_arithmetic, bricks: {facts: {weight: 1}}}]\n"
    assert not edited.resolve(text + steps).warnings
    # `plan` reads no tensors: what would need them is named, and not said to be well.
    (edited.path / "base").unlink()
    save_model(edited.path / "base")  # the same weights, not read yet
    path = edited.write("bricks: {facts: bricks/facts}\nsteps: [{merge: ties}]\n")
    seen = resolve(load_recipe(path), HEADERS)
    assert "brick 'facts': the edit was solved on this base" in seen.deferred
    assert len(resolve(load_recipe(path)).warnings) == 1


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ("{merge: task_arithmetic, bricks: {facts: 1.0}}", None),
        ("{merge: average, bricks: [facts]}", None),
        ("{merge: task_arithmetic, bricks: {facts: 0.5}}", "which step 'merge-task_arithmetic' (task_arithmetic) changes before adding it"),
        ("{merge: task_arithmetic, bricks: {facts: 1.0}, lambda: 2.0}", "which step 'merge-task_arithmetic' (task_arithmetic) changes before adding it"),
        ("{merge: ties, bricks: {facts: 1.0}}", "which step 'merge-ties' (ties) changes before adding it"),
        ("{id: all, merge: ties}", "which step 'all' (ties) merges with one"),
        ("{merge: average, bricks: [one]}, {merge: average, bricks: [facts]}", "which was not solved on the weights that step 'merge-average-1' adds it to"),
    ],
)  # fmt: skip
def test_warnings(edited: Project, steps: str, reason: str | None) -> None:
    text = f"bricks: {{one: bricks/one, facts: bricks/facts}}\nsteps: [{steps}]\n"
    warnings = list(edited.resolve(text).warnings)
    if reason is None:
        assert warnings == []
        return
    recipe = edited.path / "recipes" / "test.yaml"
    assert warnings == [
        f"brick 'facts': an edit, {reason}. The result may lose facts: `workbench eval {recipe} --suite facts:bricks/facts/facts.jsonl` "
        f"measures how many survive. To keep them, solve the edit again on the result and add it in a last step: "
        f"`workbench edit rebase bricks/facts --onto {recipe} -o bricks/facts-rebased`"
    ]


def test_commands_of_the_warning_work(edited: Project, cwd: Path) -> None:
    """The one measures how many facts survive, the other solves them again; their shares agree."""
    edited.write("bricks: {one: bricks/one, facts: bricks/facts}\nsteps: [{id: all, merge: ties, density: 0.4}]\n", "all.yaml")
    (warning,) = resolve(load_recipe(Path("recipes/all.yaml"))).warnings
    score, again = (command.split()[1:] for command in warning.split("`")[1::2])
    (configuration,) = document(*score, "--no-controls")["configurations"]
    survived = configuration["tasks"]["facts-efficacy"]["acc"]["value"]
    said = document(*again)["said"]
    assert said["before"] == pytest.approx(survived)
    assert said["after"] == 1.0


def test_merges_take_it_as_a_brick(edited: Project) -> None:
    """Task arithmetic adds its delta exactly; TIES and DARE run on it."""
    text = "bricks: {one: bricks/one, facts: bricks/facts}\nsteps: [%s]\n"
    base, alone = edited.tensors("steps: []\n"), edited.tensors(text % "{merge: task_arithmetic, bricks: {facts: 1}}")
    one = edited.tensors(text % "{merge: task_arithmetic, bricks: {one: 1}}")
    both = edited.tensors(text % "{merge: task_arithmetic}")
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(alone[name], base[name])
    torch.testing.assert_close(both[name], base[name] + (alone[name] - base[name]) + (one[name] - base[name]), atol=1e-5, rtol=0)
    for step in ("{merge: ties, density: 0.5}", "{merge: dare, density: 0.5}"):
        merged = edited.tensors(text % step)
        assert not torch.equal(merged[name], base[name])
        assert all(t.isfinite().all() for t in merged.values())


def test_rebase_from_the_command_line(edited: Project, cwd: Path) -> None:
    """The command that the warning names works, on a recipe that holds the old brick too; so do `brick show`, `verify` and `ls`."""
    edited.write(HEAD.replace("}", ", facts: bricks/facts}") + "steps: [{id: all, merge: ties, density: 0.3}]\n", "all.yaml")
    found = document("edit", "rebase", "facts", "--onto", "all", "-o", "bricks/new")
    assert found["said"]["before"] == found["said"]["without"] < found["said"]["after"] == 1.0, "the recipe holds it already"
    assert (found["brick"], found["onto"], found["facts"], found["method"]) == ("bricks/new", "all", 6, "memit")
    for args, said in (
        (["brick", "verify", "bricks/new"], "1 tensors fit base, digest"),
        (["brick", "show", "bricks/new"], "new: edit, "),
        (["brick", "ls"], "6 facts, memit"),
    ):
        assert said in call(*args).stdout
    text = call("edit", "rebase", "facts", "--onto", "recipes/all.yaml", "-o", "bricks/other")
    assert "6 facts, memit, solved on all (" in text.stdout
    assert "% without the edit, " in text.stdout
    assert "use:    bricks: {other: bricks/other} and, as a last step of recipes/all.yaml" in text.stderr
    assert (
        files_of(edited.path / "bricks" / "new")["adapter_model.safetensors"]
        == files_of(edited.path / "bricks" / "other")["adapter_model.safetensors"]
    )


def test_rebase_onto_a_model(edited: Project, cwd: Path) -> None:
    """With a model directory the base is that model, and the refusal of another base names the command that ends it."""
    edited.run(HEAD + f"steps: [{MIX}]\n", "mix.yaml", out=edited.path / "mixed")
    recipe = "base: mixed\nbricks: {facts: %s}\nsteps: [{merge: task_arithmetic}]\n"
    with pytest.raises(WorkbenchError, match="brick 'facts': this edit was solved on another base") as caught:
        edited.resolve(recipe % "bricks/facts")
    assert caught.value.hint is not None
    command = caught.value.hint.split("`")[1].split()
    assert command == ["workbench", "edit", "rebase", "bricks/facts", "--onto", "mixed", "-o", "bricks/facts-rebased"]
    assert document(*command[1:])["said"]["after"] == 1.0
    assert not edited.resolve(recipe % "bricks/facts-rebased").warnings
    assert "base:\n  id: mixed\n" in (edited.path / "bricks" / "facts-rebased" / "brick.yaml").read_text("utf-8")
    assert "machine" not in (edited.path / "bricks" / "facts-rebased" / "edit.json").read_text("utf-8")
    assert str(edited.path) not in (edited.path / "bricks" / "facts-rebased" / "edit.json").read_text("utf-8")


def test_measured_settings_are_kept_or_measured_again(edited: Project) -> None:
    """`auto` layers are those of the old record; --remeasure runs the sweep on the new weights; the record still says auto."""
    auto = MEMIT.replace("layers: [1], position: prompt_last", "layers: auto")
    document = edited.run(f"steps: [{auto}]\n", "auto.yaml")
    brick = Path(document["run"]) / "edits" / "facts"
    onto = edited.resolve(HEAD + f"steps: [{MIX}]\n", "mix.yaml")
    sweeps = edited.path / ".workbench" / "sweeps"
    before = set(sweeps.iterdir())
    kept = rebase(brick, NamedModel("mix", onto), edited.path / "kept", device=CPU)
    assert set(sweeps.iterdir()) == before
    was, now = record(brick), record(edited.path / "kept")
    assert list(kept.kept["layers"]) == was["layers"] == now["layers"]
    assert now["step"]["layers"] == was["step"]["layers"] == "auto"
    measured = rebase(brick, NamedModel("mix", onto), edited.path / "measured", device=CPU, remeasure=True)
    assert measured.kept == {}
    assert len(set(sweeps.iterdir()) - before) == 1


def test_finetuned_facts_are_rebased_without_a_trace(edited: Project) -> None:
    document = edited.run("steps: [{edit: finetune, facts: facts.jsonl, learning_rate: 0.05, epochs: 60}]\n", "tuned.yaml")
    onto = edited.resolve(HEAD + f"steps: [{MIX}]\n", "mix.yaml")
    found = rebase(Path(document["run"]) / "edits" / "edit-finetune", NamedModel("mix", onto), edited.path / "tuned", device=CPU)
    assert found.said.without < found.said.after
    assert record(edited.path / "tuned")["solved_on"] == found.solved_on
    # Twice onto the same recipe: the same files.
    for name in ("a", "b"):
        rebase(edited.path / "bricks" / "facts", NamedModel("mix", onto), edited.path / name / "facts", device=CPU)
    assert files_of(edited.path / "a") == files_of(edited.path / "b")
    assert tensors_of(edited.path / "a" / "facts")


def test_errors(edited: Project, monkeypatch: pytest.MonkeyPatch, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onto = edited.resolve(HEAD + f"steps: [{MIX}]\n", "mix.yaml")
    facts = edited.path / "bricks" / "facts"
    with pytest.raises(WorkbenchError, match=r"bricks/one: not an edit brick \(no edit\.json"):
        rebase(edited.path / "bricks" / "one", NamedModel("mix", onto), edited.path / "x", device=CPU)
    with pytest.raises(WorkbenchError, match=r"nowhere: no such directory"):
        read_edit(edited.path / "nowhere")
    with pytest.raises(WorkbenchError, match="exists and is not an empty directory"):
        rebase(facts, NamedModel("mix", onto), edited.path / "bricks", device=CPU)
    with pytest.raises(WorkbenchError, match=r"edit\.json, step:1:1 stepz: unknown field. Did you mean 'steps'\?"):
        rebase(facts, NamedModel("mix", onto), edited.path / "x", device=CPU, settings=["stepz=3"])
    with pytest.raises(WorkbenchError, match=r"at layer 1, .*, no value") as caught:
        rebase(facts, NamedModel("mix", onto), edited.path / "x", device=CPU, settings=["steps=1", "learning_rate=0.0001"])
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("Set fields of the step with `--set FIELD=VALUE`.")
    assert not (edited.path / "x").exists()
    grown = edited.resolve("steps: [{grow: depth, blocks: 1, check: off}]\n", "grown.yaml")
    with pytest.raises(WorkbenchError, match=r"grown grows its base \(step 'grow-depth'\)"):
        rebase(facts, NamedModel("grown", grown), edited.path / "x", device=CPU)
    deaf = save_model(edited.path / "deaf")
    edit_json(deaf / "tokenizer.json", model={"type": "WordLevel", "vocab": {"<unk>": 0, "is": 1}, "unk_token": "<unk>"})
    with pytest.raises(WorkbenchError, match="deaf has another tokenizer than the base that facts was solved on"):
        rebase(facts, NamedModel("deaf", edited.resolve("base: deaf\n", "deaf.yaml")), edited.path / "x", device=CPU)
    unseal(facts.resolve().parent.parent)
    (facts.resolve() / "facts.jsonl").unlink()
    monkeypatch.setattr("sys.argv", ["workbench", "edit", "rebase", "facts", "--onto", "mix", "-o", "x"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "bricks/facts: the edit brick has no facts.jsonl" in capsys.readouterr().err


def test_base_is_composed_with_the_edits_of_the_recipe(edited: Project) -> None:
    """A recipe with an edit step of its own is a model like any other: its edit comes from the cache."""
    onto = edited.resolve(f"steps: [{MEMIT}]\n", "edit.yaml")
    compose(onto, CPU)
    found = rebase(edited.path / "bricks" / "facts", NamedModel("edit", onto), edited.path / "twice", device=CPU)
    assert found.said.without == 1.0
