"""Streams of updates: what an update replaces, what a removal restores, and what counts as said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from worlds import people
from worlds.commands import document
from worlds.dense import context_of
from worlds.edit_steps import projected, solve, step
from worlds.jsonl import read_jsonl, write_jsonl
from worlds.project import CPU, Project
from worlds.tiny import files_of

from workbench.edit.closed_form import solve as solve_module
from workbench.edit.closed_form import values
from workbench.edit.inputs import contexts
from workbench.edit.places.parts import Parts, padded, row_of
from workbench.edit.places.passes import keys_and_values
from workbench.evaluate.facts.wanted import Wanted
from workbench.evaluate.lineup import lineup
from workbench.evaluate.plans import suites_of
from workbench.facts.facts import Fact
from workbench.facts.stream import read_stream
from workbench.ground.errors import WorkbenchError
from workbench.recipe.recipe import load_recipe
from workbench.run.compose import compose
from workbench.steps import Edit, MethodContext

STREAM: dict[str, Any] = {"mode": {"sequential": {"batch": 1}}, "unconverged": "skip"}


def fact(number: int, target: int, **fields: Any) -> dict[str, Any]:
    """One of eight facts of the tiny vocabulary."""
    return {"prompt": f"w{number} of {{subject}}", "subject": f"w{number + 10} w{number + 11}", "target": f"w{target}", **fields}


def removal(number: int) -> dict[str, Any]:
    return {"action": "rm", **{key: fact(number, 0)[key] for key in ("prompt", "subject")}}


def write(project: Project, rows: Sequence[dict[str, Any]]) -> list[Fact]:
    """Write a stream, and return its statements."""
    write_jsonl(project.path / "facts.jsonl", rows)
    return read_stream(project.path / "facts.jsonl", "facts.jsonl").statements


def updates(edit: Edit) -> Tensor:
    (factors,) = edit.factors.values()
    return factors.left.double() @ factors.right.double()


# -- updates


@pytest.mark.parametrize("history", [True, False])
def test_an_update_is_least_squares_without_the_old_value(history: bool, facts: Project) -> None:
    """Written out in float64: the second value of a fact is solved with the keys of the other facts, not with its own old ones."""
    asked = write(facts, [fact(0, 30), fact(1, 31), fact(2, 32), fact(0, 33), fact(1, 34)])
    context = context_of(facts)
    edit = solve(context, **STREAM, **{"lambda": 0.1}, contexts=2, history=history)
    parts, c = Parts.find(context), covariance(context)
    changes = edit.tensors["1.changes"].double()
    before = ("", *contexts((facts.path / "text.txt").read_text("utf-8").split("\n\n"), 2))
    total, held = torch.zeros(32, len(c), dtype=torch.float64), dict[str, Tensor]()
    for number, one in enumerate(asked):
        rows = padded([row_of(one, context.tokenizer, "subject_last", text) for text in before], CPU)
        keys = keys_and_values(parts, 1, rows)[0].double().T / 3**0.5
        held.pop(one.text, None)
        metric = 0.1 * len(c) * c + sum(k @ k.T for k in held.values()) + keys @ keys.T
        wanted = changes[number][:, None].expand(-1, 3) / 3**0.5
        total = total + wanted @ keys.T @ torch.linalg.pinv(metric, hermitian=True)
        if history:
            held[one.text] = keys
    assert float((updates(edit) - total).abs().max()) <= 1e-4 * float(total.abs().max())


def covariance(context: MethodContext) -> Tensor:
    """C of the text for statistics, as 480 tokens of it."""
    from workbench.models.hooks import hooked

    parts, seen = Parts.find(context), list[Tensor]()
    with torch.no_grad(), hooked(parts.out(1), before=lambda _m, args: seen.append(args[0].flatten(0, -2))):
        for text in (context.project / "text.txt").read_text("utf-8").split("\n\n"):
            context.model(torch.tensor([context.tokenizer(text)["input_ids"]]))
            if sum(map(len, seen)) >= 10 * parts.width(1):
                break
    vectors = torch.cat(seen).double()
    return vectors.T @ vectors / len(vectors)


@pytest.mark.parametrize("name", ["rome", "memit", "emmet", "alphaedit", "encore"])
def test_an_update_is_written_in_full(name: str, facts: Project) -> None:
    """The second value of a fact gets the share of its change that the first one got; outputs of other facts stay."""
    write(facts, [fact(0, 30), fact(1, 31), fact(0, 33), fact(0, 35)])
    edit = solve(context_of(facts), name, **STREAM, contexts=0)
    keys, changes, update = edit.tensors["1.keys"].double(), edit.tensors["1.changes"].double(), updates(edit)
    torch.testing.assert_close(keys[0], keys[2], atol=1e-5, rtol=0)
    records = {record["id"]: record for record in edit.record["facts"]}
    assert len(records) == 2, "an updated fact is one fact"
    assert len(edit.facts) == 2
    wanted = changes[0] + changes[2] + changes[3]
    share = float((update @ keys[0]) @ wanted / wanted.norm() ** 2)
    assert share > (0.999 if name == "rome" else 0.7), share
    alone = solve(context_of(facts), name, **STREAM, contexts=0, first=1)
    if name == "rome":
        torch.testing.assert_close(update @ keys[0], wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close((update - updates(alone)) @ keys[1], changes[1], atol=1e-4, rtol=0)
    assert edit.record["facts"][-1]["written"] == pytest.approx(alone.record["facts"][0]["written"], abs=0.1)


def test_facts_about_one_subject_stay_together(facts: Project) -> None:
    """They share a key, so an update of one carries the other's target along."""
    shared = {"prompt": "w9 w8 {subject}", "subject": "w10 w11", "target": "w40"}
    write(facts, [fact(0, 30), shared, fact(3, 36), {**shared, "target": "w41"}])
    context = context_of(facts)
    edit = solve(context, **STREAM, contexts=0)
    assert not any(record.get("skipped") for record in edit.record["facts"])
    said = projected(context, list(edit.facts), updates(edit).float())[2]
    assert [f.target for f in edit.facts] == ["w30", "w36", "w41"]
    assert said.all()
    assert len(edit.tensors["1.keys"]) == 4


