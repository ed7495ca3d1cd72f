"""Merges of checkpoints without torch: the same bytes and records as with it, and no import of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from worlds.arrays import check_apart, check_same, lay_out, written
from worlds.packed_models import save_fp8
from worlds.project import CPU, Project
from worlds.tiny import edit_json, save_finetuned, save_model

from workbench.ground.errors import WorkbenchError
from workbench.run import device as run_device
from workbench.run.device import device_of_run, needs_no_torch
from workbench.weights.kernels import Backend, backend
from workbench.weights.specs import NUMPY

needs_compiler = pytest.mark.skipif(backend().library is None, reason="no C compiler")

BRICKS = "bricks: {a: a, b: b, c: c}\n"
PAIR = "bricks: {a: a, b: b}\n"
STEPS = {
    "linear": BRICKS + "steps: [{merge: linear, bricks: {a: 0.3, b: 1.1, c: -0.2}}]\n",
    "linear, not normalized": BRICKS + "steps: [{merge: linear, normalize: false, bricks: {a: 0.3, b: 1.1, c: -0.2}}]\n",
    "average": BRICKS + "steps: [{merge: average}]\n",
    "average of some layers": BRICKS + "steps: [{merge: average, where: {layers: '1:3', exclude: ['*.mlp.*']}}]\n",
    "task arithmetic": BRICKS + "steps: [{merge: task_arithmetic, bricks: {a: 0.3, b: -0.7, c: 1.3}, lambda: 0.9}]\n",
    "lambda over depth": BRICKS + "steps: [{merge: task_arithmetic, lambda: {first: 0.1, last: 1.7}}]\n",
    "weights by rules": PAIR
    + "steps: [{merge: task_arithmetic, bricks: {a: [{where: {include: ['*.mlp.*']}, value: 0.4}], b: {knots: [0, 1, 0.5]}}}]\n",
    "ties": BRICKS + "steps: [{merge: ties}]\n",
    "ties, densities": BRICKS
    + "steps: [{merge: ties, density: 0.4, lambda: 1.3, bricks: {a: {density: 0.05}, b: 0.8, c: {density: 1}}}]\n",
    "ties as in mergekit": BRICKS + "steps: [{merge: ties, density: {first: 0, last: 0.9}, weigh: before, divide: weight}]\n",
    "ties by frequency": BRICKS + "steps: [{merge: ties, sign: frequency, density: 0.7}]\n",
    "dare": BRICKS
    + "seed: 7\nsteps: [{merge: dare, density: 0.3, bricks: {a: 0.5, b: {weight: -1, density: 0.9}, c: {density: 0}}}]\n",
    "dare, l1, elected": BRICKS + "steps: [{merge: dare, rescale: l1, then: ties, lambda: 0.7}]\n",
    "dare without scales": PAIR + "steps: [{merge: dare, rescale: none, density: {first: 0.2, last: 1}}]\n",
    "slerp": PAIR + "steps: [{merge: slerp}]\n",
    "slerp over depth": PAIR
    + "steps: [{merge: slerp, parallel: 1, bricks: {a: {first: 1, last: 0.2}, b: {first: 0, last: 0.8}}}]\n",
    "one after the other": BRICKS
    + "steps: [{merge: ties, bricks: [a, b]}, {id: x, merge: linear, bricks: [c], where: {layers: '2:'}}, {merge: dare, bricks: [b]}]\n",
    "no step": "steps: []\n",
}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory, model_of: Callable[..., Path]) -> Callable[..., Project]:
    """(family, dtype of the base, dtype of the bricks) -> project, made when first asked for."""
    made: dict[tuple[str, ...], Project] = {}

    def get(family: str = "llama", base: str = "bf16", tuned: str | None = None) -> Project:
        key = (family, base, tuned or base)
        if key not in made:
            folder = tmp_path_factory.mktemp("arrays") / "-".join(key)
            made[key] = lay_out(folder, model_of(family), DTYPES[base], DTYPES[tuned or base])
        return made[key]

    return get


@needs_compiler
@pytest.mark.parametrize("name", STEPS)
def test_the_files_and_the_record_are_those_of_torch(worlds: Callable[..., Project], name: str) -> None:
    """Every method with its fields, on bf16 checkpoints with tied embeddings."""
    files = check_same(worlds(), STEPS[name])
    tensor = "model.layers.2.self_attn.q_proj.weight"
    unchanged = load_file(worlds().path / "base" / "model.safetensors")[tensor]
    assert torch.equal(load(files["model.safetensors"])[tensor], unchanged) is (name == "no step")


@needs_compiler
@pytest.mark.parametrize(
    ("base", "tuned", "out"),
    [("f32", "f32", None), ("f32", "f32", "bfloat16"), ("f16", "bf16", "float32"), ("bf16", "f32", "float16")],
)
def test_all_dtypes_of_inputs_and_output(worlds: Callable[..., Project], base: str, tuned: str, out: str | None) -> None:
    """Inputs of one dtype and of two, rounded to each dtype."""
    output = f"output: {{dtype: {out}}}\n" if out else ""
    for name in ("linear", "ties", "dare, l1, elected", "slerp over depth"):
        check_same(worlds(base=base, tuned=tuned), STEPS[name] + output)


@needs_compiler
@pytest.mark.parametrize("family", ["llama_untied", "gpt2"])
def test_layouts_of_other_families(worlds: Callable[..., Project], family: str) -> None:
    """A head of its own, weights stored as [in, out], fused attention; in several files and threads."""
    for name in ("ties, densities", "one after the other"):
        files = check_same(worlds(family), STEPS[name] + "output: {shard_size: 100KB}\n")
        assert len([name for name in files if name.endswith(".safetensors")]) > 2


@needs_compiler
def test_sharded_bricks_and_a_head_that_the_base_has_untied(worlds: Callable[..., Project], tmp_path: Path) -> None:
    """Brick a lies in two files; b ties its head, which the base does not."""
    project = Project(shutil.copytree(worlds("llama_untied").path, tmp_path / "project"))
    tensors = load_file(project.path / "a" / "model.safetensors")
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, project.path / "a" / file, metadata={"format": "pt"})
    (project.path / "a" / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, some in parts.items() for name in some}}
    (project.path / "a" / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    tied = load_file(project.path / "b" / "model.safetensors")
    del tied["lm_head.weight"]
    save_file(tied, project.path / "b" / "model.safetensors", metadata={"format": "pt"})
    edit_json(project.path / "b" / "config.json", tie_word_embeddings=True)
    for name in ("linear", "ties", "slerp"):
        check_same(project, STEPS[name])


@needs_compiler
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_errors_name_the_same_element(worlds: Callable[..., Project], tmp_path: Path, number: float) -> None:
    """A value that is not finite in a brick, of a tensor with three dimensions and of a wide one."""
    project = Project(shutil.copytree(worlds().path, tmp_path / "project"))
    tensor, place = ("extra.wide", (690, 17)) if number == float("inf") else ("extra.table", (1, 2, 3))
    tensors = load_file(worlds().path / "b" / "model.safetensors")
    tensors[tensor][place] = number
    save_file(tensors, project.path / "b" / "model.safetensors", metadata={"format": "pt"})
    for name in ("linear", "ties", "dare, l1, elected", "slerp"):
        errors = []
        for device in (CPU, NUMPY):
            with pytest.raises(WorkbenchError) as error:
                written(project, STEPS[name], device)
            errors.append((error.value.message, error.value.hint))
        assert errors[0] == errors[1]
        assert f"brick 'b': {tensor} holds" in errors[0][0]
        assert str(list(place)) in errors[0][0]


@needs_compiler
def test_a_result_that_is_not_finite_in_its_dtype_is_the_same_error(worlds: Callable[..., Project]) -> None:
    """A sum beyond the largest float16."""
    text = BRICKS + "steps: [{merge: task_arithmetic, lambda: 1e7}]\noutput: {dtype: float16}\n"
    errors = []
    for device in (CPU, NUMPY):
        with pytest.raises(WorkbenchError, match="the result is not finite in F16") as error:
            written(worlds(), text, device, threads=1)
        errors.append((error.value.message, error.value.hint))
    assert errors[0] == errors[1]


@needs_compiler
def test_an_interrupted_write_of_tensors_goes_on_with_arrays(worlds: Callable[..., Project], tmp_path: Path) -> None:
    """Tensors that torch has written count, and the file is whole."""
    from workbench.run.compose import compose
    from workbench.weights.writer import write_checkpoint

    resolved = worlds().resolve(STEPS["ties"])
    out = tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done > total / 3:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"dtype": None, "shard_size": 1 << 40, "threads": 1}
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(compose(resolved, CPU).model.weights, out, device=CPU, progress=stop, **settings)
    complete = len((out / "journal.jsonl").read_text("utf-8").splitlines()) - 1
    assert 0 < complete < len(resolved.base.weights.specs)
    calls: list[int] = []
    write_checkpoint(
        compose(resolved, NUMPY).model.weights, out, device=NUMPY, progress=lambda done, _: calls.append(done), **settings
    )
    assert len(calls) == len(resolved.base.weights.specs) - complete
    assert (out / "model.safetensors").read_bytes() == written(worlds(), STEPS["ties"], CPU)[0]["model.safetensors"]


OTHERS = {
    "weights from the overlap": BRICKS + "steps: [{merge: task_arithmetic, weights: auto}]\n",
    "one threshold of the model": BRICKS + "steps: [{merge: ties, threshold: model}]\n",
    "another method": BRICKS + "steps: [{merge: tsv}]\n",
    "a recipe": "bricks: {a: a, r: {recipe: recipes/inner.yaml}}\nsteps: [{merge: linear}]\n",
    "an adapter as result": PAIR + "steps: [{merge: task_arithmetic}]\noutput: {form: adapter, rank: 2}\n",
    "more tokens": PAIR + "tokenizer: {source: base, pad_to_multiple_of: 16}\nsteps: [{merge: linear}]\n",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_recipes_take_torch(worlds: Callable[..., Project], bricks: Path, tmp_path: Path, name: str) -> None:
    """A recipe of which one loop is not compiled."""
    project = worlds()
    if not (project.path / "bricks").exists():
        (project.path / "bricks").symlink_to(bricks)
    project.write(PAIR + "steps: [{merge: linear}]\n", "inner.yaml")
    try:
        resolved = project.resolve(OTHERS[name])
    except WorkbenchError as error:
        pytest.fail(f"{error.message} {error.hint}")
    assert not needs_no_torch(resolved)
    assert device_of_run("cpu", resolved) == CPU


def test_float64_takes_torch(worlds: Callable[..., Project]) -> None:
    """No loop is compiled for it."""
    resolved = worlds(tuned="f64").resolve(STEPS["linear"])
    assert not needs_no_torch(resolved)


@pytest.mark.parametrize("packed", ["base", "one"])
def test_weights_of_8_bits_take_torch(tmp_path: Path, packed: str) -> None:
    """No loop is compiled that computes their numbers, whichever input has them."""
    (tmp_path / "recipes").mkdir()
    base = save_model(tmp_path / "base", "llama_untied", layers=2)
    save_finetuned(base, tmp_path / "one", seed=1)
    recipe = "bricks: {one: one}\nsteps: [{merge: linear}]\n"
    assert needs_no_torch(Project(tmp_path).resolve(recipe))
    save_fp8(tmp_path / packed, "tensor")
    resolved = Project(tmp_path).resolve(recipe)
    assert not needs_no_torch(resolved)
    assert device_of_run("cpu", resolved) == CPU


def test_the_device_of_a_run(worlds: Callable[..., Project], monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays on the CPU only, and only with compiled loops."""
    resolved = worlds().resolve(STEPS["linear"])
    if backend().library is not None:
        assert device_of_run("cpu", resolved) is NUMPY
    monkeypatch.setattr(run_device, "has_cuda", lambda: True)
    monkeypatch.setattr(run_device, "pick_device", lambda name: name)
    assert device_of_run("auto", resolved) == "auto"
    assert device_of_run("cuda:1", resolved) == "cuda:1"
    monkeypatch.setattr(run_device, "backend", lambda: Backend("torch", "no C compiler"))
    assert device_of_run("cpu", resolved) == "cpu"


ALL = (
    BRICKS + "steps: [{merge: average}, {merge: linear}, {merge: task_arithmetic}, {merge: ties}, {merge: dare, rescale: l1}, "
    "{merge: slerp, bricks: {a: 0.3, b: 0.7}}]\n"
)


@needs_compiler
def test_a_run_works_where_torch_cannot_be_imported(worlds: Callable[..., Project]) -> None:
    """The whole command with all six methods, in a process in which an import of torch fails."""
    check_apart(worlds(), ALL)
