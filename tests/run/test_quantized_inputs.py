"""Recipes on weights of 8 bits: the result is that of the same recipe on dequantized copies, and everything says what was lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from worlds.commands import call, document, refused
from worlds.packed_models import save_fp8
from worlds.project import Project
from worlds.tiny import edit_json, save_adapter, save_finetuned, save_model, tensors_of

from workbench.ground.foreign_names import SINGLE

SAID = "14 weights were stored in 8 bits (F8_E4M3 with a scale for each block of 16 × 24)"
STEPS = "steps: [{merge: task_arithmetic, lambda: 0.7}]\n"


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with base/, one/ (a fine-tune) and lora/, the first two in 8 bits, and both dequantized in float32."""
    (tmp_path / "recipes").mkdir()
    base = save_model(tmp_path / "base", "llama_untied", layers=2)
    save_finetuned(base, tmp_path / "one", seed=1)
    save_adapter(base, tmp_path / "lora", seed=2)
    for name in ("base", "one"):
        worth = save_fp8(tmp_path / name, "block")
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-plain")
        save_file(worth, tmp_path / f"{name}-plain" / SINGLE, metadata={"format": "pt"})
        edit_json(tmp_path / f"{name}-plain" / "config.json", quantization_config=None)
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


def test_equals_dequantized_copies(packed: Project) -> None:
    """Base, checkpoint brick and adapter, merged and written."""
    bricks = "bricks: {{one: {}, lora: lora}}\noutput: {{dtype: float32}}\n"
    done = packed.run(f"base: base\n{bricks.format('one')}{STEPS}", "packed.yaml")
    plain = packed.run(f"base: base-plain\n{bricks.format('one-plain')}{STEPS}", "plain.yaml")
    found, want = tensors_of(Path(done["model"])), tensors_of(Path(plain["model"]))
    assert set(found) == set(want)
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())
    config = json.loads((Path(done["model"]) / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config
    record = json.loads((Path(done["run"]) / "run.json").read_text("utf-8"))
    assert [w for w in record["warnings"] if SAID in w] == [w for w in record["warnings"] if "8 bits" in w]
    assert sum("8 bits" in warning for warning in record["warnings"]) == 2
    assert SAID in (Path(done["model"]) / "README.md").read_text("utf-8")


def test_command(packed: Project) -> None:
    """`run` gives the same files, whichever buffers it uses for other checkpoints."""
    text = f"base: base\nbricks: {{one: one}}\n{STEPS}"
    call("run", str(packed.write(text)), "--device", "cpu", "-o", "out")
    want = packed.tensors(f"base: base-plain\nbricks: {{one: one-plain}}\n{STEPS}", torch.bfloat16)
    found = tensors_of(packed.path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())


def test_plan_and_its_key(packed: Project) -> None:
    """`plan` says what was lost; another block size in config.json is another run."""
    recipe = str(packed.write(f"base: base\nbricks: {{one: one}}\n{STEPS}"))
    planned = document("plan", recipe)
    assert any(SAID in warning for warning in planned["warnings"])
    first = packed.resolve(f"base: base\nbricks: {{one: one}}\n{STEPS}").key
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 30]}
    edit_json(packed.path / "base" / "config.json", quantization_config=quantization)
    assert packed.resolve(f"base: base\nbricks: {{one: one}}\n{STEPS}").key != first


def test_live_model(packed: Project) -> None:
    """A live model, as `eval` and `edit` use it, computes with the dequantized weights."""
    from transformers import AutoModelForCausalLM

    from workbench.run.materialize import materialize

    live = materialize(packed.resolve("base: base\nsteps: []\noutput: {dtype: float32}\n"), torch.device("cpu"))
    want = AutoModelForCausalLM.from_pretrained(packed.path / "base-plain", dtype=torch.float32).eval()
    tokens = torch.tensor([[3, 7, 11, 20]])
    with torch.no_grad():
        assert torch.equal(live(tokens).logits, want(tokens).logits)


def test_adapter_as_result(packed: Project) -> None:
    """Its delta is against the base as it is read, and the hint does not load the base as transformers would."""
    text = "base: base\nbricks: {one: one}\nsteps: [{merge: task_arithmetic}]\noutput: {form: adapter, rank: 64}\n"
    out = call("run", str(packed.write(text, "adapter.yaml"))).output
    assert "first run a recipe with this base and no steps" in out
    assert "from_pretrained" not in out
    (adapter,) = packed.path.glob("runs/adapter-*/adapter")
    read = packed.tensors(f"base: base\nbricks: {{a: {adapter}}}\nsteps: [{{merge: task_arithmetic}}]\n")
    for name, tensor in tensors_of(packed.path / "one-plain").items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=2e-5)


def test_show_says_how_a_brick_is_stored(packed: Project) -> None:
    assert f"stored   {SAID}" in call("brick", "show", "one", "--card").output


def test_export_refuses_a_packed_base(packed: Project) -> None:
    recipe = str(packed.write("base: base\nbricks: {lora: lora}\nsteps: [{merge: task_arithmetic}]\n"))
    error = refused("export", recipe, "--for", "vllm", "--served-base", "org/base", "-o", "out")
    assert "stores weights in fewer bits" in error.message
    assert "no steps" in (error.hint or "")
    assert not (packed.path / "out").exists()


def test_codes_are_never_weights(packed: Project) -> None:
    """Integers in a base, a checkpoint brick or an adapter are refused before any work."""
    name = "model.layers.0.mlp.up_proj.weight"
    for folder in ("base-plain", "one-plain"):
        tensors = tensors_of(packed.path / folder)
        save_file({**tensors, name: torch.ones(48, 32, dtype=torch.int8)}, packed.path / folder / SINGLE)
        base, one, label = ("base-plain", "one", "base") if folder == "base-plain" else ("base", "one-plain", "brick 'one'")
        recipe = packed.write(f"base: {base}\nbricks: {{one: {one}}}\n{STEPS}")
        assert (
            f"{label}: {name} holds int8 numbers, which are codes of a quantized weight" in refused("plan", str(recipe)).message
        )
    lora = packed.path / "lora" / "adapter_model.safetensors"
    tensors = tensors_of(packed.path / "lora")
    for dtype, message in ((torch.int8, "int"), (torch.float8_e4m3fn, "has dtype F8_E4M3")):
        save_file({n: t.to(dtype) for n, t in tensors.items()}, lora)
        recipe = packed.write("base: base\nbricks: {lora: lora}\nsteps: [{merge: task_arithmetic}]\n")
        assert message in refused("plan", str(recipe)).message