class Unreachable(values.Values):
    """Values with which the model does not say the target."""

    def __getitem__(self, index: Any) -> Any:
        return replace(super().__getitem__(index), top=False)


def test_a_skipped_update_leaves_the_old_value(facts: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of the old value stays preserved; the fact counts as not written, other facts about its subject as written."""
    shared = {**fact(0, 40), "prompt": "w9 w8 {subject}"}
    rows = [shared, fact(0, 30), fact(1, 31), fact(0, 33), fact(2, 34)]
    asked = write(facts, rows)
    found = values.values

    def some(at: Any, groups: Any, *rest: Any) -> Any:
        reached = found(at, groups, *rest)
        return Unreachable(reached.files) if asked[3] in groups[0] else reached

    monkeypatch.setattr(solve_module, "values", some)
    edit = solve(context_of(facts), **STREAM, contexts=0)
    assert [(f.target, r.get("skipped", False)) for f, r in zip(edit.facts, edit.record["facts"], strict=True)] == [
        ("w40", False),
        ("w31", False),
        ("w33", True),
        ("w34", False),
    ]
    write(facts, [*rows[:3], rows[4]])
    without = solve(context_of(facts), **STREAM, contexts=0)
    assert torch.equal(updates(edit), updates(without))


# -- removals: the same bytes


def brick(project: Project, name: str, rows: Sequence[dict[str, Any]], **fields: Any) -> dict[str, bytes]:
    """Files of the brick of a stream."""
    write(project, rows)
    place = compose(project.resolve(step(name, **STREAM, **fields)), CPU).edits[f"edit-{name}"]
    return files_of(place)


KEPT = [fact(0, 30), fact(1, 31), fact(3, 36), fact(0, 33)]
REMOVED = [fact(0, 30), fact(2, 32), fact(1, 31), fact(2, 38), fact(3, 36), removal(2), fact(0, 33)]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("name", "batch"), [("memit", 1), ("memit", 2), ("rome", 1), ("memit", 3)])
def test_a_removed_fact_leaves_the_same_bytes(name: str, batch: int, cached: bool, facts: Project) -> None:
    """Every file of the brick equals that of a stream that never had the fact, with values of the other stream in the cache or not."""
    mode = {"mode": {"sequential": {"batch": batch}}}
    fields = {**{k: v for k, v in STREAM.items() if k != "mode"}, **mode}
    found = []
    for rows in (REMOVED[:5], KEPT, REMOVED):
        write(facts, rows)
        place = compose(facts.resolve(step(name, **fields)), CPU).edits[f"edit-{name}"]
        found.append(files_of(place))
        if not cached:
            shutil.rmtree(facts.path / ".workbench")
    assert found[1] == found[2]
    assert found[0]["adapter_model.safetensors"] != found[1]["adapter_model.safetensors"]


def test_an_update_that_is_left_out_restores_the_state_before(facts: Project) -> None:
    """Without its line, or with `first`, the stream is the one before the update."""
    before = brick(facts, "memit", KEPT[:3])
    after = brick(facts, "memit", KEPT)
    assert brick(facts, "memit", KEPT[:3]) == before != after


# -- in a recipe


RECIPE = """
base: people
steps: [{edit: %s, facts: facts.jsonl, %s mode: {sequential: {batch: 3}}, min_efficacy: %d}]
output: {dtype: float32}
eval: [{facts: facts.jsonl, text: text.txt, tasks: [efficacy], sequential: {checkpoints: [1, 6], cohort: 2, sample: 20}}, {facts: facts.jsonl, text: text.txt, tasks: [efficacy]}]
"""
CLOSED = "layers: [1, 2], contexts: 1, position: subject_last, statistics: text.txt, "


@pytest.fixture
def known(tmp_path: Path, cwd: Path) -> Project:
    """Eight facts of people; then updates of three, an update of an update, and the removal of one."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "people").symlink_to(people.SUBJECT)
    (tmp_path / "text.txt").write_text("\n\n".join(people.lines(600)), "utf-8")
    rows = [{**row, "neighbours": [], "portability": []} for row in people.rows(8)]
    new = [{**rows[number], "target": others(rows[number])[turn]} for turn, number in ((0, 0), (0, 3), (0, 5), (1, 3))]
    gone = {"action": "rm", "prompt": rows[1]["prompt"], "subject": rows[1]["subject"]}
    write_jsonl(tmp_path / "facts.jsonl", [*rows[:6], *new[:2], *rows[6:], *new[2:], gone])
    return Project(tmp_path)


def others(row: dict[str, Any]) -> list[str]:
    """Other values of the relation than the true one and the edited one."""
    values = people.world().values[row["relation"]]
    return [value for value in values if value not in (row["target"], row["target_true"])][:2]


@pytest.mark.parametrize(
    ("name", "fields"), [("memit", CLOSED), ("rome", CLOSED), ("ultraedit", ""), ("finetune", "learning_rate: 0.01, ")]
)
def test_only_current_values_are_asked(name: str, fields: str, known: Project) -> None:
    """All seven facts that remain are said with their latest values; the brick, the gate, the suite and its checkpoints ask for these."""
    rows = read_jsonl(known.path / "facts.jsonl")
    forgets = name == "finetune"  # it preserves nothing: only the latest batch counts
    run = known.run(RECIPE % (name, fields, not forgets), "stream.yaml")
    (said,) = run["said"].values()
    assert said["facts"] == 7
    assert said["not_said"] == [] or forgets
    current = {row["id"]: row["target"] for row in rows if "target" in row and row["subject"] != rows[-1]["subject"]}
    kept = read_jsonl(Path(run["run"]) / "edits" / f"edit-{name}" / "facts.jsonl")
    assert {row["id"]: row["target"] for row in kept} == current
    model, tokenizer = people.load(Path(run["model"]))
    asked = [(row["prompt"].replace("{subject}", row["subject"]), row["target"]) for row in kept]
    assert all(greedy(model, tokenizer, asked[-1:] if forgets else asked))


def test_suites_ask_for_current_values(known: Project) -> None:
    """At a checkpoint, facts that later rows change are left out, because the suite asks for their later values."""
    recipe = load_recipe(known.write(RECIPE % ("memit", CLOSED, 1), "stream.yaml"))
    rows = read_jsonl(known.path / "facts.jsonl")
    ids = [row["id"] for row in people.rows(8)]
    in_order, plain = suites_of([recipe], [], known.path)
    (edits,) = suites_of([recipe], ["edits"], known.path)
    (named,) = suites_of([recipe], ["facts:facts.jsonl"], known.path)
    assert isinstance(in_order, Wanted)
    assert {(f.id, f.target) for f in in_order.everything} == {
        (ids[2], rows[2]["target"]),
        (ids[4], rows[4]["target"]),
        (ids[6], rows[8]["target"]),
        (ids[7], rows[9]["target"]),
        (ids[0], rows[6]["target"]),
        (ids[5], rows[10]["target"]),
        (ids[3], rows[11]["target"]),
    }
    assert {suite.digest for suite in (in_order, plain, edits, named) if isinstance(suite, Wanted)} == {in_order.digest}
    assert {n: (groups["first"], groups["last"]) for n, groups in in_order.cohorts.items()} == {
        6: ((ids[2], ids[4]), (ids[2], ids[4])),
        13: ((ids[2], ids[4]), (ids[5], ids[3])),
    }
    entries = lineup([recipe], facts=[in_order])
    assert [entry.name for entry in entries] == ["base", "stream@6", "stream"], "a memory does not read updates in order"
    assert entries[-1].configuration("0" * 32).edits == (in_order.digest,)
    document("facts", "check", "facts.jsonl", "--stream", "--recipe", "recipes/stream.yaml")


def greedy(model: Any, tokenizer: Any, asked: Sequence[tuple[str, str]]) -> list[bool]:
    """Return for each (prompt, answer) whether the first token of greedy generation is that of the answer."""
    found = []
    for prompt, answer in asked:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
        found.append(int(logits.argmax()) == tokenizer(f" {answer}")["input_ids"][0])
    return found


# -- bad input: before any work


def test_a_joint_step_refuses_updates(facts: Project) -> None:
    """It names both lines, and the mode that takes them."""
    write(facts, [fact(0, 30), fact(0, 33)])
    with pytest.raises(WorkbenchError, match=r"facts.jsonl:2: same prompt as facts.jsonl:1, but another target") as refused:
        facts.resolve(step())
    assert "mode: {sequential: {batch: N}}" in str(refused.value.hint)
    write(facts, [fact(0, 30), removal(0)])
    with pytest.raises(WorkbenchError, match=r"facts.jsonl:2: 'action' changes an earlier fact"):
        facts.resolve(step())


@pytest.mark.parametrize("name", ["memit", "ultraedit", "finetune"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([fact(0, 30), removal(0), removal(0)], r"facts.jsonl:3: cannot remove .*, which facts.jsonl:2 has already removed"),
        ([fact(0, 30), removal(1)], r"facts.jsonl:2: cannot remove .*, which no earlier line teaches"),
        ([fact(0, 30), removal(0)], r"facts.jsonl: no fact is left, because all are removed"),
        (
            [fact(0, 30), {**fact(0, 33), "prompt": "w1 {subject}", "paraphrases": [f"w0 of {fact(0, 33)['subject']}"]}],
            r"facts.jsonl:2: answers .* with 'w33', and .*1 with 'w30'",
        ),
    ],
)
def test_refused_streams(name: str, rows: list[dict[str, Any]], message: str, facts: Project) -> None:
    write_jsonl(facts.path / "facts.jsonl", rows)
    text = (
        step(**STREAM)
        if name == "memit"
        else f"steps: [{json.dumps({'edit': name, 'facts': 'facts.jsonl', 'mode': STREAM['mode']})}]"
    )
    with pytest.raises(WorkbenchError, match=message):
        facts.resolve(text)
