"""GGUF adapters: every update beside PEFT's, what is refused, and llama.cpp itself where llama-cpp-python is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.gguf_models import gguf_field, gguf_tensors, save_llama_gguf, separated
from worlds.project import Project
from worlds.tiny import edit_json, live, save_adapter

from workbench.adapters.bind import bind
from workbench.adapters.linear import FAMILIES, gguf_places, write_gguf
from workbench.adapters.read import Adapter
from workbench.ground.errors import WorkbenchError
from workbench.models.layout import Model

HEADS = {"attn_q": 4, "attn_k": 2}
PATTERNS: dict[str, Any] = {"rank_pattern": {"q_proj": 6, "layers.1.*down_proj": 2}, "alpha_pattern": {"o_proj": 3}}
Make = Callable[..., Path]


def base_model(project: Project, base: Path) -> Model:
    (project.path / "recipes").mkdir(exist_ok=True)
    model: Model = project.resolve(f"base: {base}\nsteps: []\n", "base.yaml").plain
    return model


def written(project: Project, base: Path, adapter: Path, out: Path) -> Path:
    model = base_model(project, base)
    bound = bind(Adapter(adapter, "adapter 'a'"), model.weights.specs, model)
    write_gguf(bound, gguf_places(bound, model, "adapter 'a'"), model.config, out, "a")
    return out


def deltas(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Tensor -> the update that llama.cpp adds to it: alpha / rank times lora_b times lora_a."""
    tensors, alpha = gguf_tensors(path), float(gguf_field(path, "adapter.lora.alpha"))
    names = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    assert len(tensors) == 2 * len(names)
    return {
        name: alpha / len(tensors[f"{name}.lora_a"]) * (tensors[f"{name}.lora_b"].astype(float) @ tensors[f"{name}.lora_a"])
        for name in names
    }


