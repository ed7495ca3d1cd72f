"""Several edit steps in one recipe: `preserve_steps` keeps what the earlier steps have written at the same layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from worlds.dense import context_of
from worlds.edit_steps import FIELDS, solve, step
from worlds.jsonl import write_jsonl
from worlds.project import CPU, Project

from workbench.edit.closed_form.closed_form import ClosedForm
from workbench.edit.closed_form.continuing import earlier_facts
from workbench.edit.inputs import contexts
from workbench.edit.memit import Memit
from workbench.edit.places.parts import Parts, padded, row_of
from workbench.edit.places.passes import keys_and_values
from workbench.facts.facts import Fact, fact_of
from workbench.ground.errors import WorkbenchError
from workbench.models.hooks import hooked
from workbench.recipe.methods import methods
from workbench.recipe.recipe import dump_step, load_recipe
from workbench.run.compose import compose


def fact(number: int, target: int) -> dict[str, Any]:
    return {"prompt": f"w{number} of {{subject}}", "subject": f"w{number + 10} w{number + 11}", "target": f"w{target}"}


FIRST, SECOND = [fact(0, 30), fact(1, 31), fact(2, 32)], [fact(3, 36), fact(1, 33)]
"""The second step updates one fact of the first."""


def two_steps(first: str = "memit", second: str = "memit", settings: dict[str, Any] | None = None, **fields: Any) -> str:
    """A recipe of two edits at layer 1; `fields` are those of the second."""
    common = {**FIELDS, "unconverged": "skip", "min_efficacy": 0, **(settings or {})}
    one = {"id": "one", "edit": first, **common, "facts": "one.jsonl"}
    two = {"id": "two", "edit": second, **common, "facts": "two.jsonl", **fields}
    return f"steps: [{json.dumps(one)}, {json.dumps(two)}]\noutput: {{dtype: float32}}\n"


def edits(project: Project, text: str) -> dict[str, Path]:
    write_jsonl(project.path / "one.jsonl", FIRST)
    write_jsonl(project.path / "two.jsonl", SECOND)
    return compose(project.resolve(text), CPU).edits


def update(place: Path) -> Tensor:
    """ΔW of an edit, in float64."""
    factors = load_file(place / "adapter_model.safetensors")
    (left,) = (tensor for name, tensor in factors.items() if "lora_B" in name)
    (right,) = (tensor for name, tensor in factors.items() if "lora_A" in name)
    scale = json.loads((place / "adapter_config.json").read_text("utf-8"))
    return left.double() @ right.double() * scale["lora_alpha"] / scale["r"]


def keys(project: Project, rows: Sequence[dict[str, Any]], beginnings: int = 1) -> list[Tensor]:
    """For each fact its keys [d, n] after n beginnings, divided by √n. They are measured on the base: an edit of layer 1 does not change them."""
    context = context_of(project)
    before = ("", *contexts((project.path / "text.txt").read_text("utf-8").split("\n\n"), beginnings))
    found = []
    for row in rows:
        asked = padded([row_of(of(row), context.tokenizer, "subject_last", text) for text in before], CPU)
        found.append(keys_and_values(Parts.find(context), 1, asked)[0].double().T / len(before) ** 0.5)
    return found


def of(row: dict[str, Any]) -> Fact:
    return fact_of(row, "here")


def covariance(project: Project) -> Tensor:
    """C of the text for statistics at layer 1, as 480 tokens of it."""
    context = context_of(project)
    parts, seen = Parts.find(context), list[Tensor]()
    with torch.no_grad(), hooked(parts.out(1), before=lambda _m, args: seen.append(args[0].flatten(0, -2))):
        for text in (project.path / "text.txt").read_text("utf-8").split("\n\n"):
            context.model(torch.tensor([context.tokenizer(text)["input_ids"]]))
            if sum(map(len, seen)) >= 10 * parts.width(1):
                break
    vectors = torch.cat(seen).double()
    return vectors.T @ vectors / len(vectors)


@pytest.mark.parametrize("mode", ["joint", {"sequential": {"batch": 1}}])
def test_the_second_step_is_least_squares_with_the_keys_of_the_first(mode: Any, facts: Project) -> None:
    """Written out in float64: keys of the first step's facts are held, without the one that the second step updates."""
    place = edits(facts, two_steps(preserve_steps=True, mode=mode, refine=0, settings={"lambda": 0.1}))["two"]
    solved = load_file(place / "keys.safetensors")
    c, total = covariance(facts), torch.zeros(32, 48, dtype=torch.float64)
    held = dict(zip(range(3), keys(facts, FIRST), strict=True))
    new = keys(facts, SECOND)
    # Joint facts are sorted by ID, a digest, so each change is found by its key.
    means = torch.stack([k.sum(1) / 2**0.5 for k in new])
    order = [int((means - row).norm(dim=1).argmin()) for row in solved["1.keys"].double()]
    changes = {i: row.double()[:, None].expand(-1, 2) / 2**0.5 for i, row in zip(order, solved["1.changes"], strict=True)}
    for batch in [order] if mode == "joint" else [[i] for i in order]:
        if 1 in batch:
            del held[1]  # the value of the first step that the second one updates
        k, r = torch.cat([new[i] for i in batch], 1), torch.cat([changes[i] for i in batch], 1)
        total = total + r @ k.T @ torch.linalg.inv(0.1 * len(c) * c + sum(h @ h.T for h in held.values()) + k @ k.T)
        held |= {3 + i: new[i] for i in batch}
    assert float((update(place) - total).abs().max()) <= 1e-4 * float(total.abs().max())
    record = json.loads((place / "edit.json").read_text("utf-8"))
    assert record["preserved_steps"] == 3


