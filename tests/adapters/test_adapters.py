"""PEFT adapters that are refused, and those that are written."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from worlds.project import CPU
from worlds.tiny import edit_json, save_adapter, tensors_of

from workbench.adapters.bind import bind
from workbench.adapters.export import write_adapter
from workbench.adapters.keys import unties
from workbench.adapters.read import CONFIG, WEIGHTS, Adapter
from workbench.ground.errors import WorkbenchError
from workbench.models.architecture import disk_weight, live_module
from workbench.models.layout import Model
from workbench.weights.checkpoint import Checkpoint, read_config
from workbench.weights.lowrank import Factors
from workbench.weights.specs import TensorSpec


@pytest.fixture
def lora(bricks: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    import shutil

    return Path(shutil.copytree(bricks / "one", tmp_path / "lora"))


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"peft_type": "C3A"}, "peft_type C3A; expected LORA, LOHA, LOKR, IA3, OFT, ADALORA, TRAINABLE_TOKENS, VERA, BOFT, HRA, FOURIERFT, RANDLORA, VBLORA",
         "merge_and_unload"),
        ({"use_qalora": True}, "LORA with use_qalora is not supported", "merge_and_unload"),
        ({"kasa_config": {"x": 1}}, "LORA with kasa_config", "path_initial_model_for_weight_conversion"),
        ({"layer_replication": [[0, 2], [1, 4]]}, "LORA with layer_replication", "repeats layers"),
        ({"alora_invocation_tokens": [1], "arrow_config": {"top_k": 2}}, "LORA with alora_invocation_tokens, arrow_config", "some tokens only"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' is not supported: the adapter refers to a base minus its initial factors",
         "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'", "path_initial_model_for_weight_conversion"),
    ],
)  # fmt: skip
def test_refused_flavours(lora: Path, changes: dict[str, Any], message: str, hint: str) -> None:
    edit_json(lora / CONFIG, **changes)
    with pytest.raises(WorkbenchError) as caught:
        Adapter(lora, "brick 'x'")
    assert f"brick 'x': {message}" in caught.value.message
    assert hint in (caught.value.hint or "")


def test_starts_that_leave_the_base_alone(lora: Path, llama: Path) -> None:
    base = Model(Checkpoint(llama, "base"), read_config(llama, "base"))
    before = bind(Adapter(lora, "x"), base.weights.specs, base)
    edit_json(lora / CONFIG, init_lora_weights="eva", eva_config={"rho": 2.0}, use_kernel="fast", velora_config={"scale": 1.0})
    bound = bind(Adapter(lora, "x"), base.weights.specs, base)
    assert set(bound.places) == set(before.places)
    assert bound.notes == ["x: adapter_config.json sets use_kernel, which is not supported and is ignored"]


Q = "base_model.model.model.layers.0.self_attn.q_proj"
NORM = "base_model.model.model.norm.weight"


@pytest.mark.parametrize(
    ("dropped", "added", "message"),
    [
        ([f"{Q}.lora_A.weight"], {}, r"x: model\.layers\.0\.self_attn\.q_proj has lora_B, but no lora_A"),
        ([f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"], {f"{Q}.lora_magnitude_vector": torch.ones(32)}, "has only lora_magnitude_vector"),
        ([], {f"{Q}.hada_w1_a": torch.ones(32, 4)}, r"q_proj\.hada_w1_a does not belong to its peft_type"),
        ([], {f"{Q}.lora_magnitude_vector": torch.ones(32)}, r"q_proj has a lora_magnitude_vector, but the configuration does not set use_dora"),
        ([], {f"{Q}.lora_C": torch.ones(2)}, r"adapter key \S*q_proj\.lora_C \[2\] is neither a tensor of the base nor part of a supported update"),
        ([], {"base_model.model.model.extra.weight": torch.ones(2)}, r"adapter key \S*extra\.weight \[2\] is neither a tensor of the base"),
        ([], {NORM: torch.ones(31)}, r"norm\.weight is \[31\], the base has \[32\]"),
        ([], {NORM: torch.ones(32), NORM.replace("norm.", "norm.modules_to_save."): torch.zeros(32)}, r"adapter key \S*norm\.\S*weight names the same tensor as another key"),
        ([], {"base_model.model.model.embed_tokens.weight": torch.ones(66, 32)}, r"is \[66, 32\], the base has \[64, 32\] \(another vocabulary"),
        ([], {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 63),
              "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(32, 4)},
         r"embed_tokens\.weight is \[64, 32\] in the base, the adapter's update is \[32, 4\] x \[4, 63\]"),
        ([], {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32), "base_model.model.lm_head.lora_B.weight": torch.ones(64, 4)},
         r"module lm_head has no weight in the base"),
        ([], {f"{Q}.lora_B.bias": torch.ones(32)}, r"lora_bias on model\.layers\.0\.self_attn\.q_proj, which has no bias in the base"),
        ([], {f"{Q}.lora_A.weight": torch.ones(8, 33)}, r"q_proj\.weight is \[32, 32\] in the base, the adapter's update is \[32, 8\] x \[8, 33\]"),
        ([], {f"{Q}.lora_embedding_A": torch.ones(4, 32), f"{Q}.lora_embedding_B": torch.ones(32, 4)},
         r"adapter key \S*q_proj\.lora_A\.weight cannot be combined with the other keys of model\.layers\.0\.self_attn\.q_proj"),
        ([], {f"{Q}.lora_A.weight": torch.ones(4, 32)}, r"the adapter's update is \[32, 8\] x \[4, 32\]"),
        ([], {f"{Q}.lora_A.weight": torch.full((8, 32), float("nan"))}, r"x: \S*q_proj\.lora_A\.weight holds nan at \[0, 0\]; expected finite"),
        ([], {f"{Q.replace('q_proj', 'q_porj')}.lora_A.weight": torch.ones(8, 32), f"{Q.replace('q_proj', 'q_porj')}.lora_B.weight": torch.ones(32, 8)},
         r"module model\.layers\.0\.self_attn\.q_porj has no weight in the base\. Did you mean 'model\.layers\.0\.self_attn\.q_proj"),
        ([], {f"{Q.replace('model.model.model', 'model.model')}.lora_A.weight": torch.ones(8, 32),
              f"{Q.replace('model.model.model', 'model.model')}.lora_B.weight": torch.ones(32, 8)},
         r"two modules of the adapter update model\.layers\.0\.self_attn\.q_proj\.weight"),
    ],
)  # fmt: skip
def test_refused_keys(lora: Path, llama: Path, dropped: list[str], added: dict[str, torch.Tensor], message: str) -> None:
    kept = {k: t for k, t in tensors_of(lora).items() if k not in dropped}
    save_file({**kept, **added}, lora / WEIGHTS)
    base = Model(Checkpoint(llama, "base"), read_config(llama, "base"))
    with pytest.raises(WorkbenchError, match=message):
        bound = bind(Adapter(lora, "x"), base.weights.specs, base)
        _ = [bound.factors(name, CPU) for name in bound.places]


def test_saved_weights_that_are_nan_or_do_not_fit(lora: Path, llama: Path) -> None:
    base = Model(Checkpoint(llama, "base"), read_config(llama, "base"))
    spoilt = torch.ones(64, 32)
    spoilt[40, 7] = float("inf")
    save_file({**tensors_of(lora), "base_model.model.model.embed_tokens.weight": spoilt}, lora / WEIGHTS)
    adapter = Adapter(lora, "x")
    message = r"x: base_model\.model\.model\.embed_tokens\.weight holds inf at \[40, 7\]; expected finite numbers"
    with pytest.raises(WorkbenchError, match=message):  # compared with the base's own, to tell a copy from a change
        bind(adapter, base.weights.specs, base)
    source = bind(adapter, base.weights.specs).open_delta("model.embed_tokens.weight", CPU)
    block = torch.zeros(4, 32)
    source.read_delta(0, 4, block, block.clone())
    with pytest.raises(WorkbenchError, match=message):
        source.read_delta(38, 42, block, block.clone())
    base = Model(Checkpoint(llama, "base"), read_config(llama, "base"))
    edit_json(lora / CONFIG, use_dora=True)
    pairs = {k: t for k, t in tensors_of(lora).items() if "layers.0.self_attn.q_proj" in k}
    save_file({**pairs, f"{Q}.lora_magnitude_vector": torch.ones(31)}, lora / WEIGHTS)
    with pytest.raises(WorkbenchError, match=r"lora_magnitude_vector is \[31\], expected 32 numbers, one per output"):
        bind(Adapter(lora, "x"), base.weights.specs, base)


def test_copies_of_the_base_need_the_base(lora: Path, llama: Path) -> None:
    """PEFT stores the base's own head beside its factors: nothing to merge, once it is seen to be the base's."""
    base = Model(Checkpoint(llama, "base"), read_config(llama, "base"))
    copy = tensors_of(llama)["model.embed_tokens.weight"].float()
    tensors = tensors_of(lora)
    save_file({**tensors, "base_model.model.model.embed_tokens.base_layer.weight": copy}, lora / WEIGHTS)
    assert "model.embed_tokens.weight" not in bind(Adapter(lora, "x"), base.weights.specs, base).places
    with pytest.raises(WorkbenchError, match="is a weight, not an update") as caught:
        bind(Adapter(lora, "x"), base.weights.specs)
    assert "save_embedding_layers=False" in (caught.value.hint or "")
    copy[3, 4] += 1
    save_file({**tensors, "base_model.model.model.embed_tokens.base_layer.weight": copy}, lora / WEIGHTS)
    bound = bind(Adapter(lora, "x"), base.weights.specs, base)
    out, rows = torch.empty(64, 32), tensors_of(llama)["model.embed_tokens.weight"].float()
    bound.open_delta("model.embed_tokens.weight", CPU).read_delta(0, 64, rows, out)
    assert out.nonzero().tolist() == [[3, 4]]
    assert unties(Adapter(lora, "x").keys, base) == "updates only the embeddings"


def test_an_adapter_is_bound_once_to_a_base_and_then_freed(lora: Path, llama: Path) -> None:
    checkpoint = Checkpoint(llama, "base")
    base, equal = (Model(checkpoint, read_config(llama, "base")) for _ in range(2))
    adapter = Adapter(lora, "x")
    bound = bind(adapter, base.weights.specs, base)
    assert bind(adapter, base.weights.specs, base) is bound
    other = bind(adapter, equal.weights.specs, equal)
    assert other is not bound
    assert other.places.keys() == bound.places.keys()
    alive = weakref.ref(adapter)
    del adapter
    gc.collect()
    assert alive() is None, "neither the bound adapter nor the cache keeps the adapter alive"


def test_no_safetensors(lora: Path) -> None:
    (lora / WEIGHTS).rename(lora / "adapter_model.bin")
    with pytest.raises(
        WorkbenchError,
        match=r"expected adapter_model\.safetensors in .*, found .* as adapter_model\.bin \(pickles are never opened\)",
    ):
        Adapter(lora, "x")
    (lora / CONFIG).write_text("{", "utf-8")
    with pytest.raises(WorkbenchError, match=r"adapter_config\.json: not JSON: Expecting property name"):
        Adapter(lora, "x")
    (lora / CONFIG).write_text('{"peft_type": "LORA", "r": 4, "r": 8}', "utf-8")
    with pytest.raises(WorkbenchError, match=r"adapter_config\.json: not JSON: duplicate key 'r'"):
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
    specs = {name: TensorSpec.of((6, 4), torch.float32) for name in factors}
    bound = bind(Adapter(tmp_path, "x"), specs)
    for name, update in factors.items():
        again = bound.factors(name, CPU)
        assert again is not None
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
        bind(adapter, Checkpoint(llama, "base").specs)
    assert "another architecture" in (caught.value.hint or "")
