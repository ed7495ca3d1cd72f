"""Closed-form edits as steps of a recipe: bricks that PEFT loads, the same bytes again, interrupted work that goes on, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from worlds.dense import context_of, write_facts_file
from worlds.edit_steps import FIELDS, PROJECTION, Interrupt, counting, projected, solve, step, stopping
from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project
from worlds.tiny import files_of, live, tensors_of

from workbench.edit.closed_form import moments, values
from workbench.facts.facts import Fact
from workbench.facts.published import read_facts
from workbench.ground.errors import WorkbenchError
from workbench.run.compose import compose

NAMES = ["rome", "memit", "emmet", "alphaedit", "encore"]


# -- bricks


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_is_a_brick(name: str, facts: Project) -> None:
    """PEFT loads it with the logits of the written checkpoint; what it was solved for lies beside it."""
    from peft import PeftModel

    document = facts.run(step(name))
    brick = Path(document["run"]) / "edits" / f"edit-{name}"
    base, written = live(facts.path / "base"), live(Path(document["model"]))
    tokens = torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = written(tokens).logits
        assert float((base(tokens).logits - expected).abs().max()) > 0.01
        torch.testing.assert_close(PeftModel.from_pretrained(base, brick)(tokens).logits, expected, atol=1e-5, rtol=0)

    record = json.loads((brick / "edit.json").read_text("utf-8"))
    assert record["method"] == name
    assert record["order"] == "free"
    assert record["layers"] == [1]
    assert record["block_ratio"] == {"1": 1.0}
    assert record["statistics"]["1"]["tokens"] == 480
    assert record["statistics"]["1"]["text"] == "text.txt"
    assert [f["id"] for f in record["facts"]] == ["f0", "f1", "f2", "f3"]
    assert all(f["loss"] < f["before"] for f in record["facts"])
    assert read_facts(brick / "facts.jsonl", "kept") == [
        replace(f, place=f.place.replace("facts.jsonl", "kept")) for f in read_facts(facts.path / "facts.jsonl", "facts.jsonl")
    ]
    kept = load_file(brick / "keys.safetensors")
    assert {n: tuple(t.shape) for n, t in kept.items()} == {"1.keys": (4, 48), "1.changes": (4, 32)}
    adapter = load_file(brick / "adapter_model.safetensors")
    update = next(t for n, t in adapter.items() if "lora_B" in n) @ next(t for n, t in adapter.items() if "lora_A" in n)
    shares = (kept["1.keys"] @ update.T).norm(dim=1) / kept["1.changes"].norm(dim=1)
    assert [f["written"] for f in record["facts"]] == pytest.approx(shares.tolist(), abs=2e-4)
    delta = tensors_of(Path(document["model"]))[PROJECTION] - tensors_of(facts.path / "base")[PROJECTION].float()
    torch.testing.assert_close(delta, update, atol=1e-6, rtol=1e-5)


def test_facts_are_learned(facts: Project) -> None:
    """From the written checkpoint: rome and memit say every target, which the base does not."""
    context = context_of(facts)
    asked = read_facts(facts.path / "facts.jsonl", "facts.jsonl")
    assert not projected(context, asked)[2].any()
    for name in ("rome", "memit"):
        update = facts.tensors(step(name, contexts=0))[PROJECTION] - tensors_of(facts.path / "base")[PROJECTION].float()
        assert projected(context, asked, update)[2].all(), name


def test_transposed_weights(facts: Project, model_of: Callable[..., Path]) -> None:
    """GPT-2 stores [in, out]: the adapter says so, and PEFT adds it the right way round."""
    from peft import PeftModel

    base = model_of("gpt2", torch.float32)
    document = facts.run(f"base: {base}\n" + step())
    brick = Path(document["run"]) / "edits" / "edit-memit"
    assert json.loads((brick / "adapter_config.json").read_text("utf-8"))["fan_in_fan_out"] is True
    tokens = torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = PeftModel.from_pretrained(live(base), brick)(tokens).logits
        torch.testing.assert_close(found, live(Path(document["model"]))(tokens).logits, atol=1e-5, rtol=0)


def test_without_the_edit_the_file_is_the_same(facts: Project) -> None:
    """Taken out of the recipe, the edit leaves no trace in what is written."""
    head, merge = "bricks: {one: bricks/one, full: bricks/full}\n", "{merge: ties, bricks: {one: 1, full: 1}}"
    before = files_of(Path(facts.run(head + f"steps: [{merge}]\n", "plain.yaml")["model"]))["model.safetensors"]
    edit = json.dumps({"edit": "memit", **FIELDS})
    edited = tensors_of(Path(facts.run(head + f"steps: [{merge}, {edit}]\n", "edited.yaml")["model"]))
    again = Path(facts.run(head + f"steps: [{merge}]\n", "again.yaml")["model"])
    assert files_of(again)["model.safetensors"] == before
    assert [n for n, t in tensors_of(again).items() if not torch.equal(t, edited[n])] == [PROJECTION]


# -- the same again


def solved(project: Project, text: str) -> Path:
    return compose(project.resolve(text), CPU).edits["edit-memit"]


def test_same_bytes_from_an_empty_cache(facts: Project) -> None:
    first = files_of(solved(facts, step(preserve="facts.jsonl", refine=2)))
    shutil.rmtree(facts.path / ".workbench")
    torch.manual_seed(99)
    assert files_of(solved(facts, step(preserve="facts.jsonl", refine=2))) == first


def test_order_of_facts_is_free(facts: Project) -> None:
    """A joint edit of one layer does not depend on the file's order; the record says whether one does."""
    lines = write_facts_file(facts.path / "facts.jsonl", 12)
    first = solved(facts, step())
    write_jsonl(facts.path / "facts.jsonl", lines[::-1])
    shutil.rmtree(facts.path / ".workbench" / "values")
    second = solved(facts, step())
    assert first != second
    one, other = (load_file(place / "adapter_model.safetensors") for place in (first, second))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-6, rtol=0)
    orders = {
        name: json.loads((solved(facts, step(first=2, **fields)) / "edit.json").read_text("utf-8"))["order"]
        for name, fields in {
            "joint": {}, "layers": {"layers": [1, 2]}, "sequential": {"mode": {"sequential": {"batch": 1}}}
        }.items()
    }  # fmt: skip
    assert orders == {"joint": "free", "layers": "dependent", "sequential": "dependent"}


