"""`workbench recipe import` of slices of several models and of files with several documents, beside mergekit's own runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from worlds.commands import call
from worlds.mergekit_runs import EXAMPLES, difference, imported, run_mergekit, run_mergekit_multi
from worlds.tiny import save_finetuned, save_model

from workbench.exchange.mergekit import import_recipe
from workbench.ground.errors import WorkbenchError

CHAIN = """\
name: mixed
merge_method: slerp
base_model: base
models: [{model: base}, {model: one}]
parameters: {t: [0.2, 0.8]}
dtype: float32
---
name: stacked
merge_method: passthrough
slices:
  - sources: [{model: mixed, layer_range: [0, 3]}]
  - sources: [{model: two, layer_range: [2, 4]}]
dtype: float32
---
name: taller
merge_method: passthrough
slices:
  - sources: [{model: two, layer_range: [0, 2]}]
  - sources: [{model: three, layer_range: [1, 4]}]
dtype: float32
---
merge_method: task_arithmetic
base_model: stacked
models: [{model: taller, parameters: {weight: [0.3, 0.9]}}]
parameters: {lambda: 0.5}
dtype: float32
"""
STAGES = """\
merge_method: linear
models: [{model: first, parameters: {weight: 0.5}}, {model: second, parameters: {weight: 0.3}}]
dtype: float32
---
name: first
merge_method: ties
base_model: base
models: [{model: one, parameters: {weight: 1}}, {model: two, parameters: {weight: 0.5}}]
parameters: {density: 0.6}
dtype: float32
---
name: second
merge_method: linear
models: [{model: one, parameters: {weight: 1}}, {model: base+lora, parameters: {weight: 2}}]
dtype: float32
"""


@pytest.mark.parametrize(("text", "recipes"), [(CHAIN, 4), (STAGES, 4)], ids=["chain", "stages"])
def test_files_with_several_documents_equal_mergekit_multi(
    text: str, recipes: int, mergekit_project: Path, tmp_path: Path, in_mergekit_project: None
) -> None:
    """Every document becomes a recipe (and an adapter of another model one more); a document may be the base of another one and have
    another depth."""
    ours, recipe, _ = imported(text, mergekit_project, "multi")
    theirs = run_mergekit_multi(text, tmp_path / "out")
    assert difference(ours, theirs) <= 1e-6, recipe
    assert len(list((mergekit_project / "recipes").glob("multi*.yaml"))) == recipes


@pytest.mark.parametrize("example", ["goliath", "slices_slerp", "slices_linear", "shifted_ties"])
def test_slices_of_untied_models_equal_mergekit(example: str, tmp_path: Path, cwd: Path) -> None:
    """The models have a head of their own, which mergekit takes from the last slice."""
    from worlds.tiny import save_adapter

    (tmp_path / "recipes").mkdir()
    save_model(tmp_path / "base", "llama_untied", dtype=torch.float32)
    for seed, name in enumerate(("one", "two", "three"), 1):
        save_finetuned(tmp_path / "base", tmp_path / name, seed=seed)
    save_adapter(tmp_path / "base", tmp_path / "lora", seed=5)
    save_adapter(tmp_path / "two", tmp_path / "lora-two", seed=6)
    text = EXAMPLES[example].read_text("utf-8")
    ours, recipe, _ = imported(text, tmp_path)
    theirs = run_mergekit(yaml.safe_load(text), tmp_path / "out")
    assert difference(ours, theirs) <= 1e-6, recipe


SCALED = """\
merge_method: passthrough
slices:
  - sources: [{model: one, layer_range: [0, 3], parameters: {scale: [0.5, 1.0]}}]
    parameters: {scale: 7}
  - sources: [{model: two, layer_range: [1, 4]}]
    parameters:
      scale:
        - {filter: down_proj, value: [0.1, 0.9]}
        - {filter: layers.3.self_attn, value: 0.25}
        - {filter: norm.weight, value: 2.0}
parameters: {scale: [{filter: up_proj, value: 3.0}]}
dtype: float32
"""


def test_factors_equal_mergekits_at_every_tensor(mergekit_project: Path, tmp_path: Path, in_mergekit_project: None) -> None:
    """Gradients of factors, filters with layer numbers, filters on the final norm, and values of an outer level."""
    ours, recipe, _ = imported(SCALED, mergekit_project, "scaled-slices")
    theirs = run_mergekit(yaml.safe_load(SCALED), tmp_path / "out")
    assert difference(ours, theirs) <= 1e-7, recipe


def test_one_slice_below_the_base_s_depth(mergekit_project: Path, tmp_path: Path, in_mergekit_project: None) -> None:
    text = """\
