"""What the score store keeps is what was scored: edited rows, impossible values and refusals of single configurations."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worlds.local_tasks import A, plan_of, tiny

from workbench.compare.compare import compare
from workbench.evaluate import evaluate
from workbench.evaluate.check import RefusedError
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import bytes_digest
from workbench.scores.documents import read_document
from workbench.scores.plan import ScorePlan
from workbench.scores.store import Configuration, Scores, ScoreStore

B = Configuration("b" * 32, "b")


class Kept:
    """Scores of two configurations on two tasks, and their files."""

    def __init__(self, plan: ScorePlan, store: ScoreStore) -> None:
        self.plan, self.store = plan, store
        self.scores = [evaluate(plan, store, c, lambda seed=seed: tiny(seed)) for c, seed in ((A, 0), (B, 1))]
        self.folder = store.folder("toy", plan.digest)
        self.document = self.folder / f"{A.key(plan)[:12]}.json"
        self.rows = self.document.with_suffix(".jsonl.gz")

    def lines(self) -> list[str]:
        return gzip.decompress(self.rows.read_bytes()).decode().splitlines()

    def write(self, lines: list[str], *, sign: bool = False) -> None:
        """Write rows; `sign`: with their digest in the document, as a program that knows the format would."""
        data = "".join(line + "\n" for line in lines).encode()
        self.rows.write_bytes(gzip.compress(data))
        if sign:
            self.change(lambda d: d.update(rows=bytes_digest(data)))

    def change(self, how: Callable[[dict[str, Any]], Any]) -> None:
        document = json.loads(self.document.read_text("utf-8"))
        how(document)
        self.document.write_text(json.dumps(document), "utf-8")

    def compared(self) -> dict[str, Any]:
        scores = [self.store.read(self.plan, c.key(self.plan)) for c in (A, B)]
        return compare(self.store, scores, baseline="b").to_dict()


@pytest.fixture
def kept(tasks_dir: Path, tokenizer: Any, tmp_path: Path) -> Kept:
    return Kept(plan_of(tasks_dir, tokenizer), ScoreStore(tmp_path / "scores"))


def error(kept: Kept) -> WorkbenchError:
    with pytest.raises(WorkbenchError) as found:
        kept.compared()
    return found.value


def test_the_document_holds_digests_of_rows_and_items(kept: Kept) -> None:
    document = json.loads(kept.document.read_text("utf-8"))
    assert document["version"] == 2
    assert document["rows"] == bytes_digest(gzip.decompress(kept.rows.read_bytes()))
    assert document["items"] == bytes_digest(gzip.decompress((kept.folder / "items.jsonl.gz").read_bytes()))
    assert kept.compared()["configurations"][0]["scores"]["pick"]["n"] == 24


def test_an_edited_row_is_refused(kept: Kept) -> None:
    """The scores of two items exchanged: the means stay, the digest does not."""
    lines = kept.lines()
    rows = [json.loads(line) for line in lines]
    one, other = [row for row in rows if row["task"] == "pick"][:2]
    assert one["metrics"] != other["metrics"]
    one["metrics"], other["metrics"] = other["metrics"], one["metrics"]
    kept.write([json.dumps(row, ensure_ascii=False) for row in rows])
    found = error(kept)
    assert f"{kept.rows}: the rows changed after scoring: their digest is " in found.message
    assert found.hint is not None
    assert f"rm -r {kept.document.with_suffix('')}.*" in found.hint


def test_an_edited_item_is_refused(kept: Kept) -> None:
    items = kept.folder / "items.jsonl.gz"
    text = gzip.decompress(items.read_bytes()).decode()
    items.write_bytes(gzip.compress(text.replace('"gold": 0', '"gold": 1', 1).encode()))
    assert f"{items}: the rows changed after scoring" in error(kept).message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("20001", "acc is 20001, expected a number from 0 to 1"),
        ("-0.5", "acc is -0.5, expected a number from 0 to 1"),
        ("NaN", "not JSON: NaN, expected a finite number"),
        ("1e999", "not JSON: 1e999, expected a number up to"),
        ("true", "acc is true, expected a finite number"),
        ('"1"', 'acc is "1", expected a finite number'),
        ("[1, 2, 3]", "acc is [1, 2, 3], expected a finite number and a weight of at least 0"),
    ],
)
def test_impossible_values_are_refused_even_with_a_matching_digest(kept: Kept, value: str, message: str) -> None:
    lines = kept.lines()
    number = next(i for i, line in enumerate(lines) if '"task": "pick"' in line)
    row = json.loads(lines[number])
    row["metrics"]["acc"] = "HERE"
    lines[number] = json.dumps(row).replace('"HERE"', value)
    kept.write(lines, sign=True)
    assert error(kept).message.startswith(f"{kept.rows}:{number + 1}: ")
    assert message in error(kept).message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["tasks"]["pick"].update(n=-3), "tasks.pick.n: Input should be greater than or equal to 1"),
        (lambda d: d["tasks"]["pick"].update(n=23), "24 rows of 'pick', expected 23"),
        (lambda d: d["tasks"]["pick"].update(n="24"), "tasks.pick.n: Input should be a valid integer"),
        (lambda d: d["tasks"]["pick"]["metrics"]["acc"].update(value=1.5, high=2.0), "acc is 1.5, expected a number from 0 to 1"),
        (lambda d: d["tasks"]["pick"]["metrics"]["acc"].update(value=0.123, low=0.0, high=1.0), "the scores document has 0.123"),
        (lambda d: d["tasks"]["pick"]["metrics"]["acc"].update(low=0.9, high=0.95), "is outside its interval"),
        (lambda d: d["tasks"].pop("copy"), "rows of the tasks copy, pick, expected pick"),
        (lambda d: d.update(seconds=-1.0), "seconds: Input should be greater than or equal to 0"),
        (lambda d: d.update(version=99), "the scores document has format 99, this version reads formats up to 2"),
        (lambda d: d.update(rows=None), "expected a key and the digests of rows and items"),
        (lambda d: d.pop("tasks"), "tasks: Field required"),
    ],
)  # fmt: skip
def test_impossible_documents_are_refused(kept: Kept, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    kept.change(change)
    found = error(kept)
    assert message in found.message
    assert str(kept.folder) in found.message
    assert "rm -r" in str(found.hint) or "rm " in str(found.hint)


@pytest.mark.parametrize("size", [0, 1, 40])
def test_truncated_files_end_in_an_error_that_names_them(kept: Kept, size: int) -> None:
    for path in (kept.rows, kept.folder / "items.jsonl.gz", kept.folder / "plan.json", kept.document):
        whole = path.read_bytes()
        path.write_bytes(whole[:size])
        assert error(kept).message.startswith(str(path))
        path.write_bytes(whole)
    kept.compared()


def test_documents_of_the_first_format_are_scored_again(kept: Kept) -> None:
    """They hold no digest of their rows: not complete for the store, and no rows are read for them."""

    def old(document: dict[str, Any]) -> None:
        for key in ("rows", "items", "key"):
            document.pop(key)
        document["version"] = 1

    kept.change(old)
    assert not kept.store.has(kept.plan, A.key(kept.plan))
    assert kept.store.has(kept.plan, B.key(kept.plan))
    with pytest.raises(WorkbenchError, match="an earlier version stored these scores without a digest of their rows"):
        kept.store.rows(read_document(kept.document))
    calls: list[int] = []
    again = evaluate(kept.plan, kept.store, A, lambda: calls.append(1) or tiny(0))
    assert calls == [1]
    assert again.rows == kept.scores[0].rows
    kept.compared()


def test_damaged_results_of_an_interrupted_evaluation_are_scored_again(tasks_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    plan, store = plan_of(tasks_dir, tokenizer), ScoreStore(tmp_path / "scores")
    store.keep_task(plan, A.key(plan), "pick", {"rows": [1], "seconds": 1.0})
    path = next(store.root.rglob("pick.json.gz"))
    whole = path.read_bytes()
    assert store.finished_task(plan, A.key(plan), "pick") == {"rows": [1], "seconds": 1.0}
    edited = gzip.compress(gzip.decompress(whole).replace(b"[1]", b"[2]"))
    for data in (whole[:20], b"", b"no gzip", edited, gzip.compress(b"[]"), gzip.compress(b'{"digest": "')):
        path.write_bytes(data)
        assert store.finished_task(plan, A.key(plan), "pick") is None
    journal = path.with_name("pick.jsonl")
    head = json.dumps([-1, A.key(plan)])
    journal.write_bytes(f"{head}\n[0, [-1.0, true]]\n7\n[1, [-2.0, true]]\n".encode() + b"\xff\n")
    assert store.journal(plan, A.key(plan), "pick").done == {0: [-1.0, True]}
    assert journal.read_text("utf-8") == f"{head}\n[0, [-1.0, true]]\n"


def refusing(seed: int) -> Any:
    """A model on which the packed scorer raises: it takes no mask of four dimensions."""
    model = tiny(seed)
    forward = model.forward

    def strict(*args: Any, attention_mask: Any = None, **given: Any) -> Any:
        if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.dim() == 4):
            raise ValueError("no such mask")
        return forward(*args, attention_mask=attention_mask, **given)

    model.forward = strict
    return model


def test_a_refused_configuration_hides_no_other_scores(tasks_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    plan, store = plan_of(tasks_dir, tokenizer, tasks=["pick"], chance={}), ScoreStore(tmp_path / "scores")
    evaluate(plan, store, A, lambda: tiny(0))
    with pytest.raises(RefusedError, match="no such mask"):
        evaluate(plan, store, B, lambda: refusing(1))
    assert store.settled(plan, [A.key(plan)]) == plan
    assert store.has(store.settled(plan, [A.key(plan)]), A.key(plan))
    both = store.settled(plan, [A.key(plan), B.key(plan)])
    assert both.scorer == "hflm"
    with pytest.raises(RefusedError, match="ValueError: no such mask"):  # remembered: no model is loaded
        evaluate(plan, store, B, lambda: pytest.fail("the model is loaded again"))
    scored = {c.name: evaluate(both, store, c, lambda seed=seed: tiny(seed)) for c, seed in ((A, 0), (B, 1))}
    assert {s.tasks["pick"].scorer for s in scored.values()} == {"hflm"}


class _Entry:
    """What `scoring.stored` asks of an entry."""

    def __init__(self, configuration: Configuration, role: str) -> None:
        self.made, self.name, self.role = configuration, configuration.name, role

    def digest(self) -> str:
        return self.made.digest

    def key(self, plan: ScorePlan) -> str:
        return self.made.key(plan)

    def configuration(self, digest: str) -> Configuration:
        return self.made


def test_stored_shows_the_scorer_that_has_most(tasks_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    from workbench.evaluate.scoring import stored

    plan, store = plan_of(tasks_dir, tokenizer, tasks=["pick"], chance={}), ScoreStore(tmp_path / "scores")
    third = Configuration("c" * 32, "c")
    for c, seed in ((A, 0), (third, 2)):
        evaluate(plan, store, c, lambda seed=seed: tiny(seed))
    with pytest.raises(RefusedError):
        evaluate(plan, store, B, lambda: refusing(1))
    entries: list[Any] = [_Entry(A, "base"), _Entry(B, "configuration"), _Entry(third, "configuration")]

    def shown() -> tuple[list[tuple[str, str | None]], list[str]]:
        found, missing = stored(entries, [plan], store)
        return [(s.configuration.name, scorer(s)) for s in found], missing

    assert shown() == ([("a", "prefix"), ("c", "prefix")], ["b"])
    hflm = plan.by("hflm")
    for c, seed in ((A, 0), (B, 1)):
        evaluate(hflm, store, c, lambda seed=seed: tiny(seed))
    assert shown() == ([("a", "hflm"), ("b", "hflm")], ["c"])  # as many: the plan that holds the refused one


def scorer(scores: Scores) -> str | None:
    return scores.tasks["pick"].scorer


@pytest.mark.parametrize("suite", ["other", "\0", "x" * 300])
def test_a_document_of_another_suite_is_refused(kept: Kept, suite: str) -> None:
    document = json.loads(kept.document.read_text("utf-8"))
    kept.document.write_text(json.dumps({**document, "suite": suite}), "utf-8")
    with pytest.raises(WorkbenchError, match="the document's suite and plan differ from those in its folder's name"):
        read_document(kept.document)
