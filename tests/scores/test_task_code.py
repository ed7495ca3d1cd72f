"""A plan covers what a built task yields, and all code that scores it: also what its files do not name."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from worlds.jsonl import write_jsonl
from worlds.local_tasks import asks_for_texts, documents
from worlds.places import TASKS

from workbench.evaluate import build_plan
from workbench.ground.errors import WorkbenchError
from workbench.scores.plan import ScorePlan
from workbench.scores.suite import Suite

TASK = asks_for_texts(
    "copy",
    "data.jsonl",
    docs="code.docs",
    prompt="!function code.prompt",
    more="""\
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
process_results: !function code.score
metric_list: [{metric: em, aggregation: mean, higher_is_better: true}]
""",
)
CODE = """
import json
import sys
from pathlib import Path

import datasets

sys.path.insert(0, str(Path(__file__).parent))
import indirect_helper


def docs(config_source, data_files, **_):
    folder = Path(config_source).parent
    rows = [json.loads(line) for line in (folder / data_files["test"]).read_text("utf-8").splitlines()]
    extra = json.loads((folder / "read.json").read_text("utf-8"))
    return {"test": datasets.Dataset.from_list([{**row, "extra": extra["word"]} for row in rows])}


def prompt(doc):
    return indirect_helper.HEAD + doc["extra"] + doc["prompt"]


def score(doc, results):
    import indirect_lazy

    return {"em": float(indirect_lazy.clean(results[0]) == doc["answer"])}
"""
HELPER = 'import json\nfrom pathlib import Path\nHEAD = json.loads((Path(__file__).parent / ("at" + "_import.json")).read_text())["head"]\n'
LAZY = (
    "import json\nfrom pathlib import Path\n\n\ndef clean(text):\n"
    '    names = "used_when_" + "scoring"\n    strip = json.load(open(Path(__file__).parent / f"{names}.json"))\n'
    "    return text.strip(strip)\n"
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "evals" / "tasks"
    folder.mkdir(parents=True)
    (folder / "copy.yaml").write_text(TASK)
    (folder / "code.py").write_text(CODE)
    (folder / "indirect_helper.py").write_text(HELPER)
    (folder / "indirect_lazy.py").write_text(LAZY)
    (folder / "read.json").write_text('{"word": "say "}')
    (folder / "at_import.json").write_text('{"head": "Please "}')
    (folder / "used_when_scoring.json").write_text('" "')
    write_jsonl(folder / "data.jsonl", documents())
    monkeypatch.setattr("sys.path", list(sys.path))
    for name in ("indirect_helper", "indirect_lazy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def plan(folder: Path, tokenizer: Any, memo: Path | None = None) -> ScorePlan:
    return build_plan(Suite(suite="toy", tasks=("copy",)), tokenizer, tasks_dir=folder, memo=memo)


def swap(file: str, before: str, after: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / file).read_text("utf-8")
        assert before in text
        (folder / file).write_text(text.replace(before, after))

    return change


CHANGES = {
    "a module that the code imports": swap("indirect_helper.py", '["head"]', '["head"].upper()'),
    "a module that is imported when an item is scored": swap(
        "indirect_lazy.py", "text.strip(strip)", "text.lower().strip(strip)"
    ),
    "a file that the data's function reads": swap("read.json", "say", "tell"),
    "a file that a module reads when it is imported": swap("at_import.json", "Please", "Kindly"),
    "a file that is read when an item is scored": swap("used_when_scoring.json", '" "', '"-"'),
    "the function of the data": swap("code.py", "[{**row,", "[{**row, 'prompt': row['prompt'] * 2,"),
    "the template": swap("copy.yaml", "doc_to_target: answer", "doc_to_target: '{{answer}}!'"),
    "the data": swap("data.jsonl", "Say aa0", "Say aa1"),
}


@pytest.mark.parametrize("kept", [False, True], ids=["built", "memo"])
@pytest.mark.parametrize("what", CHANGES)
def test_every_change_makes_another_plan(what: str, kept: bool, place: Path, tokenizer: Any, tmp_path: Path) -> None:
    memo = tmp_path / "memo" if kept else None
    first = plan(place, tokenizer, memo)
    assert plan(place, tokenizer, memo).digest == first.digest
    CHANGES[what](place)
    changed = plan(place, tokenizer, memo)
    assert changed.digest != first.digest
    assert plan(place, tokenizer, memo).digest == changed.digest


def test_a_changed_module_is_imported_again(place: Path, tokenizer: Any) -> None:
    """The digest is that of the new code, so the requests have to be made by it."""
    from workbench.evaluate.tasks import load_tasks

    def prompt() -> str:
        made = plan(place, tokenizer)
        task = load_tasks(made)["copy"]
        return str(task.doc_to_text(task.eval_docs[0]))

    assert prompt().startswith("Please say Say aa0")
    CHANGES["a module that the code imports"](place)
    assert prompt().startswith("PLEASE say Say aa0")


def test_names_and_times_of_files_decide_nothing(
    place: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan(place, tokenizer)
    (place / "data.jsonl").rename(place / "other.jsonl")
    swap("copy.yaml", "data.jsonl", "other.jsonl")(place)
    os.utime(place / "read.json", (1, 1))
    assert plan(place, tokenizer).digest == first.digest
    shutil.copytree(place, tmp_path / "elsewhere")
    for name in ("indirect_helper", "indirect_lazy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert plan(tmp_path / "elsewhere", tokenizer).digest == first.digest


def test_the_documents_are_those_of_the_task(place: Path, tokenizer: Any) -> None:
    """A function that leaves documents out: the plan has the items that it yields, not the lines of the file."""
    swap("code.py", "for row in rows]", "for row in rows[4:]]")(place)
    assert [item.id for item in plan(place, tokenizer).items["copy"]] == [f"copy-{i:03d}" for i in range(4, 24)]


# The memo


def never(*_: Any) -> Any:
    raise AssertionError("built again")


@contextmanager
def remembered(place: Path, tokenizer: Any, memo: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make a plan whose task is kept and used again; after the body's change the task is built again."""
    plan(place, tokenizer, memo)
    monkeypatch.setattr("workbench.evaluate.tasks.load_task", never)
    plan(place, tokenizer, memo)
    yield
    with pytest.raises(WorkbenchError, match="built again"):
        plan(place, tokenizer, memo)


