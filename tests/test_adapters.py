"""PEFT adapters that are refused, and those that are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from project import CPU
from safetensors.torch import save_file
from tiny import edit_json, save_adapter, tensors_of

from workbench.adapters import CONFIG, WEIGHTS, Adapter, write_adapter
from workbench.errors import WorkbenchError
from workbench.names import disk_weight, live_module
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.lowrank import Factors


@pytest.fixture
def lora(bricks: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    import shutil

    return Path(shutil.copytree(bricks / "one", tmp_path / "lora"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3; expected LORA"),
        ({"use_dora": True}, "LoRA with use_dora, which is not a product of two factors"),
        ({"bias": "all"}, "LoRA with bias"),
        ({"modules_to_save": ["lm_head"]}, "LoRA with modules_to_save"),
        ({"lora_bias": True, "use_qalora": True}, "LoRA with lora_bias, use_qalora"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "LoRA with target_parameters"),
        ({"layer_replication": [[0, 2], [1, 4]]}, "LoRA with layer_replication"),
        ({"trainable_token_indices": [3]}, "LoRA with trainable_token_indices"),
    ],
)
def test_refused_flavours(lora: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(lora / CONFIG, **changes)
    with pytest.raises(WorkbenchError) as caught:
        Adapter(lora, "brick 'x'")
    assert f"brick 'x': {message}" in caught.value.message
    assert "merge_and_unload" in (caught.value.hint or "")


def test_refused_files(lora: Path, llama: Path) -> None:
    tensors = tensors_of(lora)
    specs = Checkpoint(llama, "base").specs
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(changed: dict[str, torch.Tensor], message: str) -> None:
        save_file(changed, lora / WEIGHTS)
        with pytest.raises(WorkbenchError, match=message):
            bound = Adapter(lora, "x").bind(specs)
            _ = [bound.factors(name, CPU) for name in bound.places]

    refused({k: t for k, t in tensors.items() if k != key}, r"x: model\.layers\.0\.self_attn\.q_proj has lora_B only")
    refused({**tensors, key.replace("lora_A", "lora_magnitude_vector"): torch.ones(32)}, "is not a LoRA factor of a linear layer")
    refused(
        {**tensors, "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 64)},
        "lora_embedding_A .* is not a LoRA factor",
    )
    with pytest.raises(WorkbenchError) as caught:
        save_file({**tensors, "base_model.model.lm_head.base_layer.weight": torch.ones(64, 32)}, lora / WEIGHTS)
        Adapter(lora, "x").modules()
    assert "save_embedding_layers=False" in (caught.value.hint or "")
    refused(
        {**tensors, key: torch.ones(8, 33)},
        r"q_proj\.weight is \[32, 32\] in the base, the adapter's update is \[32, 8\] x \[8, 33\]",
    )
    refused({**tensors, key: torch.ones(4, 32)}, r"the adapter's update is \[32, 8\] x \[4, 32\]")
    refused(
        {**tensors, key: torch.full((8, 32), float("nan"))},
        r"lora_A of model\.layers\.0\.self_attn\.q_proj\.weight holds nan at \[0, 0\]",
    )
    refused({**tensors, key.replace("q_proj", "q_porj"): torch.ones(8, 32), key.replace("q_proj", "q_porj").replace("lora_A", "lora_B"): torch.ones(32, 8)},
            r"module model\.layers\.0\.self_attn\.q_porj has no weight in the base\. Did you mean 'model\.layers\.0\.self_attn\.q_proj")  # fmt: skip
    twice = {
        k.replace("base_model.model.model.", "base_model.model."): t.clone()
        for k, t in tensors.items()
        if "layers.0.self_attn.q_proj" in k
    }
    refused({**tensors, **twice}, "two modules of the adapter stand for model")


def test_no_safetensors(lora: Path) -> None:
    (lora / WEIGHTS).rename(lora / "adapter_model.bin")
    with pytest.raises(
        WorkbenchError, match=r"expected adapter_model\.safetensors in .*, found adapter_model\.bin \(a pickle, never opened\)"
    ):
        Adapter(lora, "x")
    (lora / CONFIG).write_text("{", "utf-8")
    with pytest.raises(WorkbenchError, match="is not valid JSON"):
        Adapter(lora, "x")
    (lora / CONFIG).unlink()
    with pytest.raises(WorkbenchError, match=r"no adapter_config\.json"):
        Adapter(lora, "x")


@pytest.mark.parametrize("transposed", [False, True])
def test_written_adapters_are_read_back(tmp_path: Path, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = {f"transformer.h.{i}.mlp.c_proj.weight": Factors(torch.randn(6, r, generator=generator), torch.randn(r, 4, generator=generator))
               for i, r in enumerate((1, 3, 3))}  # fmt: skip
    write_adapter(tmp_path, factors, "org/base", fan_in_fan_out=transposed)
    specs: Any = {name: type("S", (), {"shape": (6, 4)}) for name in factors}
    bound = Adapter(tmp_path, "x").bind(specs)
    for name, update in factors.items():
        again = bound.factors(name, CPU)
        assert again.rank == update.rank
        torch.testing.assert_close(again.left @ again.right, update.left @ update.right)


def test_names_with_and_without_root() -> None:
    specs: Any = dict.fromkeys(["h.0.mlp.c_fc.weight", "model.layers.0.q.weight", "language_model.norm.weight"])
    assert disk_weight("transformer.h.0.mlp.c_fc", specs, "x") == "h.0.mlp.c_fc.weight"
    assert disk_weight("layers.0.q", specs, "x") == "model.layers.0.q.weight"
    assert disk_weight("norm", specs, "x") == "language_model.norm.weight"
    assert live_module("h.0.mlp.c_fc.weight", {"transformer.h.0.mlp.c_fc"}) == "transformer.h.0.mlp.c_fc"
    with pytest.raises(WorkbenchError, match="the live model has no module gate"):
        live_module("gate.weight", {"model.gate_up"})
    with pytest.raises(WorkbenchError, match=r"x: module lm_head has no weight in the base\.$") as caught:
        disk_weight("lm_head", specs, "x")
    assert "ties its head" in (caught.value.hint or "")


def test_card_of_an_adapter_on_another_family(model_of: Any, tmp_path: Path, llama: Path) -> None:
    adapter = Adapter(save_adapter(model_of("opt"), tmp_path / "o", seed=1, family="opt"), "brick 'o'")
    with pytest.raises(WorkbenchError, match="has no weight in the base") as caught:
        adapter.bind(Checkpoint(llama, "base").specs)
    assert "another architecture" in (caught.value.hint or "")
