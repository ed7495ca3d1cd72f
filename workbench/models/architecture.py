"""Architecture facts: names of embeddings and heads, tied embeddings, transposed matrices, and what config.json states.

All parts of the package use these tables, so that a name that is added here is known everywhere. The fields of config.json are listed in
`weights/header.py`, which checks their values when a file is read. Names on disk and in a live model may differ by a root prefix.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.weights.header import DEPTHS, POSITIONS, TEXT_CONFIGS
from workbench.weights.specs import Source, TensorSpec, Weights

if TYPE_CHECKING:
    from torch import nn


# Modules of the input embeddings: Llama and most others | GPT-2 | GPT-NeoX | BLOOM, Falcon | Llama's first release, InternLM2 |
# Mamba, RWKV, XLM and Nemotron-H in transformers | Mamba in its authors' files | T5, BART | GPT | XLNet | CPM-Ant.
EMBEDDINGS = (
    "embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings", "backbone.embedding", "shared",
    "tokens_embed", "word_embedding", "input_embedding",
)  # fmt: skip
# Modules of the output embeddings: most models | GPT-NeoX | Llama's first release, InternLM2 | BERT | RoBERTa | BioGPT, TrOCR |
# Whisper | ELECTRA | XLM | XLNet.
HEADS = (
    "lm_head", "embed_out", "output", "cls.predictions.decoder", "lm_head.decoder", "output_projection", "proj_out",
    "generator_lm_head", "pred_layer.proj", "lm_loss",
)  # fmt: skip
# Names above that some models also use for a matrix inside a layer, such as `blocks.0.attention.output` in RWKV.
_USED_IN_LAYERS = ("output", "shared", "embeddings", "proj_out", "output_projection")
# Heads whose names are words that other modules end with too: RWKV | ModernBERT.
_WHOLE_HEADS = ("head", "decoder")
# `model_type` -> module of the output embeddings, where it is not `lm_head` or `embed_out`.
_OTHER_HEADS = {
    **dict.fromkeys(("bert", "big_bird", "ernie", "megatron-bert", "rembert", "roc_bert", "roformer"), "cls.predictions.decoder"),
    **dict.fromkeys(("bert-generation", "camembert", "data2vec-text", "roberta", "roberta-prelayernorm"), "lm_head.decoder"),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "xmod"), "lm_head.decoder"),
    **dict.fromkeys(("biogpt", "trocr"), "output_projection"),
    "whisper": "proj_out",
    "electra": "generator_lm_head",
    "modernbert-decoder": "decoder",
    "xlm": "pred_layer.proj",
    "xlnet": "lm_loss",
    "rwkv": "head",
}
# Names of POSITIONS in config.json of RWKV | Bailing, Kimi Linear | DBRX, MPT | Whisper.
_OTHER_POSITIONS = ("context_length", "model_max_length", "max_seq_len", "max_target_positions")
_MOST_POSITIONS = 10**9  # a larger number stands for "no limit"
# Embeddings of tokens and positions. `embed_out` is a head, and `embedding_norm` is the final norm of LFM2.
_BEFORE_LAYERS = re.compile(r"embed(?!_out|ding_norm)|wte|wpe")

# Models whose linear layers are transformers' Conv1D, which stores a weight as [in, out], and the names of these layers.
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder"})
CONV1D_LAYERS = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})

# Fields of config.json with one entry per layer, for models that have none of DEPTHS (Nemotron-H).
LAYER_KINDS = ("layers_block_type",)

# Weights that write to the residual stream in each layer of dense models:
#   llama mistral qwen2 qwen3 gemma olmo granite   self_attn.o_proj, mlp.down_proj
#   gpt2 starcoder2                                attn.c_proj, mlp.c_proj (self_attn.o_proj, mlp.c_proj)
#   gpt_neox falcon bloom                          attention.dense | self_attention.dense, mlp.dense_4h_to_h
#   phi opt                                        self_attn.dense | self_attn.out_proj, mlp.fc2 | fc2
#   mpt gptj gpt_neo                               attn.out_proj | attn.attention.out_proj, ffn.down_proj | mlp.fc_out | mlp.c_proj
ATTENTION_OUT = re.compile(
    r"(self_attn\.(o_proj|dense|out_proj)|attn\.(c_proj|out_proj)|attn\.attention\.out_proj|(self_)?attention\.dense|^mixer\.o_proj)$"
)
SHARED_OUT = re.compile(r"^(mlp|feed_forward)\.shared_(experts?|mlp)\.down_proj$")
MLP_OUT = re.compile(r"((^|\.)mlp\.(down_proj|c_proj|dense_4h_to_h|fc2|fc_out)|^ffn\.down_proj|^fc2|^mixer\.down_proj)$")
# Tensors of a layer that write to the residual stream: outputs of attention, state-space models and convolutions, and of feed-forward
# parts, experts and shared experts. Experts can share one tensor, with or without `.weight`, and biases are `down_proj_bias` in gpt_oss.
MIXER_WRITERS = re.compile(
    r"^((self_)?att(n|ention)(\.attention)?|linear_attn|mamba|conv|mixer)\.(o_proj|out_proj|dense|c_proj)(\.\w+)?$"
    r"|^self_attention\.experts\.(output_linear\.weight|bias)$"  # JetMoE
)
FFN_WRITERS = re.compile(
    r"^((mlp|ffn|feed_forward|mixer|block_sparse_moe|shared_mlp)\.)?((shared_)?experts?\.(\d+\.)?|shared_mlp\.)?"
    r"(down_proj|c_proj|dense_4h_to_h|fc2|fc_out|w2|output_linear)(\.\w+|_bias)?$"
    r"|^mlp\.bias$"  # JetMoE
)

# Fields of config.json for the number of experts of a layer.
EXPERT_COUNTS = ("num_local_experts", "num_experts", "moe_num_experts", "n_routed_experts", "num_routed_experts")


def is_embedding_module(module: str) -> bool:
    """Return whether a module, by its name, holds a model's input embeddings."""
    return _is_one_of(module, EMBEDDINGS)


