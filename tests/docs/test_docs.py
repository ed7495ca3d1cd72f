"""The documents: generated parts are current, what they name exists, and their examples run."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_eval.tasks
import pytest
import torch
import typer
import yaml

from worlds.places import PROJECT
from worlds.project import CPU, Project
from worlds.report_document import make_document

from workbench.cli.app import app
from workbench.ground import yamldoc
from workbench.recipe import methods as registry
from workbench.recipe import recipe, schema
from workbench.scores.suite import Suite, load_suite
from workbench.steps import step as steps

PAGES = sorted(
    [
        *(PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(PROJECT / "docs").glob("*.md"),
        PROJECT / "benchmarks" / "mergebench.md",
    ]
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOUNS = ("recipe", "brick", "runs")


def read(name: str) -> str:
    return (PROJECT / name).read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text) if name == language]


def code(text: str) -> Iterator[str]:
    """Lines of code blocks and code spans, Python left out."""
    for language, body in FENCE.findall(text):
        if language != "python":
            yield from (line.partition(" # ")[0] for line in body.splitlines())
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


@pytest.mark.slow
def test_generated_parts_are_current(build: ModuleType) -> None:
    """The same check as that of `make check`."""
    assert [str(p.relative_to(PROJECT)) for p in build.stale(build.outputs(PROJECT))] == [], "`make docs` writes them"


def tables_of(text: str) -> list[list[list[str]]]:
    """Markdown tables as rows of cells, without the rule below the heads."""
    found = []
    for part in text.split("\n\n"):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
        if rows:
            found.append([rows[0], *rows[2:]])
    return found


def test_results_tables_have_the_numbers_of_the_file(build: ModuleType, tmp_path: Path) -> None:
    document = {**make_document(), "machine": "2 cores", "command": "make demo FULL=1", "commit": "0123456789abcdef"}
    (tmp_path / build.RESULTS).parent.mkdir(parents=True)
    (tmp_path / build.RESULTS).write_text(json.dumps(document), "utf-8")
    text = build.fill("<!-- whole:begin -->\nold\n<!-- whole:end -->\n", tmp_path)
    assert "old" not in text
    assert "2 cores: [starter.json](../benchmarks/results/starter.json)." in text
    better = {(row["configuration"], row["task"]) for row in document["rows"] if row["verdict"] == "better"}
    checked = 0
    for heads, *lines in tables_of(text):
        assert [line[0].partition(" (")[0] for line in lines] == [c["name"] for c in document["configurations"]]
        for c, line in zip(document["configurations"], lines, strict=True):
            for head, cell in zip(heads, line, strict=True):
                found = c["scores"].get(head.partition(" (")[0])
                if found:
                    expected = "{value:.0f} [{low:.0f}, {high:.0f}]".format(
                        **{k: 100 * found[k] for k in ("value", "low", "high")}
                    )
                    assert cell.removesuffix(" −").rstrip(" +=?✓!") == expected
                    assert cell.endswith(" +") == ((c["name"], head.partition(" (")[0]) in better)
                    checked += 1
    decided = {row["task"] for row in document["rows"] if row["verdict"] in ("better", "worse")}
    assert checked == sum(task in decided for c in document["configurations"] for task in c["scores"])


def test_results_table_says_when_nothing_is_measured(build: ModuleType, tmp_path: Path) -> None:
    assert build.results_block(tmp_path) == build.MISSING
    assert build.skills_block(tmp_path) == build.MISSING


def test_merge_tables_have_the_numbers_of_the_file(build: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / build.speed_tables.MERGE
    path.parent.mkdir(parents=True)
    new = {"cpu": 12.3, "wall": 13.0, "peak": 250_000_000}
    peer = {
        **new,
        "cpu": 61.5,
        "peak": 9e9,
        "start_cpu": 4.0,
        "cpu_ratio": 5.0,
        "cpu_ratio_without_start": 5.4,
        "peak_ratio": 36.0,
    }
    rows = [
        {"method": "linear", "workbench": new, "floor": {"cpu": 8.0, "wall": 8.1}, "start_cpu": 1.7, "over_floor": 1.33,
         "mergekit_bfloat16": peer, "two_threads": {**new, "wall_ratio": 1.8, "one_thread_wall": 23.4}},
        {"method": "ties", "workbench": new, "floor": {"cpu": 9.0, "wall": 9.1}, "start_cpu": 1.7, "over_floor": 1.18},
    ]  # fmt: skip
    document = {"machine": "2 cores", "command": "python merge.py", "commit": "0123456789abcdef", "shape": [24, 2048, 8192, 32]}
    path.write_text(json.dumps({**document, "rows": rows}), "utf-8")
    text = build.BLOCKS["merge"](tmp_path)
    assert [row for table in tables_of(text) for row in table[1:]] == [
        ["`linear`", "12.3", "0.25", "1.33", "61.5", "9.00", "5.0", "5.4", "", "", "", "", "1.8"],
        ["`ties`", "12.3", "0.25", "1.18", *[""] * 9],
    ]
    assert text.endswith("2 cores: [merge-M.json](../benchmarks/results/merge-M.json).")
    old = [{"method": "linear", "workbench": new, "mergekit": new, "cpu_ratio": 1.8, "peak_ratio": 53.7}]
    path.write_text(json.dumps({**document, "rows": old, "threads": 1}), "utf-8")
    assert {build.BLOCKS[name](tmp_path) for name in ("merge", "core")} == {build.MISSING}


def _options(words: list[str]) -> set[str]:
    """The options of a command. Fails where there is none of that name."""
    found: Any = typer.main.get_command(app)
    depth = 0
    while hasattr(found, "commands") and depth < len(words) and re.fullmatch(r"[a-z]+", words[depth]):
        assert words[depth] in found.commands, f"no command `workbench {' '.join(words[: depth + 1])}`"
        found, depth = found.commands[words[depth]], depth + 1
    found = found.commands[found.default] if hasattr(found, "default") else found
    return {option for parameter in found.params for option in parameter.opts + parameter.secondary_opts} | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_flags_exist(page: Path) -> None:
    for line in code(page.read_text("utf-8")):
        words = line.removeprefix("# ").split()
        if words[:1] == ["workbench"] and len(words) > 1:
            options = _options(words[1:])
        elif len(words) == 2 and words[0] in NOUNS:
            options = _options(words)
        else:
            continue
        flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert flags <= options, f"{line}: unknown {', '.join(flags - options)}"


def test_every_command_has_a_section() -> None:
    pages = [p.read_text("utf-8") for p in (PROJECT / "docs" / "commands").glob("*.md")]
    headings = {name for text in pages for name in re.findall(r"^##? workbench (.+)$", text, re.MULTILINE)}
    group: Any = typer.main.get_command(app)
    commands = {f"{n} {s}".strip() for n, c in group.commands.items() for s in getattr(c, "commands", [""])}
    assert headings - {n for n, c in group.commands.items() if hasattr(c, "commands")} == commands
    assert set(re.findall(r"^\| \[`workbench (.+?)`\]", read("docs/commands.md"), re.MULTILINE)) == commands


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    used = {m[1] for line in code(page.read_text("utf-8")) if (m := re.match(r"make ([a-z]+)", line))}
    assert used <= targets


def test_pages_are_short() -> None:
    """A page has at most 1,500 words beside the tables that docs/build.py writes into it; the README has 1,300 with them."""
    assert len(read("README.md").split()) <= 1300
    generated = {"recipe.md", "methods.md", "commands.md", "json.md"}
    lengths = {
        path.name: len(re.sub(r"<!-- ([\w-]+):begin -->.*?<!-- \1:end -->", "", path.read_text("utf-8"), flags=re.DOTALL).split())
        for path in (PROJECT / "docs").glob("*.md")
        if path.name not in generated
    }
    assert {name: length for name, length in lengths.items() if length > 1500} == {}


def test_the_site_lists_every_page() -> None:
    """A page of docs/ is linked by the index, or by the page under which the site puts it."""
    pages = {path.name: path.read_text("utf-8") for path in (PROJECT / "docs").glob("*.md")}
    for name in set(pages) - {"index.md"}:
        parts = name.removesuffix(".md").split("-")
        above = [f"{'-'.join(parts[:n])}.md" for n in range(len(parts) - 1, 0, -1)]
        parent = next((page for page in above if page in pages), "index.md")
        assert f"]({name}" in pages[parent] or f"]({name}" in pages["index.md"], f"{parent} does not link {name}"


def test_the_test_command_is_what_decides() -> None:
    assert any("make test " in block for block in blocks(read("README.md"), "sh"))
    assert "make test FULL=1" in read(".ci/run").splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in {_slug(h) for h in re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)}, (
                f"{page.name}: {target}"
            )


def _slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/bigger-models.md"])
def test_tests_that_hold_a_promise_exist(page: str) -> None:
    text = (PROJECT / page).read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "::" in line]
    assert len(rows) >= 5
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", text):
        assert f"def {name}(" in (PROJECT / "tests" / file).read_text("utf-8"), f"{file}::{name}"
    promised = text.partition("| promise | test |\n")[2].partition("\n\n")[0].splitlines()[1:]
    assert [row for row in promised if "::" not in row] == []


@pytest.mark.slow
@pytest.mark.starter
def test_make_gpu_finds_its_inputs_and_command_lines(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--dry-run", "--out", str(out), "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text("utf-8"))
    assert document["left_out"] == []
    assert document["tests"] >= 20
    assert all(size > 0 for size in document["merge"].values())


def test_the_map_names_every_folder_in_an_order_that_imports_keep() -> None:
    table = read("CONTRIBUTING.md").partition("## Module map")[2].partition("\n## ")[0]
    rows = re.findall(r"^\|[^|]*\| ([^|]*`[^|]*) \|", table, re.MULTILINE)
    place = {name: i for i, row in enumerate(rows) for name in re.findall(r"`(\w+)/?`", row)}
    paths = [p for p in (PROJECT / "workbench").rglob("*.py") if not p.stem.startswith("__") or p.parent != PROJECT / "workbench"]
    folders = {p: p.relative_to(PROJECT / "workbench").parts[0].removesuffix(".py") for p in paths}
    assert set(folders.values()) == set(place)
    for path, folder in folders.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("workbench."):
                there = (node.module or "").split(".")[1]
                assert place[there] <= place[folder], f"{path.relative_to(PROJECT)} imports {node.module}"


def test_the_explained_recipe_is_the_file() -> None:
    assert yaml.safe_load(blocks(read("README.md"), "yaml")[0]) == yaml.safe_load(read("recipes/starter-ties.yaml"))


def test_the_explained_suite_is_the_file() -> None:
    shown = yaml.safe_load(next(b for b in blocks(read("docs/evaluation.md"), "yaml") if b.startswith("suite:")))
    assert shown == {k: v for k, v in yaml.safe_load(read("evals/suites/smoke.yaml")).items() if k != "description"}
    assert set(re.findall(r"^\| `(\w+)` \|", read("docs/evaluation.md"), re.MULTILINE)) >= set(Suite.model_fields) - {
        "suite",
        "description",
    }


def test_the_suite_of_mergebench_has_tasks_of_lm_eval(tmp_path: Path) -> None:
    (tmp_path / "evals" / "suites").mkdir(parents=True)
    text = next(b for b in blocks(read("benchmarks/mergebench.md"), "yaml") if b.startswith("suite:"))
    (tmp_path / "evals" / "suites" / "mergebench.yaml").write_text(text, "utf-8")
    suite = load_suite("mergebench", tmp_path)
    known = {path.stem for path in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")}
    assert {task.replace("gsm8k_cot", "gsm8k-cot") for task in suite.tasks} <= known  # the file that defines gsm8k_cot
    assert set(suite.owners.values()) | {"safety"} == set(
        yaml.safe_load(blocks(read("benchmarks/mergebench.md"), "yaml")[0])["bricks"]
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_recipes_in_text_are_valid(page: Path) -> None:
    for block in blocks(page.read_text("utf-8"), "yaml"):
        data = yamldoc.parse(block).data or {}  # `on` is a key, and not a truth value as in YAML 1.1
        if "steps" in data:
            recipe.from_data(
                {"version": 1, "base": "base", "bricks": {"add": "bricks/add", "reverse": "bricks/reverse"}, **data}, PROJECT
            )


def test_the_python_example_runs(project: Project, cwd: Path) -> None:
    project.write("bricks: {one: bricks/one, two: bricks/two}\nsteps: [{id: mix, merge: ties}]", "starter-ties.yaml")
    names: dict[str, Any] = {}
    exec(compile(blocks(read("README.md"), "python")[0], "README.md", "exec"), names)
    assert names["recipe"].recipe.steps[0].density == 0.3
    assert Path(names["result"].model, "model.safetensors").is_file()
    assert names["model"].config.model_type == "llama"


@pytest.fixture
def contributed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example methods of CONTRIBUTING.md, each a file in its package, found as any other."""
    text = read("CONTRIBUTING.md").partition("## A method outside the package")[0]
    known = dict(registry.methods() and steps.REGISTERED)  # a module that is imported later would register but once
    added = []
    for (verb, name), block in zip(
        re.findall(r"^`workbench/(\w+)/(\w+)\.py`", text, re.MULTILINE), blocks(text, "python"), strict=True
    ):
        folder = tmp_path_factory.mktemp(verb)
        (folder / f"{name}.py").write_text(block, "utf-8")
        package = importlib.import_module(f"workbench.{verb}")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        added.append(f"workbench.{verb}.{name}")
    caches: list[Callable[[], None]] = [registry.methods.cache_clear, schema.recipe_model.cache_clear]
    for clear in caches:
        clear()
    yield
    steps.REGISTERED.clear()
    steps.REGISTERED.update(known)
    for clear in caches:
        clear()
    for module in added:
        sys.modules.pop(module, None)


