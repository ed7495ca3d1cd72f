"""The choice of a layer and a token: which facts it is measured on, which layers compete, and what an edit at each of them is worth."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from worlds import people
from worlds.dense import context_of
from worlds.jsonl import write_jsonl
from worlds.project import Project

from workbench.edit.closed_form import closed_form
from workbench.edit.closed_form.closed_form import _carrying_layers, _choose_position, _pilot_facts, candidates, choose
from workbench.edit.memit import Memit
from workbench.edit.places.knowledge import Trace, trace
from workbench.edit.places.parts import Parts
from workbench.facts.facts import Fact
from workbench.steps import MethodContext

FIELDS: dict[str, Any] = {"edit": "memit", "facts": "facts.jsonl", "statistics": "people.txt", "lambda": 3.0, "steps": 15}


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> MethodContext:
    """The model that looks facts up at the subject; no test changes it."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "recipes").mkdir()
    (folder / "base").symlink_to(people.SUBJECT)
    (folder / "people.txt").write_text("\n\n".join(people.lines(1200)), "utf-8")
    people.write_rows(folder / "facts.jsonl", 20)
    return context_of(Project(folder))


def carried(**shares: tuple[float, float]) -> Trace:
    """A trace with these shares at the subject and at the last token of layers 0, 1, …"""
    return Trace(1, 1.0, 0.0, {i: {"subject": at, "last": last} for i, (at, last) in enumerate(shares.values())})


def test_layers_and_tokens_that_compete() -> None:
    """The middles of six equal parts of the depth; the subject's last token if it carries facts anywhere, else the prompt's."""
    assert [candidates(range(count)) for count in (1, 4, 7, 12)] == [[0], [0, 1, 2, 3], [0, 1, 2, 4, 5, 6], [1, 3, 5, 7, 9, 11]]
    assert candidates([2, 5, 9]) == [2, 5, 9]
    both, last, neither = (
        carried(a=(0.7, 0.1), b=(0.6, 0.9), c=(0.59, 0.9)),
        carried(a=(0.5, 0.2), b=(0.3, 0.6), c=(0.1, 0.9)),
        carried(a=(0.5, 0.2), b=(0.4, 0.4), c=(0.1, 0.3)),
    )
    assert _carrying_layers(both, range(3)) == ([0, 1], {0: "subject_last", 1: "subject_last"})
    assert _carrying_layers(last, range(3)) == ([1, 2], {1: "prompt_last", 2: "prompt_last"})
    assert _carrying_layers(neither, range(3)) == ([0, 1, 2], dict.fromkeys(range(3), "prompt_last"))
    assert _carrying_layers(None, range(2)) == ([0, 1], dict.fromkeys(range(2), "prompt_last"))
    auto, named = (Memit.model_validate({**FIELDS, "position": position}) for position in ("auto", "subject_last"))
    assert [_choose_position(auto, neither, layer) for layer in range(3)] == ["subject_last", "subject_last", "prompt_last"]
    assert [_choose_position(auto, None, 0), _choose_position(named, last, 2)] == ["prompt_last", "subject_last"]


