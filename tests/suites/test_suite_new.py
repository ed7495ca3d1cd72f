"""`suite new`: files that pass `suite check`, right answers of every form, and bad rows named with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worlds.commands import run
from worlds.jsonl import write_jsonl
from worlds.places import PROJECT

from workbench.ground.errors import WorkbenchError
from workbench.scores.suite import load_suite
from workbench.suites.new import NewSuite, new_suite

CHOICE = [{"question": f"Capital {i}?", "choices": [f"a{i}", f"b{i}", f"c{i}", f"d{i}"], "answer": f"b{i}"} for i in range(24)]
EXACT = [{"prompt": f"{i} plus {i} is", "answer": 2 * i, "cluster": f"c{i % 12}"} for i in range(24)]


def made(folder: Path, rows: list[Any], kind: Any = "choice", **options: Any) -> NewSuite:
    write_jsonl(folder / "items.jsonl", rows)
    return new_suite("mine", folder / "items.jsonl", kind, folder, **options)


def data(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evals/tasks/data/mine.jsonl").read_text().splitlines()]


def test_choices_with_the_score_of_guessing(tmp_path: Path) -> None:
    found = made(tmp_path, [*CHOICE, {"prompt": "Two:", "choices": ["x", "y"], "answer": 1}])
    assert (found.items, found.clusters, found.cluster) == (25, 25, "id")
    assert found.chance == pytest.approx((24 / 4 + 1 / 2) / 25)
    suite = load_suite("mine", tmp_path)
    assert (suite.tasks, suite.primary, suite.cluster) == (("mine",), {"mine": "acc"}, "id")
    assert suite.chance["mine"] == pytest.approx(found.chance, abs=1e-6)
    first, *_, last = data(tmp_path)
    assert (first["prompt"], first["gold"], first["id"], first["cluster"]) == (
        "Question: Capital 0?\nAnswer:",
        1,
        "items-00001",
        "items-00001",
    )
    assert (last["prompt"], last["gold"]) == ("Two:", 1)


@pytest.mark.parametrize(("answer", "gold"), [("b", 1), (0, 0), ("C", 2), ("c", 2)])
def test_the_right_choice_as_text_index_or_letter(answer: Any, gold: int, tmp_path: Path) -> None:
    made(tmp_path, [{"prompt": "p", "choices": ["a", "b", "c"], "answer": answer}])
    assert data(tmp_path)[0]["gold"] == gold


def test_a_choice_that_is_a_letter_is_meant_as_text(tmp_path: Path) -> None:
    made(tmp_path, [{"prompt": "p", "choices": ["B", "A"], "answer": "A"}])
    assert data(tmp_path)[0]["gold"] == 1


def test_answers_texts_clusters_and_roles(tmp_path: Path) -> None:
    found = made(tmp_path, EXACT, "exact", role="guarded")
    assert (found.clusters, found.cluster, found.chance) == (12, "cluster", 0.0)
    assert data(tmp_path)[3]["answer"] == "6"
    assert load_suite("mine", tmp_path).roles == {"mine": "guarded"}
    assert "max_gen_toks: 10," in (tmp_path / "evals/tasks/mine.yaml").read_text(), "two bytes and room for eight tokens"
    texts = made(
        tmp_path, [{"text": f"line {i}", "id": i, "book": i // 2} for i in range(4)], "text", cluster="book", flags=["force"]
    )
    assert (texts.clusters, texts.chance, load_suite("mine", tmp_path).primary) == (2, None, {"mine": "bits_per_byte"})


@pytest.mark.parametrize("name", ["123", "yes", "1e3", "a.b", "x-1"])
def test_any_name_is_read_as_a_name(name: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "items.jsonl", CHOICE)
    new_suite(name, tmp_path / "items.jsonl", "choice", tmp_path)
    suite = load_suite(name, tmp_path)
    assert (suite.suite, suite.tasks, list(suite.chance)) == (name, (name,), [name])


BAD: dict[str, tuple[str, Any, str]] = {
    "no object": ("choice", [1], "items.jsonl:1: expected an object, found a number"),
    "no choices": ("choice", [{"prompt": "p", "answer": "a"}], "items.jsonl:1: no 'choices'"),
    "one choice": ("choice", [{"prompt": "p", "choices": ["a"], "answer": "a"}], "items.jsonl:1: 1 choice, expected two or more"),
    "no answer": ("choice", [{"prompt": "p", "choices": ["a", "b"]}], "items.jsonl:1: no 'answer' and no 'gold'"),
    "other answer": ("choice", [{"prompt": "p", "choices": ["a", "b"], "answer": "c"}], "which is none of the 2 choices"),
    "index": ("choice", [{"prompt": "p", "choices": ["a", "b"], "answer": 2}], "expected an index from 0 to 1"),
    "true": ("choice", [{"prompt": "p", "choices": ["a", "b"], "answer": True}], "none of the 2 choices"),
    "equal choices": ("choice", [{"prompt": "p", "choices": ["a", "a"], "answer": "a"}], 'the choice "a" stands twice'),
    "two answers": ("choice", [{"prompt": "p", "choices": ["a", "b"], "answer": "a", "gold": 1}], "name different choices"),
    "blank choice": ("choice", [{"prompt": "p", "choices": ["a", " "], "answer": "a"}], "texts that are not blank"),
    "no prompt": ("exact", [{"answer": "a"}], "no 'prompt' and no 'question'"),
    "two prompts": ("exact", [{"prompt": "p", "question": "q", "answer": "a"}], "both 'prompt' and 'question'"),
    "no exact answer": ("exact", [{"prompt": "p"}], "items.jsonl:1: no 'answer'"),
    "empty answer": ("exact", [{"prompt": "p", "answer": " "}], "'answer' must be a text that is not blank"),
    "lines": ("exact", [{"prompt": "p", "answer": "a\nb"}], "several lines"),
    "long": ("exact", [{"prompt": "p", "answer": "a" * 201}], "more than 200 bytes"),
    "no text": ("text", [{"prompt": "p"}], "no 'text'"),
    "cluster": ("exact", [{**EXACT[0]}, {"prompt": "p", "answer": "a"}], "items.jsonl:2: no 'cluster'"),
    "question twice": ("exact", [EXACT[0], EXACT[1], EXACT[0]], "items.jsonl:3: the same question as in line 1"),
    "id twice": (
        "exact",
        [{"id": 7, "prompt": "p", "answer": "a"}, {"id": "7", "prompt": "q", "answer": "a"}],
        "items.jsonl:2: the same id '7' as in line 1",
    ),
    "nothing": ("exact", [], "items.jsonl: no items"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    kind, rows, message = BAD[case]
    with pytest.raises(WorkbenchError) as caught:
        made(tmp_path, rows, kind)
    assert message in caught.value.message
    assert not (tmp_path / "evals").exists()


def test_every_bad_row_is_listed(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError) as caught:
        made(tmp_path, [*CHOICE[:3], *({"prompt": f"p{i}", "choices": ["a"]} for i in range(25))])
    lines = caught.value.message.splitlines()
    assert lines[0].endswith("items.jsonl:4: 1 choice, expected two or more")
    assert (len(lines), lines[-1].endswith("5 more bad rows")) == (21, True)
    assert '"choices"' in str(caught.value.hint)


def test_existing_files_and_bad_names_are_refused(tmp_path: Path) -> None:
    made(tmp_path, CHOICE)
    before = (tmp_path / "evals/tasks/data/mine.jsonl").read_text()
    with pytest.raises(WorkbenchError, match="already exists"):
        made(tmp_path, EXACT, "exact")
    assert (tmp_path / "evals/tasks/data/mine.jsonl").read_text() == before
    with pytest.raises(WorkbenchError, match=r"'\.\./x': expected a name"):
        new_suite("../x", tmp_path / "items.jsonl", "choice", tmp_path)
    with pytest.raises(WorkbenchError, match=r"no such file of items"):
        new_suite("other", tmp_path / "itms.jsonl", "choice", tmp_path)


def test_the_command_checks_what_it_writes(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny base has a byte a token and 256 positions; 24 items in 24 or 12 clusters."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "base").symlink_to(llama)
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "choice.jsonl", CHOICE)
    write_jsonl(tmp_path / "exact.jsonl", EXACT)
    found = run("suite", "new", "capitals", "--data", "choice.jsonl", "--kind", "choice", "--base", "base", "--json")
    document = json.loads(found.stdout)
    assert (document["items"], document["chance"], document["check"]["ok"]) == (24, 0.25, True)
    assert document["files"] == [
        "evals/tasks/data/capitals.jsonl",
        "evals/tasks/capitals.yaml",
        "evals/suites/capitals.yaml",
        "evals/tasks/localdata.py",
    ]
    assert {c["status"] for c in document["check"]["checks"]} == {"ok"}
    text = run("suite", "new", "sums", "--data", "exact.jsonl", "--kind", "exact", "--base", "base")
    assert "12 clusters by 'cluster'" in text.stdout
    assert "24 items in 12 clusters by 'cluster', chance 0" in text.stderr
    write_jsonl(tmp_path / "few.jsonl", EXACT[:3])
    assert (
        "fewer than 8"
        in run("suite", "new", "few", "--data", "few.jsonl", "--kind", "exact", "--base", "base", code=3).exception.message
    )
    error = run("suite", "new", "no", "--data", "exact.jsonl", "--kind", "exakt", "--base", "base", code=2).exception
    assert "Did you mean 'exact'" in error.message
    assert "no base" in run("suite", "new", "no", "--data", "exact.jsonl", "--kind", "exact", code=2).exception.message
    assert not (tmp_path / "evals/suites/no.yaml").exists()


def test_the_task_of_the_documentation_is_the_one_that_is_written(tmp_path: Path) -> None:
    """The page shows rows and the suite file; both are what the command writes."""
    page = (PROJECT / "docs" / "evaluation.md").read_text("utf-8")
    rows = page.split("```json\n", 1)[1].split("```", 1)[0]
    (tmp_path / "capitals.jsonl").write_text(rows, "utf-8")
    new_suite("capitals", tmp_path / "capitals.jsonl", "choice", tmp_path)
    assert (tmp_path / "evals/suites/capitals.yaml").read_text("utf-8") in page
    assert (tmp_path / "evals/tasks/capitals.yaml").read_text("utf-8") in page


def test_an_interrupted_call_goes_on(tmp_path: Path) -> None:
    """Files with the content that they would get are no other suite's."""
    first = made(tmp_path, CHOICE)
    (tmp_path / "evals/suites/mine.yaml").unlink()
    assert made(tmp_path, CHOICE).files == [path for path in first.files if not path.endswith("localdata.py")]
    assert (tmp_path / "evals/suites/mine.yaml").is_file()
    (tmp_path / "evals/tasks/mine.yaml").write_text("edited: by hand\n", "utf-8")
    with pytest.raises(WorkbenchError, match=r"^evals/tasks/mine\.yaml: already exists$"):
        made(tmp_path, CHOICE)
