"""Merges of LoRA adapters without torch: the same bytes, records and errors as with it, and no import of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from worlds.arrays import WIDE, check_apart, check_same, lay_out, written
from worlds.project import CPU, Project
from worlds.tiny import edit_json, save_adapter

from workbench.ground.errors import WorkbenchError
from workbench.merge.streaming import trim
from workbench.run.device import device_of_run, needs_no_torch
from workbench.weights.kernels import backend
from workbench.weights.specs import NUMPY

needs_compiler = pytest.mark.skipif(backend().library is None, reason="no C compiler")

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Name -> settings of PEFT; those of one family in its own test.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "target_modules": EVERY},
    "rslora": {"use_rslora": True},
    "patterns": {
        "target_modules": EVERY,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 16},
        "alpha_pattern": {"v_proj": 3, "layers.2.self_attn.o_proj": 20},
    },
    "embeddings": {"r": 3, "target_modules": ["embed_tokens", "up_proj"]},
}
NAMES = "bricks: {l: plain, r: rslora, p: patterns, e: embeddings}\n"
MIXED = "bricks: {a: a, l: plain, p: patterns}\n"
PAIR = "bricks: {a: a, l: plain}\n"
STEPS = {
    "linear": NAMES + "steps: [{merge: linear, bricks: {l: 0.3, r: 1.1, p: -0.2, e: 2}}]\n",
    "linear, not normalized": MIXED + "steps: [{merge: linear, normalize: false, bricks: {a: 0.3, l: 1.1, p: -0.2}}]\n",
    "average": NAMES + "steps: [{merge: average}]\n",
    "average with a checkpoint": MIXED + "steps: [{merge: average, where: {layers: '1:3'}}]\n",
    "task arithmetic": NAMES + "steps: [{merge: task_arithmetic, bricks: {l: 0.3, r: -0.7, p: 1.3, e: 1}, lambda: 0.9}]\n",
    "task arithmetic with a checkpoint": MIXED + "steps: [{merge: task_arithmetic, lambda: {first: 0.1, last: 1.7}}]\n",
    "ties": NAMES + "steps: [{merge: ties}]\n",
    "ties with a checkpoint": MIXED
    + "steps: [{merge: ties, density: 0.4, lambda: 1.3, weigh: before, divide: weight, bricks: {a: {density: 0.05}, l: 0.8, p: 1}}]\n",
    "dare": NAMES
    + "seed: 7\nsteps: [{merge: dare, density: 0.3, bricks: {l: 0.5, r: {weight: -1, density: 0.9}, p: 1, e: 1}}]\n",
    "dare, l1, elected": MIXED + "steps: [{merge: dare, rescale: l1, then: ties, lambda: 0.7}]\n",
    "slerp": PAIR + "steps: [{merge: slerp}]\n",
    "slerp of two adapters": "bricks: {l: plain, r: rslora}\nsteps: [{merge: slerp, bricks: {l: 0.2, r: 0.8}}]\n",
    "one after the other": MIXED
    + "steps: [{merge: ties, bricks: [l, p]}, {merge: task_arithmetic, bricks: {l: -0.5}}, {merge: dare, bricks: [a]}]\n",
}
QUICK = ("average", "ties with a checkpoint", "dare, l1, elected", "slerp")


def with_adapters(folder: Path, base: Path, dtype: torch.dtype, family: str = "llama") -> Project:
    """Make the project of `lay_out`, and adapters of the kinds above in float32, bfloat16 and float16."""
    project = lay_out(folder, base, dtype)
    for seed, (name, settings) in enumerate(KINDS.items(), 1):
        own = settings if family == "llama" else {k: v for k, v in settings.items() if k in ("r", "use_rslora")}
        out = save_adapter(base, folder / name, seed=seed, family=family, **own)
        stored = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
        tensors = {key: tensor.to(stored) for key, tensor in load_file(out / "adapter_model.safetensors").items()}
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return project


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory, model_of: Callable[..., Path]) -> Callable[..., Project]:
    """(family, dtype of the base) -> project, made when first asked for."""
    made: dict[tuple[str, torch.dtype], Project] = {}

    def get(family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Project:
        if (family, dtype) not in made:
            folder = tmp_path_factory.mktemp("adapters") / "project"
            made[family, dtype] = with_adapters(folder, model_of(family), dtype, family)
        return made[family, dtype]

    return get


@pytest.fixture
def copied(worlds: Callable[..., Project], tmp_path: Path) -> Project:
    """A copy of the project that a test may change."""
    return Project(shutil.copytree(worlds().path, tmp_path / "project", ignore=shutil.ignore_patterns("runs", ".workbench")))


@needs_compiler
@pytest.mark.parametrize("name", STEPS)
def test_the_files_and_the_record_are_those_of_torch(worlds: Callable[..., Project], name: str) -> None:
    """Every method, on every kind of adapter and on mixtures of adapters and checkpoints."""
    files = check_same(worlds(), STEPS[name])
    tensor = "model.layers.2.self_attn.q_proj.weight"
    unchanged = load_file(worlds().path / "base" / "model.safetensors")[tensor]
    assert not torch.equal(load(files["model.safetensors"])[tensor], unchanged)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtypes_of_the_base(worlds: Callable[..., Project], dtype: torch.dtype) -> None:
    """Bases in float32 and float16."""
    for name in QUICK:
        check_same(worlds(dtype=dtype), STEPS[name])


@needs_compiler
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_layouts_of_other_families(worlds: Callable[..., Project], family: str) -> None:
    """Weights stored as [in, out], for which PEFT sets `fan_in_fan_out`, and fused attention; layers with biases."""
    for name in QUICK:
        check_same(worlds(family), STEPS[name])


def reference(project: Path, name: str, tensor: str) -> torch.Tensor:
    """An adapter's update of a linear layer from its files, in float64."""
    config = json.loads((project / name / "adapter_config.json").read_text("utf-8"))
    tensors = load_file(project / name / "adapter_model.safetensors")
    module = tensor.removesuffix(".weight")
    a, b = (tensors[f"base_model.model.{module}.lora_{letter}.weight"].double() for letter in "AB")
    alpha = next((v for k, v in config["alpha_pattern"].items() if module.endswith(k)), config["lora_alpha"])
    product: torch.Tensor = b @ a
    return product * (alpha / len(a) ** (0.5 if config["use_rslora"] else 1))


