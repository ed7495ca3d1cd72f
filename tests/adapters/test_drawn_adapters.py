"""Adapters of drawn PEFT configurations: one with weight 1 gives the logits of PEFT's own forward.

Both forwards run in float64, so that they differ by the weights alone: our updates are computed in float32 and added once, with 2⁻²⁴ of a
weight an operation. In these models that changed a logit by at most 2⁻¹⁸ of the largest (RandLoRA's long sums; 2⁻²¹ else) in 600 examples;
a wrong scale or a module left out changes it by more than 2⁻¹⁰.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from worlds.flavours import Flavour, logits, reference, relative, resolved, save_base, save_flavour
from worlds.fuzzing import EXAMPLES, fuzz
from worlds.project import CPU
from worlds.tiny import tensors_of

from workbench.models.live import compute, live_model
from workbench.run.compose import compose

BOUND = 2.0**-16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Family -> linear layers, those of them that read a feed-forward's hidden state, embeddings and norms.
FAMILIES: dict[str, tuple[tuple[str, ...], str, str, str]] = {
    "llama": (LLAMA, "down_proj", "embed_tokens", "input_layernorm"),
    "llama_untied": (LLAMA, "down_proj", "embed_tokens", "norm"),
    "qwen2": (LLAMA, "down_proj", "embed_tokens", "post_attention_layernorm"),
    "gemma2": (LLAMA, "down_proj", "embed_tokens", "norm"),
    "gpt2": (("c_attn", "c_fc", "attn.c_proj", "mlp.c_proj"), "mlp.c_proj", "wte", "ln_f"),
    "gpt_neox": (("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), "dense_4h_to_h", "embed_in", "final_layer_norm"),
    "opt": (("q_proj", "v_proj", "out_proj", "fc1", "fc2"), "fc2", "embed_tokens", "final_layer_norm"),
    "mixtral": (("q_proj", "k_proj", "v_proj", "o_proj"), "", "embed_tokens", "norm"),
    "qwen3_moe": (("q_proj", "k_proj", "o_proj"), "", "embed_tokens", "norm"),
}  # fmt: skip
PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight")
ALL, BIASES = tuple(FAMILIES), ("gpt2", "opt", "gpt_neox")
DENSE = ALL[:-2]
LINEAR = tuple(family for family in ALL if family != "gpt2")  # PEFT wraps nn.Linear alone
Draw = Callable[[st.SearchStrategy[Any]], Any]
Fields = Callable[[Draw, str, list[str]], dict[str, Any]]


def one_of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


def patterns(draw: Draw, targets: list[str], values: st.SearchStrategy[Any]) -> dict[str, Any]:
    """Numbers for some modules: by name, by a path with a layer, by an expression."""
    forms = one_of("{}", ".*1.*{}", "^{}", r"(layers|h)\.0\..*{}")
    chosen = draw(st.lists(one_of(*targets), max_size=2, unique=True))
    return {draw(forms).format(name.replace(".", r"\.")): draw(values) for name in chosen}


def lora(extra: str = "") -> Fields:
    """LoRA with one of the things that can stand beside it."""

    def fields(draw: Draw, family: str, targets: list[str]) -> dict[str, Any]:
        _, _, embeddings, norm = FAMILIES[family]
        alphas = one_of(1, 3, 16, 0.5, 0)
        made: dict[str, Any] = {"r": draw(one_of(1, 2, 4, 5)), "lora_alpha": draw(alphas), "use_rslora": draw(st.booleans())}
        made["alpha_pattern"] = patterns(draw, targets, alphas)
        if extra != "parameters":
            made["rank_pattern"] = patterns(draw, targets, one_of(2, 3, 6))
        some: dict[str, Callable[[], dict[str, Any]]] = {
            "dora": lambda: {"use_dora": True},
            "bias": lambda: draw(one_of({"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True})),
            "saved": lambda: {"modules_to_save": draw(st.lists(one_of(norm, embeddings, "lm_head"), min_size=1, max_size=2, unique=True))},
            "tokens": lambda: {"trainable_token_indices": draw(st.lists(st.integers(0, 63), min_size=1, max_size=4, unique=True))},
            "ends": lambda: {"target_modules": [*targets, embeddings, *draw(one_of([], ["lm_head"]))], "use_dora": draw(st.booleans()),
                             "ensure_weight_tying": family != "gpt2" and draw(st.booleans())},
            "layers": lambda: {"layers_to_transform": draw(st.lists(st.integers(0, 1), min_size=1, max_size=2, unique=True))},
            "parameters": lambda: {"target_parameters": draw(st.lists(one_of(*PARAMETERS), min_size=1, unique=True))},
        }  # fmt: skip
        return made | (some[extra]() if extra else {})

    return fields


def lycoris(draw: Draw, _family: str, targets: list[str]) -> dict[str, Any]:
    return {"r": draw(one_of(1, 2, 4)), "alpha": draw(one_of(1, 6, 0.5)), "rank_pattern": patterns(draw, targets, one_of(2, 3)),
            "alpha_pattern": patterns(draw, targets, one_of(2, 9))}  # fmt: skip


def ia3(draw: Draw, family: str, targets: list[str]) -> dict[str, Any]:
    feedforward = [name for name in targets if name == FAMILIES[family][1] or draw(st.booleans())]
    return {"feedforward_modules": feedforward}


# Kind -> families, PEFT's class and its fields beside `target_modules`.
KINDS: dict[str, tuple[tuple[str, ...], str, Fields]] = {
    "lora": (ALL, "LoraConfig", lora()),
    **{f"lora with {extra}": (ALL, "LoraConfig", lora(extra)) for extra in ("dora", "saved", "tokens", "ends", "layers")},
    "lora with bias": (BIASES, "LoraConfig", lora("bias")),
    "lora with parameters": (("mixtral", "qwen3_moe"), "LoraConfig", lora("parameters")),
    "tokens": (ALL, "TrainableTokensConfig", lambda draw, family, _: {
        "target_modules": [FAMILIES[family][2]], "token_indices": draw(st.lists(st.integers(0, 63), min_size=1, max_size=5, unique=True))}),
    "adalora": (DENSE, "AdaLoraConfig", lambda draw, *_: {
        "init_r": draw(one_of(1, 3, 5)), "target_r": 1, "lora_alpha": draw(one_of(1, 7, 32)), "total_step": 9}),
    "loha": (LINEAR, "LoHaConfig", lycoris),
    "lokr": (LINEAR, "LoKrConfig", lambda draw, *rest: {
        **lycoris(draw, *rest), "decompose_both": draw(st.booleans()), "decompose_factor": draw(one_of(-1, 2, 4))}),
    "ia3": (ALL, "IA3Config", ia3),
    "oft": (LINEAR, "OFTConfig", lambda draw, *_: {
        "oft_block_size": draw(one_of(2, 4, 8, 16)), "block_share": draw(st.booleans()), "use_cayley_neumann": draw(st.booleans()),
        "num_cayley_neumann_terms": draw(st.integers(1, 6)), "bias": draw(one_of("none", "all"))}),
    "boft": (LINEAR, "BOFTConfig", lambda draw, *_: {
        **draw(one_of({"boft_block_size": 4}, {"boft_block_size": 2}, {"boft_block_size": 0, "boft_block_num": 8})),
        "bias": draw(one_of("none", "all", "boft_only"))}),
    "hra": (LINEAR, "HRAConfig", lambda draw, *_: {"r": draw(st.integers(1, 6)), "apply_GS": draw(st.booleans())}),
    "vera": (DENSE, "VeraConfig", lambda draw, *_: {
        "r": draw(one_of(1, 3, 9)), "save_projection": draw(st.booleans()), "projection_prng_key": draw(st.integers(0, 9)),
        "d_initial": draw(one_of(0.1, 1.0))}),
    "fourierft": (DENSE, "FourierFTConfig", lambda draw, family, targets: {
        "n_frequency": draw(one_of(1, 33, 200)), "scaling": draw(one_of(1.0, 30.0)), "random_loc_seed": draw(st.integers(0, 9)),
        "n_frequency_pattern": {draw(one_of(*targets)): draw(one_of(5, 60))} if draw(st.booleans()) else {}}),
    "randlora": (DENSE, "RandLoraConfig", lambda draw, *_: {
        "r": draw(one_of(2, 5, 16)), "randlora_alpha": draw(one_of(1, 9)), "save_projection": draw(st.booleans()),
        **draw(one_of({}, {"sparse": True}, {"very_sparse": True}))}),
    "vblora": (DENSE, "VBLoRAConfig", lambda draw, *_: {
        "r": draw(one_of(1, 3)), "num_vectors": draw(one_of(4, 9)), "vector_length": draw(one_of(8, 16)), "topk": draw(one_of(1, 2)),
        "save_only_topk_weights": draw(st.booleans())}),
}  # fmt: skip


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Path]:
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(family: str, dtype: torch.dtype) -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = save_base(tmp_path_factory.mktemp("bases") / family, family, dtype)
        return made[family, dtype]

    return get


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(fuzz, max_examples=max(2, EXAMPLES // 8))
def test_drawn_adapter(kind: str, data: st.DataObject, base_of: Callable[[str, torch.dtype], Path], tmp_path: Path) -> None:
    families, config, fields = KINDS[kind]
    family, dtype, stored = (data.draw(one_of(*values)) for values in (families, DTYPES, DTYPES))
    targets = data.draw(st.lists(one_of(*FAMILIES[family][0]), min_size=1, max_size=3, unique=True))
    made = {"target_modules": targets, **fields(data.draw, family, targets)}
    if family == "gpt2" and kind != "tokens":
        made["fan_in_fan_out"] = config != "LoraConfig" or data.draw(st.booleans())  # PEFT corrects LoRA's
    if kind != "tokens" and data.draw(st.integers(0, 3)) == 0:
        made.setdefault("modules_to_save", [FAMILIES[family][3]])
    base, out = base_of(family, dtype), Path(tempfile.mkdtemp(dir=tmp_path))
    adapter = save_flavour(Flavour(family, made, peft=config), base, out / "adapter")
    if kind != "vblora":  # PEFT does not load its chosen weights in another dtype
        # PEFT stores whole tensors beside an adapter of embeddings and of saved modules, some of them twice.
        own = tensors_of(base)
        whole = re.compile(r".*\.(base_layer|modules_to_save|original_module)\..*")
        tensors = {name: t if whole.match(name) or name.removeprefix("base_model.model.") in own else t.to(stored)
                   for name, t in tensors_of(adapter).items()}  # fmt: skip
        save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    recipe = resolved(base, adapter, out)
    model = compose(recipe, CPU).model
    full = compute(model, torch.float32, CPU)
    ours, theirs = logits(live_model(model.config, full, base, CPU)), reference(base, adapter)
    assert relative(ours, logits(theirs)) <= BOUND
    for name, tensor in compute(model, torch.bfloat16, CPU).items():
        assert torch.equal(tensor, full[name].bfloat16()), "one rounding, from float32"
