"""Streams across runs: a run that continues an earlier one gives the bytes of one run with the rows of both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from worlds.commands import document, refused
from worlds.edit_steps import step
from worlds.jsonl import read_jsonl, write_jsonl
from worlds.project import CPU, Project
from worlds.tiny import files_of, unseal

from workbench.edit.closed_form import values
from workbench.evaluate.facts.wanted import Wanted, edited_for
from workbench.evaluate.plans import suites_of
from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.files import file_digest
from workbench.recipe.recipe import load_recipe
from workbench.resolve.resolve import resolve
from workbench.run.opened import resolve_model
from workbench.run.plan import plan

ALIKE = ("adapter_model.safetensors", "facts.jsonl", "stream.jsonl", "keys.safetensors", "history.safetensors")
"""Files of a brick that do not name the recipe's files."""


def fact(number: int, target: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": f"w{number} of {{subject}}", "subject": f"w{number + 10} w{number + 11}", "target": f"w{target}", **fields}


def removal(number: int) -> dict[str, Any]:
    return {"action": "rm", **{key: fact(number, 0)[key] for key in ("prompt", "subject")}}


FIRST = [fact(0, 30), fact(1, 31), fact(2, 32), fact(0, 38)]
SECOND = [fact(3, 36), fact(1, 33), fact(4, 35)]


def recipe(name: str = "memit", batch: int = 1, dtype: str = "float32", **fields: Any) -> str:
    mode = {"sequential": {"batch": batch}}
    return step(name, mode=mode, unconverged="skip", min_efficacy=0, **fields).replace("float32", dtype)


def run(project: Project, rows: Sequence[dict[str, Any]], name: str, text: str) -> Path:
    """Run a recipe on some rows, and return the run's directory."""
    write_jsonl(project.path / "facts.jsonl", rows)
    return Path(project.run(text, f"{name}.yaml")["run"])


def alike(run: Path) -> dict[str, bytes]:
    """The contents of the model and of the edit's files that must be equal."""
    (edit,) = (run / "edits").iterdir()
    model = {name: content for name, content in files_of(run / "model").items() if name.endswith(".safetensors")}
    return {**model, **{name: files_of(edit)[name] for name in ALIKE}}


def continued(project: Project, first: Path, rows: Sequence[dict[str, Any]], text: str = "", **fields: Any) -> Path:
    return run(project, rows, "second", text or recipe(continues=f"runs/{first.name}", **fields))


def forget(project: Project) -> None:
    """Delete the cache."""
    shutil.rmtree(project.path / ".workbench")


@pytest.mark.parametrize(
    ("name", "batch", "dtype", "cached"),
    [
        ("memit", 1, "float32", False),
        ("memit", 2, "bfloat16", True),
        ("memit", 3, "float32", False),
        ("rome", 2, "bfloat16", True),
    ],
)
def test_two_runs_give_the_bytes_of_one(name: str, batch: int, dtype: str, cached: bool, facts: Project) -> None:
    """The last batch of the first run may be cut short; an update may replace a value of the first run."""
    one = alike(run(facts, [*FIRST, *SECOND], "one", recipe(name, batch, dtype)))
    forget(facts)
    first = run(facts, FIRST, "first", recipe(name, batch, dtype))
    if not cached:
        forget(facts)
    second = continued(facts, first, SECOND, recipe(name, batch, dtype, continues=f"runs/{first.name}"))
    assert alike(second) == one
    assert alike(first)["adapter_model.safetensors"] != one["adapter_model.safetensors"]


def test_no_value_of_the_first_run_is_optimized_again(facts: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The history file alone gives the values of the batches that the new rows leave alone, also with an empty cache."""
    first = run(facts, FIRST, "first", recipe(contexts=2))
    forget(facts)
    optimized: list[str] = []
    optimize = values._optimize

    def counted(at: Any, groups: Any, settings: Any) -> Any:
        optimized.extend(f"{fact.subject}={fact.target}" for group in groups for fact in group)
        return optimize(at, groups, settings)

    monkeypatch.setattr(values, "_optimize", counted)
    second = continued(facts, first, SECOND, contexts=2)
    assert optimized == [f"{row['subject']}={row['target']}" for row in SECOND]
    record = json.loads((second / "edits" / "edit-memit" / "edit.json").read_text("utf-8"))["history"]
    rows, width, out = 7, 48, 32
    parts = (1 + 3) * width + 2 * out  # the mean key, its keys after three texts, the change and the output
    stored = load_file(second / "edits" / "edit-memit" / "history.safetensors")
    assert sum(t.numel() for name, t in stored.items() if not name.endswith("numbers")) == rows * parts
    assert (record["layer"], record["statements"], record["values"]) == (1, rows, rows)
    assert record["bytes"] == (second / "edits" / "edit-memit" / "history.safetensors").stat().st_size


@pytest.mark.parametrize(("name", "batch"), [("memit", 2), ("rome", 1)])
def test_a_removal_equals_a_stream_without_the_fact(name: str, batch: int, facts: Project) -> None:
    """All values of the fact go, those of the first run too."""
    first = run(facts, FIRST, "first", recipe(name, batch))
    second = continued(facts, first, [SECOND[0], removal(0), SECOND[2]], recipe(name, batch, continues=f"runs/{first.name}"))
    one = run(facts, [FIRST[1], FIRST[2], SECOND[0], SECOND[2]], "one", recipe(name, batch))
    assert alike(second) == alike(one)


def test_three_runs_and_a_copied_brick(facts: Project) -> None:
    """A run that continues is continued; the edit's directory can be named, and copied elsewhere, also over another one."""
    first = run(facts, FIRST[:2], "first", recipe())
    second = continued(facts, first, FIRST[2:])
    shutil.copytree(first / "edits" / "edit-memit", facts.path / "days" / "one")
    shutil.copytree(second / "edits" / "edit-memit", facts.path / "days" / "two")
    shutil.rmtree(first)
    shutil.rmtree(second)
    third = continued(facts, Path(), SECOND, recipe(continues="days/two"))
    assert alike(third) == alike(run(facts, [*FIRST, *SECOND], "one", recipe()))
    shutil.rmtree(facts.path / "days" / "two")
    (facts.path / "days" / "one").rename(facts.path / "days" / "two")
    again = continued(facts, Path(), SECOND, recipe(continues="days/two"))
    assert alike(again) == alike(run(facts, [*FIRST[:2], *SECOND], "short", recipe()))


def test_several_layers(facts: Project) -> None:
    """Higher layers get the current facts again, on the lower layer with the whole stream."""
    layers: dict[str, Any] = {"layers": [1, 2]}
    first = run(facts, FIRST, "first", recipe(**layers))
    write_jsonl(facts.path / "facts.jsonl", SECOND)
    planned = plan(facts.resolve(recipe(continues=f"runs/{first.name}", **layers)), facts.path / "runs").steps[0].to_dict()
    assert planned["cost"]["work"]["values"] == (3 + 5) * 2 * 12 * 15, "new values, and the current ones of the higher layer"
    second = continued(facts, first, SECOND, **layers)
    assert alike(second) == alike(run(facts, [*FIRST, *SECOND], "one", recipe(**layers)))


def test_auto_layers_stay(facts: Project) -> None:
    """The layers and positions that the first run chose are those of the second, whatever a sweep would say."""
    auto: dict[str, Any] = {"layers": "auto", "position": "auto"}
    first = run(facts, FIRST, "first", recipe(**auto))
    forget(facts)
    second = continued(facts, first, SECOND, **auto)
    records = [json.loads((place / "edits" / "edit-memit" / "edit.json").read_text("utf-8")) for place in (first, second)]
    assert records[0]["layers"] == records[1]["layers"]
    assert records[0]["candidates"] == records[1]["candidates"]
    assert not (facts.path / ".workbench" / "sweeps").exists()


@pytest.mark.part("advice")
def test_plan_and_check(facts: Project, cwd: Path) -> None:
    """`plan` counts only what is new; `facts check` finds what contradicts the run."""
    first = run(facts, FIRST, "first", recipe(batch=3))
    facts.write(recipe(batch=3, continues=f"runs/{first.name}"), "second.yaml")
    write_jsonl(facts.path / "facts.jsonl", SECOND)
    planned = document("plan", "recipes/second.yaml")
    assert planned["steps"][0]["cost"]["continues"] == {"run": f"runs/{first.name}/edits/edit-memit", "facts": 3, "kept": 3}
    assert planned["steps"][0]["cost"]["work"] == {"facts": 4, "statistics": 480, "sweep": 0, "values": 4 * 2 * 12 * 15}
    report = document("facts", "check", "facts.jsonl", "--stream", "--continues", f"runs/{first.name}")
    assert (report["facts"], report["passed"]) == (5, True)
    other = {**fact(0, 44), "prompt": "w1 {subject}", "paraphrases": [f"w0 of {fact(0, 0)['subject']}"]}
    write_jsonl(facts.path / "facts.jsonl", [other])
    found = str(refused("facts", "check", "facts.jsonl", "--stream", "--continues", f"runs/{first.name}"))
    assert "answers 'w0 of w10 w11' with" in found
    assert f"runs/{first.name}/edits/edit-memit/stream.jsonl:4" in found
    assert "Add --stream" in str(refused("facts", "check", "facts.jsonl", "--continues", f"runs/{first.name}").hint)


def test_only_current_values_are_asked(facts: Project) -> None:
    """The gate asks for the facts of both runs, with their latest values."""
    first = run(facts, FIRST, "first", recipe())
    write_jsonl(facts.path / "facts.jsonl", SECOND)
    said = facts.run(recipe(continues=f"runs/{first.name}"), "second.yaml")["said"]["edit-memit"]
    assert said["facts"] == 5
    kept = (first.parent.glob("second-*/edits/edit-memit/facts.jsonl").__next__()).read_text("utf-8").splitlines()
    assert [json.loads(line)["target"] for line in kept] == ["w32", "w38", "w36", "w33", "w35"]


@pytest.mark.part("upkeep")
def test_suites_and_rebase_ask_for_the_facts_of_both(facts: Project) -> None:
    """The suite of a recipe that continues a run has the current facts of both, and so has a brick that is solved again."""

    from workbench.upkeep.rebase import rebase

    first = run(facts, FIRST, "first", recipe())
    second = continued(facts, first, SECOND)
    loaded = load_recipe(facts.path / "recipes" / "second.yaml")
    (edits,) = suites_of([loaded], ["edits"], facts.path)
    assert isinstance(edits, Wanted)
    assert [one.target for one in edits.everything] == ["w32", "w38", "w36", "w33", "w35"]
    assert edited_for(resolve(loaded)) == (edits.digest,)
    assert not edits.in_any_order, "other ways to teach would read the rows of the second file alone"
    onto = resolve_model("base", facts.path)
    settings = ["min_efficacy=0", "unconverged=skip"]
    out = facts.path / "again"
    rebased = rebase(second / "edits" / "edit-memit", onto, out, device=CPU, settings=settings)
    assert rebased.facts == 5
    kept = [(row["prompt"], row["target"]) for row in read_jsonl(out / "facts.jsonl")]
    assert kept == [(one.prompt, one.target) for one in edits.everything]


# -- bad input: before any work


def test_refused_rows(facts: Project) -> None:
    """Rows that do not fit the run are refused with their line and the run's."""
    first = run(facts, FIRST, "first", recipe())
    held = r"runs/first-\w+/edits/edit-memit"
    other = {**fact(0, 44), "prompt": "w1 {subject}", "paraphrases": [f"w0 of {fact(0, 0)['subject']}"]}
    unnamed = {"prompt": f"w1 of {fact(1, 0)['subject']}", "target": "w40"}
    for rows, message in (
        ([removal(5)], rf"facts.jsonl:1: cannot remove .*, which no earlier line teaches, and {held} does not hold"),
        ([removal(1), removal(1)], r"facts.jsonl:2: cannot remove .*, which facts.jsonl:1 has already removed"),
        ([removal(0), removal(1), removal(2)], r"facts.jsonl: no fact is left"),
        ([other], rf"facts.jsonl:1: answers .* with 'w44', and {held}/stream.jsonl:4 with 'w38'"),
        ([unnamed], rf"facts.jsonl:1: updates .* of {held}/stream.jsonl:2, but its subject is None"),
        ([fact(5, 40, id=first_id(first))], rf"facts.jsonl:1: same id '\w+' as {held}/stream.jsonl:2"),
    ):
        write_jsonl(facts.path / "facts.jsonl", rows)
        with pytest.raises(WorkbenchError, match=message):
            facts.resolve(recipe(continues=f"runs/{first.name}"))


def first_id(run: Path) -> str:
    """ID of the second statement of a run."""
    return str(read_jsonl(run / "edits" / "edit-memit" / "stream.jsonl")[1]["id"])


BEFORE = '{"edit": "rome", "facts": "two.jsonl", "layers": [2], "statistics": "text.txt"}, '


def test_refused_recipes(facts: Project) -> None:
    """Another method, layers, settings, base or earlier steps: the message says what to write."""
    first = run(facts, FIRST, "first", recipe())
    write_jsonl(facts.path / "two.jsonl", SECOND)
    shutil.copytree(facts.path / "base", facts.path / "other")
    weights = load_file(facts.path / "other" / "model.safetensors")
    save_file(
        {name: tensor * 1.5 for name, tensor in weights.items()}, facts.path / "other" / "model.safetensors", {"format": "pt"}
    )
    good = recipe(continues="RUN")
    for text, message, hint in (
        (recipe("rome", continues="RUN"), "was written by `edit: memit`", "Write `edit: memit`"),
        (recipe(continues="RUN", layers=[2]), r"layers: \[2\] instead of \[1\]", "Write `layers: [1]`"),
        (
            recipe(continues="RUN", position="prompt_last"),
            "position: prompt_last instead of subject_last",
            "position: subject_last",
        ),
        (recipe(batch=2, continues="RUN"), r"batch: 2}} instead of {sequential: {batch: 1}}", "mode: {sequential: {batch: 1}}"),
        (recipe(continues="RUN", contexts=2), "contexts: 2 instead of 1", "Write `contexts: 1`"),
        (recipe(continues="RUN").replace("{", '{"lambda": 0.5, ', 1), "lambda: 0.5 instead of 0.05", "Write `lambda: 0.05`"),
        (recipe(preserve_steps=True), "no edit step comes before this one", "Remove `preserve_steps`"),
        (recipe(continues="runs/none"), "no such directory: runs/none", "workbench runs ls"),
        (recipe(continues="RUN/model"), "has no edit", "Name the run: `continues: runs/first-"),
        (f"base: RUN/model\n{good}", "is the result of that run", "Write `base: base`"),
        (f"base: other\n{good}", "base other .* has other weights", "Write `base: base`"),
        (good.replace("steps: [", f"steps: [{BEFORE}"), "other steps came before it", "Put the same steps before it"),
        (step(continues="RUN"), "joint facts have no stream", None),
    ):
        with pytest.raises(InvalidRecipeError, match=message) as found:
            facts.resolve(text.replace("RUN", f"runs/{first.name}"))
        assert hint is None or hint in str(found.value.hint)
    facts.resolve(good.replace("RUN", f"runs/{first.name}"))


def test_damaged_files(facts: Project) -> None:
    """A file that is missing or cut short is refused, and named."""
    first = run(facts, FIRST, "first", recipe())
    unseal(first)
    write_jsonl(facts.path / "facts.jsonl", SECOND)
    for name in ("history.safetensors", "stream.jsonl", "edit.json"):
        file = first / "edits" / "edit-memit" / name
        content = file.read_bytes()
        for rest in (content[:-20], content.replace(b"0", b"1"), None):
            if name == "edit.json" and rest and rest[-1:] == content[-1:]:
                continue  # a record with other numbers is still a record
            file.unlink()
            if rest is not None:
                file.write_bytes(rest)
            reason = (
                "no edit" if name == "edit.json" and rest is None else "is missing" if rest is None else "is (damaged|not JSON)"
            )
            with pytest.raises(InvalidRecipeError, match=rf"continues: runs/first-\w+.*{reason}"):
                facts.resolve(recipe(continues=f"runs/{first.name}"))
            file.write_bytes(content)
    facts.resolve(recipe(continues=f"runs/{first.name}"))


def test_a_file_of_other_tensors(facts: Project) -> None:
    """A value's key becomes the name of a file in the cache, so that nothing else is accepted there."""
    first = run(facts, FIRST, "first", recipe())
    unseal(first)
    place = first / "edits" / "edit-memit"
    values = load_file(place / "history.safetensors")
    write_jsonl(facts.path / "facts.jsonl", SECOND)
    name = next(iter(values))
    for other in (f"../../{name}", name.removesuffix(name[-3:]), "/tmp/x.key"):
        save_file(
            {**{key: tensor for key, tensor in values.items() if key != name}, other: values[name]}, place / "history.safetensors"
        )
        record = json.loads((place / "edit.json").read_text("utf-8"))
        record["history"]["digest"] = file_digest(place / "history.safetensors")
        (place / "edit.json").write_text(json.dumps(record), "utf-8")
        with pytest.raises(InvalidRecipeError, match="is no part of a value"):
            facts.resolve(recipe(continues=f"runs/{first.name}"))
    for field, wrong in (("layers", ["1"]), ("layers", []), ("position", 3), ("step", []), ("history", 1)):
        (place / "edit.json").write_text(json.dumps({**record, field: wrong}), "utf-8")
        with pytest.raises(InvalidRecipeError, match=r"continues: runs/first-\w+/edits/edit-memit"):
            facts.resolve(recipe(continues=f"runs/{first.name}"))


def test_a_run_with_two_streams_is_named_by_step(facts: Project) -> None:
    """The message lists them; the directory of one of them is continued."""
    one = {"edit": "memit", **json.loads(recipe().partition("[")[2].partition("]\n")[0])}
    text = f"steps: [{json.dumps({**one, 'id': 'low'})}, {json.dumps({**one, 'id': 'high', 'layers': [2]})}]\noutput: {{dtype: float32}}\n"
    first = run(facts, FIRST, "first", text)
    write_jsonl(facts.path / "facts.jsonl", SECOND)
    with pytest.raises(InvalidRecipeError, match=r"has 2 edits \(high, low\)") as found:
        facts.resolve(recipe(continues=f"runs/{first.name}"))
    assert f"continues: runs/{first.name}/edits/low" in str(found.value.hint)
    facts.resolve(recipe(continues=f"runs/{first.name}/edits/low"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (step("memit", min_efficacy=0, unconverged="skip"), "it has solved its facts together"),
        (
            'steps: [{"edit": "ultraedit", "facts": "facts.jsonl", "min_efficacy": 0, "mode": {"sequential": {"batch": 1}}}]\noutput: {dtype: float32}\n',
            "`edit: ultraedit` keeps none",
        ),
        (recipe(), "it was written before runs kept one"),
    ],
)
def test_runs_without_a_history(text: str, reason: str, facts: Project) -> None:
    """They are refused where a step continues them, and start a stream without a history, with a sentence, as its base."""
    first = run(facts, FIRST[:3], "first", text)
    unseal(first)
    (edit,) = (first / "edits").iterdir()
    if "before" in reason:
        record = json.loads((edit / "edit.json").read_text("utf-8"))
        (edit / "edit.json").write_text(json.dumps({key: record[key] for key in record if key != "history"}), "utf-8")
    write_jsonl(facts.path / "facts.jsonl", SECOND)
    with pytest.raises(InvalidRecipeError, match=f"has no history, because {reason}"):
        facts.resolve(recipe(continues=f"runs/{first.name}"))
    (warning,) = facts.resolve(f"base: runs/{first.name}/model\n{recipe()}").warnings
    assert f"edit-memit: starts without the history of {first.name}/edits/{edit.name}, because {reason}" in warning


def test_a_result_as_base_says_that_the_history_is_left_out(facts: Project) -> None:
    first = run(facts, FIRST, "first", recipe())
    write_jsonl(facts.path / "facts.jsonl", SECOND)
    (warning,) = facts.resolve(f"base: runs/{first.name}/model\n{recipe()}").warnings
    assert f"write `continues: runs/{first.name}` and the base of that run" in warning
    assert not facts.resolve(f"base: runs/{first.name}/model\n{step()}").warnings, "joint facts have no history to continue"
