"""Every folder of stored results: which part of a model's identity gives another key, and which does not."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from worlds.fact_world import FACTS, TEXT
from worlds.jsonl import write_jsonl
from worlds.places import PROJECT
from worlds.project import CPU, Project
from worlds.routed_models import write_calibration
from worlds.tiny import edit_json, tensors_of

from workbench.evaluate.lineup import lineup
from workbench.evaluate.plans import plans, suites_of
from workbench.models import identity
from workbench.recipe.recipe import load_recipe

_TABLE = runpy.run_path(str(PROJECT / "docs" / "stores.py"))
PARTS, RUNS, STORES = _TABLE["PARTS"], _TABLE["RUNS"], _TABLE["STORES"]
MEMIT = "edit: memit, facts: facts.jsonl, position: prompt_last, contexts: 0, statistics: text.txt, tokens_per_input: 4, steps: 3, unconverged: skip, confidence: 0.02, clamp: 30, min_efficacy: 0"
ROUTE = "route: text, samples: 16, bricks: {both: {calibration: calibration/one.jsonl}, three: {calibration: calibration/three.jsonl}}"
PAIR = "name: pair\nbricks: {one: bricks/one, two: bricks/two}\nsteps: [{merge: task_arithmetic, lambda: 0.5}]\noutput: {form: adapter}\n"
LORAS = "bricks: {one: bricks/one, two: bricks/two}\n"
ROWS = "data: rows.jsonl, steps: 2, learning_rate: 0.01"
# Recipes that fill folders, and the folders that they fill. `dtype` is the output's.
RECIPES: dict[str, tuple[str, str]] = {
    "memit": (f"steps: [{{{MEMIT}, layers: auto}}]\n", "edits moments values sweeps said configurations"),
    "codebook": ("steps: [{edit: grace, facts: facts.jsonl, min_efficacy: 0}]\n", "memories grace"),
    "train": (f"steps: [{{id: skill, grow: brick, rank: 2, {ROWS}}}]\n", "bricks"),
    "grown": (f"steps: [{{grow: depth, blocks: 1, train: {{{ROWS}}}}}]\n", "grown growth"),
    "route": (
        f"bricks: {{both: {{recipe: recipes/pair.yaml}}, three: bricks/three}}\nsteps: [{{{ROUTE}}}]\n",
        "routers adapters",
    ),
    "regmean": (LORAS + "steps: [{merge: regmean, calibration: all.jsonl}]\n", "grams"),
    "null_space": (LORAS + "steps: [{merge: null_space, calibration: all.jsonl, tokens: [w], keep: one}]\n", "inputs"),
    "fisher": (LORAS + "steps: [{merge: fisher, calibration: all.jsonl, samples: 4}]\n", "fisher"),
    "aim": (LORAS + "steps: [{merge: aim, calibration: all.jsonl}]\n", "magnitudes"),
    "featcal": (LORAS + "steps: [{merge: featcal, calibration: all.jsonl}]\n", "forward"),
    "cocktail": (LORAS + "steps: [{merge: cocktail, examples: all.jsonl}]\n", "losses"),
    "gates": (
        LORAS
        + "steps: [{grow: experts, check: off, gate: ridge, bricks: {one: {calibration: one.jsonl}, two: {calibration: two.jsonl}}, calibration: all.jsonl, top_k: 1}]\n",
        "gates",
    ),
    "fuse": (
        f"bricks: {{full: bricks/full}}\nsteps: [{{fuse: mince, weight: 0.5, teachers: [full], batch_size: 4, {ROWS}}}]\n",
        "teachers lessons",
    ),
}
"""Folders whose keys other tests hold: they are named after files and hub commits, or are shared with `scores`."""
ELSEWHERE = {"digests", "gguf", "hub", "tasks", "search", "neurons", "tokenizers", "combinations"}


@pytest.fixture
def world(project: Project) -> Project:
    """The tiny llama as files of the project's own, with all that the recipes read."""
    path = project.path
    source = (path / "base").resolve()
    (path / "base").unlink()
    shutil.copytree(source, path / "base")
    write_jsonl(path / "facts.jsonl", FACTS)
    (path / "text.txt").write_text(TEXT * 20)
    write_jsonl(path / "rows.jsonl", [{"prompt": f"w{i} w{i + 1} is", "completion": f"w{i + 2}"} for i in range(8)])
    for name, start in (("all", 0), ("one", 20), ("two", 40)):
        write_jsonl(
            path / f"{name}.jsonl",
            [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3}"} for i in range(start, start + 12)],
        )
    write_calibration(path)
    return project