def is_head_module(module: str) -> bool:
    """Return whether a module, by its name, is the output embedding of a language model."""
    return module in _WHOLE_HEADS or _is_one_of(module, HEADS)


def is_embedding(tensor: str) -> bool:
    """Return whether a tensor, by its name, is the weight of the input embeddings."""
    return tensor.endswith(".weight") and is_embedding_module(tensor.removesuffix(".weight"))


def is_head(tensor: str) -> bool:
    """Return whether a tensor, by its name, is the weight of the output embedding."""
    return tensor.endswith(".weight") and is_head_module(tensor.removesuffix(".weight"))


def is_before_layers(tensor: str) -> bool:
    """Return whether a tensor outside the layers is used before the first one: embeddings of tokens or positions."""
    return bool(_BEFORE_LAYERS.search(tensor)) or is_embedding(tensor)


def is_table(tensor: str) -> bool:
    """Return whether a tensor has one row per token or position: embeddings or a head."""
    return is_before_layers(tensor) or "lm_head" in tensor or is_head(tensor)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a live module is transformers' Conv1D, which stores its weight as [in, out]."""
    return type(module).__name__ == "Conv1D"


def is_conv1d_layer(config: Mapping[str, object], module: str) -> bool:
    """Return whether a module, by its name and the model's config.json, is transformers' Conv1D."""
    return config.get("model_type") in CONV1D_MODELS and module.rpartition(".")[2] in CONV1D_LAYERS


