"""Adapters as plain low-rank updates of linear layers: beside the weights, for LoRA servers, and for llama.cpp.

LoRA servers read `r`, `lora_alpha` and the factors. They ignore `rank_pattern` and `alpha_pattern`, and refuse DoRA and `modules_to_save`;
so a module with a rank of its own would be scaled wrongly without an error. They get plain LoRA of one rank, whose scaling is part of
the factors.

llama.cpp loads a GGUF adapter beside a GGUF base. Its converter renames the tensors of a base, reorders the rows of some of them, and
transposes others. An adapter acts on the converted base, so its factors have to follow. Families whose conversion is not known here are
refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.adapters.export import write_adapter
from workbench.adapters.lora import FactorPair, LowRank
from workbench.adapters.read import WEIGHTS
from workbench.ground.errors import WorkbenchError, shell
from workbench.ground.lazy import torch
from workbench.weights import lowrank
from workbench.weights.lowrank import Factors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from workbench.adapters.bind import BoundAdapter
    from workbench.adapters.keys import Part
    from workbench.adapters.read import Adapter
    from workbench.models.layout import Model
    from workbench.weights.lowrank import Factors


_FACTORS = {"lora_A", "lora_B", "lora_E"}
_NAMES = {
    "lora_magnitude_vector": "DoRA", "lora_B.bias": "lora_bias", "lora_embedding_A": "LoRA on an embedding", "ia3_l": "(IA)³",
    "oft_R": "OFT", "vera_lambda_b": "VeRA", "boft_R": "BOFT", "hra_u": "HRA", "fourierft_spectrum": "FourierFT",
    "randlora_A": "RandLoRA", "randlora_gamma": "RandLoRA", "vblora_logits_A": "VB-LoRA",
    "vblora_logits_A_topk_indices": "VB-LoRA", "trainable_tokens_delta": "trainable tokens",
}  # fmt: skip


def not_linear(adapter: Adapter, bound: BoundAdapter) -> str | None:
    """Return the part of an adapter that is no low-rank update of a linear layer; None if every part is one."""
    modules = {str(name).rpartition(".")[0] for name in adapter.config.get("target_parameters") or ()}
    for part in adapter.keys.parts:
        extra = sorted(set(part.fields) - _FACTORS)
        if extra or not {"lora_A", "lora_B"} <= set(part.fields):
            return f"{_NAMES.get(extra[0], extra[0].split('_')[0])} on {part.module}"
        # A module with a parameter that the configuration lists may be no linear layer.
        if part.depth or _rows(part) is None or any(m and f".{part.module}".endswith(f".{m}") for m in modules):
            return f"LoRA on a parameter of {part.module} (target_parameters)"
    for disk, update in bound.places.items():
        if not isinstance(update, LowRank):
            return f"a whole tensor for {disk} (modules_to_save or bias)"
        if len(update.spec.shape) != 2 or any(patch.pair.expert for patch in update.patches):
            return f"LoRA on stacked experts in {disk} (target_parameters)"
    return None


def as_lora(brick: str, directory: str) -> str:
    """Return the commands that turn any adapter into plain LoRA, for hints."""
    whole, factored = f"bricks/{brick}-full", f"bricks/{brick}-lora"
    return (
        f"`{shell('workbench', 'brick', 'bake', directory, '-o', whole)}`, then "
        f"`{shell('workbench', 'brick', 'extract', whole, '--base')} BASE {shell('-o', factored)}`."
    )


def linear_factors(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the update B A of each linear layer, in float32.

    Args:
        adapter: An adapter for which `not_linear` returns None.

    Returns:
        Live module -> (A [rank, in], B [out, rank]); the scaling, also that of rsLoRA and AdaLoRA, is part of B.
    """
    factors = {}
    for part in adapter.keys.parts:
        a, b = part.fields["lora_A"], part.fields["lora_B"]
        pair = FactorPair(a, b, 1.0, singular_values=part.fields.get("lora_E")).factors()
        factors[part.module] = (pair.right, pair.left * adapter.scale(part.module, a.shape[0]))
    return factors


