"""Files that once ended in a traceback, a hang or a silent misreading: each with the message that it gets."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from worlds.effort import cpu_limit
from worlds.project import Project
from worlds.tiny import edit_json

from workbench.adapters.read import Patterns
from workbench.bricks.card import read_licence, read_title
from workbench.cli.app import app
from workbench.console.output import Terminal
from workbench.ground import jsondoc
from workbench.ground.errors import WorkbenchError, nearest, printable
from workbench.ground.files import read_json, read_memo, write_json
from workbench.ground.tables import as_markdown, prose
from workbench.recipe.recipe import load_recipe
from workbench.resolve.resolve import resolve
from workbench.run.card import model_card
from workbench.run.directory import RunDirectory, list_runs
from workbench.scores.tasks import task_index
from workbench.weights.digests import tensor_digests
from workbench.weights.header import read_header

RECIPE = "bricks: {mine: mine}\nsteps: [{merge: average}]\n"


def plan(project: Project, monkeypatch: pytest.MonkeyPatch) -> WorkbenchError:
    """The error of `workbench plan`."""
    project.write(RECIPE)
    monkeypatch.chdir(project.path)
    result = CliRunner().invoke(app, ["plan", "recipes/test.yaml"])
    assert isinstance(result.exception, WorkbenchError), repr(result.exception) + result.output
    return result.exception


def mine(project: Project, brick: str) -> Path:
    shutil.copytree(project.path / "bricks" / brick, project.path / "mine")
    return project.path / "mine"


DEEP = "[" * 200_000 + "]" * 200_000
JSON = {
    "infinity": (b'{"a": Infinity}', "x: not JSON: Infinity, expected a finite number"),
    "nan": (b'{"a": [NaN]}', "x: not JSON: NaN, expected a finite number"),
    "overflow": (b'{"a": 1e999}', "x: not JSON: 1e999, expected a number up to 1.8e308"),
    "deep": (DEEP.encode(), "x: not JSON: nested too deeply (up to 100 levels)"),
    "less deep": (("[" * 150 + "]" * 150).encode(), "x: not JSON: nested too deeply (up to 100 levels)"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "x: not JSON: not UTF-8 text (byte 0)"),
    "surrogate": (b'{"a": "\\ud800"}', "x: not JSON: an unpaired surrogate in a string"),
    "surrogate key": (b'{"\\udfff": 1}', "x: not JSON: an unpaired surrogate in a string"),
    "raw surrogate": (b'{"a": "\xed\xa0\x80"}', "x: not JSON: not UTF-8 text (byte 7)"),
    "long number": (b"9" * 5_000, "x: not JSON: Exceeds the limit (4300 digits)"),
    "twice": (b'{"a": {"b": 1, "b": 2}}', "x: not JSON: duplicate key 'b'"),
    "cut": (b'{"a": ', "x: not JSON: Expecting value: line 1 column 7"),
}


@pytest.mark.parametrize("name", JSON)
def test_json(name: str) -> None:
    raw, message = JSON[name]
    with pytest.raises(WorkbenchError) as caught:
        jsondoc.parse(raw, "x", unique=True)
    assert caught.value.message.startswith(message)


def test_json_that_is_right() -> None:
    assert jsondoc.parse('{"a": "\\ud83d\\ude00", "b": 1e3}', "x") == {"a": "😀", "b": 1000.0}
    assert jsondoc.parse(b'{"time_step_limit": [0.0, Infinity]}', "x", infinite=True) == {"time_step_limit": [0.0, float("inf")]}
    assert jsondoc.parse("[" * 100 + "]" * 100, "x")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "depth": ({"num_hidden_layers": float("inf")}, "num_hidden_layers: expected a whole number from 0 to 10,000, found inf"),
    "many layers": (
        {"num_hidden_layers": 10**9},
        "num_hidden_layers: expected a whole number from 0 to 10,000, found 1000000000",
    ),
    "part": ({"text_config": [1]}, "text_config: expected an object, found a list"),
    "inner": ({"text_config": {"vocab_size": "64"}}, "text_config: vocab_size: expected a whole number from 0, found '64'"),
    "type": ({"model_type": ["llama"]}, "model_type: expected a text, found a list"),
    "tied": ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false, found 'no'"),
    "tokens": ({"eos_token_id": {"a": 1}}, "eos_token_id: expected a token id, or a list of them, found an object"),
}


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "alpha as text": ({"lora_alpha": "16"}, "lora_alpha: expected a number, found '16'"),
    "alpha infinite": ({"lora_alpha": 1e40}, "lora_alpha: expected a number, found 1e+40"),
    "list for an object": ({"alpha_pattern": ["q_proj"]}, "alpha_pattern: expected patterns with numbers, found a list"),
    "text in a pattern": ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern: expected patterns with numbers, found an object"),
    "rank of zero": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: expected patterns with numbers over 0, found an object"),
    "flag as text": ({"use_dora": "false"}, "use_dora: expected true or false, found 'false'"),
    "type": ({"peft_type": ["LORA"]}, "peft_type: expected a text, found a list"),
    "targets": ({"target_parameters": [1]}, "target_parameters: expected a list of texts, found a list"),
}


FIELDS = [
    *(("full", "config.json", case) for case in CONFIGS.values()),
    *(("one", "adapter_config.json", case) for case in ADAPTERS.values()),
]


@pytest.mark.parametrize(("brick", "file", "case"), FIELDS, ids=[*CONFIGS, *(f"adapter: {name}" for name in ADAPTERS)])
def test_a_field_of_another_kind_is_named(
    brick: str, file: str, case: tuple[dict[str, Any], str], project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the configuration of a checkpoint and in that of an adapter."""
    changes, message = case
    edit_json(mine(project, brick) / file, **changes)
    assert plan(project, monkeypatch).message.endswith(f"mine/{file}: {message}")


