"""Mixture-of-experts architectures of transformers, the dense ones that become them with the same function, and plans that append experts.

Each row has the tensor names that `save_pretrained` writes, the fields of config.json with sizes, and the settings with which
identical experts compute what one of them computes (see docs/growing.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from workbench.ground.errors import InvalidRecipeError, WorkbenchError, nearest
from workbench.ground.lazy import np
from workbench.grow.expansion.parts import check_places, check_shapes
from workbench.grow.mixtures.mixture import Mixture, numbered
from workbench.models.layout import Model
from workbench.models.skeleton import parse_config
from workbench.steps import NEW, Axis, Grown
from workbench.weights.specs import TensorSpec

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
        serving_all: Name within a layer of the module of experts that serve every token, and the field for their number.
    """

    model_type: str
    architecture: str
    router: str
    experts: str
    top_k: str = "num_experts_per_tok"
    expert: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: tuple[str, ...] = ("intermediate_size",)
    fixed: Mapping[str, object] = field(default_factory=dict)
    shared: tuple[str, str, str] | None = None
    zeros: tuple[str, ...] = ()
    always: str | None = None
    factor: str | None = None
    serving_all: tuple[str, str] | None = None


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
               always="mlp.gate.e_score_correction_bias", factor="routed_scaling_factor", serving_all=("mlp.shared_experts", "n_shared_experts")),
    )
}  # fmt: skip


def _head_dim(config: Mapping[str, object]) -> int:
    """Return the number of channels of an attention head."""
    return whole(config, "head_dim") or whole(config, "hidden_size") // whole(config, "num_attention_heads")


def whole(config: Mapping[str, object], field: str) -> int:
    """Return a whole number of config.json; 0 if the field has none."""
    value = config.get(field)
    return value if isinstance(value, int) else 0


PAIRS: dict[str, dict[str, Callable[[Mapping[str, object]], dict[str, object]]]] = {
    "llama": {
        "mixtral": lambda c: {"sliding_window": None},
        "granitemoe": lambda c: {"attention_multiplier": _head_dim(c) ** -0.5},
    },
    "mistral": {"mixtral": lambda c: {}},
    "qwen2": {"qwen2_moe": lambda c: {}},
    "qwen3": {"qwen3_moe": lambda c: {}},
    "olmo2": {"flex_olmo": lambda c: {}},
    "granite": {"granitemoe": lambda c: {}},
    "ernie4_5": {"ernie4_5_moe": lambda c: {"moe_layer_end_index": whole(c, "num_hidden_layers") - 1}},
}
"""Dense architecture -> mixtures that it can become, the usual one first, with fields derived from the dense config.json."""