def ranks_of(adapter: Adapter) -> Mapping[str, int]:
    """Return live module -> rank of its update, from the file's header."""
    return {part.module: part.fields["lora_A"].shape[0] for part in adapter.keys.parts}


def linear_bytes(adapter: Adapter) -> int:
    """Return the memory of `linear_factors`, in bytes."""
    return 4 * sum(part.fields[x].entry.spec.numel for part in adapter.keys.parts for x in ("lora_A", "lora_B"))


def _rows(part: Part) -> int | None:
    """Return the rank of a matrix pair; None if the factors are no matrices of one rank."""
    a, b = part.fields["lora_A"].shape, part.fields["lora_B"].shape
    return a[0] if len(a) == len(b) == 2 and a[0] == b[1] else None


RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for --max-lora-rank."""


def served_rank(ranks: Iterable[int]) -> int:
    """Return the smallest rank that a server accepts and that holds all given ranks.

    Raises:
        WorkbenchError: If a rank is larger than every accepted one.
    """
    largest = max(ranks)
    for rank in RANKS:
        if rank >= largest:
            return rank
    raise WorkbenchError(
        f"rank {largest}: servers accept ranks up to {RANKS[-1]}",
        f"Write the adapter with a smaller rank: `output: {{form: adapter, rank: {RANKS[-1]}}}` in a recipe.",
    )


def write_served(adapter: Adapter, out: Path, base: str, rank: int) -> dict[str, object]:
    """Write an adapter as plain LoRA: every module padded with zeros to one rank, alpha equal to it, factors in float32.

    Args:
        adapter: An adapter for which `linear.not_linear` returns None.
        out: Directory to create.
        base: Value of `base_model_name_or_path`: the name that the server has for its base.
        rank: Rank of all modules.

    Returns:
        The number of modules, and the size of the file in bytes.
    """
    fan_in_fan_out = bool(adapter.config.get("fan_in_fan_out"))
    factors = {}
    for module, (a, b) in linear_factors(adapter).items():
        padded = lowrank.padded(Factors(b, a), rank)
        # `write_adapter` takes updates as the base stores its weights.
        factors[f"{module}.weight"] = padded.transposed() if fan_in_fan_out else padded
    write_adapter(out, factors, base, fan_in_fan_out=fan_in_fan_out)
    return {"modules": len(factors), "bytes": (out / WEIGHTS).stat().st_size}


SUFFIX = ".gguf"


@dataclass(frozen=True)
class Family:
    """A family of models, as llama.cpp's converter writes it.

    Attributes:
        name: Name of the architecture in GGUF files.
        interleaved: True if the rows of the query and key projections are reordered; see `_interleaved`.
        transposed: Ends of the names of weights that are stored as [in, out] and are transposed.
    """

    name: str
    interleaved: bool = False
    transposed: tuple[str, ...] = ()


# Class in config.json -> family. Each was compared with the converter and with llama.cpp itself; see docs/shipping.md.
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", interleaved=True),
    "MistralForCausalLM": Family("llama", interleaved=True),
    "SmolLM3ForCausalLM": Family("smollm3", interleaved=True),
    "GraniteForCausalLM": Family("granite", interleaved=True),
    "OlmoForCausalLM": Family("olmo", interleaved=True),
    "Olmo2ForCausalLM": Family("olmo2"),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "GemmaForCausalLM": Family("gemma"),
    "Gemma2ForCausalLM": Family("gemma2"),
    "Gemma3ForCausalLM": Family("gemma3"),
    "PhiForCausalLM": Family("phi2"),
    "Phi3ForCausalLM": Family("phi3"),
    "StableLmForCausalLM": Family("stablelm"),
    "Starcoder2ForCausalLM": Family("starcoder2"),
    "CohereForCausalLM": Family("command-r"),
    "GPT2LMHeadModel": Family("gpt2", transposed=(".c_attn.weight", ".c_proj.weight", ".c_fc.weight")),
}


@dataclass(frozen=True)
class Place:
    """The tensor of a converted base that an update acts on.

    Attributes:
        name: Its name.
        heads: Number of attention heads whose rows are reordered; 0 if no row moves.
        transposed: True if it is the transpose of the tensor in the original base.
    """

    name: str
    heads: int = 0
    transposed: bool = False

    def converted(self, factors: Factors) -> Factors:
        """Return the update of this tensor from the update of the original one."""
        if self.transposed:
            factors = factors.transposed()
        if self.heads:
            factors = type(factors)(factors.left[_interleaved(factors.left.shape[0], self.heads)].contiguous(), factors.right)
        return factors


def family_of(config: Mapping[str, object]) -> Family | None:
    """Return the family of a base with this config.json; None if its conversion is not known here."""
    classes = config.get("architectures")
    return FAMILIES.get(str(classes[0])) if isinstance(classes, list) and classes else None


def gguf_places(bound: BoundAdapter, base: Model, label: str) -> dict[str, Place]:
    """Return where llama.cpp finds the tensors that an adapter updates.

    Args:
        bound: An adapter on its base, for which `linear.not_linear` returns None.
        base: The base.
        label: The adapter in messages, such as "adapter 'math'".

    Returns:
        Tensor of the original base -> its place in the converted one.

    Raises:
        WorkbenchError: If the family of the base or one of the tensors is not known.

    Source: llama.cpp, convert_lora_to_gguf.py and conversion/llama.py; names from the package gguf.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    family = family_of(base.config)
    if family is None:
        found = ", ".join(map(str, base.config.get("architectures") or ["unknown"]))
        raise WorkbenchError(
            f"{label}: GGUF adapters are not written for bases of the class {found}, but only for {', '.join(FAMILIES)}",
            "Merge the adapter into its base with `workbench run` (a recipe without `output: adapter`), and export that run.",
        )
    architecture = next(number for number, name in MODEL_ARCH_NAMES.items() if name == family.name)
    names = get_tensor_name_map(architecture, base.layout.depth)
    places = {}
    for disk in bound.places:
        known = names.get_name(disk, try_suffixes=(".weight",))
        if known is None:
            raise WorkbenchError(
                f"{label}: updates {disk}, for which the package gguf knows no name in the architecture {family.name}",
                "Merge the adapter into its base with `workbench run`, and export that run.",
            )
        places[disk] = Place(known, _heads(disk, base.config) if family.interleaved else 0, disk.endswith(family.transposed))
    return places


