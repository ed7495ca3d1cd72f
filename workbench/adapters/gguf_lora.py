"""GGUF adapters: the file that llama.cpp loads beside a GGUF base.

llama.cpp's converter renames the tensors of a base, reorders the rows of some of them, and transposes others. An adapter acts on
the converted base, so its factors have to follow. Families whose conversion is not known here are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.adapters.lora import LowRank
from workbench.errors import WorkbenchError
from workbench.lazy import torch
from workbench.weights import svd

if TYPE_CHECKING:
    from workbench.adapters.bind import BoundAdapter
    from workbench.models.layout import Model
    from workbench.weights.lowrank import Factors

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

    def of(self, factors: Factors) -> Factors:
        """Return the update of this tensor from the update of the original one."""
        if self.transposed:
            factors = factors.transposed()
        if self.heads:
            factors = type(factors)(factors.left[_interleaved(factors.left.shape[0], self.heads)].contiguous(), factors.right)
        return factors


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family of a base with this config.json; None if its conversion is not known here."""
    classes = config.get("architectures") or [None]
    return FAMILIES.get(str(classes[0]))


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
    bound: BoundAdapter, places: Mapping[str, Place], config: Mapping[str, Any], out: Path, name: str
) -> dict[str, Any]:
    """Write a GGUF adapter: every module padded with zeros to the largest rank, alpha equal to it, factors in float32.

    llama.cpp multiplies each product by alpha / rank of its factors, which is then 1; the scaling is part of the factors.

    Args:
        bound: The adapter on its base.
        places: Result of `gguf_places`.
        config: The base's config.json.
        out: File to create; its folder may be missing.
        name: Name of the adapter in the file.

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
        factors[places[disk].name] = places[disk].of(product)
    rank = max(product.rank for product in factors.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out, family.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    writer.add_name(name)
    for tensor, product in factors.items():
        whole = svd.padded(product, rank)
        writer.add_tensor(f"{tensor}.lora_a", whole.right.contiguous().numpy())
        writer.add_tensor(f"{tensor}.lora_b", whole.left.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"modules": len(factors), "bytes": out.stat().st_size}
