"""`scores pull`: what the other store has comes in whole, what differs is named, and nothing here is overwritten."""

from __future__ import annotations

import gzip
import json
import shutil
import tracemalloc
from pathlib import Path

import pytest

from worlds.commands import call, document, refused
from worlds.stored_scores import ADD, BASE, SORT, TIES, right, stored

from workbench.exchange.pull import pull_scores, store_in
from workbench.ground.errors import UsageError
from workbench.scores.store import ScoreStore

N = 24
BOMBS = {  # gzip's files may have many members
    "3 GB of empty lines": gzip.compress(b"\n" * (1 << 20)) * 3072,
    "a long line": gzip.compress(b" " * (1 << 20)) * 68,
    "deep rows": gzip.compress(b"[" * 100_000),
    "a huge number": gzip.compress(b'{"task": "a", "id": "x", "metrics": {"em": 1' + b"0" * 400 + b"}}\n"),
    "not gzip": b"PK\x03\x04",
    "a damaged block": gzip.compress(b"x" * 1000)[:20] + b"\xff" * 20,
}


@pytest.fixture
def here(project: Path) -> ScoreStore:
    store = ScoreStore(project / "runs" / "scores")
    stored(store, {BASE: {"a": right(0.5, N)}, ADD: {"a": right(0.7, N)}})
    return store


@pytest.fixture
def there(tmp_path: Path) -> ScoreStore:
    store = ScoreStore(tmp_path / "other" / "runs" / "scores")
    stored(store, {BASE: {"a": right(0.5, N)}, SORT: {"a": right(0.6, N)}, TIES: {"a": right(0.8, N)}})
    return store


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def only_folder(store: ScoreStore) -> Path:
    (folder,) = store.root.iterdir()
    return folder


def test_new_scores_come_in_byte_for_byte_and_equal_ones_are_skipped(here: ScoreStore, there: ScoreStore) -> None:
    before = content(here.root)
    planned = pull_scores(there.root, here, dry_run=True)
    assert content(here.root) == before, "a dry run writes nothing"
    pulled = pull_scores(there.root, here)
    assert planned.model_copy(update={"dry_run": False}) == pulled
    assert sorted((d.name, d.status) for d in pulled.documents) == [
        ("base", "same"),
        (SORT.name, "pulled"),
        (TIES.name, "pulled"),
    ]
    assert (pulled.refused, pulled.plans) == ([], [])
    after = content(here.root)
    assert {name: after[name] for name in before} == before
    assert {name: after[name] for name in content(there.root)} == content(there.root)
    (plan,) = document("scores", "ls")
    assert sorted(c["name"] for c in plan["configurations"]) == sorted([BASE.name, ADD.name, SORT.name, TIES.name])
    again = pull_scores(there.root, here)
    assert {d.status for d in again.documents} == {"same"}


def test_a_new_plan_comes_with_its_items(there: ScoreStore, project: Path) -> None:
    here = ScoreStore(project / "runs" / "scores")
    told = document("scores", "pull", str(there.root.parent.parent))
    assert told["plans"] == [only_folder(there).name]
    assert content(here.root) == content(there.root)
    scores = next(iter(sorted(s for s in (here.root / told["plans"][0]).glob("*.json") if s.name != "plan.json")))
    assert json.loads(scores.read_text("utf-8"))["suite"] == "toy"


def test_other_rows_under_one_key_are_refused(here: ScoreStore, tmp_path: Path, project: Path) -> None:
    there = ScoreStore(tmp_path / "other" / "runs" / "scores")
    stored(there, {BASE: {"a": right(0.9, N)}, SORT: {"a": right(0.6, N)}})
    before = content(here.root)
    error = refused("scores", "pull", str(tmp_path / "other"))
    assert "other scores of the same configuration under the same plan" in error.message
    assert "those of this store (" in error.message
    assert error.hint == "Everything else was taken."
    after = content(here.root)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2, "the rows and the document of the other configuration"


def test_names_of_equal_scores_are_added(here: ScoreStore, tmp_path: Path) -> None:
    there = ScoreStore(tmp_path / "other")
    (scores, *_) = stored(there, {BASE: {"a": right(0.5, N)}})
    path = only_folder(there) / f"{scores.key[:12]}.json"
    data = json.loads(path.read_text("utf-8"))
    data["configuration"]["name"] = "the-base-there"
    path.write_text(json.dumps(data))
    (one,) = pull_scores(there.root, here).documents
    assert one.status == "named"
    text = (only_folder(here) / path.name).read_text("utf-8")
    kept = json.loads(text)
    assert text.startswith('{\n "version": 2,\n "')
    assert kept["configuration"]["name"] == "base"
    assert [a["name"] for a in kept["aliases"]] == ["the-base-there"]