def _heads(disk: str, config: Mapping[str, Any]) -> int:
    """Return the number of heads of a query or key projection; 0 for other tensors."""
    heads = int(config["num_attention_heads"])
    if disk.endswith("q_proj.weight"):
        return heads
    return int(config.get("num_key_value_heads") or heads) if disk.endswith("k_proj.weight") else 0


def _interleaved(rows: int, heads: int) -> torch.Tensor:
    """Return the order of the rows of a query or key projection in llama.cpp.

    Transformers rotates row i of a head with row i + d/2, where d is the number of rows of a head. llama.cpp rotates neighboring
    rows in these families, so row i becomes row 2i, and row i + d/2 becomes row 2i + 1.
    """
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def write_gguf(
    bound: BoundAdapter, places: Mapping[str, Place], config: Mapping[str, object], out: Path, name: str
) -> dict[str, object]:
    """Write a GGUF adapter: every module padded with zeros to the largest rank, alpha equal to it, factors in float32.

    llama.cpp multiplies each product by alpha / rank of its factors, which is then 1; the scaling is part of the factors.

    Returns:
        The number of modules, and the size of the file in bytes.
    """
    import gguf

    cpu, family = torch.device("cpu"), family_of(config)
    assert family is not None, "`gguf_places` refuses other bases"
    factors = {}
    for disk, update in bound.places.items():
        product = update.factors(cpu) if isinstance(update, LowRank) else None
        assert product is not None, "`not_linear` refuses other updates"
        factors[places[disk].name] = places[disk].converted(product)
    rank = max(product.rank for product in factors.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out, family.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    writer.add_name(name)
    for tensor, product in factors.items():
        whole = lowrank.padded(product, rank)
        writer.add_tensor(f"{tensor}.lora_a", whole.right.contiguous().numpy())
        writer.add_tensor(f"{tensor}.lora_b", whole.left.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"modules": len(factors), "bytes": out.stat().st_size}