def test_a_memo_is_used_while_no_file_has_changed(
    place: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan(place, tokenizer, tmp_path / "memo")
    kept = (place / "read.json").stat()
    with monkeypatch.context() as patched:
        patched.setattr("workbench.evaluate.tasks.load_task", never)
        again = plan(place, tokenizer, tmp_path / "memo")
        assert (again.digest, again.items, again.metrics) == (first.digest, first.items, first.metrics)
        os.utime(place / "read.json", (1, 1))  # another time, the same bytes
        assert plan(place, tokenizer, tmp_path / "memo").digest == first.digest
        swap("read.json", "say", "tel")(place)
        os.utime(place / "read.json", ns=(kept.st_atime_ns, kept.st_mtime_ns))  # other bytes of the same size and time
        with pytest.raises(WorkbenchError, match="built again"):
            plan(place, tokenizer, tmp_path / "memo")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": "task-1"}', '{"format": "task-0"}'])
def test_a_damaged_memo_is_made_again(damage: str, place: Path, tokenizer: Any, tmp_path: Path) -> None:
    first = plan(place, tokenizer, tmp_path / "memo")
    (file,) = (tmp_path / "memo").glob("*.json")
    whole = file.read_bytes()
    file.write_text(damage)
    assert plan(place, tokenizer, tmp_path / "memo").digest == first.digest
    assert json.loads(file.read_bytes())["source"] == json.loads(whole)["source"]


def test_a_module_that_hides_another_ends_a_memo(
    place: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, late = tmp_path / "first", tmp_path / "late"
    for folder in (first, late):
        folder.mkdir()
    shutil.move(place / "indirect_helper.py", late)
    shutil.copy(place / "at_import.json", late)
    swap("code.py", "sys.path.insert(0, str(Path(__file__).parent))", "")(place)
    monkeypatch.setattr("sys.path", [str(first), str(late), str(place), *sys.path])
    before = plan(place, tokenizer, tmp_path / "memo")
    (first / "indirect_helper.py").write_text('HEAD = "Hidden "\n')
    assert plan(place, tokenizer, tmp_path / "memo").digest != before.digest


@pytest.mark.parametrize("line", ["import subprocess", "HERE = Path('x').exists()"])
def test_no_memo_is_kept_of_code_that_may_read_unseen(line: str, place: Path, tokenizer: Any, tmp_path: Path) -> None:
    (place / "code.py").write_text(CODE.replace("import datasets\n", f"import datasets\n{line}\n"))
    made = plan(place, tokenizer, tmp_path / "memo")
    assert not list((tmp_path / "memo").glob("*.json"))
    assert plan(place, tokenizer, tmp_path / "memo").digest == made.digest


@pytest.mark.parametrize("file", ["code.py", "indirect_helper.py"])
def test_no_memo_is_kept_where_an_import_starts_a_process(file: str, place: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Seen while it runs, under no name that the code's text shows; a module that is imported once is not seen again, and counts."""
    (place / file).write_text("import sys\nsys.modules['o' + 's'].system('true')\n" + (place / file).read_text("utf-8"))
    for _ in range(2):
        plan(place, tokenizer, tmp_path / "memo")
        assert not list((tmp_path / "memo").glob("*.json"))


@pytest.mark.parametrize("how", ["iterdir()", "glob('*')"])
def test_a_folder_that_an_import_lists_ends_a_memo(
    how: str, place: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the memo is of a second build, which imports nothing."""
    listing = f"HEAD += ' '.join(sorted(p.name for p in (Path(__file__).parent / 'parts').{how}))\n"
    (place / "indirect_helper.py").write_text(HELPER + listing)
    (place / "parts").mkdir()
    plan(place, tokenizer)
    with remembered(place, tokenizer, tmp_path / "memo", monkeypatch):
        (place / "parts" / "new").write_text("")


@pytest.mark.parametrize(
    "line",
    [
        "try:\n    HEAD += open(Path(__file__).parent / ('parts/la' + 'ter.txt')).read()\nexcept OSError:\n    pass",
        "NAMED = 'parts/later.txt'",
    ],
    ids=["opened in vain", "named"],
)
def test_a_file_that_was_not_there_ends_a_memo(
    line: str, place: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "parts").mkdir()  # nobody lists it: a new file beside the code ends a memo by the list of its folder
    (place / "indirect_helper.py").write_text(f"{HELPER}{line}\n")
    with remembered(place, tokenizer, tmp_path / "memo", monkeypatch):
        (place / "parts" / "later.txt").write_text("now")


def test_a_link_that_leads_to_another_file_ends_a_memo(
    place: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code computes the name of the link, and the file that it led to stays as it was."""
    link = (place / "at_import.json").rename(place / "first.json").with_name("at_import.json")
    (place / "second.json").write_text('{"head": "Kindly "}')
    link.symlink_to("first.json")
    with remembered(place, tokenizer, tmp_path / "memo", monkeypatch):
        link.unlink()
        link.symlink_to("second.json")


@pytest.mark.parametrize("field", ["format", "cwd", "versions"])
def test_a_memo_of_another_place_or_version_is_not_used(
    field: str, place: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code may read by relative paths, and another lm-eval may build other requests of the same files."""
    with remembered(place, tokenizer, tmp_path / "memo", monkeypatch):
        (memo,) = (tmp_path / "memo").glob("*.json")
        kept = json.loads(memo.read_text("utf-8"))
        other = {"format": "task-0", "cwd": "/", "versions": {**kept["versions"], "lm_eval": "0.0"}}
        memo.write_text(json.dumps({**kept, field: other[field]}))


def test_the_definition_and_the_examples_are_part_of_a_plan(place: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Fields that change no prompt decide scores too; examples are asked for by the suite, and their memos are kept apart."""
    memo = tmp_path / "memo"
    swap("copy.yaml", "test_split: test", "test_split: test\nfewshot_split: test")(place)

    def made(shots: int | None = None, cluster: str = "cluster", **settings: Any) -> ScorePlan:
        suite = Suite(suite="toy", tasks=("copy",), num_fewshot=shots, cluster=cluster)
        return build_plan(suite, tokenizer, tasks_dir=place, memo=memo, **settings)

    def yielded(shots: int | None) -> str:
        return str(made(shots).facts[1][0][1])

    first = yielded(None)
    assert first != yielded(1), "the pool of examples is part of what the task yields"
    assert yielded(None) == first
    plans = [
        made(),
        made(1),
        made(2),
        made(dtype="float32"),
        made(batch_size=4),
        made(limit=3),
        made().by("hflm"),
        made(cluster="id"),
    ]
    plans.append(plans[0].part({"copy": plans[0].items["copy"][:3]}))
    assert len({plan.digest for plan in plans}) == len(plans)
    swap("copy.yaml", "max_gen_toks: 4", "max_gen_toks: 5")(place)
    assert yielded(None) != first


@pytest.mark.parametrize("field", ["doc_to_target", "doc_to_choice"])
def test_targets_and_choices_are_part_of_a_plan(field: str, place: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of them is digested by what it yields, where neither documents nor files tell it."""
    made = 'os.environ["YIELDED_WORD"]' if field == "doc_to_target" else '[os.environ["YIELDED_WORD"], "b"]'
    (place / "code.py").write_text(f"import os\n{CODE}\n\ndef made(doc):\n    return {made}\n")
    others = "".join(line for line in TASK.splitlines(True) if field not in line)
    (place / "copy.yaml").write_text(f"{others}{field}: !function code.made\n")
    digests = []
    for word in ("a", "a", "c"):
        monkeypatch.setenv("YIELDED_WORD", word)
        digests.append(plan(place, tokenizer).digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_module_with_a_computed_name_counts_each_time(place: Path, tokenizer: Any) -> None:
    swap("code.py", "    import indirect_lazy\n", "    indirect_lazy = __import__('indirect_' + 'lazy')\n")(place)
    first = plan(place, tokenizer).digest
    assert plan(place, tokenizer).digest == first, "imported once, read once, and part of both"


def test_the_tasks_of_this_repository_are_kept(tokenizer: Any, tmp_path: Path) -> None:
    """All of them are traceable, so that comparing stored scores imports no lm_eval."""
    tasks = TASKS
    names = ["add", "facts", "functions-stripped", "retention"]
    made = Suite(suite="all", tasks=tuple(names), cluster="id")
    build_plan(made, tokenizer, tasks_dir=tasks, memo=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == len(names)