# -- one after the other


def test_a_sequence_keeps_what_it_has_written(facts: Project) -> None:
    """ROME fact by fact: with a memory the first key still gets its change at the end, without one it does not. Later changes are
    those of the model that the facts before have made."""
    context = context_of(facts)
    for history in (True, False):
        edit = solve(context, "rome", mode={"sequential": {"batch": 1}}, history=history)
        keys, changes = edit.tensors["1.keys"].double(), edit.tensors["1.changes"].double()
        (factors,) = edit.factors.values()
        missing = (keys[0] @ (factors.left.double() @ factors.right.double()).T - changes[0]).norm() / changes[0].norm()
        assert float(missing) < 1e-5 if history else float(missing) > 1e-2


def test_sequence_follows_the_file(facts: Project) -> None:
    """In order of the file, each fact on the result of those before."""
    rows = write_facts_file(facts.path / "facts.jsonl", 3)
    write_jsonl(facts.path / "facts.jsonl", rows[::-1])
    context = context_of(facts)
    edit = solve(context, "rome", mode={"sequential": {"batch": 1}}, contexts=0)
    assert [f["id"] for f in edit.record["facts"]] == ["f2", "f1", "f0"]
    alone = solve(context, "rome", first=1, contexts=0)
    torch.testing.assert_close(edit.tensors["1.changes"][:1], alone.tensors["1.changes"])


@pytest.mark.parametrize("layers", [[1, 2], [2, 1]])
def test_layers_are_written_upwards(layers: list[int], facts: Project) -> None:
    """The upper layer starts from what the lower one has made; both are in the brick."""
    place = solved(facts, step("memit", layers=layers, refine=0))
    record = json.loads((place / "edit.json").read_text("utf-8"))
    assert record["layers"] == [1, 2]
    assert list(record["rank"]) == [f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)]
    assert all(f["layer"] == 2 and f["before"] < 3 for f in record["facts"]), "layer 1 has brought the targets near"


# -- what must not move


def test_preserved_prompts_do_not_move(facts: Project) -> None:
    """ROME with a list of prompts: the projection gives the same at their lookups, where it moves without the list."""
    prompts = [{"prompt": f"w{i} of {{subject}}", "subject": f"w{i + 30} w{i + 31}"} for i in range(6)]
    write_jsonl(facts.path / "keep.jsonl", prompts)
    kept = [Fact(f"k{i}", p["prompt"], p["subject"], "w1") for i, p in enumerate(prompts)]
    context = context_of(facts)
    before = projected(context, kept)[1]
    moved = {}
    for preserve in (None, "keep.jsonl"):
        edit = solve(context, "rome", contexts=0, preserve=preserve)
        (factors,) = edit.factors.values()
        moved[preserve] = float((projected(context, kept, factors.left @ factors.right)[1] - before).norm() / before.norm())
        reached = edit.tensors["1.keys"] @ (factors.left @ factors.right).T
        torch.testing.assert_close(reached, edit.tensors["1.changes"], atol=1e-3, rtol=1e-3)
    assert moved["keep.jsonl"] < 1e-5 < 0.01 < moved[None]