def _as_glm(config: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of glm4_moe for a dense model with rotary attention over whole heads and without a sliding window."""
    kind, rope = config["model_type"], config["rope_parameters"]
    assert isinstance(rope, Mapping)
    return {
        "attention_bias": kind == "qwen2" or bool(config.get("attention_bias")),
        "use_qk_norm": kind == "qwen3",
        "head_dim": _head_dim(config),
        "partial_rotary_factor": 1.0,
        "rope_parameters": {**rope, "partial_rotary_factor": 1.0},
    }


SPLIT_PAIRS: dict[str, dict[str, Callable[[Mapping[str, object]], dict[str, object]]]] = {
    kind: {**pairs, **({"glm4_moe": _as_glm} if kind in ("llama", "mistral", "qwen2", "qwen3") else {})}
    for kind, pairs in PAIRS.items()
}
"""Dense architecture -> mixtures into which its neurons can be divided. glm4_moe alone has experts that serve every token: it adds their
output without a gate, and its router has a bias on the choice of experts."""


def chosen_target(model: Model, pairs: Mapping[str, object], into: str, step: str) -> Target:
    """Return the architecture of the result.

    Raises:
        WorkbenchError: If the model cannot become it.
    """
    if into not in pairs:
        raise InvalidRecipeError(
            f"grow {step}: `into: {into}`: {model.config.get('model_type')} cannot become {into} without changing its function; expected "
            f"{', '.join(pairs)}. {nearest(into, TARGETS)}"
        )
    return TARGETS[into]


def mixture_config(parsed: Mapping[str, object], target: Target, changes: Mapping[str, object]) -> dict[str, object]:
    """Return the config.json of a mixture: the dense model's fields that it has, and changed ones.

    Args:
        parsed: The dense model's config.json as transformers reads it.
        target: The mixture.
        changes: Fields with other values.
    """
    known = {*parse_config({"model_type": target.model_type}).to_dict(), "torch_dtype", "dtype"}
    own = {key: value for key, value in parsed.items() if key in known}
    return {**own, **changes, "model_type": target.model_type, "architectures": [target.architecture]}


def dense_layer(model: Model, layer: int) -> dict[str, str]:
    """Return the tensors of a dense feed-forward layer, by part."""
    return {part: f"{model.layout.prefix}{layer}.mlp.{part}.weight" for part in (GATE, UP, DOWN)}


def expert_tensors(model: Model, target: Target, prefix: str, experts: Sequence[Mapping[str, Grown]]) -> dict[str, Grown]:
    """Return the tensors of a layer's experts under the names of the mixture; experts that share a tensor are its parts.

    Args:
        model: The dense model.
        target: The mixture.
        prefix: Name of the layer.
        experts: The matrices of each expert, by part.
    """
    tensors = {
        prefix + name.format(e=e): expert[part] for e, expert in enumerate(experts) for part, name in target.expert.items()
    }
    for name, parts in target.fused.items():
        sizes = [one.spec(model.weights.specs[one.source]) for one in (experts[0][part] for part in parts)]
        joined = tuple(expert[part] for expert in experts for part in parts)
        shape = (len(experts), sum(size.rows for size in sizes), sizes[0].cols)
        tensors[prefix + name] = Grown(joined[0].source, parts=joined, shape=shape)
    return tensors


def check_mixture(model: Model, tensors: Mapping[str, Grown], config: Mapping[str, object], step: str) -> None:
    """Check that the architecture of a config.json needs exactly these tensors, in these shapes.

    Raises:
        WorkbenchError: If it does not.
    """
    specs = {name: grown.spec(model.weights.specs[grown.source]) for name, grown in tensors.items()}
    check_places(config, specs, step, "Try another architecture under `into`.")
    check_shapes(config, specs, step)


def from_base(mixture: Mixture, base: Model, numbers: Sequence[int]) -> dict[str, Grown]:
    """Return the tensors of a mixture with experts of its base, and their rows of the router, after its own.

    Args:
        mixture: The current model.
        base: The recipe's base.
        numbers: Numbers of the base's experts.

    Raises:
        WorkbenchError: If the base has no experts or lacks one of the numbers, or a tensor does not come from the base or has
            another shape there.
    """
    base_mixture = Mixture(base, f"{mixture.step}: the base")
    if beyond := [n for n in numbers if not 0 <= n < base_mixture.count]:
        raise InvalidRecipeError(
            f"grow {mixture.step}: no expert {beyond[0]}: the base has experts 0..{base_mixture.count - 1} in each layer"
        )
    origin, old = mixture.model.weights.origin, mixture.count

    def own_tensor(name: str, i: int) -> Grown:
        like = next((o for e in range(old) if (o := origin(numbered(name, e)))), None)
        source = numbered(like, numbers[i]) if like else None
        if source not in base_mixture.places:
            raise _not_from_base_error(mixture, name)
        return Grown(source, base=True, new=True)

    def shared_tensor(name: str) -> Grown:
        source = origin(name)
        if source is None or source not in base_mixture.places:
            raise _not_from_base_error(mixture, name)
        place, spec = mixture.places[name], mixture.model.weights.specs[name]
        parts = (Grown(name), *(base_mixture.part(source, [n], base=True) for n in numbers))
        return Grown(name, parts=parts, shape=place.shape(spec, old + len(numbers), old))

    return _appended(mixture, base, len(numbers), own_tensor, shared_tensor)


def from_bricks(mixture: Mixture, base: Model, names: Sequence[str], std: float) -> dict[str, Grown]:
    """Return the tensors of a mixture with new experts: the base's feed-forward layers with each brick applied.

    Args:
        mixture: The current model.
        base: The recipe's dense base.
        names: The bricks.
        std: Standard deviation of the router's new rows, which are drawn at random.

    Raises:
        WorkbenchError: If `grow: experts` cannot create this architecture, the base is not dense, or a layer does not come from
            the base or has another shape there.
    """
    model, count = mixture.model, len(names)
    kind = str(model.config.get("model_type"))
    if kind not in TARGETS:
        raise InvalidRecipeError(
            f"grow {mixture.step}: `bricks` support the architectures {', '.join(TARGETS)}; this model is {kind}",
            "`copy` and `base` work with every mixture.",
        )
    target, dense = TARGETS[kind], {layer: _dense(mixture, base, layer) for layer in mixture.layers}

    def own_tensor(name: str, i: int) -> Grown:
        prefix, layer = _layer_prefix(mixture, name)
        part = {prefix + n.format(e=mixture.places[name].number): p for p, n in target.expert.items()}.get(name)
        if part is None:
            raise InvalidRecipeError(f"grow {mixture.step}: {name} is not a known tensor of {target.model_type}")
        return Grown(dense[layer][part], brick=names[i], base=True, new=True)

    def shared_tensor(name: str) -> Grown:
        (prefix, layer), place, spec = _layer_prefix(mixture, name), mixture.places[name], model.weights.specs[name]
        leaf = name.removeprefix(prefix)
        added = Axis(np.concatenate([place.index(range(mixture.count)), np.full(count * place.size, NEW)]))
        if leaf == target.router:
            return Grown(name, rows=added, std=std)
        if leaf in target.zeros:
            return Grown(name, cols=added)
        if leaf not in target.fused:
            raise InvalidRecipeError(f"grow {mixture.step}: {name} is not a known tensor of {target.model_type}")
        parts = (Grown(dense[layer][p], brick=brick, base=True, new=True) for brick in names for p in target.fused[leaf])
        return Grown(name, parts=(Grown(name), *parts), shape=place.shape(spec, mixture.count + count, mixture.count))

    return _appended(mixture, base, count, own_tensor, shared_tensor)


def routers(mixture: Mixture) -> dict[int, str]:
    """Return the tensor of each layer's router, for architectures that `grow: experts` can create."""
    target = TARGETS[mixture.model.config["model_type"]]
    return {layer: f"{mixture.model.layout.prefix}{layer}.{target.router}" for layer in mixture.layers}


def corrections(mixture: Mixture) -> dict[int, list[str]]:
    """Return the tensors of each layer that are added to the router's scores before experts are selected."""
    target = TARGETS[mixture.model.config["model_type"]]
    return {layer: [f"{mixture.model.layout.prefix}{layer}.{n}" for n in target.zeros] for layer in mixture.layers}


def _appended(
    mixture: Mixture, base: Model, count: int, own_tensor: Callable[[str, int], Grown], shared_tensor: Callable[[str], Grown]
) -> dict[str, Grown]:
    """Return the tensors of a mixture with `count` experts after its own.

    Args:
        mixture: The current model.
        base: The recipe's base.
        count: Number of new experts.
        own_tensor: Function from (tensor that belongs to the last expert, i) to the tensor of the i-th new expert.
        shared_tensor: Function from a tensor with a part for every expert to the same tensor with the new experts' parts appended.
    """
    tensors: dict[str, Grown] = {}
    for name in mixture.model.layout.names:
        place = mixture.places.get(name)
        tensors[name] = Grown(name) if place is None or place.number is not None else shared_tensor(name)
        if place is not None and place.number == mixture.count - 1:
            tensors |= {numbered(name, mixture.count + i): own_tensor(name, i) for i in range(count)}
    for name, grown in tensors.items():
        own_specs, base_specs = mixture.model.weights.specs, base.weights.specs
        if grown.base:
            like = own_specs[numbered(name, 0)]
            if (spec := grown.spec(base_specs[grown.source])).shape != like.shape:
                raise _shape_error(mixture, grown.source, spec, like)
        for part in grown.parts:
            spec, like = part.spec((base_specs if part.base else own_specs)[part.source]), own_specs[grown.source]
            split_columns = mixture.places[grown.source].columns
            if (spec.rows if split_columns else spec.cols) != (like.rows if split_columns else like.cols):
                raise _shape_error(mixture, part.source, spec, like)
    return tensors


def _shape_error(mixture: Mixture, source: str, spec: TensorSpec, like: TensorSpec) -> WorkbenchError:
    return InvalidRecipeError(
        f"grow {mixture.step}: {source} has the shape {list(spec.shape)} in the base and {list(like.shape)} in the current model",
        "Add experts before the step that changes sizes.",
    )


def _dense(mixture: Mixture, base: Model, layer: int) -> dict[str, str]:
    """Return the tensors, by part, of the base's dense feed-forward layer that a layer comes from."""
    model = mixture.model
    places = (base.layout.layer(o) for n in model.layout.in_layer(layer) if (o := model.weights.origin(n)))
    base_layer = next((p for p in places if p is not None), None)
    parts = {part: f"{base.layout.prefix}{base_layer}.mlp.{part}.weight" for part in (GATE, UP, DOWN)}
    if missing := [n for n in parts.values() if n not in base.weights.specs]:
        raise InvalidRecipeError(
            f"grow {mixture.step}: the base has no {missing[0]}: `bricks` need a dense feed-forward layer of the "
            f"base from which layer {layer} was made",
            "Use `bricks` after `grow: experts` on a dense base. If the base is a mixture, use `base: N` or `copy: N`.",
        )
    return parts


def _layer_prefix(mixture: Mixture, name: str) -> tuple[str, int]:
    """Return the name prefix and the number of the layer that a tensor belongs to."""
    layer = mixture.places[name].layer
    return f"{mixture.model.layout.prefix}{layer}.", layer


def _not_from_base_error(mixture: Mixture, name: str) -> WorkbenchError:
    return InvalidRecipeError(
        f"grow {mixture.step}: {name} does not come from an expert of the base, so `base` has nothing to add to it",
        "Use `copy: N` to copy an expert of the current model.",
    )