@pytest.mark.parametrize(("first", "second"), [("rome", "rome"), ("memit", "rome"), ("ultraedit", "rome")])
def test_rome_leaves_the_earlier_facts_exactly(first: str, second: str, facts: Project) -> None:
    """Without the field, the second step changes outputs at the first step's keys; with it, at the updated one only."""
    settings = {"contexts": 0}
    text = two_steps(first, second, settings)
    if first == "ultraedit":  # it has other fields
        one = {"id": "one", "edit": "ultraedit", "facts": "one.jsonl", "min_efficacy": 0}
        text = f"steps: [{json.dumps(one)}, {{{text.partition('}, {')[2]}"
    keyed = torch.cat(keys(facts, FIRST, 0), 1)
    plain = update(edits(facts, text)["two"])
    kept = update(edits(facts, text.replace('"id": "two"', '"id": "two", "preserve_steps": true'))["two"])
    moved, left = (u @ keyed for u in (plain, kept))
    if first != "ultraedit":  # it changes lower layers too, and thereby the keys
        assert float(left[:, [0, 2]].norm()) < 1e-4 * float(moved[:, [0, 2]].norm())
        assert float(left[:, 1].norm()) > 0.1 * float(moved[:, 1].norm())
    assert float(left[:, [0, 2]].norm()) < float(moved[:, [0, 2]].norm())


def test_recipes_without_the_fields_keep_their_keys(facts: Project) -> None:
    """Both fields are part of keys and records only where they are set."""
    (plain,) = load_recipe(facts.write(step())).steps
    assert not {"preserve_steps", "continues"} & set(dump_step(plain))
    method = methods()["edit:memit"].model_validate({"edit": "memit", **FIELDS, "preserve_steps": True})
    assert isinstance(method, ClosedForm)
    assert dump_step(method)["preserve_steps"] is True


def test_fields_that_are_constants_now_stay_in_keys_and_records(facts: Project) -> None:
    """Records of earlier versions list them and are read again; another value is refused, because it would change the result."""
    plain = Memit.model_validate({"edit": "memit", **FIELDS})
    dumped = dump_step(plain)
    assert {name: dumped[name] for name in Memit.constants} == dict(Memit.constants)
    assert dumped["kl"] == 0.0625
    assert Memit.model_validate(dumped) == plain
    facts.write("steps: [{edit: memit, facts: facts.jsonl, scale: 1.25}]\n", "scaled.yaml")
    with pytest.raises(WorkbenchError, match=r"steps\.0\.scale: no longer a field, because its value is always 1\.0") as refused:
        load_recipe(facts.path / "recipes" / "scaled.yaml")
    assert refused.value.hint == "Remove it."


def test_rome_refuses_prompts_that_leave_no_room(facts: Project) -> None:
    write_jsonl(facts.path / "keep.jsonl", [{"prompt": f"w{i % 50} w{i % 7} of w{i % 11} w{i % 13}"} for i in range(60)])
    with pytest.raises(WorkbenchError, match=r"there are more independent prompts to preserve than the projection of layer 1"):
        solve(context_of(facts), "rome", contexts=0, preserve="keep.jsonl")
    solve(context_of(facts), "memit", contexts=0, preserve="keep.jsonl")


def test_facts_that_an_edit_has_skipped_are_not_preserved(facts: Project) -> None:
    """The later value counts of a fact that two edits have written."""
    places = [facts.path / name for name in ("one", "two", "three")]
    for place, rows in zip(places, (FIRST, SECOND, []), strict=True):
        place.mkdir()
        named = [{"id": f"{place.name}{i}", **row} for i, row in enumerate(rows)]
        write_jsonl(place / "facts.jsonl", named) if rows else None
        skipped = [{"id": row["id"], "skipped": True} for row in named[:1]] if rows is FIRST else []
        (place / "edit.json").write_text(json.dumps({"facts": [*skipped, *({"id": row["id"]} for row in named[1:])]}), "utf-8")
    assert [fact.id for fact in earlier_facts(places)] == ["one2", "two0", "two1"]
