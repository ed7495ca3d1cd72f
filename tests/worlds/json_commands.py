"""One call of every command with `--json` on a tiny project, and a reader of the JSON schemas that docs/ publishes."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worlds.commands import call, is_here, run
from worlds.completions_server import serving
from worlds.dictionaries import random_autoencoder
from worlds.project import Project
from worlds.routing import outside, prompts, write_prompts
from worlds.search_world import RECIPE, lay_out, searched
from worlds.tiny import live

from workbench.models.prompts import load_tokenizer

EDIT = ("{id: facts, edit: memit, facts: facts.jsonl, statistics: texts.jsonl, tokens_per_input: 20, contexts: 0, lambda: 0.001, "
        "layers: [1], position: prompt_last, min_efficacy: 0}")  # fmt: skip
RECIPES = {
    "mix": RECIPE,
    "adapter": "bricks: {one: bricks/one}\nsteps: [{merge: task_arithmetic}]\noutput: {form: adapter}\n",
    "edited": f"steps: [{EDIT}]\n",
    "memory": "steps: [{edit: grace, facts: facts.jsonl}]\n",
    "experts": "bricks: {one: bricks/one}\nsteps: [{grow: experts, experts: 2}]\n",
    "routed": "bricks: {one: bricks/one, two: bricks/two}\nsteps: [{route: ridge, calibration: 'calibration/{brick}.jsonl'}]\n",
    "deep": "steps: [{grow: depth, blocks: 1}]\n",
    "sought": searched("{mix.lambda: [0.2, 1.6], mix.bricks.two: [0, 1]}", ", trials: 4, sampler: random"),
}
SAMPLE = {
    "doc_id": 0, "doc": {"id": "a", "cluster": "c"}, "target": "0", "arguments": {"gen_args_0": {"arg_0": "q", "arg_1": " a"}, "gen_args_1": {"arg_0": "q", "arg_1": " b"}},
    "resps": [[["-1.0", "False"]], [["-2.0", "False"]]], "filtered_resps": [["-1.0", "False"], ["-2.0", "False"]], "filter": "none", "metrics": ["acc"], "acc": 1.0,
}  # fmt: skip


def write_project(project: Project) -> None:
    """Add tasks, facts, texts, sample files, recipes, and a folder of bricks that may be changed."""
    lay_out(project)
    words = random.Random(0)
    rows = [{"id": f"f{i}", "prompt": "{subject} is", "subject": f"w{i} of w{i + 10}", "target": f"w{i + 30}"} for i in range(4)]
    (project.path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    labelled = [
        {
            "prompt": " ".join(f"w{first + words.randrange(20)}" for _ in range(6)),
            "function": name,
            "task": f"{name}-{task}",
            "response": "w1 w2",
        }
        for name, first in (("low", 0), ("high", 30))
        for task in range(4)
        for _ in range(3)
    ]
    (project.path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled), "utf-8")
    texts = [" ".join(f"w{words.randrange(60)}" for _ in range(60)) for _ in range(60)]
    (project.path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    write_prompts(project.path / "calibration", {"one": 0, "two": 1})
    asked = [(text, name) for i, name in enumerate(("one", "two")) for text in prompts(i, count=4, seed=9)]
    asked += [(text, None) for text in outside(count=4)]
    rows = [{"prompt": text, "brick": name} for text, name in asked]
    items = [{"prompt": f"w{i} w{i + 1}", "choices": ["w2", f"w{i + 9}"], "answer": "w2"} for i in range(12)]
    (project.path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items), "utf-8")
    (project.path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (project.path / "samples").mkdir()
    (project.path / "samples" / "samples_pick_2026-01-01T00-00-00.000000.jsonl").write_text(json.dumps(SAMPLE) + "\n", "utf-8")
    linked = project.path / "bricks"
    target = linked.resolve()
    linked.unlink()
    linked.mkdir()
    for brick in target.iterdir():
        (linked / brick.name).symlink_to(brick)
    shutil.copytree(target / "one", linked / "own")
    (linked / "own" / "brick.yaml").write_text("version: 1\nname: own\nkind: adapter\nbase: {id: base}\n", "utf-8")
    for name, text in RECIPES.items():
        project.write(text, f"{name}.yaml")


def call_all(project: Project) -> dict[str, list[Any]]:
    """Call every command with `--json`, and return command -> the documents that it printed. The working directory is the project's."""
    printed: dict[str, list[Any]] = {}

    def document(command: str, *arguments: object, code: int | tuple[int, ...] = 0) -> Any:
        if not is_here(command):
            return None
        result = run(*command.split(), *map(str, arguments), "--json", code=code)
        printed.setdefault(command, []).append(json.loads(result.stdout))
        return printed[command][-1]

    runs: dict[str, Path] = {}
    for name in ("mix", "adapter", "edited", "memory", "experts", "routed", "deep"):
        document("plan", f"recipes/{name}.yaml")
        runs[name] = Path(document("run", f"recipes/{name}.yaml", "--device", "cpu", "--threads", 1)["run"])
        document("runs show", runs[name].name)
    document("plan", "recipes/mix.yaml")
    document("recipe diff", "recipes/mix.yaml", "recipes/adapter.yaml")
    document("runs ls")
    document("eval", "recipes/mix.yaml", "--device", "cpu")
    document("compare", "recipes/mix.yaml", code=(0, 3))
    document("ship", "--baseline", "mix", "--device", "cpu", "--yes")
    document("scores items", "recipes/mix.yaml", "--only", "all")
    document("scores import", "samples", "--name", "outside")
    document("scores ls")
    document("scores pull", ".", "--runs-dir", "elsewhere")
    document("search", "recipes/sought.yaml", "--device", "cpu")
    document("suite ls")
    document("suite show", "words")
    document("suite show", "words", "--base", "base")
    document("suite check", "words", "--base", "base", code=3)
    document("suite new", "more", "--data", "items.jsonl", "--kind", "choice", "--base", "base")
    document("methods")
    document("methods", "ties")
    document("methods", "rome")
    document("brick extract", "bricks/full", "--base", "base", "-o", "bricks/extracted", "--rank", 4)
    document("brick bake", "bricks/one", "-o", "baked")
    rows = [json.loads(line) for line in (project.path / "items.jsonl").read_text("utf-8").splitlines()]
    lines = [json.dumps({**row, "prompt": f"{row['prompt']} of"}) + "\n" for row in rows]
    (project.path / "others.jsonl").write_text("".join(lines), "utf-8")
    texts = ("--texts", "one=items.jsonl", "--texts", "two=others.jsonl")
    document("brick advise", "one", "two", "--base", "base", *texts, "--measure", "--device", "cpu")
    document("brick advise", "one", "--base", "base")
    document("brick barrier", "base", runs["mix"] / "model", "--text", "texts.jsonl")
    document("brick transplant", "bricks/one", "--to", runs["mix"] / "model", "-o", "new", "--texts", "texts.jsonl")
    document("brick transplant", "bricks/one", "--to", runs["mix"] / "model", "-o", "some", "--map", "0:0,1:1")
    document("brick ls")
    document("brick show", "extracted")
    document("brick show", "one", "two", "--base", "base")
    document("brick train", "taught", "--data", "texts.jsonl", "--base", "base", "--steps", 1, "--device", "cpu")
    document("facts check", "facts.jsonl", code=(0, 3))
    document("facts import", "facts.jsonl")
    document(
        "edit rebase",
        os.path.relpath(runs["edited"] / "edits" / "facts"),
        "--onto",
        "recipes/mix.yaml",
        "-o",
        "rebased",
        "--set",
        "min_efficacy=0",
    )
    document("edit trace", "base", "facts.jsonl", "-n", 2)
    document("memory ls", runs["memory"])
    call("memory", "feedback", str(runs["memory"]), "f0", "--reward", "1")
    document("memory log", runs["memory"])
    call_routes(runs["routed"], document)
    document("analyze", "base", "--facts", "facts.jsonl", "-n", 2)
    call_analyses(project, document)
    document("experts", runs["experts"].name, "--texts", "texts.jsonl", "--samples", 4)
    document("push", runs["mix"].name, "org/mix", "--dry-run", "--yes")
    exported = document(
        "export write", runs["adapter"].name, "--for", "vllm", "--served-base", "org/base", "-o", "served", "--tokens", 2
    )
    if exported:
        with serving(served(project, exported), load_tokenizer(project.path / "base")) as url:
            document("export check", url, "--expected", "served")
    document("open", runs["adapter"].name)
    document("doctor", code=(0, 3))
    return printed