MODULES = [
    f"base_model.model.model.layers.{i}.{m}" for i in range(12) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]
PATTERNS = [
    {"q_proj": 1.0}, {"layers.1.self_attn.q_proj": 3.0, "q_proj": 4.0}, {r"layers\.(1|2)\..*q_proj": 1.0, "v_proj": 2.0}, {".*": 2.0}, {"proj": 1.0},
    {"^model.layers.0.mlp.down_proj": 1.0}, {"^base_model.model.model.layers.0.mlp.down_proj": 7.0}, {"l.yers.1.mlp.down_proj": 5.0}, {"": 1.0},
    {r"layers.[0-9]+.mlp\.down_proj": 2.0}, {"q_proj|v_proj": 3.0}, {"1.self_attn.q_proj": 9.0}, {r".*\.(self_attn|mlp)\.(q|down)_proj$": 2.0},
    {r"^base_model\.model\.model\.layers\.3\.mlp\.down_proj": 6.0}, {"layers.1.mlp.down_proj": 1.0, "layers.1.m.p.down_proj": 2.0},
    {"layers.1.m.p.down_proj": 2.0, "layers.1.mlp.down_proj": 1.0}, {r"(?:layers\.)?\d+\.self_attn\.\w_proj": 8.0}, {"a)|(q_proj": 3.0},
]  # fmt: skip


@pytest.mark.parametrize("patterns", PATTERNS, ids=lambda patterns: " ".join(patterns))
def test_patterns_match_as_in_peft(patterns: dict[str, float]) -> None:
    """PEFT: the first pattern for which re.match(rf"(.*\\.)?({pattern})$", name) is true."""
    found = Patterns(patterns, "x")
    for module in MODULES:
        wanted = next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), 8.0)
        assert found.value(module, 8.0) == wanted, module


@pytest.mark.parametrize(
    "pattern", ["(?!x)a", "(?<=x)a", r"(a)\1", "(", "*", "[", "a{,3}", "[[:alpha:]]", r"\p{L}", "x" * 9_999 + "|b*"]
)
def test_patterns_that_are_refused(pattern: str) -> None:
    with pytest.raises(WorkbenchError, match=r"^file: the pattern .* is not supported: ") as caught:
        Patterns({"q_proj": 1.0, pattern: 2.0}, "file")
    assert "without lookaround and backreferences" in str(caught.value.hint)
    assert len(caught.value.message) < 300


def test_a_catastrophic_pattern_does_not_hang(project: Project, cwd: Path) -> None:
    file = mine(project, "one") / "adapter_config.json"
    patterns = {"(([a-z_]+)*)*x": 1, "((.*)*)*y": 2, "(.|.)*z": 3}
    file.write_text(json.dumps({**json.loads(file.read_text()), "alpha_pattern": patterns, "rank_pattern": patterns}))
    project.write(RECIPE)
    with cpu_limit(30):  # more than the imports of a first command; the pattern takes years
        result = CliRunner().invoke(app, ["plan", "recipes/test.yaml"])
    assert result.exit_code == 0, result.exception