def test_a_fact_without_subject_is_looked_up_at_the_last_token(facts: Project) -> None:
    rows = [{"id": "a", "prompt": "w1 of w2 w3", "target": "w30"}, {"id": "b", "prompt": "w4 of w5", "target": "w31"}]
    write_jsonl(facts.path / "facts.jsonl", rows)
    context = context_of(facts)
    keys = [solve(context, position=position).tensors["1.keys"] for position in ("subject_last", "prompt_last")]
    assert torch.equal(*keys)


def test_one_subject_has_one_value(facts: Project) -> None:
    """Two facts that are looked up at one place: one key, one change, both targets reached as far as one change can."""
    rows = [
        {"id": "a", "prompt": "w1 of {subject}", "subject": "w20", "target": "w30"},
        {"id": "b", "prompt": "w2 of {subject}", "subject": "w20", "target": "w30"},
        {"id": "c", "prompt": "w3 of {subject}", "subject": "w21", "target": "w31"},
    ]
    write_jsonl(facts.path / "facts.jsonl", rows)
    edit = solve(context_of(facts), "rome")
    assert {n: t.shape[0] for n, t in edit.tensors.items()} == {"1.keys": 2, "1.changes": 2}
    assert edit.record["facts"][0]["steps"] == edit.record["facts"][1]["steps"]
    (rank,) = edit.record["rank"].values()
    assert rank == 2


# -- interrupted