def call_routes(routed: Path, document: Callable[..., Any]) -> None:
    """Call the commands that ask and change a router."""
    document("route explain", routed, "w8 w9 w10")
    document("route check", routed, "--prompts", "asked.jsonl")
    document("route add", routed, "again=one", "--calibration", "calibration/two.jsonl", "--device", "cpu")
    document("route ls", routed)
    document("route rm", routed, "again")
    document("route measure", "own", "--calibration", "asked.jsonl", "--device", "cpu")


def call_analyses(project: Project, document: Callable[..., Any]) -> None:
    """Call the commands that analyze neurons of texts with labels."""
    document("analyze", "base", "--data", "labelled.jsonl")
    random_autoencoder(
        project.path / "sae", json.loads((project.path / "base" / "config.json").read_text("utf-8"))["hidden_size"]
    )
    parts = ("--sparsity", "--partition", "cmoe", "--experts", 4, "--shared", 1, "--neuron", "0.1", "--dictionary", "sae")
    document("analyze", "base", "--data", "labelled.jsonl", *parts)


def served(project: Project, exported: Any) -> dict[str, Any]:
    """Return the models of an export, as its server has them."""
    from peft import PeftModel

    models = {exported["served_base"]: live(project.path / "base")}
    for name, adapter in exported["adapters"].items():
        models[name] = PeftModel.from_pretrained(live(project.path / "base"), project.path / "served" / adapter["path"]).eval()
    return models