@needs_compiler
def test_the_numbers_are_those_of_float64(worlds: Callable[..., Project]) -> None:
    """The sum of three kinds of adapters and a checkpoint, with patterns of rank and alpha, beside a direct computation."""
    project = worlds(dtype=torch.float32)
    text = "bricks: {a: a, l: plain, r: rslora, p: patterns}\nsteps: [{merge: task_arithmetic, bricks: {a: 0.5, l: 2, r: -1, p: 3}}]\n"
    result = load(written(project, text, NUMPY)[0]["model.safetensors"])
    base, tuned = (load_file(project.path / name / "model.safetensors") for name in ("base", "a"))
    for tensor, ranks in (("layers.2.self_attn.o_proj", (8, 4, 4)), ("layers.1.mlp.down_proj", (8, 4, 16))):
        name = f"model.{tensor}.weight"
        want = base[name].double() + 0.5 * (tuned[name].double() - base[name].double())
        for factor, brick, rank in zip((2, -1, 3), ("plain", "rslora", "patterns"), ranks, strict=True):
            update = reference(project.path, brick, name)
            assert int(torch.linalg.matrix_rank(update)) == rank
            want += factor * update
        torch.testing.assert_close(result[name].double(), want, rtol=1e-6, atol=1e-6)


@needs_compiler
def test_several_blocks_and_a_last_block_of_a_few_rows(copied: Project) -> None:
    """Tensors of several blocks, of which the last has 45, two or one rows, and thresholds that a sample suggests."""
    base = load_file(copied.path / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    shapes = {"gate_proj": WIDE, "up_proj": (2 * 655 + 2, 400), "down_proj": (2 * 1638 + 1, 160)}
    for module, shape in shapes.items():
        name = f"model.layers.0.mlp.{module}.weight"
        base[name] = (torch.randn(shape, generator=generator) * 0.05).bfloat16()
        for place in "abc":
            tensors = load_file(copied.path / place / "model.safetensors")
            tensors[name] = (base[name].float() + torch.randn(shape, generator=generator) * 0.01).bfloat16()
            save_file(tensors, copied.path / place / "model.safetensors", metadata={"format": "pt"})
        for place in ("plain", "patterns"):
            tensors = load_file(copied.path / place / "adapter_model.safetensors")
            key = f"base_model.model.model.layers.0.mlp.{module}.lora_"
            rank, dtype = len(tensors[f"{key}A.weight"]), tensors[f"{key}A.weight"].dtype
            tensors[f"{key}A.weight"] = torch.randn(rank, shape[1], generator=generator).to(dtype)
            tensors[f"{key}B.weight"] = torch.randn(shape[0], rank, generator=generator).to(dtype)
            save_file(tensors, copied.path / place / "adapter_model.safetensors", metadata={"format": "pt"})
    save_file(base, copied.path / "base" / "model.safetensors", metadata={"format": "pt"})
    for name in ("task arithmetic with a checkpoint", *QUICK[1:]):
        check_same(copied, STEPS[name])


@needs_compiler
def test_thresholds_outside_the_window_of_the_sample(copied: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """All magnitudes are counted then, with and without torch, also for checkpoints."""
    monkeypatch.setattr(trim, "_SMALL", 1 << 6)
    monkeypatch.setattr(trim, "_threshold_window", lambda *_: (1, 1))
    for name in ("ties", "ties with a checkpoint"):
        in_arrays = written(copied, STEPS[name], NUMPY)[0]
        with monkeypatch.context() as patch:
            patch.setattr(trim, "_SMALL", 1 << 18)
            assert in_arrays == written(copied, STEPS[name], CPU)[0]
        assert in_arrays == written(copied, STEPS[name], CPU)[0]


@needs_compiler
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_errors_name_the_same_element(copied: Project, number: float) -> None:
    """A value that is not finite in a factor."""
    file = copied.path / "plain" / "adapter_model.safetensors"
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    tensors = load_file(file)
    tensors[key][5, 3] = number
    save_file(tensors, file, metadata={"format": "pt"})
    for name in QUICK:
        errors = []
        for device in (CPU, NUMPY):
            with pytest.raises(WorkbenchError) as error:
                written(copied, STEPS[name], device)
            errors.append((error.value.message, error.value.hint))
        assert errors[0] == errors[1]
        assert errors[0][0] == f"brick 'l': {key} holds {number} at [5, 3]; expected finite numbers"


def break_adapter(project: Path, fault: str) -> None:
    """Damage the adapter `plain` in one way."""
    file = project / "plain" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    if fault == "missing file":
        file.unlink()
        return
    if fault == "wrong shape":
        tensors[key] = tensors[key][:, :-1].contiguous()
    if fault == "missing factor":
        del tensors[key]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing file", r"brick 'l': .*adapter_model.safetensors"),
        ("wrong shape", r"brick 'l': model.layers.1.self_attn.v_proj.weight is \[16, 32\] in the base"),
        ("missing factor", r"brick 'l': .*v_proj"),
    ],
)
def test_damaged_adapters_are_refused_before_the_device_is_chosen(copied: Project, fault: str, message: str) -> None:
    """So that the error is the same with and without torch."""
    break_adapter(copied.path, fault)
    with pytest.raises(WorkbenchError, match=message):
        copied.resolve(STEPS["ties"])


