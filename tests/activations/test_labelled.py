"""Files of labelled texts: splits by tasks, warnings, and errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workbench.activations.labelled import item_rows, read_labelled
from workbench.ground.errors import WorkbenchError


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def row(function: str, number: int = 0, **fields: Any) -> dict[str, Any]:
    return {"prompt": f"{function} {number}", "function": function, **fields}


def test_every_second_task_judges(tmp_path: Path) -> None:
    rows = [row(f, i, task=f"{f}-{t}") for f in ("math", "code") for t in "abc" for i in range(2)]
    data = read_labelled(write(tmp_path / "x.jsonl", *rows), "x.jsonl")
    assert data.functions == ("math", "code")
    assert data.tasks("math", "train") == ("math-a", "math-c")
    assert data.tasks("math", "heldout") == ("math-b",)
    assert data.warnings == ()
    assert [item.id for item in data.items[:2]] == ["0", "1"]


def test_a_function_with_one_task_is_split_by_items_with_a_warning(tmp_path: Path) -> None:
    rows = [row("math", i) for i in range(4)] + [row("code", i, task=f"t{i}") for i in range(2)]
    data = read_labelled(write(tmp_path / "x.jsonl", *rows), "x.jsonl")
    assert [item.split for item in data.items if item.function == "math"] == ["train", "heldout"] * 2
    assert len(data.warnings) == 1
    assert "function 'math' has one task" in data.warnings[0]


def test_rows_with_several_functions_are_left_out(tmp_path: Path) -> None:
    labels = [["code"], ["code", "math"], ["math"], ["code"], ["math", "math"]]
    rows = [{"prompt": f"{i}", "labels": of} for i, of in enumerate(labels)]
    data = read_labelled(write(tmp_path / "x.jsonl", *rows), "x.jsonl")
    assert [(item.prompt, item.function) for item in data.items] == [("0", "code"), ("2", "math"), ("3", "code"), ("4", "math")]
    assert data.several == 1


def test_the_file_s_own_split_stays(tmp_path: Path) -> None:
    rows = [row(f, i, split=s) for f in ("math", "code") for s in ("heldout", "train") for i in range(2)]
    data = read_labelled(write(tmp_path / "x.jsonl", *rows), "x.jsonl")
    assert [item.split for item in data.items] == ["heldout", "heldout", "train", "train"] * 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("math"), row("math"), {"prompt": "x"}], r"x\.jsonl:3: expected the function as text in 'function'.*found no label"),
        (
            [row("math"), row("math"), {"prompt": "", "function": "code"}],
            r"x\.jsonl:3: expected a text in 'prompt', found an empty",
        ),
        ([row("math"), row("math"), row("code")], r"function 'code' has 1 item, expected at least 2"),
        ([row("math"), row("math")], r"all rows have the function 'math'"),
        ([row("math"), row("math", split="test")], r"x\.jsonl:2: expected split 'train' or 'heldout', found 'test'"),
        ([row("math", split="train"), row("math"), row("code"), row("code")], r"x\.jsonl:2: the row has no 'split'"),
        ([row("math"), [1]], r"x\.jsonl:2: expected an object"),
        ([row("math"), row("code", response=3)], r"x\.jsonl:2: expected a text in 'response'"),
        ([row(f, i, split="train") for f in "ab" for i in range(2)], r"function 'a' has 0 items in split 'heldout'"),
        ([], r"no row has exactly one function"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        read_labelled(write(tmp_path / "x.jsonl", *rows), "x.jsonl")


def test_a_missing_file_suggests_its_neighbor(tmp_path: Path) -> None:
    write(tmp_path / "functions.jsonl", row("a"))
    with pytest.raises(WorkbenchError, match="no such file") as caught:
        read_labelled(tmp_path / "function.jsonl", "function.jsonl")
    assert "functions.jsonl" in (caught.value.hint or "")


def test_rows_know_where_the_prompt_ends(tmp_path: Path, tokenizer: Any) -> None:
    rows = [row("math", 1, response="two words"), row("math", 2), row("code", 3), row("code", 4)]
    items = read_labelled(write(tmp_path / "x.jsonl", *rows), "x.jsonl").items
    whole, bare, *_ = item_rows(items, tokenizer, 512)
    assert tokenizer.decode(whole.tokens[: whole.prompt]).strip() == "math 1"
    assert tokenizer.decode(whole.tokens[whole.prompt :]).strip() == "two words"
    assert bare.prompt == len(bare.tokens)
    cut = item_rows(items, tokenizer, 2)[0]
    assert len(cut.tokens) == 2
    assert cut.prompt <= 2


def test_a_chat_template_is_needed_for_chat(tmp_path: Path, tokenizer: Any) -> None:
    items = read_labelled(write(tmp_path / "x.jsonl", *(row(f, i) for f in "ab" for i in range(2))), "x.jsonl").items
    tokenizer.chat_template = None
    with pytest.raises(WorkbenchError, match="no chat template"):
        item_rows(items, tokenizer, 512, chat=True)


@pytest.mark.part("neurons")
def test_some_items_of_each_task_are_spread_over_the_task(tmp_path: Path) -> None:
    from workbench.neurons.subject import some_of_each_task

    rows = [row(f, i, task=f"{f}-{t}") for f in ("math", "code") for t in "ab" for i in range(6)]
    items = read_labelled(write(tmp_path / "x.jsonl", *rows), "x.jsonl").items
    assert [item.prompt for item in some_of_each_task(items, 2)] == ["math 0", "math 3"] * 2 + ["code 0", "code 3"] * 2
    assert some_of_each_task(items, 9) == list(items)