def test_many_patterns_take_linear_time() -> None:
    modules = [f"model.layers.{i}.{name}" for i in range(1_000) for name in "abcdefg"]
    with cpu_limit(3):
        found = Patterns({module: float(i) for i, module in enumerate(modules)}, "x")
        assert [found.value(f"base_model.{module}", -1.0) for module in modules] == [float(i) for i in range(len(modules))]
    with pytest.raises(WorkbenchError, match="more than 256 patterns that are not names of modules"):
        Patterns({f"(a|b){i}": 1.0 for i in range(300)}, "x")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5_000, "..", "a/b", ""])
def test_names_of_files_in_an_index(name: str, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    place = mine(project, "full")
    (place / "model.safetensors").rename(place / "other.safetensors")
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert "names a file outside its directory" in plan(project, monkeypatch).message


def test_a_header_of_many_tensors(tmp_path: Path) -> None:
    """Two seconds a megabyte at most."""
    entries = {f"model.layers.{i}.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    text = json.dumps(entries).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with cpu_limit(2 * len(text) / 1e6):
        assert len(read_header(tmp_path / "x.safetensors")) == 100_000


def test_duplicate_tensors_in_a_header(tmp_path: Path) -> None:
    entry = '{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    text = f'{{"a": {entry}, "a": {entry}}}'.encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(WorkbenchError, match="damaged safetensors header: not JSON: duplicate key 'a'"):
        read_header(tmp_path / "x.safetensors")


READMES = {
    "date": ("license: mit\ndate: 2026-13-45\nmodel_name: 1e-3\n", "mit", "1e-3"),
    "twice, octal and merge key": ("license: gpl\nlicense: mit\nn: 010\nyes: 1\n<<: {a: b}\n", "mit", None),
    "list": ("- license\n", None, None),
    "bomb": ("a: &a [x,x]\n" + "".join(f"b{i}: &b{i} [{'*a,' * 9}x]\n" for i in range(40)) + "license: mit\n", "mit", None),
    "no YAML": ("license: [mit\n", None, None),
    "code": ("license: !!python/object:os.system x\n", "x", None),
}


@pytest.mark.parametrize("name", READMES)
def test_headers_of_readmes(name: str, tmp_path: Path) -> None:
    header, licence, title = READMES[name]
    (tmp_path / "README.md").write_text(f"---\n{header}---\n# x\n", "utf-8")
    assert (read_licence(tmp_path), read_title(tmp_path)) == (licence, title)


def test_foreign_texts_stay_in_their_place_in_a_card(project: Project) -> None:
    shutil.copytree(project.path / "base", project.path / "own")
    header = yaml.safe_dump(
        {"license": "mit |\n\n# Owned\n\n<script>`x`", "model_name": "a\x1b[2J | b\n---\ntags: [x]"}, allow_unicode=True
    )
    (project.path / "own" / "README.md").write_text(f"---\n{header}---\n", "utf-8")
    resolved = resolve(load_recipe(project.write("base: own\nbricks: {one: bricks/one}\nsteps: [{merge: average}]\n")))
    record = {"output": {"digest": "0" * 32}, "versions": {"brick-workbench": "1", "torch": "2"}}
    card = model_card(resolved, record, "a: |\n  ```\n  # Owned\n")
    row = next(line for line in card.split("\n") if line.startswith("| base |"))
    assert (
        row
        == f"| base | a\\\\x1b\\[2J \\| b --- tags: \\[x\\] | `{resolved.base_digest[:12]}` | mit \\| \\# owned &lt;script&gt;\\`x\\` |"
    )
    assert "\n# Owned" not in card
    assert "````yaml\na: |\n  ```\n" in card
    assert yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))["tags"] == ["merge", "brick-workbench"]


def test_what_a_terminal_gets() -> None:
    assert printable("a\x1b[31m\x9b\r\n\t\u202eb\udc80") == "a\\x1b[31m\\x9b\\x0d\n\t\\u202eb\\udc80"
    assert as_markdown("a|b\n`c` [d](e)") == "a\\|b \\`c\\` \\[d\\](e)"
    assert prose("[a] `b *c*` `<d>` `e|` f`") == "\\[a\\] `b *c*` \\`&lt;d&gt;\\` \\`e\\|\\` f\\`"
    stream = io.StringIO()
    output = Terminal()
    output.talk = Console(file=stream, width=100, soft_wrap=True, highlight=False)
    output.error(WorkbenchError("no '\x1b]0;x\x07' " + "y" * 1_000_000, "\x1b[2J"))
    assert stream.getvalue().startswith("error: no '\\x1b]0;x\\x07' yyy")
    assert "\x1b" not in stream.getvalue()
    assert len(stream.getvalue()) < 11_000


