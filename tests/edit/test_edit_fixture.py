"""Every edit method on models that know their facts exactly: what is taught is said, what follows from it too, the rest stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from worlds import people
from worlds.jsonl import write_jsonl
from worlds.project import Project

from workbench.models.live import compute, live_model
from workbench.resolve.resolved import Resolved
from workbench.run.kind import place_of
from workbench.run.materialize import materialize

STATISTICS = "people.txt"
# Method -> (fields, least efficacy, paraphrase, unchanged neighbours, portability) for 1 and for 24 facts of as many people.
METHODS: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "rome": (f"statistics: {STATISTICS}", (1, 1, 0.7, 1), (1, 0.9, 0.9, 0.65)),
    "memit": (f"statistics: {STATISTICS}", (1, 1, 0.7, 1), (1, 0.9, 0.9, 0.65)),
    "emmet": (f"statistics: {STATISTICS}", (1, 1, 0.7, 1), (1, 0.9, 0.9, 0.65)),
    # A part of the directions only: its facts are reached less well.
    "alphaedit": (f"statistics: {STATISTICS}", (1, 1, 0.7, 1), (0.9, 0.8, 0.85, 0.4)),
    # Values stop as soon as their target is on top.
    "encore": (f"statistics: {STATISTICS}", (1, 1, 0.7, 1), (1, 0.85, 0.9, 0.6)),
}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project on the model that looks facts up at the subject, with the text that it was trained on for statistics."""
    folder = tmp_path_factory.mktemp("people")
    (folder / "recipes").mkdir()
    (folder / "base").symlink_to(people.SUBJECT)
    (folder / STATISTICS).write_text("\n\n".join(people.lines(1200)), "utf-8")
    for count in (1, 24):
        people.write_rows(folder / f"facts{count}.jsonl", count)
    return Project(folder)


def scores(model: Any, tokenizer: Any, count: int) -> tuple[float, ...]:
    """Shares of greedy answers, ended by the model itself, that are right: efficacy, paraphrase, neighbours, portability."""
    rows = people.rows(count)
    asked = {
        "efficacy": [(r["prompt"].replace("{subject}", r["subject"]), r["target"]) for r in rows],
        "paraphrase": [(p.replace("{subject}", r["subject"]), r["target"]) for r in rows for p in r["paraphrases"]],
        "neighbours": [(n["prompt"], n["target"]) for r in rows for n in r["neighbours"]],
        "portability": [(p["prompt"], p["target"]) for r in rows for p in r["portability"]],
    }
    found = {name: people.answered(model, tokenizer, pairs) for name, pairs in asked.items()}
    return tuple(sum(right) / len(right) for right in found.values())


def edited(project: Project, step: str, name: str) -> tuple[Any, Any, Resolved]:
    """The live model after an edit, its tokenizer, and the resolved recipe."""
    from transformers import AutoTokenizer

    resolved = project.resolve(f"base: base\nsteps: [{step}]\noutput: {{dtype: float32}}\n", f"{name}.yaml")
    model = materialize(resolved, torch.device("cpu"))
    return model, AutoTokenizer.from_pretrained(project.path / "base"), resolved


@pytest.mark.parametrize("count", [1, 24])
@pytest.mark.parametrize("method", METHODS)
def test_edits_hold(method: str, count: int, known: Project) -> None:
    """The layer and the lookup are found on the way."""
    fields, one, many = METHODS[method]
    model, tokenizer, _ = edited(known, f"{{edit: {method}, facts: facts{count}.jsonl, {fields}}}", f"{method}-{count}")
    found = scores(model, tokenizer, count)
    least = one if count == 1 else many
    assert all(value >= bound for value, bound in zip(found, least, strict=True)), (method, count, found)


def test_the_base_knows_nothing_of_them(known: Project) -> None:
    model, tokenizer = people.load(people.SUBJECT)
    efficacy, paraphrase, neighbours, portability = scores(model, tokenizer, 24)
    assert (efficacy, paraphrase, neighbours) == (0, 0, 1)
    assert portability <= 0.1, "a new value may lie in the old group"


