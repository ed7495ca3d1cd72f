"""Mixture-of-experts architectures of transformers, and the dense architectures that can become one with the same function.

Each row has the tensor names that `save_pretrained` writes, the fields of config.json with sizes, and the settings with which
identical experts compute what one of them computes (see docs/growing.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
"""Matrices of a dense gated feed-forward layer: `mlp.gate_proj` and so on."""


@dataclass(frozen=True)
class Target:
    """A mixture-of-experts architecture.

    Attributes:
        model_type: Value of `model_type` in config.json.
        architecture: Value of `architectures` in config.json.
        router: Name of the router's weight [experts, hidden] within a layer.
        experts: Field of config.json for the number of experts.
        top_k: Field of config.json for the number of experts per token.
        expert: Part -> name of an expert's matrix within a layer, with `{e}` for its number; empty if all experts are in one
            tensor.
        fused: Name of a tensor [experts, rows, cols] -> parts that are stacked in it by rows.
        sizes: Fields of config.json for the number of neurons of an expert.
        fixed: Fields of config.json with a required value.
        shared: Names within a layer of a shared expert and of its gate, and the field for its size. Its output starts as zero.
        zeros: Names of further tensors [1, experts] that start as zeros.
        always: Name of the router's bias on the choice of experts [experts], which does not change their weights.
        factor: Field of config.json by which the weights of the selected experts are multiplied.
        beside: Name within a layer of the module of experts that serve every token, and the field for their number.
    """

    model_type: str
    architecture: str
    router: str
    experts: str
    top_k: str = "num_experts_per_tok"
    expert: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: tuple[str, ...] = ("intermediate_size",)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    shared: tuple[str, str, str] | None = None
    zeros: tuple[str, ...] = ()
    always: str | None = None
    factor: str | None = None
    beside: tuple[str, str] | None = None


_CLASSIC = {part: f"mlp.experts.{{e}}.{part}.weight" for part in (GATE, UP, DOWN)}
_NORMED = {"norm_topk_prob": True}
TARGETS = {
    target.model_type: target
    for target in (
        Target("mixtral", "MixtralForCausalLM", "block_sparse_moe.gate.weight", "num_local_experts",
               expert={part: f"block_sparse_moe.experts.{{e}}.{w}.weight" for part, w in ((GATE, "w1"), (DOWN, "w2"), (UP, "w3"))}),
        Target("qwen2_moe", "Qwen2MoeForCausalLM", "mlp.gate.weight", "num_experts", expert=_CLASSIC, sizes=("intermediate_size", "moe_intermediate_size"),
               fixed={**_NORMED, "decoder_sparse_step": 1, "mlp_only_layers": []},
               shared=("mlp.shared_expert", "mlp.shared_expert_gate.weight", "shared_expert_intermediate_size")),
        Target("qwen3_moe", "Qwen3MoeForCausalLM", "mlp.gate.weight", "num_experts", expert=_CLASSIC, sizes=("intermediate_size", "moe_intermediate_size"),
               fixed={**_NORMED, "decoder_sparse_step": 1, "mlp_only_layers": []}),
        Target("flex_olmo", "FlexOlmoForCausalLM", "mlp.gate.weight", "num_experts", expert=_CLASSIC, fixed=_NORMED),
        Target("granitemoe", "GraniteMoeForCausalLM", "block_sparse_moe.router.layer.weight", "num_local_experts",
               fused={"block_sparse_moe.input_linear.weight": (GATE, UP), "block_sparse_moe.output_linear.weight": (DOWN,)}),
        Target("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", "mlp.gate.weight", "moe_num_experts", "moe_k", expert=_CLASSIC,
               sizes=("intermediate_size", "moe_intermediate_size"), fixed={"moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_layer_interval": 1},
               zeros=("mlp.moe_statics.e_score_correction_bias",)),
        Target("glm4_moe", "Glm4MoeForCausalLM", "mlp.gate.weight", "n_routed_experts", expert=_CLASSIC, sizes=("intermediate_size", "moe_intermediate_size"),
               fixed={**_NORMED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0},
               always="mlp.gate.e_score_correction_bias", factor="routed_scaling_factor", beside=("mlp.shared_experts", "n_shared_experts")),
    )
}  # fmt: skip


def _head_dim(config: Mapping[str, Any]) -> int:
    """Return the number of channels of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


PAIRS: dict[str, dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "llama": {
        "mixtral": lambda c: {"sliding_window": None},
        "granitemoe": lambda c: {"attention_multiplier": _head_dim(c) ** -0.5},
    },
    "mistral": {"mixtral": lambda c: {}},
    "qwen2": {"qwen2_moe": lambda c: {}},
    "qwen3": {"qwen3_moe": lambda c: {}},
    "olmo2": {"flex_olmo": lambda c: {}},
    "granite": {"granitemoe": lambda c: {}},
    "ernie4_5": {"ernie4_5_moe": lambda c: {"moe_layer_end_index": c["num_hidden_layers"] - 1}},
}
"""Dense architecture -> mixtures that it can become, the usual one first, with fields derived from the dense config.json."""


def _as_glm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of glm4_moe for a dense model with rotary attention over whole heads and without a sliding window."""
    kind = config["model_type"]
    return {
        "attention_bias": kind == "qwen2" or bool(config.get("attention_bias")),
        "use_qk_norm": kind == "qwen3",
        "head_dim": _head_dim(config),
        "partial_rotary_factor": 1.0,
        "rope_parameters": {**config["rope_parameters"], "partial_rotary_factor": 1.0},
    }


SPLIT_PAIRS: dict[str, dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    kind: {**pairs, **({"glm4_moe": _as_glm} if kind in ("llama", "mistral", "qwen2", "qwen3") else {})}
    for kind, pairs in PAIRS.items()
}
"""Dense architecture -> mixtures into which its neurons can be divided. glm4_moe alone has experts that serve every token: it adds their
output without a gate, and its router has a bias on the choice of experts."""