def peft_deltas(base: Path, adapter: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Module -> the update that PEFT adds to its weight as [out, in]."""
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(live(base), adapter)
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach().numpy()
            found[name] = delta.T if getattr(module, "fan_in_fan_out", False) else delta
    return found


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, PATTERNS], ids=["plain", "rslora", "patterns"])
def test_llama_has_the_updates_of_peft_in_the_order_of_llama_cpp(
    settings: dict[str, Any], model_of: Make, tmp_path: Path
) -> None:
    base = model_of("llama_untied", torch.float32)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    adapter = save_adapter(base, tmp_path / "adapter", seed=3, target_modules=modules, **settings)
    out = written(Project(tmp_path), base, adapter, tmp_path / "a.gguf")
    assert (gguf_field(out, "general.type"), gguf_field(out, "adapter.type")) == ("adapter", "lora")
    assert gguf_field(out, "general.architecture") == "llama"
    ours, peft = deltas(out), peft_deltas(base, adapter)
    assert len(ours) == len(peft) == 4 * 7 + 1
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
    }
    names |= {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    for layer in range(4):
        for short, module in names.items():
            found = ours[f"blk.{layer}.{short}.weight"]
            found = separated(found, HEADS[short]) if short in HEADS else found
            np.testing.assert_allclose(found, peft[f"model.layers.{layer}.{module}"], atol=1e-6, rtol=0)
    np.testing.assert_allclose(ours["output.weight"], peft["lm_head"], atol=1e-6, rtol=0)
    moved = np.abs(ours["blk.0.attn_q.weight"] - peft["model.layers.0.self_attn.q_proj"]).max()
    assert moved > 0.01, "the order of the rows matters"


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen2", {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj"}),
        ("gpt2", {"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    ],
)
def test_other_families_keep_the_order_of_their_rows(family: str, names: dict[str, str], model_of: Make, tmp_path: Path) -> None:
    base = model_of(family, torch.float32)
    modules = sorted({name.rpartition(".")[2] for name in names.values()})
    extra = {"fan_in_fan_out": True} if family == "gpt2" else {}
    adapter = save_adapter(base, tmp_path / "adapter", seed=3, family=family, target_modules=modules, **extra)
    ours, peft = deltas(written(Project(tmp_path), base, adapter, tmp_path / "a.gguf")), peft_deltas(base, adapter)
    prefix = "transformer.h" if family == "gpt2" else "model.layers"
    assert len(ours) == len(peft) == 4 * len(names)
    for layer in range(4):
        for short, module in names.items():
            found = ours[f"blk.{layer}.{short}.weight"]
            np.testing.assert_allclose(found, peft[f"{prefix}.{layer}.{module}"], atol=1e-6, rtol=0)


def test_gguf_knows_every_family_by_its_name() -> None:
    from gguf import MODEL_ARCH_NAMES

    assert {family.name for family in FAMILIES.values()} <= set(MODEL_ARCH_NAMES.values())


def test_families_and_tensors_that_are_not_known_are_refused(model_of: Make, tmp_path: Path) -> None:
    project = Project(tmp_path)
    base = model_of("gpt_neox", torch.float32)
    adapter = save_adapter(base, tmp_path / "neox", seed=3, family="gpt_neox")
    with pytest.raises(WorkbenchError, match="bases of the class GPTNeoXForCausalLM, but only for LlamaForCausalLM") as error:
        written(project, base, adapter, tmp_path / "a.gguf")
    assert "workbench run" in str(error.value.hint)

    other = tmp_path / "other"
    other.mkdir()
    for file in model_of("llama_untied", torch.float32).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    edit_json(other / "config.json", architectures=["Qwen2ForCausalLM"])
    tensors = load_file(other / "model.safetensors")
    save_file({name.replace("mlp.up_proj", "mlp.upper"): t for name, t in tensors.items()}, other / "model.safetensors")
    model = base_model(project, other)
    place = tmp_path / "renamed"
    save_adapter(model_of("llama_untied", torch.float32), place, seed=3, target_modules=["up_proj"])
    factors = load_file(place / "adapter_model.safetensors")
    save_file({n.replace("up_proj", "upper"): t for n, t in factors.items()}, place / "adapter_model.safetensors")
    config = json.loads((place / "adapter_config.json").read_text("utf-8"))
    edit_json(place / "adapter_config.json", target_modules=["upper"], base_model_name_or_path=config["base_model_name_or_path"])
    bound = bind(Adapter(place, "adapter 'a'"), model.weights.specs)
    with pytest.raises(
        WorkbenchError, match=r"updates model.layers.0.mlp.upper.weight, for which the package gguf knows no name"
    ):
        gguf_places(bound, model, "adapter 'a'")
    assert not list(tmp_path.glob("*.gguf"))


def test_llama_cpp_computes_what_peft_computes(model_of: Make, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from peft import PeftModel

    base = model_of("llama_untied", torch.float32)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    adapter = save_adapter(base, tmp_path / "adapter", seed=3, target_modules=modules, use_rslora=True, **PATTERNS)
    model, beside = save_llama_gguf(base, tmp_path / "base.gguf"), written(Project(tmp_path), base, adapter, tmp_path / "a.gguf")
    tokens = [5, 9, 41, 7, 3, 22]
    with torch.no_grad():
        plain = live(base)(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        adapted = PeftModel.from_pretrained(live(base), adapter)(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    assert (adapted - plain).abs().max() > 0.1
    for lora, wanted in ((None, plain), (str(beside), adapted)):
        options = {
            "n_ctx": 64,
            "logits_all": True,
            "verbose": False,
            "n_threads": 1,
            "type_k": 0,
            "type_v": 0,
        }  # a cache of float32
        loaded = llama_cpp.Llama(str(model), lora_path=lora, **options)
        loaded.eval(tokens)
        found = torch.tensor(np.array(loaded.scores[: len(tokens)])).log_softmax(-1)
        loaded.close()
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