def paths_of(value: Any, at: str = "") -> set[str]:
    """Return the paths of all keys: `[]` stands for an entry of a list, `*` for the name of a tensor, digest or file.

    Keys that depend on the machine are left out: compilers and caches.
    """
    if at.endswith((".backend", ".checks[].data")):
        return set()
    if isinstance(value, dict):
        named = {key: "*" if "." in key or "/" in key or len(key) > 30 else key for key in value}
        return {path for key, inner in value.items() for path in (f"{at}.{named[key]}", *paths_of(inner, f"{at}.{named[key]}"))}
    if isinstance(value, list):
        return {path for inner in value for path in paths_of(inner, f"{at}[]")}
    return set()


def problems(value: Any, part: dict[str, Any], root: dict[str, Any], at: str = "") -> list[str]:
    """Return where a value differs from a JSON schema. Knows the keywords that pydantic writes, and fails on others."""
    known = {"$schema", "$defs", "title", "description", "type", "properties", "required", "additionalProperties", "items", "prefixItems",
             "minItems", "maxItems", "minimum", "exclusiveMinimum", "anyOf", "enum", "const", "$ref"}  # fmt: skip
    assert part.keys() <= known, part.keys() - known
    if "$ref" in part:
        return problems(value, root["$defs"][part["$ref"].removeprefix("#/$defs/")], root, at)
    if "anyOf" in part:
        each = [problems(value, option, root, at) for option in part["anyOf"]]
        return [] if [] in each else min(each, key=len)
    if "const" in part or "enum" in part:
        allowed = part.get("enum", [part.get("const")])
        return [] if value in allowed and type(value) in map(type, allowed) else [f"{at}: {value!r} is none of {allowed}"]
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    kind = part.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))):
        return [f"{at}: expected {kind}, found {value!r:.60}"]
    if "minimum" in part and value < part["minimum"]:
        return [f"{at}: {value!r} is below {part['minimum']}"]
    if "exclusiveMinimum" in part and value <= part["exclusiveMinimum"]:
        return [f"{at}: {value!r} is not above {part['exclusiveMinimum']}"]
    if kind == "object":
        return _of_object(value, part, root, at)
    if kind == "array":
        first = part.get("prefixItems", [])
        if not part.get("minItems", 0) <= len(value) <= part.get("maxItems", len(value)):
            return [f"{at}: {len(value)} items"]
        pairs = [*zip(value, first, strict=False), *((inner, part["items"]) for inner in value[len(first) :] if "items" in part)]
        return [text for i, (inner, schema) in enumerate(pairs) for text in problems(inner, schema, root, f"{at}[{i}]")]
    return []


def _of_object(value: dict[str, Any], part: dict[str, Any], root: dict[str, Any], at: str) -> list[str]:
    found = [f"{at}: lacks {key}" for key in part.get("required", ()) if key not in value]
    more = part.get("additionalProperties", True)
    for key, inner in value.items():
        schema = part.get("properties", {}).get(key, more)
        if schema is False:
            found.append(f"{at}: has {key}")
        elif schema is not True:
            found += problems(inner, schema, root, f"{at}.{key}")
    return found
