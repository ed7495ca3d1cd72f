"""Things of other tools and names of other systems, for every command; the table of such things in docs/coming-from.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from worlds.commands import refused
from worlds.jsonl import write_jsonl
from worlds.places import PROJECT
from worlds.trainers import FACT, FILES, TREES

from workbench.ground.foreign_names import retyped
from workbench.ground.recognize import look

COMMANDS = [
    "plan {}", "run {}", "eval {} --suite s", "chat {}", "search {}", "compare {} --suite s", "report {}", "experts {} --texts texts.jsonl",
    "export write {} --for vllm -o new", "push {} a/b --dry-run", "analyze {} --facts facts.jsonl",
    "recipe import {}", "recipe new n --base {}", "recipe new n --base base --brick m={}",
    "brick show {}", "brick train x --data {} --base base", "brick extract {} --base base -o new", "brick bake {} --base base -o new",
    "brick advise {} --base base", "brick barrier base {} --text texts.jsonl", "brick transplant {} --to base -o new",
    "brick verify {} --base base", "suite show {}", "suite check {} --base base", "suite new x --data {} --kind exact --base base",
    "scores import {}", "scores pull {}", "facts check {}", "facts import {}", "edit rebase {} --onto base -o new", "edit trace {} facts.jsonl",
    "edit trace base {}", "runs show {}", "memory ls {}", "route explain {} w1", "route measure {}",
]  # fmt: skip
"""Every command that reads what a user names."""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, llama: Path, bricks: Path) -> Path:
    """A project with all folders and files of other tools, those in got/, and results of lm-eval with items in scored/."""
    here = tmp_path_factory.mktemp("foreign")
    for folder in ("recipes", "got", "scored/org__m"):
        (here / folder).mkdir(parents=True)
    (here / "base").symlink_to(llama)
    (here / "bricks").symlink_to(bricks)
    write_jsonl(here / "facts.jsonl", [{**FACT, "subject": "w1"}])
    write_jsonl(here / "texts.jsonl", [{"text": "w1 w2 w3"}] * 8)
    write_jsonl(
        here / "scored" / "org__m" / "samples_copy_2026-01-01T00-00-00.000000.jsonl", [{"doc_id": 0, "filtered_resps": ["w1"]}]
    )
    for name, (lay_out, *_) in TREES.items():
        lay_out(here, here / name)
    for name, (content, *_) in FILES.items():
        (here / "got" / name).write_text(content)
    return here


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_gives_the_hint_of_open(command: str, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each thing that none takes as it is, whether its reader knows the thing or looks for something else, such as a run."""
    monkeypatch.chdir(foreign)
    read_by_some = ("items.json", "facts-list.jsonl", "weights.pt")  # JSON lists and pickles: see MET
    names = [name for name in TREES if not TREES[name][3]] + [f"got/{name}" for name in FILES if name not in read_by_some]
    things = [thing for name in names if (thing := look(Path(name))) and thing.problem]
    assert len(things) == 20 + 6
    for thing in things:
        error = refused(*command.format(thing.name).split())
        told = thing.commands[0] if thing.commands else str(thing.problem).rpartition(". ")[2]
        assert told in (error.hint or ""), f"{thing.name}: {error.message} {error.hint}"
        if command.split()[0] in ("plan", "chat") and thing.name in ("old-peft", "mlx-lora", "prompt"):
            assert thing.says in error.message  # not "a LoRA adapter"
    assert not (foreign / "new").exists()
    assert not [*(foreign / "recipes").iterdir(), *(foreign / "bricks").glob("x/*")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_how_to_type_a_name_of_another_system(
    command: str, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name with `~` behind `=` comes as it is from a shell: commands take it, or say its path."""
    monkeypatch.chdir(foreign)
    monkeypatch.setenv("HOME", str(foreign))
    names = {
        "https://huggingface.co/org/name/tree/v1": "org/name@v1",
        "file:///no/llama": "/no/llama",
        r"C:\llama": "/mnt/c/llama",
    }
    home = {} if command.startswith("recipe new") else {"~/onnx/model.onnx": f"{foreign}/onnx/model.onnx"}  # recipes may have `~`
    for name, meant in {**names, **home}.items():
        error = refused(*(word.format(name) for word in command.split()))
        said = f"{error.message} {error.hint}"
        assert meant in said.replace(name, "").replace(str(Path(name)), ""), f"{name}: {said}"


def test_an_error_about_something_else_keeps_its_hint(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one about a damaged file; a file's folder is no project."""
    monkeypatch.chdir(foreign)
    assert "on each line" in (refused("experts", "mlx", "--texts", "got/items.jsonl").hint or "")
    (foreign / "got" / "old.gguf").write_bytes(b"GGUF")
    error = refused("brick", "transplant", "got/old.gguf", "--to", "base", "-o", "new")
    assert "not a complete GGUF file" in error.message
    assert error.hint == "Download the file again."


ROWS: dict[str, Sequence[str]] = {
    # row of the table in docs/coming-from.md: things of that kind
    "an adapter of PEFT": ("peft", "unsloth", "axolotl", "llama-factory"), "`checkpoint-N` folders": ("trl-stopped", "torchtune", "checkpoint-500"),
    "a mergekit YAML": ("got/config.yml", "mergekit"), "tensors named": (), "a fine-tune or adapter with tokens": (), "a model of sentence-": (),
    "`.bin` or `.pt`": ("old-peft", "old-transformers", "got/weights.pt", "iter_0000020", "megatron-bridge", "nemo2"), "FSDP": ("fsdp",),
    "DeepSpeed": ("deepspeed",), "verl": ("global_step_40", "verl-megatron", "verl-whole"),
    "a model quantized by MLX": ("mlx", "mlx-lora"), "a clone": ("clone", "got/model.safetensors"), "a learned prompt": ("prompt", "onnx"),
    "results of": ("scored",), "CounterFact": ("got/counterfact.json", "got/zsre.json"), "CSV": ("got/items.csv", "got/items.json"), "`https": (),
}  # fmt: skip


def test_the_table_in_docs_says_what_open_prints(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row: commands in it are printed for things of the kind, and what needs none, or has none, is so. Each kind has a row."""
    monkeypatch.chdir(foreign)
    page = (PROJECT / "docs" / "coming-from.md").read_text("utf-8").partition("## Files of other tools")[2]
    rows = [row.strip("| ").split(" | ") for row in page.splitlines() if row.startswith("| ")][2:]
    for (have, text), (start, names) in zip(rows, ROWS.items(), strict=True):
        assert have.startswith(start)
        things = [look(Path(name)) for name in names]
        printed = [command for thing in things if thing for command in thing.commands]
        if have.startswith("`https"):
            assert retyped(have.strip("`")) == text.strip("`")
        elif text.startswith("none: "):
            assert [(thing is not None and thing.problem is not None, printed) for thing in things] == [(True, [])] * len(names)
        elif text.startswith("the printed line"):
            assert all(thing and thing.problem and thing.commands[0].startswith("python -c ") for thing in things)
        elif not text.startswith("nothing: "):  # names and rows that are read: WRAPPED, tests/vocabulary/test_added_rows.py
            for command in re.findall(r"`([^`]+)`", text):
                pattern = re.sub(r"\b[A-Z]{2,}\b|\u2026", "\0", command)
                assert any(re.match(".+".join(map(re.escape, pattern.split("\0"))), line) for line in printed), command
            assert all(thing and (thing.commands or thing.problem) for thing in things)
    assert set(TREES) - {name for names in ROWS.values() for name in names} == {"c3a", "tokenizer", "lm-eval", "megatron-legacy"}
