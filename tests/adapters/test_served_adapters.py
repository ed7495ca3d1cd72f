"""Kinds of adapters as they are exported: PEFT loads each, vLLM's rules accept it, and both add what the original adds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.flavours import save_base
from worlds.project import Project
from worlds.tiny import edit_json, live, save_adapter
from worlds.vllm_rules import RANKS, Refused, linear_modules, load_as_vllm

from workbench.adapters.bind import bind
from workbench.adapters.linear import not_linear, ranks_of, served_rank, write_served
from workbench.adapters.read import Adapter

Make = Callable[..., Path]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rank and alpha patterns": ("llama", {"rank_pattern": {"q_proj": 9, "o_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "rslora": ("llama", {"use_rslora": True}),
    "rslora with patterns": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"o_proj": 5}}),
    "copies in modules_to_save": ("llama", {"modules_to_save": ["norm"]}),
    "some layers": ("llama", {"layers_to_transform": [1, 3]}),
    "head": ("llama_untied", {"target_modules": ["q_proj", "lm_head"]}),
    "fan in": ("gpt2", {"fan_in_fan_out": True}),
    "attention of a mixture": ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "dora": ("llama", {"use_dora": True}, "DoRA on "),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on an embedding on model.embed_tokens"),
    "lora bias": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias on "),
    "bias": ("qwen2", {"bias": "lora_only"}, "(modules_to_save or bias)"),
    "changed modules_to_save": ("llama", {"modules_to_save": ["norm"]}, "a whole tensor for model."),
    "experts": ("mixtral", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}, "(target_parameters)"),
}


@pytest.fixture(scope="module")
def base_of(model_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family == "mixtral" and family not in made:
            made[family] = save_base(tmp_path_factory.mktemp("mixture") / family, family)
        return made.get(family) or model_of(family, torch.float32)

    return get


def saved(base: Path, family: str, settings: dict[str, Any], out: Path) -> Path:
    known = "llama" if family in ("llama_untied", "mixtral") else family
    return save_adapter(base, out, seed=3, family=known, **settings)


def loaded(base: Path, place: Path) -> Any:
    """The adapter under PEFT, which must find every key."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(live(base), place).eval()
    assert not [str(one.message) for one in seen if "adapter keys" in str(one.message)]
    return model


def updates(model: Any) -> dict[str, torch.Tensor]:
    """Module -> the update that PEFT adds, [out, in] as the layer computes."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach()
            found[name] = delta.T if getattr(module, "fan_in_fan_out", False) else delta
    return found


def refusal(base: Path, place: Path, project: Path) -> str | None:
    (project / "recipes").mkdir(exist_ok=True)
    model = Project(project).resolve(f"base: {base}\nsteps: []\n", "base.yaml").plain
    adapter = Adapter(place, "the adapter")
    return not_linear(adapter, bind(adapter, model.weights.specs, model))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_and_vllm_add_what_the_original_adds(kind: str, base_of: Make, tmp_path: Path) -> None:
    family, settings = KINDS[kind]
    base = base_of(family)
    place = saved(base, family, settings, tmp_path / "original")
    assert refusal(base, place, tmp_path) is None
    adapter = Adapter(place, "the adapter")
    rank = served_rank(ranks_of(adapter).values())
    assert rank == (16 if "q_proj" in settings.get("rank_pattern", {}) else 8)
    write_served(adapter, tmp_path / "served", "org/base", rank)

    original, written = loaded(base, place), loaded(base, tmp_path / "served")
    wanted, found = updates(original), updates(written)
    served = load_as_vllm(tmp_path / "served", "org/base", rank, linear_modules(live(base)))
    assert wanted.keys() == found.keys() == served.keys()
    for module, update in wanted.items():
        torch.testing.assert_close(found[module], update, atol=1e-6, rtol=0)
        torch.testing.assert_close(served[module], update, atol=1e-6, rtol=0)
    ids = torch.arange(12)[None] * 5 % 64
    with torch.no_grad():
        torch.testing.assert_close(written(input_ids=ids).logits, original(input_ids=ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_servers_cannot_add_exactly_is_refused(kind: str, base_of: Make, tmp_path: Path) -> None:
    family, settings, named = REFUSED[kind]
    base = base_of(family)
    place = saved(base, family, settings, tmp_path / "original")
    if kind == "changed modules_to_save":
        tensors = load_file(place / "adapter_model.safetensors")
        save_file({n: t + 0.5 if "norm" in n else t for n, t in tensors.items()}, place / "adapter_model.safetensors")
    if kind == "bias":  # PEFT saves the biases as they are in the base, and unchanged copies may be left out
        tensors = load_file(place / "adapter_model.safetensors")
        save_file({n: t + 0.5 if n.endswith(".bias") else t for n, t in tensors.items()}, place / "adapter_model.safetensors")
    assert named in str(refusal(base, place, tmp_path))


def test_vllm_would_refuse_or_misread_the_originals(base_of: Make, tmp_path: Path) -> None:
    """The rules bite: without an export, each of these is an error or another update."""
    base = base_of("llama")
    modules = linear_modules(live(base))
    for name, settings, message in (
        ("dora", {"use_dora": True}, "DoRA"),
        ("saved", {"modules_to_save": ["norm"]}, "modules_to_save"),
        ("large", {"rank_pattern": {"q_proj": 9}}, "a larger rank than r"),
    ):
        place = save_adapter(base, tmp_path / name, seed=3, **settings)
        edit_json(place / "adapter_config.json", base_model_name_or_path="org/base")
        with pytest.raises(Refused, match=message):
            load_as_vllm(place, "org/base", 16, modules)
    place = save_adapter(base, tmp_path / "alpha", seed=3, alpha_pattern={"v_proj": 3})
    with pytest.raises(Refused, match="resolver"):
        load_as_vllm(place, "org/base", 8, modules)
    edit_json(place / "adapter_config.json", base_model_name_or_path="org/base")
    served, wanted = load_as_vllm(place, "org/base", 8, modules), updates(loaded(base, place))
    wrong = {name.rpartition(".")[2] for name, update in wanted.items() if (served[name] - update).abs().max() > 1e-3}
    assert wrong == {"v_proj"}, "alpha_pattern is ignored without a word"
    assert [served_rank([rank]) for rank in (1, 8, 9, 33, 257, 321)] == [8, 8, 16, 64, 320, 512]
    assert {served_rank([rank]) for rank in range(1, 513)} == RANKS