def test_pilot_facts_are_known_and_of_many_relations(context: MethodContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundled facts that the model says, one of each relation in turn; with fewer than eight of them every nth fact of the recipe."""
    own, parts = people.facts(20), Parts.find(context)
    assert [f.id for f in _pilot_facts(context, parts, own)] == [f.id for f in own[::2][:8]], "the bundled facts are unknown here"
    assert [f.id for f in _pilot_facts(context, parts, own[:5])] == [f.id for f in own[:5]]
    relation = {f.id: f.relation for f in own}
    for known, expected in ((8, 8), (7, 0)):
        bundled = [replace(f, target_true=f.target_true if i < known else f.target) for i, f in enumerate(own)]
        monkeypatch.setattr(closed_form, "known_facts", lambda bundled=bundled: bundled)
        found = [f.id for f in _pilot_facts(context, parts, own[::-1])]
        if not expected:
            assert found == [f.id for f in own[::-2][:8]]
            continue
        by_relation = {name: [f.id for f in own[:8] if f.relation == name] for name in dict.fromkeys(f.relation for f in own[:8])}
        assert len(by_relation) == 3
        turns = sorted(
            range(8), key=lambda i: (by_relation[relation[own[i].id]].index(own[i].id), list(by_relation).index(own[i].relation))
        )
        assert found == [own[i].id for i in turns]


def test_a_candidate_has_the_shares_of_an_edit_of_the_pilot_facts(context: MethodContext) -> None:
    """Measured once more on the whole edit, prompt by prompt; the layer with the best score is chosen, the margin breaks ties."""
    parts, own = Parts.find(context), people.facts(20)
    method = Memit.model_validate(FIELDS)
    choice = choose(method, context, parts, own)
    record = json.loads((context.cache / "sweeps" / f"{choice.record['sweep']}.json").read_text("utf-8"))
    pilot = [f for f in own if f.id in record["pilot"]]
    assert len(pilot) == 8
    tracing = trace(context, parts, pilot, range(4))
    assert tracing is not None
    shares_of = tracing.recovered.items()
    assert record["trace"] == {str(i): {name: round(value, 3) for name, value in shares.items()} for i, shares in shares_of}
    rows = {int(layer): row for layer, row in record["candidates"].items()}
    assert choice.layers == (max(rows, key=lambda i: (rows[i]["score"], rows[i]["margin"])),)
    assert choice.positions == {choice.layers[0]: "subject_last"}
    write_jsonl(context.project / "pilot.jsonl", [row for row in people.rows(20) if row["id"] in record["pilot"]])

    def said(fact: Fact, text: str) -> tuple[bool, float]:
        prompt, whole = (context.tokenizer(part)["input_ids"] for part in (text, f"{text} {fact.target}"))
        with torch.no_grad():
            found = context.model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        target = torch.tensor(whole[len(prompt) :])
        return bool((found.argmax(1) == target).all()), float(found.gather(1, target[:, None]).mean())

    def following(text: str) -> int:
        with torch.no_grad():
            return int(context.model(torch.tensor([context.tokenizer(text)["input_ids"]])).logits[0, -1].argmax())

    def mean(values: list[Any]) -> float:
        return float(sum(values) / len(values))

    for layer, row in rows.items():
        fields = {**FIELDS, "facts": "pilot.jsonl", "layers": [layer], "position": "subject_last", "contexts": 0, "refine": 0}
        edit = Memit.model_validate({**fields, "unconverged": "skip"}).solve(context)
        written: Any = edit.record["facts"]
        converged = mean(["skipped" not in fact for fact in written])
        assert converged == row["converged"] == 1
        (factors,) = edit.factors.values()
        neighbours = [probe.prompt for f in pilot for probe in f.neighbours]
        before = [following(text) for text in neighbours]
        with parts.changed({layer: factors.left @ factors.right}):
            own_words = [said(f, f.text) for f in pilot]
            shares = {
                "efficacy": mean([right for right, _ in own_words]),
                "paraphrase": mean([said(f, text)[0] for f in pilot for text in f.paraphrases]),
                "unchanged": mean([following(text) == old for text, old in zip(neighbours, before, strict=True)]),
            }
        assert {name: row[name] for name in shares} == pytest.approx(shares, abs=1e-4)
        assert row["margin"] == pytest.approx(mean([value for _, value in own_words]), abs=1e-3)
        assert row["score"] == pytest.approx(4 / (1 + sum(1 / max(share, 1e-3) for share in shares.values())), abs=1e-3)
    assert min(row["paraphrase"] for row in rows.values()) < 1


def test_a_named_layer_or_token_is_kept(context: MethodContext) -> None:
    """Tracing says the rest: facts are at the subject below the last layer, where the last token takes them."""
    parts, own = Parts.find(context), people.facts(20)
    named = choose(Memit.model_validate({**FIELDS, "layers": [3, 2]}), context, parts, own)
    assert (named.layers, named.positions) == ((2, 3), {2: "subject_last", 3: "prompt_last"})
    assert "candidates" not in named.record
    for fields, same in (
        ({"contexts": 1, "refine": 0, "facts": "other.jsonl"}, True),
        ({"lambda": 2.0}, False),
        ({"clamp": 3.0}, False),
    ):
        again = choose(Memit.model_validate({**FIELDS, "layers": [3, 2], **fields}), context, parts, own)
        assert (again.record["sweep"] == named.record["sweep"]) == same, fields
    told: list[tuple[int, int, str]] = []
    told_to = replace(context, progress=lambda done, total, text: told.append((done, total, text)))
    at_last = choose(Memit.model_validate({**FIELDS, "position": "prompt_last"}), told_to, parts, own).record["candidates"]
    whole = [line for line in told if line[2].startswith(("tracing", "sweep: layer"))]
    assert whole == [(0, 4, "tracing facts"), *((i, 4, f"sweep: layer {i}") for i in range(4))]
    assert isinstance(at_last, dict)
    assert {int(layer): row["position"] for layer, row in at_last.items()} == dict.fromkeys(range(4), "prompt_last")
    both = Memit.model_validate({**FIELDS, "layers": [3, 1], "position": "prompt_last"})
    assert choose(both, context, parts, own).record == {"layers": [1, 3], "position": "prompt_last"}