def test_values_go_on_after_an_interruption(facts: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 facts are three chunks; what is finished is not optimised again, and the result is the uninterrupted one."""
    write_facts_file(facts.path / "facts.jsonl", 20)
    context = context_of(facts)
    expected = solve(replace(context, cache=facts.path / "other"), "rome", refine=0)
    before = {n: p.detach().clone() for n, p in context.model.named_parameters()}
    with pytest.raises(Interrupt):
        solve(replace(context, progress=stopping("values", 8)), "rome", refine=0)
    assert all(torch.equal(p, before[n]) for n, p in context.model.named_parameters())
    assert len(list((context.cache / "values").iterdir())) == 8
    calls = counting(monkeypatch, values, "_optimize")
    found = solve(context, "rome", refine=0)
    assert [len(call[1]) for call in calls] == [8, 4]
    assert found.record == expected.record
    assert all(torch.equal(t, expected.tensors[n]) for n, t in found.tensors.items())
    solve(context, "rome", refine=0)
    assert len(calls) == 2, "nothing is optimised a third time"


def test_statistics_go_on_after_an_interruption(facts: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are saved while they grow; the rest is added to them, to the same bytes."""
    monkeypatch.setattr(moments, "_SAVE_EVERY", 0.0)
    monkeypatch.setattr(moments, "BATCH_TOKENS", moments.LENGTH)  # one row of 40 tokens a batch
    context = context_of(facts)
    solve(replace(context, cache=facts.path / "other"), first=1)
    with pytest.raises(Interrupt):
        solve(replace(context, progress=stopping("statistics", 200)), first=1)
    assert not any("values" in str(p) for p in context.cache.iterdir())
    calls = counting(monkeypatch, moments, "_add_batch")
    solve(context, first=1)
    assert len(calls) == 480 // 40 - 4, "the fifth batch was not saved yet when it stopped"
    one, other = ((root / "moments") for root in (context.cache, facts.path / "other"))
    assert files_of(one) == files_of(other)
    assert [p.name.split(".", 1)[1] for p in one.iterdir()] == ["factors.safetensors"]
    solve(context, first=2)
    assert len(calls) == 8, "collected once"


def test_statistics_are_shared(facts: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """By methods, and by bases that differ above the layer alone; not by other texts."""
    context = context_of(facts)
    calls = counting(monkeypatch, moments, "_save_factors")
    solve(context, "memit", first=1)
    solve(context, "encore", first=1)
    digests = {n: ("other" if "layers.2" in n or n == PROJECTION else d) for n, d in context.digests.items()}
    solve(replace(context, digests=digests), "memit", first=1)
    assert len(calls) == 1
    (facts.path / "text.txt").write_text((facts.path / "text.txt").read_text("utf-8") + "\n\nw1 w2 w3", "utf-8")
    solve(context, "memit", first=1)
    assert len(calls) == 2
    for number, place in enumerate(("layers.0", "layers.1.self_attn"), 3):
        digests = {n: ("other" if place in n else d) for n, d in context.digests.items()}
        solve(replace(context, digests=digests), "memit", first=1)
        assert len(calls) == number
    solve(context, "memit", first=1, tokens_per_input=11)
    assert len(calls) == 5


# -- refused


LONG = {"prompt": "w1 of {subject}", "subject": "w2", "target": " ".join(["w3"] * 33)}


@pytest.mark.parametrize(
    ("fields", "rows", "message"),
    [
        ({}, [LONG], r"facts.jsonl:1: prompt and target have 36 tokens \(33 of them in the target\); at most 64 tokens are allowed, 32 in the target"),
        ({"layers": [4]}, [], r"edit memit: layer 4 does not exist; the model has layers 0 to 3"),
        ({"layers": []}, [], r"layers: expected at least 1 entries, found \[\]"),
        ({"layers": [1, 1]}, [], r"expected auto or distinct layers, found \[1, 1\]"),
        ({"tokens_per_input": 100}, [], r"statistics: text.txt has 3,000 tokens, expected 4,800 \(100 for each of 48 inputs\)"),
        ({"statistics": "none.txt"}, [], r"none.txt"),
        ({"preserve": "none.jsonl"}, [], r"none.jsonl"),
        ({"mode": {"sequential": {"batch": 0}}}, [], r"batch"),
        ({"clamp": 0.001}, [], r"edit memit: at layer 1, subject_last, no value makes the model give the target of 4 of 4 facts: "
                               r"f0 \(\d\.\d\d -> \d\.\d\d nats per token\); f1 .*No weight was changed"),
        ({"clamp": 0.001, "unconverged": "skip"}, [], r"edit memit: .*any of the 4 facts"),
        ({}, [{"prompt": "w1 of {subject}", "target": "w3"}], r"facts.jsonl:1: the prompt has \{subject\}, but there is no 'subject'"),
        ({}, [{"prompt": "w1 of {subject}", "subject": "w2", "target": "w3"}, {"prompt": "w1 of w2", "target": "w4"}],
         r"facts.jsonl:2: same prompt as facts.jsonl:1, but another target"),
    ],
)  # fmt: skip
def test_bad_input(fields: dict[str, Any], rows: list[dict[str, str]], message: str, facts: Project) -> None:
    """Refused with its place and a repair; nothing half-made stays in the cache of edits."""
    if rows:
        write_jsonl(facts.path / "facts.jsonl", rows)
    with pytest.raises(WorkbenchError, match=message):
        facts.run(step(**fields))
    assert not list((facts.path / ".workbench").glob("edits/*"))


def test_unconverged_facts_change_nothing(facts: Project) -> None:
    """No weight of the live model, and no file but finished values, which the next try uses."""
    context = context_of(facts)
    before = {n: p.detach().clone() for n, p in context.model.named_parameters()}
    with pytest.raises(WorkbenchError, match="No weight was changed"):
        solve(context, clamp=0.001, layers=[0, 1])
    assert all(torch.equal(p, before[n]) for n, p in context.model.named_parameters())
    assert all(p.requires_grad for p in context.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in context.model.modules())
    assert {p.name for p in context.cache.iterdir()} == {"moments", "values"}
    assert not list(context.cache.rglob(".*"))


def test_skipped_facts_are_named(facts: Project) -> None:
    """A target that no value can reach, among others that are written all the same."""
    rows = write_facts_file(facts.path / "facts.jsonl", 3)
    far = {**rows[0], "id": "far", "prompt": "{subject} w1 w2 w3 is", "target": "w59 w58 w57"}
    write_jsonl(facts.path / "facts.jsonl", [*rows, far])
    edit = solve(context_of(facts), "rome", unconverged="skip", contexts=0)
    record = {f["id"]: f for f in edit.record["facts"]}
    cached = list(values.Values(list((facts.path / ".workbench" / "values").iterdir())))
    (failed,) = (v for v in cached if not v.top)
    numbers = {(round(v.loss, 4), round(v.before, 4), v.steps) for v in cached}
    assert all(
        (record[row["id"]]["loss"], record[row["id"]]["before"], record[row["id"]]["steps"]) in numbers for row in rows[1:]
    )
    assert record["far"] == {
        "id": "far",
        "layer": 1,
        "loss": round(failed.loss, 4),
        "before": round(failed.before, 4),
        "skipped": True,
    }
    assert not any("skipped" in record[row["id"]] for row in rows[1:])