def text_parts(config: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """Yield config.json, then its parts that describe the text decoder of a multimodal model."""
    yield config
    for field in TEXT_CONFIGS:
        part = config.get(field)
        if isinstance(part, Mapping):
            yield part


def head_of(config: Mapping[str, object], embeddings: str) -> str:
    """Return the tensor name that transformers expects for the head of a model if it is not tied."""
    if module := _OTHER_HEADS.get(str(config.get("model_type"))):
        return f"{module}.weight"
    head = "embed_out.weight" if embeddings.endswith("embed_in.weight") else "lm_head.weight"
    return f"language_model.{head}" if embeddings.startswith("language_model.model.") else head


def model_depth(config: Mapping[str, object]) -> int:
    """Return the number of layers that config.json or its text decoder's part states; 0 if neither does."""
    for part in text_parts(config):
        for key in DEPTHS:
            if isinstance(depth := part.get(key), (int, float)) and depth:
                return int(depth)
        for key in LAYER_KINDS:
            if isinstance(kinds := part.get(key), list):
                return len(kinds)
    return 0


def max_positions(config: Any) -> int | None:
    """Return the number of positions that a model takes; None if its configuration does not state it.

    Args:
        config: The content of config.json, or a configuration object of transformers.
    """
    keys = (*POSITIONS, *_OTHER_POSITIONS)
    if isinstance(config, Mapping):
        stated = [part.get(key) for part in text_parts(config) for key in keys]
    else:
        parsed = config.get_text_config(decoder=True)
        stated = [getattr(parsed, key, None) for key in keys]
    return next((int(value) for value in stated if isinstance(value, (int, float)) and 0 < value <= _MOST_POSITIONS), None)


def _is_one_of(module: str, names: tuple[str, ...]) -> bool:
    """Return whether a module has one of the names; some names count only outside the layers."""
    known = next((name for name in names if module == name or module.endswith(f".{name}")), None)
    return known is not None and not (known in _USED_IN_LAYERS and any(part.isdigit() for part in module.split(".")))


def is_usual_decoder(config: Mapping[str, object]) -> bool:
    """Return whether config.json names a `...ForCausalLM` class of an architecture that is part of transformers.

    This reads no code of transformers, which takes a second to import. `skeleton.check_decoder` decides the other cases.
    """
    architectures, kind = config.get("architectures"), config.get("model_type")
    named = isinstance(architectures, list) and len(architectures) == 1 and str(architectures[0]).endswith("ForCausalLM")
    if not named or not isinstance(kind, str) or not kind.isidentifier():
        return False
    library = find_spec("transformers")
    return any((Path(folder) / "models" / kind).is_dir() for folder in (library and library.submodule_search_locations) or ())


_ROOTS = ("model.", "transformer.", "gpt_neox.", "language_model.", "thinker.")


def disk_weight(module: str, specs: Mapping[str, TensorSpec], label: str) -> str:
    """Return the name on disk of a live module's weight.

    The names of a base that was saved without its head, or inside a larger model, lack a root prefix or have another one.

    Args:
        module: A module name of the live model: "model.layers.0.self_attn.q_proj".
        specs: The base's tensors.
        label: The owner of the module name in messages.
    """
    name = f"{module}.weight"
    stored = counterpart(name, specs)
    if stored is None:
        hint = "The adapter was trained on another architecture: use its own base in the recipe."
        if is_head_module(module):
            hint = "The base ties its head to its embeddings, and an update of the head alone would untie them: train the adapter without the head."
        raise WorkbenchError(f"{label}: module {module} has no weight in the base.{nearest_name(name, specs)}", hint)
    return stored


def live_module(weight: str, modules: Collection[str]) -> str:
    """Return the live model's module that a weight on disk belongs to; the inverse of `disk_weight`.

    Args:
        weight: A tensor name on disk: "h.0.mlp.c_proj.weight".
        modules: Module names of the live model.
    """
    name = weight.removesuffix(".weight")
    module = counterpart(name, modules)
    if module is None:
        raise WorkbenchError(
            f"{weight}: the live model has no module {name}.{nearest_name(name, modules)}",
            "transformers renames or fuses this architecture's weights, which is not supported here.",
        )
    return module


def counterpart(name: str, known: Collection[str]) -> str | None:
    """Return the name among `known` that equals a name with or without a root prefix; None if there is none."""
    return next((c for c in with_and_without_root(name) if c in known), None)


def nearest_name(name: str, known: Collection[str]) -> str:
    """Return a "Did you mean" sentence with a leading space if a known name is similar, else an empty text."""
    close = get_close_matches(name, known, n=1, cutoff=0.8)
    return f" Did you mean '{close[0]}'?" if close else ""


def with_and_without_root(name: str) -> Iterator[str]:
    """Yield a name, then the name without its root prefix, with each known root prefix added, and in a multimodal model."""
    yield name
    yield from (name.removeprefix(root) for root in _ROOTS if name.startswith(root))
    yield from (root + name for root in _ROOTS)
    for here, there in (
        ("model.", "model.language_model."),
        ("model.language_model.", "model."),
    ):  # a text decoder in a multimodal model
        if name.startswith(here):
            yield there + name.removeprefix(here)


def vocabulary_tensors(specs: Mapping[str, TensorSpec], label: str = "base") -> list[str]:
    """Return the names of the tensors with one row per token, embeddings first.

    These are embeddings and heads, with their biases, that have as many rows as the first embedding.

    Raises:
        WorkbenchError: If there is no such tensor.
    """
    modules = {n: n.rpartition(".")[0] for n, s in specs.items() if n.endswith((".weight", ".bias")) and 1 <= len(s.shape) <= 2}
    names = [n for n, module in modules.items() if is_embedding_module(module) or is_head_module(module)]
    if not names:
        raise WorkbenchError(
            f"{label}: no tensor has the name of an embedding (names are {', '.join(list(specs)[:3])}, …)",
            "Only vocabularies of decoder-only language models can be aligned. Remove `tokenizer` from the recipe.",
        )
    names.sort(key=lambda n: is_head_module(modules[n]))
    rows = specs[names[0]].shape[0]
    return [n for n in names if specs[n].shape[0] == rows]


def tied_embeddings(names: Iterable[str], config: Mapping[str, object]) -> tuple[str, str] | None:
    """Return the names of embeddings and head of a language model that stores one tensor for both; None for other models.

    Args:
        names: Names of the stored tensors.
        config: The content of config.json. Multimodal models have the flag `tie_word_embeddings` in the text decoder's part.

    Returns:
        (embeddings, head). The head is not stored; its name is the one that transformers expects in an untied model.
    """
    names = list(names)
    flag = next((part["tie_word_embeddings"] for part in text_parts(config) if "tie_word_embeddings" in part), True)
    tables = [name for name in names if is_embedding(name)]
    if not flag or not tables or any(map(is_head, names)):
        return None
    embeddings = min(tables, key=len)
    return embeddings, head_of(config, embeddings)


def untied_config(config: Mapping[str, object]) -> dict[str, object]:
    """Return config.json for the model with an untied head."""
    changed: dict[str, object] = {**config, "tie_word_embeddings": False}
    for field in TEXT_CONFIGS:
        if isinstance(part := config.get(field), dict):
            changed[field] = {**part, "tie_word_embeddings": False}
    return changed


class UntiedWeights:
    """Weights with an untied head, which is a copy of the embeddings after all other tensors."""

    def __init__(self, tied: Weights, embeddings: str, head: str) -> None:
        self.tied = tied
        self.embeddings = embeddings
        self.head = head
        self._specs = {**tied.specs, head: tied.specs[embeddings]}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The specs of the tied weights, and the head."""
        return self._specs

    def origin(self, name: str) -> str | None:
        """Delegate to the tied weights; bricks address the head by its own name."""
        return name if name == self.head else self.tied.origin(name)

    def open(self, name: str, device: torch.device) -> Source:
        """Open a tensor; the head reads the embeddings."""
        return self.tied.open(self.embeddings if name == self.head else name, device)


def with_head_of(weights: Weights, base: Weights, config: Mapping[str, object]) -> Weights:
    """Untie weights if the base has a head of its own and they do not; their embeddings are then used as the head."""
    tied = tied_embeddings(weights.specs, config)
    return UntiedWeights(weights, *tied) if tied and tied[1] in base.specs else weights
