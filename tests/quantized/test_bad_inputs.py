"""Quantized checkpoints that are damaged, incomplete, or of a variant that is not read: the error names tensor, file and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from worlds.commands import refused
from worlds.project import Project
from worlds.quantized_models import quantize, save_gpt_oss
from worlds.tiny import edit_json, save_adapter, save_model

from workbench.bricks.locate import resolve_base
from workbench.ground.errors import WorkbenchError
from workbench.ground.foreign_names import HEADERS_ONLY, SINGLE
from workbench.run.opened import resolve_model
from workbench.weights.specs import load

Tensors = dict[str, Tensor]
MODULE = "model.layers.1.mlp.up_proj"
UP, STATE = f"{MODULE}.weight", f"{MODULE}.weight.quant_state.bitsandbytes__"
EXPERTS = "model.layers.1.mlp.experts.down_proj"


def text(said: str) -> Tensor:
    return torch.tensor([*said.encode()], dtype=torch.uint8)


def model(folder: Path, layout: str) -> Path:
    built = save_gpt_oss(folder) if layout == "mxfp4" else save_model(folder, "llama", layers=2)
    quantize(built, layout)
    return built


def change(folder: Path, damage: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / SINGLE)
    damage(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE)


def opened(folder: Path) -> WorkbenchError:
    with pytest.raises(WorkbenchError) as caught:
        resolve_base(str(folder), folder.parent)
    return caught.value


@pytest.mark.parametrize(
    ("layout", "damage", "message"),
    [
        ("mxfp4", lambda t: t.pop(f"{EXPERTS}_scales"), f"base: {EXPERTS} is quantized, but no file has {EXPERTS}_scales"),
        ("mxfp4", lambda t: t.update({f"{EXPERTS}_scales": t[f"{EXPERTS}_scales"][:, :-1]}), f"{EXPERTS}_scales in {SINGLE} is U8 [3, 31, 2]; expected U8 or F8_E8M0 [3, 32, 2]"),
        ("mxfp4", lambda t: t.update({f"{EXPERTS}_blocks": t[f"{EXPERTS}_blocks"][..., :8]}), "is U8 [3, 32, 2, 8]; expected [experts, rows, blocks, 16]"),
        ("mxfp4", lambda t: t.update({f"{EXPERTS}_scales": t[f"{EXPERTS}_scales"].float()}), "is F32 [3, 32, 2]; expected U8"),
        ("nf4", lambda t: t.pop(f"{UP}.absmax"), f"{UP} is quantized, but no file has {UP}.absmax"),
        ("nf4", lambda t: t.pop(f"{UP}.quant_map"), f"no file has {UP}.quant_map"),
        ("nf4", lambda t: t.update({f"{UP}.absmax": t[f"{UP}.absmax"][:-1]}), f"{UP}.absmax in {SINGLE} is F32 [23]; expected F32 [24]"),
        ("nf4", lambda t: t.update({UP: t[UP][:-1]}), f"{UP} in {SINGLE} has 767 bytes in the shape [767, 1]; expected 768 bytes"),
        ("nf4", lambda t: t.update({UP: t[UP].T}), "has 768 bytes in the shape [1, 768]; expected 768 bytes in one column"),
        ("nf4", lambda t: t.update({f"{STATE}nf4": text("{}")}), "shape None and blocksize None; expected whole numbers from 1"),
        ("nf4", lambda t: t.update({f"{STATE}nf4": text("{")}), f"{STATE}nf4 in {SINGLE}: not JSON"),
        ("nf4-double", lambda t: t.pop(f"{UP}.nested_absmax"), f"no file has {UP}.nested_absmax"),
        ("nf4-double", lambda t: t.update({f"{UP}.nested_absmax": torch.ones(2)}), "is F32 [2]; expected F32 [6]"),
        ("int8", lambda t: t.update({f"{MODULE}.SCB": torch.ones(3)}), f"{MODULE}.SCB in {SINGLE} is F32 [3]; expected F32 [48]"),
        ("int8", lambda t: t.update({f"{MODULE}.weight_format": torch.tensor(2, dtype=torch.uint8)}), f"{UP}: weight_format 2 orders bytes for a GPU"),
        ("group", lambda t: t.pop(f"{UP}_scale"), f"{UP} is quantized, but no file has {UP}_scale"),
        ("group", lambda t: t.pop(f"{UP}_shape"), f"no file has {UP}_shape"),
        ("group", lambda t: t.update({f"{UP}_scale": t[f"{UP}_scale"][:, :3]}), "is [48, 3]; expected one scale for the tensor, each row, or each group"),
        ("group", lambda t: t.update({f"{UP}_shape": torch.tensor([48, 99])}), "is I32 [48, 4], which does not hold [48, 99] numbers of 4 bits"),
        ("group", lambda t: t.update({UP: torch.ones(48, 32)}), f"{UP} is stored twice"),
        ("group-zeros", lambda t: t.pop(f"{UP}_zero_point"), f"no file has {UP}_zero_point"),
        ("group-zeros", lambda t: t.update({f"{UP}_zero_point": t[f"{UP}_zero_point"][:2]}), "is I32 [2, 4]; expected [6, 4] for the scales [48, 4]"),
        ("order", lambda t: t.pop(f"{UP}_g_idx"), f"config.json says actorder group, but no file has {UP}_g_idx"),
        ("nvfp4", lambda t: t.pop(f"{UP}_global_scale"), f"no file has {UP}_global_scale"),
        ("nvfp4", lambda t: t.update({f"{UP}_global_scale": torch.ones(2)}), f"{UP}_global_scale is [2]; expected one number"),
        ("nvfp4", lambda t: t.update({f"{UP}_scale": t[f"{UP}_scale"].float()}), "is F32 [48, 2]; expected F8_E4M3 [48, 2]"),
        ("gptq", lambda t: t.pop(f"{MODULE}.qzeros"), f"no file has {MODULE}.qzeros"),
        ("awq", lambda t: t.update({f"{MODULE}.scales": t[f"{MODULE}.scales"][:3]}), f"{MODULE}.scales in {SINGLE} is F16 [3, 48]; expected F16 or BF16 or F32 [4, 48]"),
    ],
)  # fmt: skip
def test_what_is_damaged(layout: str, damage: Callable[[Tensors], object], message: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", layout)
    change(folder, damage)
    error = opened(folder)
    assert message in error.message
    assert error.message.startswith("base: ")
    assert error.hint


@pytest.mark.parametrize(
    ("layout", "damage", "message"),
    [
        (
            "mxfp4",
            lambda t: t[f"{EXPERTS}_scales"].fill_(255),
            f"base: {EXPERTS} holds nan at [0, 0, 0]; expected finite numbers",
        ),
        ("nf4", lambda t: t[f"{UP}.absmax"].fill_(float("nan")), f"{UP}: a number in its absmax is not finite"),
        ("int8", lambda t: t[f"{MODULE}.SCB"].fill_(float("inf")), f"{UP}: a number in its SCB is not finite"),
        ("group", lambda t: t[f"{UP}_scale"].fill_(float("inf")), f"{UP}: a number in its scales is not finite"),
        ("order", lambda t: t[f"{UP}_g_idx"].fill_(4), "weight_g_idx names a group that has no scales (4 groups)"),
        ("gptq", lambda t: t[f"{MODULE}.g_idx"].fill_(-1), "g_idx names a group that has no scales (4 groups)"),
        (
            "gptq",
            lambda t: t[f"{MODULE}.qzeros"].fill_(-1),
            "a zero is stored as 15, which versions of AutoGPTQ read as 16 or as 0",
        ),
    ],
)
def test_what_is_found_while_reading(layout: str, damage: Callable[[Tensors], object], message: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", layout)
    change(folder, damage)
    checkpoint, _ = resolve_base(str(folder), tmp_path)
    with pytest.raises(WorkbenchError) as caught:
        load(checkpoint, EXPERTS if layout == "mxfp4" else UP, torch.float32)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("group", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config sparse-24-bitmask: sparse storage is not read"),
        ("group", {"transform_config": {"config_groups": {"u": {}}}}, "the model rotates activations"),
        ("group", {"config_groups": {"a": {"weights": {"num_bits": 3}}}}, "num_bits 3; read are models whose weights all have 2, 4 or 8"),
        ("gptq", {"checkpoint_format": "marlin"}, "GPTQ with checkpoint_format marlin: only gptq and gptq_v2 are read"),
        ("gptq", {"group_size": 7}, "is F16 [6, 32]; expected F16 or BF16 or F32 [7, 32]"),
        ("gptq", {"group_size": "all"}, "group_size 'all'; expected a whole number from 1, or -1"),
        ("awq", {"version": "gemv"}, "AWQ version gemv: only the order of gemm is read"),
        ("gptq", {"bits": 3}, "quantized weights (gptq); expected floating point"),
    ],
)  # fmt: skip
def test_variants(layout: str, changes: dict[str, object], message: str, tmp_path: Path) -> None:
    import json

    folder = model(tmp_path / "model", layout)
    said = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    edit_json(folder / "config.json", quantization_config={**said, **changes})
    error = opened(folder)
    assert message in error.message
    assert error.hint


def test_truncated_files(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", "nf4")
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-100])
    assert "truncated?" in opened(folder).message


def test_conv1d_in_bitsandbytes(tmp_path: Path) -> None:
    """bitsandbytes transposes the weights of GPT-2: a square one would be read the wrong way round."""
    folder = model(tmp_path / "model", "nf4")
    edit_json(folder / "config.json", model_type="gpt2")
    assert (
        "model_type gpt2 in bitsandbytes: bitsandbytes stores the weights of Conv1D layers transposed" in opened(folder).message
    )


def test_plain_weights_under_a_quantized_config(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama", layers=2)
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    assert "quantized weights (mxfp4); expected floating point" in opened(folder).message


def test_headers_alone(tmp_path: Path) -> None:
    """Shapes of 4 bits of bitsandbytes stand in the tensors; those of other formats follow from headers."""
    for layout in ("group-zeros", "nvfp4", "awq"):
        folder = model(tmp_path / layout, layout)
        want = resolve_base(str(folder), tmp_path)[0].specs
        (folder / HEADERS_ONLY).write_text('{"repository": "org/model"}', "utf-8")
        assert resolve_base(str(folder), tmp_path)[0].specs == want
    folder = model(tmp_path / "nf4", "nf4")
    (folder / HEADERS_ONLY).write_text('{"repository": "org/model"}', "utf-8")
    error = opened(folder)
    assert "the shapes of weights in bitsandbytes nf4 stand in the tensors" in error.message
    assert error.hint == "Download the model first: hf download org/model"


def test_a_base_of_4_bits_is_named_on_purpose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that was trained on 4 bits: the recipe says into which weights it is merged."""
    (tmp_path / "recipes").mkdir()
    base = save_model(tmp_path / "base", "llama", layers=2)
    save_adapter(base, tmp_path / "lora", seed=2)
    quantize(base, "nf4")
    monkeypatch.chdir(tmp_path)
    project = Project(tmp_path)
    rest = "bricks: {lora: lora}\nsteps: [{merge: task_arithmetic}]\n"
    error = refused("plan", str(project.write(f"base: base\n{rest}", "mine.yaml")))
    assert "base stores weights in about 4 bits" in error.message
    assert "mine.yaml" in error.message
    assert "Name the 16-bit model that it was quantized from, or write `base: {id: base, dequantize: true}`" in (error.hint or "")
    error = refused("plan", str(project.write("base: {adapter: lora, on: base}\nsteps: []\n", "on.yaml")))
    assert "`base: {adapter: lora, on: base, dequantize: true}`" in (error.hint or "")
    assert project.resolve(f"base: {{id: base, dequantize: true}}\n{rest}").base_path == base
    assert project.resolve("base: {adapter: lora, on: base, dequantize: true}\nsteps: []\n").base_path == base
    assert (
        "dequantize" in refused("plan", str(project.write(f"base: {{id: base, dequantize: false}}\n{rest}", "no.yaml"))).message
    )


def test_a_model_that_is_only_scored_needs_no_choice(tmp_path: Path) -> None:
    base = model(tmp_path / "base", "nf4")
    assert resolve_model(str(base), tmp_path).resolved.base_path == base


def test_8_bits_need_no_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    base = save_model(tmp_path / "base", "llama", layers=2)
    quantize(base, "int8")
    monkeypatch.chdir(tmp_path)
    assert Project(tmp_path).resolve("base: base\nsteps: []\n").base_path == base