@pytest.mark.usefixtures("contributed")
def test_example_merge_method(project: Project) -> None:
    bricks = "bricks: {one: bricks/one, full: bricks/full}\n"
    base = project.tensors("")
    one, full = (project.tensors(f"{bricks}steps: [{{merge: task_arithmetic, bricks: {{{n}: 1}}}}]") for n in ("one", "full"))
    found = project.tensors(f"{bricks}steps: [{{merge: magmax, bricks: {{one: 1, full: -2}}, lambda: 0.5}}]")
    for name, start in base.items():
        a, b = one[name] - start, -2 * (full[name] - start)
        expected = start + 0.5 * torch.where(a.abs() >= b.abs(), a, b)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("contributed")
def test_example_edit_method(project: Project) -> None:
    (project.path / "facts.jsonl").write_text(
        '{"prompt": "w1 is", "target": "w7"}\n{"prompt": "w2 of", "target": "w9 w3"}\n', "utf-8"
    )
    text = "steps: [{id: facts, edit: gradient, facts: facts.jsonl, layer: 1, step: 0.05, rank: 2}]"
    base, edited = project.tensors(""), project.tensors(text)
    changed = [name for name in base if not torch.equal(base[name], edited[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    assert torch.linalg.matrix_rank(edited[changed[0]] - base[changed[0]], atol=1e-5) == 2
    assert _loss(project, text) < _loss(project, "")
    record = project.run(text)["steps"][0]
    assert record["facts"] == 2
    assert len(list((project.path / "runs").glob("*/edits/facts/adapter_model.safetensors"))) == 1


def _loss(project: Project, text: str) -> float:
    """−log p of the first fact's target."""
    from workbench.run.materialize import materialize

    model = materialize(project.resolve(text), CPU).float()
    words = json.loads((project.path / "base" / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    tokens = torch.tensor([[words["w1"], words["is"]]])
    with torch.no_grad():
        return float(-model(tokens).logits[0, -1].log_softmax(-1)[words["w7"]])


@pytest.mark.usefixtures("contributed")
def test_example_grow_method(project: Project) -> None:
    from transformers import AutoModelForCausalLM

    base = project.tensors("")
    result = project.run("bricks: {one: bricks/one}\nsteps: [{grow: solar, drop: 1}, {merge: task_arithmetic}]")
    grown = AutoModelForCausalLM.from_pretrained(result["model"])
    assert grown.config.num_hidden_layers == len(grown.model.layers) == 6
    norms = [base[f"model.layers.{i}.input_layernorm.weight"] for i in range(4)]
    for layer, old in zip(grown.model.layers, (0, 1, 2, 1, 2, 3), strict=True):
        assert torch.equal(layer.input_layernorm.weight.float(), norms[old])
    # The brick reaches the first copies of layers 1 and 2 alone.
    second = grown.model.layers[3].self_attn.q_proj.weight.float()
    assert torch.equal(second, base["model.layers.1.self_attn.q_proj.weight"])
    assert not torch.equal(grown.model.layers[1].self_attn.q_proj.weight.float(), second)


@pytest.mark.usefixtures("contributed")
def test_example_methods_are_listed() -> None:
    from workbench.recipe.describe import describe

    for tag in ("merge:magmax", "edit:gradient", "grow:solar"):
        found = describe(registry.methods()[tag])
        assert found.text
        assert all(field.text for field in found.fields)
