"""Many runs on the same documents in one import: what they share is read once, and the store is what single imports make."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench.exchange import samples
from workbench.exchange.imports import import_samples
from workbench.ground.errors import WorkbenchError
from workbench.scores import documents
from workbench.scores import store as stores
from workbench.scores.store import ScoreStore

Edit = Callable[[list[dict[str, Any]]], object]


def written(folder: Path, seed: int, *, items: int = 6, edit: Edit = len) -> Path:
    """Write lm-eval's samples of a run on two filters."""
    lines: list[dict[str, Any]] = []
    for name in ("none", "strip"):
        for i in range(items):
            texts = {"arg_0": f'Say "resps": {i}', "arg_1": {"until": ["\n"]}}
            asked = {"doc_id": i, "doc": {"text": f"é {i}", "size": 1}, "target": "x", "arguments": {"gen_args_0": texts}}
            answer = {"resps": [[f"{seed} {i}"]], "filtered_resps": ["x"], "filter": name, "metrics": ["exact_match"]}
            lines.append({**asked, **answer, "doc_hash": "f", "exact_match": float((i * seed) % 3 == 0)})
    edit(lines)
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "samples_say_2026-12-01T10-00-00.000000.jsonl").write_text(text, "utf-8")
    return folder


def content(root: Path) -> dict[str, bytes]:
    """The store's files without the time of the import."""
    files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    return {name: re.sub(rb'"created": "[^"]*"', b"", data) for name, data in files.items()}


def test_together_is_what_single_imports_make(tmp_path: Path) -> None:
    folders = [written(tmp_path / "runs" / f"m{seed}", seed) for seed in (1, 2, 3)]
    folders.append(written(tmp_path / "runs" / "m9", 9, edit=lambda lines: [line["doc"].update(size=1.0) for line in lines]))
    together, apart = ScoreStore(tmp_path / "together"), ScoreStore(tmp_path / "apart")
    runs = import_samples([tmp_path / "runs"], together)
    for folder in folders:
        import_samples([folder], apart)
    assert content(together.root) == content(apart.root)
    assert [run.scores.configuration.name for run in runs] == ["m1", "m2", "m3", "m9"]
    plans = [run.scores.plan for run in runs]
    assert plans[0] == plans[1] == plans[2] != plans[3], "1 and 1.0 are other documents"
    assert len(content(together.root)) == 2 * 2 + 2 * 4


def test_documents_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    stored: list[Path] = []
    of, document = samples.Document.of, documents.read_document

    def counted_of(line: dict[str, Any]) -> samples.Document:
        read.append(line)
        return of(line)

    def counted_document(path: Path) -> documents.Scores:
        stored.append(path)
        return document(path)

    monkeypatch.setattr(samples.Document, "of", counted_of)
    monkeypatch.setattr(stores, "read_document", counted_document)
    for seed in range(8):
        written(tmp_path / "runs" / f"m{seed}", seed)
    import_samples([tmp_path / "runs"], ScoreStore(tmp_path / "store"))
    assert len(read) == 6, "of eight runs with two filters"
    assert len(stored) == 8, "once for the versions"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"resps": [["2 3"]]', '"resps": [["2 3"]], "target": "y"'),  # a later key of the same name counts
        ('"target": "x", "arguments": {"gen', '"arguments": {"gen'),
        (', "resps": [["2 3"]]', ',"resps": [["2 3"]]'),
    ],
)
def test_lines_of_another_form_are_parsed_as_a_whole(tmp_path: Path, old: str, new: str) -> None:
    for seed in (1, 2):
        written(tmp_path / "runs" / f"m{seed}", seed)
    (file,) = (tmp_path / "runs" / "m2").iterdir()
    file.write_text(file.read_text("utf-8").replace(old, new), "utf-8")
    seen: dict[str, samples.Seen] = {}
    if '"target"' in old:
        with pytest.raises(WorkbenchError, match=r"jsonl:1: missing keys: target"):
            samples.read_samples("say", file, seen=seen)
        return
    samples.read_samples("say", next((tmp_path / "runs" / "m1").iterdir()), seen=seen)
    shared, alone = samples.read_samples("say", file, seen=seen), samples.read_samples("say", file)
    assert (shared.items, shared.rows, shared.identity) == (alone.items, alone.rows, alone.identity)
    assert [item["gold"] for item in shared.items] == ["x", "x", "x", "y" if '"y"' in new else "x", "x", "x"]


def test_nothing_is_stored_if_one_folder_is_refused(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "store")
    import_samples([written(tmp_path / "old" / "m2", 2)], store)
    before = content(store.root)
    for seed in (1, 2):
        written(tmp_path / "runs" / f"m{seed}", seed + 3)
    with pytest.raises(WorkbenchError, match="already has other numbers of 'm2'"):
        import_samples([tmp_path / "runs"], store)
    written(tmp_path / "runs" / "n", 3, edit=lambda lines: lines[-1].pop("resps"))
    with pytest.raises(WorkbenchError, match=r"n/samples_say_.*jsonl:12: missing keys: resps"):
        import_samples([tmp_path / "runs"], store)
    assert content(store.root) == before


def test_a_name_twice_in_one_import(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "store")
    one, two = (written(tmp_path / place / "m", 1) for place in "ab")
    first, second = import_samples([one, two], store)
    assert (first.new, second.new) == (True, False)
    assert second.scores == first.scores == store.read(first.plan, first.scores.key)
    with pytest.raises(WorkbenchError, match="already has other numbers of 'm'"):
        import_samples([one, written(tmp_path / "c" / "m", 2)], ScoreStore(tmp_path / "fresh"))
    assert not (tmp_path / "fresh").exists()