def fill(world: Project, dtype: str = "float32") -> dict[str, set[str]]:
    """Run every recipe, and return folder -> names of its entries."""
    world.write(PAIR, "pair.yaml")
    for name, (text, _) in RECIPES.items():
        world.run(f"{text}output: {{dtype: {dtype}}}\n", f"{name}.yaml")
    world.write(
        f"steps: [{{{MEMIT}, layers: [1]}}]\neval: [{{facts: facts.jsonl, text: text.txt}}]\noutput: {{dtype: {dtype}}}\n",
        "scored.yaml",
    )
    recipe = load_recipe(world.path / "recipes" / "scored.yaml")
    plans(lineup([recipe]), suites_of([recipe], (), world.path), batch_size=4, limit=None, device=CPU)
    cache = world.path / ".workbench"
    # The memo of configurations has one file a recipe, with an entry a device: the entries are what is compared.
    entries = {
        folder: {path.name for path in (cache / folder).iterdir() if not path.name.startswith(".")}
        for folder in STORES
        if (cache / folder).is_dir()
    }
    memo = {file: json.loads(file.read_text()) for file in (cache / "configurations").iterdir()}
    entries["configurations"] = {
        f"{file.stem}-{kind}-{row['libraries']}" for file, rows in memo.items() for kind, row in rows.items() if kind != "xxh3"
    }
    return entries | {"runs": {path.name for path in (world.path / "runs").iterdir()}}


def changed(part: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Change one part of the base; return the output's dtype."""
    if part == "tensors":
        tensors = tensors_of(base)
        tensors["model.layers.3.input_layernorm.weight"][0] += 0.0625
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    elif part == "config":
        edit_json(base / "config.json", rope_theta=100.0)
    elif part == "tokens":
        edit_json(base / "tokenizer.json", normalizer={"type": "Lowercase"})
    elif part == "template":
        (base / "chat_template.jinja").write_text("{% for m in messages %}w1 {{ m['content'] }} w2{% endfor %}")
    elif part == "generation":
        edit_json(base / "generation_config.json", repetition_penalty=1.5)
    elif part == "device":
        monkeypatch.setattr(identity, "_libraries", lambda: {"torch": "another"})
    return "bfloat16" if part == "dtype" else "float32"


@pytest.mark.nightly
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.part("fuse")
def test_a_part_changes_the_keys_that_depend_on_it(part: str, world: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no others, so that nothing is computed again without need."""
    before = fill(world)
    dtype = changed(part, world.path / "base", monkeypatch)
    if part == "device":
        shutil.rmtree(world.path / "runs")  # which would be reused: their record names device and libraries
    after = fill(world, dtype)
    filled = {folder for _, folders in RECIPES.values() for folder in folders.split()} | {"factsuites", "runs"}
    assert filled == (STORES.keys() | {"runs"}) - ELSEWHERE, "folders without a recipe, or gone"
    wrong = []
    for folder in sorted(filled):
        store = RUNS if folder == "runs" else STORES[folder]
        new = after[folder] - before[folder]
        sys.stdout.write(f"{folder:16} {part:10} {'another key' if new else 'does not depend'}\n")
        if bool(new) != (part in store.parts.split()):
            wrong.append(
                f"{folder}: {part} gives {'new keys' if new else 'the same keys'}, but it depends on {store.parts}: {store.without}"
            )
    assert not wrong, "\n".join(wrong)


@pytest.mark.part("fuse", "neurons", "search")
def test_every_folder_of_the_cache_is_listed() -> None:
    pattern = r'cache(?:_of\([\w.]+\))? / "(\w+)"|context\.place\("(\w+)"|place_of\(resolved, "(\w+)"'
    texts = (path.read_text("utf-8") for path in (PROJECT / "workbench").rglob("*.py"))
    named = {name for text in texts for groups in re.findall(pattern, text) for name in groups if name}
    assert named == STORES.keys()
    assert all(set(store.parts.split()) <= set(PARTS) for store in STORES.values())