def test_documents_of_an_earlier_version_here_stay(here: ScoreStore, there: ScoreStore) -> None:
    (path, *_) = [p for p in only_folder(here).glob("*.json") if (only_folder(there) / p.name).exists() and p.name != "plan.json"]
    old = json.loads(path.read_text("utf-8")) | {"version": 1, "rows": None, "items": None}
    path.write_text(json.dumps(old))
    (one,) = pull_scores(there.root, here).refused
    assert "from an earlier version without a digest of their rows; delete it and pull again" in one.reason
    assert json.loads(path.read_text("utf-8")) == old


def damage(folder: Path, document: Path, kind: str) -> None:
    rows = document.with_suffix(".jsonl.gz")
    if kind == "truncated rows":
        rows.write_bytes(rows.read_bytes()[:-20])
    elif kind == "changed rows":
        rows.write_bytes(gzip.compress(gzip.decompress(rows.read_bytes()).replace(b'"em": 1.0', b'"em": 0.0', 1)))
    elif kind in BOMBS:
        rows.write_bytes(BOMBS[kind])
    elif kind == "no rows":
        rows.unlink()
    elif kind == "not JSON":
        document.write_text("{")
    elif kind == "other format":
        document.write_text(json.dumps(json.loads(document.read_text("utf-8")) | {"version": 9}))
    elif kind == "other key":
        document.rename(document.with_name("0" * 12 + ".json"))
    elif kind == "no items":
        (folder / "items.jsonl.gz").unlink()
    elif kind == "damaged plan":
        (folder / "plan.json").write_text("[]")
    else:
        moved = folder.with_name("toy-" + "0" * 12)
        shutil.move(folder, moved)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated rows", "the file is truncated"),
        ("changed rows", "the rows changed after scoring"),
        ("3 GB of empty lines", "unpacks to more than"),
        ("a long line", "a row of 71"),
        ("deep rows", "nested too deeply"),
        ("a huge number", "is 1000000"),
        ("not gzip", "cannot be read"),
        ("a damaged block", "cannot be read"),
        ("no rows", "the file does not exist"),
        ("not JSON", "JSON"),
        ("other format", "format 9, this version reads formats up to 2"),
        ("other key", "it has the scores of"),
        ("no items", "the file does not exist"),
        ("damaged plan", "its scores were not taken"),
        ("other folder", "it has the plan of toy-"),
    ],
)
def test_damaged_files_are_named_and_the_rest_is_taken(kind: str, reason: str, here: ScoreStore, there: ScoreStore) -> None:
    folder = only_folder(there)
    path = next(
        p for p in folder.glob("*.json") if json.loads(p.read_text("utf-8")).get("configuration", {}).get("name") == SORT.name
    )
    damage(folder, path, kind)
    before = content(here.root)
    tracemalloc.start()
    pulled = pull_scores(there.root, here)
    assert tracemalloc.get_traced_memory()[1] < 1 << 28, "also for files that unpack to gigabytes"
    tracemalloc.stop()
    whole = kind not in ("no items", "damaged plan", "other folder")
    assert any(reason in one.reason for one in pulled.refused), pulled.refused
    assert {d.name for d in pulled.documents if d.status == "pulled"} == ({TIES.name} if whole else set())
    after = content(here.root)
    assert {name: after[name] for name in before} == before
    for scores in (s for s in map(Path, after) if s.suffix == ".json" and s.name != "plan.json"):
        assert f"{scores.parent}/{scores.stem}.jsonl.gz" in after, "a document never comes without its rows"


def test_unfinished_evaluations_and_other_versions_are_named(here: ScoreStore, there: ScoreStore) -> None:
    folder = only_folder(there)
    (folder / ("a" * 12 + ".partial")).mkdir()
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    plan["versions"] = dict.fromkeys(plan["versions"], "0.0.1")
    plan["suite"]["alpha"] = 0.01
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "refused").mkdir()
    (folder / "refused" / "abc.txt").write_text("too far\n")
    pulled = pull_scores(there.root, here)
    assert [one.reason for one in pulled.refused] == ["an unfinished evaluation; finish it on its machine"]
    assert any("0.0.1, here with" in note for note in pulled.notes)
    assert any("other analysis settings of the suite; those of this store stay" in note for note in pulled.notes)
    assert (only_folder(here) / "refused" / "abc.txt").read_text() == "too far\n"
    assert json.loads((only_folder(here) / "plan.json").read_text("utf-8"))["suite"]["alpha"] == 0.05


def test_places_without_a_store_are_refused(here: ScoreStore, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="found no scores"):
        store_in(tmp_path / "empty")
    assert "does not exist" in refused("scores", "pull", "nowhere").message
    assert "this is the store that would get the scores" in refused("scores", "pull", ".").message
    assert store_in(here.root) == store_in(here.root.parent) == store_in(here.root.parent.parent) == here.root


def test_what_the_command_says(here: ScoreStore, there: ScoreStore) -> None:
    said = call("scores", "pull", str(there.root.parent.parent), "--dry-run")
    assert "dry run" in said.stdout
    done = call("scores", "pull", str(there.root.parent.parent))
    assert "2 taken, 1 here already" in done.stderr
