"""Recipes of every kind of step give the keys, files and scores that they gave when `fixtures/same_bytes.json` was written.

WORKBENCH_WRITE_SAME_BYTES=1 writes that file again: after a change of numbers that is meant, and that a method's `version` says.
Keys and configs are compared wherever torch and transformers are the recorded ones; weights and scores, whose last bits C libraries
and processors decide, on the recorded processor.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from worlds.fact_world import FACTS, TEXT
from worlds.jsonl import write_jsonl
from worlds.places import FIXTURES
from worlds.project import CPU, Project

from workbench.evaluate import score
from workbench.evaluate.lineup import lineup
from workbench.evaluate.plans import plans, suites_of
from workbench.ground.manifest import MANIFEST
from workbench.recipe.recipe import load_recipe
from workbench.run.materialize import configuration_digest, materialize

FILE = FIXTURES / "same_bytes.json"
TELLING = {"run.json", "README.md", "configuration.json", MANIFEST}
LORAS = "bricks: {one: bricks/one, two: bricks/two, three: bricks/three}\n"
MIXED = "bricks: {one: bricks/one, full: bricks/full}\n"
FINETUNE = "{id: taught, edit: finetune, facts: facts.jsonl, form: lora, epochs: 4, layers: [1, 2], rank: 4, learning_rate: 0.01, min_efficacy: 0}"
MEMIT = (
    "{edit: memit, facts: facts.jsonl, layers: [1], position: prompt_last, contexts: 0, statistics: text.txt, tokens_per_input: 4, "
    "steps: 20, unconverged: skip, confidence: 0.02, clamp: 30, min_efficacy: 0}"
)
RECIPES = {
    "average": LORAS + "steps: [{merge: average}]\n",
    "ties": LORAS + "steps: [{merge: ties, density: 0.4, lambda: 0.7}]\n",
    "dare": MIXED + "seed: 3\nsteps: [{merge: dare, density: 0.5}]\n",
    "linear": MIXED + "steps: [{merge: linear, bricks: {one: 0.3, full: 0.7}}]\noutput: {dtype: float16, shard_size: 40kB}\n",
    "chain": MIXED + "steps: [{merge: task_arithmetic, bricks: {one: 1}}, {merge: slerp, bricks: {one: 0.5, full: 0.5}}]\n",
    "core": LORAS + "steps: [{merge: ties, space: core, density: 0.5}]\n",
    "adapter": LORAS + "steps: [{merge: task_arithmetic, lambda: 0.5}]\noutput: {form: adapter, rank: exact}\n",
    "small adapter": LORAS + "steps: [{merge: ties, density: 0.5}]\noutput: {form: adapter, rank: 3, accept_error: 0.7}\n",
    "edit": f"steps: [{FINETUNE}]\n",
    "closed form": f"steps: [{MEMIT}]\n",
    "memory": "steps: [{edit: memory, facts: facts.jsonl, min_efficacy: 0}]\n",
    "codebook": "steps: [{edit: grace, facts: facts.jsonl, min_efficacy: 0}]\n",
    "grow": LORAS + "steps: [{merge: average}, {grow: depth, blocks: 1}, {grow: width, neurons: 160}]\n",
    "experts": "bricks: {one: bricks/one}\nsteps: [{grow: experts, experts: 2}]\n",
    "train": "steps: [{id: skill, grow: brick, data: rows.jsonl, steps: 3, rank: 2, learning_rate: 0.01}]\n",
    "train new": "steps: [{grow: depth, blocks: 1, train: {data: rows.jsonl, steps: 2, learning_rate: 0.01}}]\n",
    "nested": "bricks: {mix: {recipe: recipes/ties.yaml}, one: bricks/one}\nsteps: [{merge: average}]\n",
    "grown tokens": 'steps: [{grow: vocabulary, tokens: ["<a>", "<b>"]}]\n',
}


@pytest.fixture
def world(project: Project, cwd: Path) -> Project:
    """The tiny llama with facts, texts and rows to train on."""
    path = project.path
    write_jsonl(path / "facts.jsonl", FACTS)
    (path / "text.txt").write_text(TEXT * 20)
    rows = [{"prompt": f"w{i} w{i + 1} is", "completion": f"w{i + 2}"} for i in range(8)]
    write_jsonl(path / "rows.jsonl", rows)
    for name, text in RECIPES.items():
        project.write(text, f"{name.replace(' ', '-')}.yaml")
    return project


def test_recipes_give_the_same_keys_and_files(world: Project, same: Callable[[str, Any], None]) -> None:
    for name, text in RECIPES.items():
        document = world.run(text, f"{name.replace(' ', '-')}.yaml")
        assert document["status"] == "done", name
        resolved = world.resolve(text, f"{name.replace(' ', '-')}.yaml")
        same(
            name,
            {
                "key": resolved.key,
                "run_key": resolved.run_key,
                "keys": list(resolved.keys),
                "files": _files(document),
            },
        )


def test_a_vocabulary_block_gives_the_same_keys_and_files(words_project: Project, same: Callable[[str, Any], None]) -> None:
    text = "bricks: {other: other, third: third}\ntokenizer: {source: union}\nsteps: [{merge: average}]\n"
    document, resolved = words_project.run(text), words_project.resolve(text)
    same("vocabulary", {"key": resolved.key, "run_key": resolved.run_key, "files": _files(document)})


def test_a_plan_gives_the_same_key_and_scores(world: Project, same: Callable[[str, Any], None]) -> None:
    world.write(f"steps: [{FINETUNE}]\neval: [{{facts: facts.jsonl, text: text.txt}}]\n", "scored.yaml")
    recipe = load_recipe(world.path / "recipes" / "scored.yaml")
    entries = lineup([recipe])
    (plan,) = plans(entries, suites_of([recipe], (), world.path), batch_size=4, limit=None, device=CPU)
    entry = next(e for e in entries if e.name == "scored")
    digest, _ = configuration_digest(entry.resolved, CPU)
    scores, rows = score(plan, entry.configuration(digest), materialize(entry.resolved, CPU), device="cpu")
    told = scores.model_dump(mode="json", exclude={"seconds", "created", "versions", "check"})
    for task in told["tasks"].values():
        del task["seconds"], task["measured"]
    same("scores", {"document": told, "rows": digest_of(rows)})


@pytest.fixture
def same() -> Callable[[str, Any], None]:
    """Compare a value with the recorded one, or record it."""
    recorded = json.loads(FILE.read_text("utf-8")) if FILE.is_file() else {}
    libraries = {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
    here = {**libraries, "processor": _processor()}

    def check(name: str, value: Any) -> None:
        if os.environ.get("WORKBENCH_WRITE_SAME_BYTES"):
            recorded.setdefault("made_with", here)
            recorded.setdefault("values", {})[name] = value
            FILE.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", "utf-8")
            return
        if libraries.items() - recorded["made_with"].items():
            pytest.skip(f"recorded with {recorded['made_with']}, this is {here}")
        expected = recorded["values"][name]
        assert _everywhere(value) == _everywhere(expected), name
        if here == recorded["made_with"]:
            assert value == expected, name

    return check


def _everywhere(value: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a recorded value and the digests of its configs, which no processor changes."""
    files = {name: digest for name, digest in value.get("files", {}).items() if name.endswith("config.json")}
    return {name: item for name, item in value.items() if "key" in name} | {"files": files}


def _processor() -> str:
    """Return the machine's kind and vendor: kernels of other vendors round sums in another order."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} {names[0] if names else platform.processor()}"


def _files(document: dict[str, Any]) -> dict[str, str]:
    """Digest of every file of a result without those that tell of the run: times, versions, paths."""
    folder = Path(document["model"] or document["adapter"] or document["directory"])
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in TELLING)
    return {p.relative_to(folder).as_posix(): digest_of(p.read_bytes()) for p in files}


def digest_of(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]