merge_method: linear
slices:
  - sources:
      - {model: one, layer_range: [0, 2], parameters: {weight: 0.5}}
      - {model: two, layer_range: [0, 2], parameters: {weight: 0.5}}
dtype: float32
"""
    ours, recipe, _ = imported(text, mergekit_project, "cut")
    assert difference(ours, run_mergekit(yaml.safe_load(text), tmp_path / "out")) <= 1e-6, recipe
    assert "layers: [0, 2]" in recipe


def test_the_recipe_of_goliath_s_pattern(mergekit_project: Path, in_mergekit_project: None) -> None:
    _, recipe, _ = imported(EXAMPLES["goliath"].read_text("utf-8"), mergekit_project, "goliath")
    assert recipe.endswith(
        """\
version: 1
base: one
bricks:
  two: two
steps:
  - grow: stack
    slices:
      - {layers: [0, 2]}
      - {brick: two, layers: [1, 3]}
      - {layers: [2, 3]}
      - {brick: two, layers: [2, 4]}
    norm: two
output: {dtype: float32}
"""
    )


def test_models_that_are_not_local_are_translated_too(tmp_path: Path, cwd: Path) -> None:
    text = (
        EXAMPLES["slices_slerp"]
        .read_text("utf-8")
        .replace("base", "org/base")
        .replace("one", "org/one")
        .replace("two", "org/two")
    )
    (tmp_path / "far.yml").write_text(text.replace("org/base_model", "base_model"), "utf-8")
    recipe = import_recipe(tmp_path / "far.yml", tmp_path / "far.yaml").text
    assert "base: org/base\n" in recipe
    assert "layers: [2, 4]" in recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            CHAIN.replace("base_model: base\n", "base_model: taller\n", 1).replace(
                "model: two, layer_range: [0, 2]", "model: mixed, layer_range: [0, 2]"
            ),
            "documents use each other: mixed -> taller -> mixed",
        ),
        (CHAIN.replace("name: taller", "name: stacked"), "name: two documents are called 'stacked'; mergekit rejects this too"),
        (CHAIN.replace("name: taller\n", ""), "two documents have no name"),
        (
            "merge_method: passthrough\nslices:\n  - sources: [{model: one, layer_range: [0, 2]}]\n  - sources: []\n",
            "4:5 slices.1: expected {sources: [{model:, layer_range:}]} with at least one source",
        ),
        (
            "merge_method: linear\nslices:\n  - sources: [{model: one, layer_range: [0, 2]}, {model: two, layer_range: [1, 4]}]\n",
            "the inputs' layer ranges have different lengths",
        ),
        (
            "merge_method: passthrough\nslices:\n  - sources: [{model: one, layer_range: [0, 2]}, {model: two, layer_range: [1, 3]}]\n",
            "passthrough takes exactly 1 model in a slice, found 2",
        ),
        (
            "merge_method: ties\nbase_model: three\nslices:\n  - sources: [{model: one, layer_range: [1, 2], parameters: {weight: 1}}]\n",
            "the base three is not among the sources; mergekit rejects this too",
        ),
        (
            "merge_method: linear\nslices:\n  - sources: [{model: one, layer_range: [1, 2], parameters: {weight: [{filter: layers.1.mlp, value: 1}, {value: 2}]}}]\n",
            "filter 'layers.1.mlp' names layers by number",
        ),
    ],
)
def test_bad_layers_are_refused_by_field(text: str, message: str, tmp_path: Path, in_mergekit_project: None) -> None:
    (tmp_path / "merge.yml").write_text(text, "utf-8")
    with pytest.raises(WorkbenchError) as caught:
        import_recipe(tmp_path / "merge.yml", tmp_path / "merge.yaml")
    assert message in caught.value.message
    assert caught.value.exit_code == 2


def test_several_documents_need_an_output_file(tmp_path: Path, in_mergekit_project: None) -> None:
    (tmp_path / "merge.yml").write_text(CHAIN, "utf-8")
    with pytest.raises(WorkbenchError, match="the file has 4 documents, which become 4 recipes"):
        import_recipe(tmp_path / "merge.yml")


def test_the_command_writes_all_recipes_and_they_run(mergekit_project: Path, in_mergekit_project: None) -> None:
    (mergekit_project / "chain.yml").write_text(CHAIN, "utf-8")
    written = call("recipe", "import", "chain.yml", "-o", "recipes/chain.yaml")
    assert written.stdout.splitlines()[0] == "recipes/chain.yaml"
    planned = call("plan", "recipes/chain.yaml")
    assert "task_arithmetic of taller 0-4; deltas from stacked 0-4" in planned.stdout
