"""Weights of 4 and 8 bits: what they are worth, in blocks of any size, and what is said about them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.project import Project
from worlds.quantized_models import LAYOUTS, TRANSPOSED, bits_and_bytes, quantize, save_gpt_oss
from worlds.tiny import edit_json, save_adapter, save_model, tensors_of

import workbench.weights.specs as specs_module
from workbench.bricks.brick import checkpoint_digest
from workbench.bricks.locate import resolve_base
from workbench.ground.foreign_names import SINGLE
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.specs import load

UP = "model.layers.1.mlp.up_proj.weight"


def built(folder: Path, layout: str) -> Path:
    return save_gpt_oss(folder) if layout == "mxfp4" else save_model(folder, "llama", layers=2)


@pytest.mark.parametrize("layout", [*LAYOUTS, *TRANSPOSED, "mxfp4"])
def test_values(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is worth what the format says, exactly, however many rows are read at once."""
    worth = quantize(built(tmp_path / "model", layout), layout)
    checkpoint, _ = resolve_base(str(tmp_path / "model"), tmp_path)
    assert set(checkpoint.specs) == set(worth)
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.packed
    for elements in (specs_module.BLOCK_ELEMENTS, 300, 40):
        monkeypatch.setattr(specs_module, "BLOCK_ELEMENTS", elements)
        for name, values in worth.items():
            assert torch.equal(load(checkpoint, name, torch.float32), values), name
            assert torch.equal(load(checkpoint, name, torch.bfloat16), values.bfloat16()), name


@pytest.mark.parametrize(
    ("layout", "note"),
    [
        (
            "mxfp4",
            "4 weights were stored as MXFP4. Rounding changed a value by up to 25 % of the largest value in its block of 32.",
        ),
        (
            "nf4-double",
            "14 weights were stored as nf4 (bitsandbytes, double quantization). Rounding changed a value by up to 15.2 %",
        ),
        (
            "int8",
            "14 weights were stored as int8 with a scale for each row (bitsandbytes). Rounding changed a value by up to 0.4 %",
        ),
        (
            "group",
            "14 weights were stored as int4 with a scale for each 8 columns (compressed-tensors). The files state no bound",
        ),
        ("gptq", "14 weights were stored as int4 with a scale for each 8 columns (GPTQ). The files state no bound"),
    ],
)
def test_notes(layout: str, note: str, tmp_path: Path) -> None:
    quantize(built(tmp_path / "model", layout), layout)
    (said,) = resolve_base(str(tmp_path / "model"), tmp_path)[0].notes
    assert said.startswith(note)
    assert said.endswith("They are read as bfloat16.")


def test_scales_of_activations_are_left_out(tmp_path: Path) -> None:
    model = built(tmp_path / "model", "nvfp4")
    quantize(model, "nvfp4")
    stored = load_file(model / SINGLE)
    save_file({**stored, f"{UP.removesuffix('weight')}input_global_scale": torch.ones(1)}, model / SINGLE)
    checkpoint, _ = resolve_base(str(model), tmp_path)
    assert "drops 1 scales of activations" in checkpoint.notes[1]
    assert UP in checkpoint.specs
    assert not [name for name in checkpoint.specs if "input_global_scale" in name]


@pytest.mark.parametrize("kind", ["nf4", "fp4-double"])
def test_rows_that_begin_in_the_middle_of_a_byte(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, worth = bits_and_bytes("up.weight", (21, 9), kind, seed=1)
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}', "utf-8")
    for elements in (9, 27, 1000):
        monkeypatch.setattr(specs_module, "BLOCK_ELEMENTS", elements)
        assert torch.equal(load(Checkpoint(tmp_path, "base"), "up.weight", torch.float32), worth)


@pytest.mark.parametrize(
    ("layout", "companion"),
    [
        ("nf4-double", f"{UP}.nested_absmax"),
        ("nf4", f"{UP}.absmax"),
        ("int8", f"{UP.removesuffix('.weight')}.SCB"),
        ("group-zeros", f"{UP}_zero_point"),
        ("order", f"{UP}_g_idx"),
        ("nvfp4", f"{UP}_global_scale"),
        ("gptq", f"{UP.removesuffix('.weight')}.qzeros"),
    ],
)
def test_digest_counts_companions(layout: str, companion: str, tmp_path: Path) -> None:
    """Equal codes with another companion are another model, also where digests are cached, and where it lies in another file."""
    model = built(tmp_path / "model", layout)
    quantize(model, layout)
    digests = [checkpoint_digest(resolve_base(str(model), tmp_path)[0], tmp_path / "cache") for _ in range(2)]
    stored = load_file(model / SINGLE)
    place = tuple(0 for _ in stored[companion].shape)
    stored[companion][place] = stored[companion][tuple(-1 for _ in place)] if layout == "order" else stored[companion][place] + 1
    stored[companion] = stored[companion].roll(1) if layout == "order" else stored[companion]
    names = {name: "two.safetensors" if name == companion else "one.safetensors" for name in stored}
    for file in set(names.values()):
        save_file({name: stored[name] for name in stored if names[name] == file}, model / file, metadata={"format": "pt"})
    (model / SINGLE).unlink()
    (model / "model.safetensors.index.json").write_text("{}", "utf-8")
    edit_json(model / "model.safetensors.index.json", weight_map=names)
    digests.append(checkpoint_digest(resolve_base(str(model), tmp_path)[0], tmp_path / "cache"))
    save_file(
        {companion: stored[companion].roll(1) if stored[companion].numel() > 1 else stored[companion] * 2},
        model / "two.safetensors",
    )
    digests.append(checkpoint_digest(resolve_base(str(model), tmp_path)[0], tmp_path / "cache"))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("layout", ["nf4-double", "group-zeros", "nvfp4", "awq"])
def test_a_run_equals_that_of_a_dequantized_copy(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base and adapter, merged and written: the same tensors, and a config.json of plain weights."""
    (tmp_path / "recipes").mkdir()
    base = save_model(tmp_path / "base", "llama_untied", layers=2)
    save_adapter(base, tmp_path / "lora", seed=2)
    worth = quantize(base, layout)
    shutil.copytree(base, tmp_path / "plain")
    save_file(worth, tmp_path / "plain" / SINGLE, metadata={"format": "pt"})
    edit_json(tmp_path / "plain" / "config.json", quantization_config=None)
    monkeypatch.chdir(tmp_path)
    project = Project(tmp_path)
    rest = "bricks: {lora: lora}\nsteps: [{merge: task_arithmetic}]\noutput: {dtype: float32}\n"
    named = "{id: base, dequantize: true}"
    done, want = project.run(f"base: {named}\n{rest}", "packed.yaml"), project.run(f"base: plain\n{rest}", "plain.yaml")
    found = tensors_of(Path(done["model"]))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors_of(Path(want["model"])).items())
    assert "quantization_config" not in (Path(done["model"]) / "config.json").read_text("utf-8")
    assert "weights were stored as" in (Path(done["model"]) / "README.md").read_text("utf-8")


def test_digest_counts_the_layout(tmp_path: Path) -> None:
    """Equal bytes whose zeros mean another number are another model, also where digests are cached."""
    digests = []
    model = built(tmp_path / "model", "gptq")
    quantize(model, "gptq")
    for form in ("gptq", "gptq_v2"):
        edit_json(
            model / "config.json",
            quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 8, "checkpoint_format": form},
        )
        digests.append(checkpoint_digest(resolve_base(str(model), tmp_path)[0], tmp_path / "cache"))
    assert digests[0] != digests[1]