def test_lookup_is_measured(known: Project) -> None:
    """Facts are at the subject below the last layer, where the last token takes them; the sweep chooses among the former."""
    _, _, resolved = edited(known, "{edit: rome, facts: facts24.jsonl, statistics: people.txt}", "rome-24")
    record = json.loads((place_of(resolved, "edits", 0) / "edit.json").read_text("utf-8"))
    trace = record["trace"]
    assert [trace[str(i)]["subject"] > 0.9 for i in range(4)] == [True, True, True, False]
    assert [trace[str(i)]["last"] > 0.9 for i in range(4)] == [False, False, False, True]
    assert set(record["candidates"]) == {"0", "1", "2"}, "the last layer does not carry facts at the subject"
    (layer,) = record["layers"]
    assert record["positions"] == {str(layer): "subject_last"}
    assert {fact["id"] for fact in record["facts"]} == {row["id"] for row in people.rows(24)}


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_facts_at_the_last_token(method: str, tmp_path: Path) -> None:
    """The model that looks facts up at the prompt's last token: found out, and edited there."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "base").symlink_to(people.PROMPT)
    (tmp_path / STATISTICS).write_text("\n\n".join(people.lines(1200)), "utf-8")
    people.write_rows(tmp_path / "facts.jsonl", 12)
    step = f"{{edit: {method}, facts: facts.jsonl, statistics: {STATISTICS}}}"
    model, tokenizer, resolved = edited(Project(tmp_path), step, method)
    record = json.loads((place_of(resolved, "edits", 0) / "edit.json").read_text("utf-8"))
    assert set(record["positions"].values()) == {"prompt_last"}
    efficacy, paraphrase, neighbours, _ = scores(model, tokenizer, 12)
    assert (efficacy, paraphrase > 0.3, neighbours > 0.7) == (1, True, True), (efficacy, paraphrase, neighbours)


def test_preserved_prompts_stay(known: Project) -> None:
    """Keys of prompts in `preserve` keep their outputs: with ROME exactly."""
    listed = [{"prompt": n["prompt"]} for r in people.rows(24) for n in r["neighbours"][:1]]
    write_jsonl(known.path / "keep.jsonl", listed)
    step = "{edit: rome, facts: facts24.jsonl, statistics: people.txt, layers: [2], position: subject_last, contexts: 0"
    subjects = {p.name for p in people.world().people}
    for row in listed:
        row["subject"] = next(name for name in subjects if row["prompt"].count(name) == 1)
    write_jsonl(known.path / "keep.jsonl", listed)
    pairs = [(n["prompt"], n["target"]) for r in people.rows(24) for n in r["neighbours"][:1]]
    shares = []
    for extra, name in (("}", "free"), (", preserve: keep.jsonl}", "kept")):
        model, tokenizer, _ = edited(known, step + extra, name)
        right = people.answered(model, tokenizer, pairs)
        shares.append(sum(right) / len(right))
        assert scores(model, tokenizer, 24)[0] == 1
    assert shares[1] == 1 >= shares[0]


def test_sequential_with_history_keeps_the_first(known: Project) -> None:
    """Six batches of four: with the term for written keys the first batch is still said, and the record says that order counts."""
    step = "{edit: memit, facts: facts24.jsonl, statistics: people.txt, layers: [2], position: subject_last, mode: {sequential: {batch: 4}}"
    kept, tokenizer, resolved = edited(known, step + "}", "history")
    lost, _, _ = edited(known, step + ", history: false}", "no-history")
    record = json.loads((place_of(resolved, "edits", 0) / "edit.json").read_text("utf-8"))
    assert record["order"] == "dependent"
    with_history, without = (scores(model, tokenizer, 24) for model in (kept, lost))
    assert with_history[0] == 1
    assert with_history[0] >= without[0]


def test_the_wrong_lookup_is_refused(known: Project) -> None:
    """At the last layer the subject's token no longer reaches the answer: no value converges, and nothing is left behind."""
    from workbench.ground.errors import WorkbenchError

    step = "{edit: rome, facts: facts24.jsonl, statistics: people.txt, layers: [3], position: subject_last}"
    resolved = known.resolve(f"base: base\nsteps: [{step}]\n", "wrong.yaml")
    with pytest.raises(
        WorkbenchError, match=r"at layer 3, subject_last, no value makes the model give the target of 24 of 24 facts"
    ) as caught:
        compute_all(resolved)
    assert "unconverged: skip" in (caught.value.hint or "")
    assert not place_of(resolved, "edits", 0).exists()


def compute_all(resolved: Resolved) -> Any:
    from workbench.run.compose import compose

    model = compose(resolved, torch.device("cpu")).model
    return live_model(
        model.config, compute(model, torch.float32, torch.device("cpu")), Path(resolved.tokenizer_path), torch.device("cpu")
    )