def add_head(project: Path) -> None:
    """Give the adapter `plain` a whole tensor of the base, with another number."""
    norm = load_file(project / "base" / "model.safetensors")["model.norm.weight"]
    file = project / "plain" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.model.norm.weight": norm + 1}, file, metadata={"format": "pt"})
    edit_json(project / "plain" / "adapter_config.json", modules_to_save=["norm"])


def add_magnitudes(project: Path) -> None:
    """Make the adapter `plain` DoRA."""
    file = project / "plain" / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if key.endswith("lora_B.weight")]:
        tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(len(tensors[key]))
    save_file(tensors, file, metadata={"format": "pt"})
    edit_json(project / "plain" / "adapter_config.json", use_dora=True)


def replace_factors(project: Path, rank: int, dtype: torch.dtype = torch.float32) -> None:
    """Give the adapter `plain` factors of another rank or dtype."""
    file = project / "plain" / "adapter_model.safetensors"
    tensors = {
        key: torch.ones((rank, tensor.shape[1]) if "lora_A" in key else (len(tensor), rank), dtype=dtype)
        for key, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    edit_json(project / "plain" / "adapter_config.json", r=rank)


OTHERS: dict[str, Callable[[Path], None]] = {
    "a whole tensor": add_head,
    "DoRA": add_magnitudes,
    "float64": lambda project: replace_factors(project, 4, torch.float64),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters_take_torch(copied: Project, name: str) -> None:
    """Adapters of which one update is computed by torch alone."""
    recipe = "bricks: {l: plain, r: rslora}\nsteps: [{merge: linear}]\n"
    assert needs_no_torch(copied.resolve(recipe))
    OTHERS[name](copied.path)
    resolved = copied.resolve(recipe)
    assert not needs_no_torch(resolved)
    assert device_of_run("cpu", resolved) == CPU
    assert copied.run(recipe)["status"] == "done"


@needs_compiler
@pytest.mark.parametrize("rank", [1, 300])
def test_every_rank_takes_arrays(copied: Project, rank: int) -> None:
    """Ranks of one and beyond the width of the tensors."""
    replace_factors(copied.path, rank)
    check_same(copied, "bricks: {l: plain, r: rslora}\nsteps: [{merge: linear}]\n")


ALL = MIXED + (
    "steps: [{merge: average}, {merge: linear}, {merge: task_arithmetic}, {merge: ties}, {merge: dare, rescale: l1}, "
    "{merge: slerp, bricks: {a: 0.3, l: 0.7}}]\n"
)


@needs_compiler
def test_a_run_works_where_torch_cannot_be_imported(copied: Project) -> None:
    """The whole command with all six methods, in a process in which an import of torch fails."""
    check_apart(copied, ALL)