def test_names_that_are_suggested_among_many() -> None:
    with cpu_limit(2):
        assert nearest("x" * 100_000, (f"n{i}" for i in range(100_000))).startswith("Known: n0, ")
    assert nearest("densty", ["density", "lambda"]) == "Did you mean 'density'?"


def test_many_problems_of_a_recipe(project: Project) -> None:
    file = project.write("bricks: {}\nsteps: []\n" + "".join(f"field{i}: 1\n" for i in range(20_000)))
    with cpu_limit(2), pytest.raises(WorkbenchError, match="19950 more problems"):
        load_recipe(file)


RECORDS: list[Any] = [
    [],
    {"status": ["done"]},
    {"status": "done", "output": []},
    {"status": "done"},
    {"inputs": {"base": "x"}},
    {"warnings": [1]},
    "x",
]


@pytest.mark.parametrize("record", RECORDS, ids=str)
def test_damaged_records_of_runs(record: Any, tmp_path: Path, cwd: Path) -> None:
    (tmp_path / "runs" / "a" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "run.json").write_text(json.dumps(record))
    assert not RunDirectory(tmp_path / "runs" / "a").done
    assert [run.name for run in list_runs(tmp_path / "runs")] == ["a"]
    assert CliRunner().invoke(app, ["runs", "ls"]).exit_code == 0
    result = CliRunner().invoke(app, ["runs", "show", "a"])
    assert isinstance(result.exception, WorkbenchError)
    assert result.exception.message.startswith("runs/a/run.json: ")


@pytest.mark.parametrize("memo", [[], {}, {"x": "y"}, {"*": 3}, "cut", "other digits"], ids=str)
def test_damaged_digests_are_taken_again(memo: Any, project: Project, tmp_path: Path) -> None:
    brick = resolve(load_recipe(project.write("bricks: {one: bricks/one}\nsteps: [{merge: average}]\n"))).on_disk["one"]
    true = tensor_digests(brick.adapter.entries, tmp_path)
    (file,) = (tmp_path / "digests").glob("*.json")
    texts = {"cut": "{", "other digits": file.read_text().translate(str.maketrans("0123456789", "1234567890"))}
    file.write_text(texts.get(str(memo)) or json.dumps(dict.fromkeys(true, 3) if memo == {"*": 3} else memo))
    assert tensor_digests(brick.adapter.entries, tmp_path) == true
    assert read_memo(file) == true


def test_kept_objects_need_their_fields(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"digest": 3})
    assert read_json(tmp_path / "x.json", digest=str) is None
    assert read_json(tmp_path / "x.json", digest=int) == {"digest": 3}


TASKS = {
    "utf-16": ("task: x\n".encode("utf-16"), "x.yaml: not YAML: 'utf-8' codec can't decode"),
    "date": (b"task: x\na: 2026-13-45\n", "x.yaml: not YAML: month must be in 1..12"),
    "deep": (b"a: " + b"[" * 5_000, "x.yaml: not YAML: nested too deeply"),
    "bomb": (
        b"a: &a [1,1,1,1,1,1,1,1,1]\n"
        + b"".join(b"%c: &%c [%s1]\n" % (98 + i, 98 + i, (b"*%c," % (97 + i)) * 9) for i in range(9)),
        "has too many aliases",
    ),
    "include": (b"task: x\ninclude: {a: b}\n", "x.yaml: include: expected the names of task files"),
}


@pytest.mark.parametrize("name", TASKS)
def test_task_files(name: str, tmp_path: Path) -> None:
    raw, message = TASKS[name]
    (tmp_path / "x.yaml").write_bytes(raw)
    with cpu_limit(3), pytest.raises(WorkbenchError, match=re.escape(message)):
        task_index(tmp_path)


def test_empty_fields_in_the_record_of_a_run(tmp_path: Path, cwd: Path) -> None:
    inputs = {"base": {"id": "b", "digest": None}, "bricks": {"one": None}}
    record = {
        "status": "done",
        "created": "x",
        "device": "cpu",
        "inputs": inputs,
        "output": {"digest": "d", "parameters": None, "bytes": None},
    }
    (tmp_path / "runs" / "a" / "model").mkdir(parents=True)
    for output in (record["output"], {"digest": "d", "parameters": 10**400, "bytes": 1}):
        (tmp_path / "runs" / "a" / "run.json").write_text(json.dumps({**record, "output": output}))
        result = CliRunner().invoke(app, ["runs", "show", "a"])
        assert result.exception is None or isinstance(result.exception, (WorkbenchError, SystemExit))
