"""Parser for the keys of an adapter's file: the module and the role of every tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from workbench.adapters.entries import Stored
from workbench.adapters.flavours import BAKE
from workbench.errors import WorkbenchError
from workbench.weights.header import Entry

PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_B\.bias|lora_[ABE]|lora_embedding_[AB]|lora_magnitude_vector|oft_R"
    r"|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|ia3_l|trainable_tokens_delta|vera_lambda_[bd]|boft_[Rs]|hra_u"
    r"|fourierft_spectrum|randlora_(?:lambda|gamma|[AB])|vblora_logits_[AB](?:_topk_(?:indices|weights))?)(?:\.weight)?"
)
_PAIRS = [
    ("lora_A", "lora_B"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("hada_w1_a", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_b"),
    ("hada_w1_a", "hada_w2_a"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
    ("vera_lambda_b", "vera_lambda_d"),
    ("boft_R", "boft_s"),
    ("randlora_lambda", "randlora_gamma"),
    ("vblora_logits_A", "vblora_logits_B"),
    ("vblora_logits_A_topk_indices", "vblora_logits_A_topk_weights"),
    ("vblora_logits_B_topk_indices", "vblora_logits_B_topk_weights"),
    ("vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices"),
]
# Field that identifies a kind of update -> all fields that it uses.
_LOGITS = ("vblora_logits_A", "vblora_logits_B")
USED = {
    "ia3_l": {"ia3_l"},
    "oft_R": {"oft_R"},
    "hada_w1_a": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    "vera_lambda_b": {"vera_lambda_b", "vera_lambda_d"},
    "boft_R": {"boft_R", "boft_s"},
    "hra_u": {"hra_u"},
    "fourierft_spectrum": {"fourierft_spectrum"},
    "randlora_lambda": {"randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"},
    "vblora_logits_A": set(_LOGITS),
    "vblora_logits_A_topk_indices": {f"{name}_topk_{end}" for name in _LOGITS for end in ("indices", "weights")},
    "lora_embedding_A": {"lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"},
    "lora_A": {"lora_A", "lora_B", "lora_E", "lora_B.bias", "lora_magnitude_vector"},
    "lokr": {f"lokr_w{i}{end}" for i in (1, 2) for end in ("", "_a", "_b")},
}
_SHARED = {f"base_model.{name}": name for name in ("vera_A", "vera_B", "randlora_A", "randlora_B", "vblora_vector_bank")}


@dataclass
class Part:
    """The tensors of an adapter for one module.

    Attributes:
        module: Name of the live module, without wrappers.
        depth: Nesting depth of the wrapper, counted by ".base_layer"; above 0 if several parameters of a module are adapted.
        fields: "lora_A", "lora_B", "lora_B.bias", "hada_w1_a", … -> tensor.
    """

    module: str
    depth: int = 0
    fields: dict[str, Stored] = field(default_factory=dict)


@dataclass
class Keys:
    """The tensors of an adapter by role; every key belongs to exactly one part or saved tensor.

    Attributes:
        parts: Updates by module.
        saved: Live name -> whole tensor: modules_to_save, biases, copies of base layers.
        shared: Name -> tensor that all modules share: the projections of VeRA and RandLoRA, the bank of VB-LoRA.
        copies: (key, tensor on disk) -> whether the two are equal; a cache of comparisons.
    """

    parts: list[Part]
    saved: dict[str, Stored]
    shared: dict[str, Stored] = field(default_factory=dict)
    copies: dict[tuple[str, str], bool] = field(default_factory=dict)


def sort_keys(entries: Mapping[str, Entry], start: str, label: str) -> Keys:
    """Assign every key of an adapter to a module and a role.

    Args:
        entries: The adapter's tensors.
        start: Prefix of the tuner's part names, such as "lora_".
        label: Name of the adapter in error messages.

    Raises:
        WorkbenchError: If a tensor is not floating-point, a key belongs to another tuner, one half of a pair is missing, or
            two keys name one tensor.
    """
    parts: dict[str, Part] = {}
    saved: dict[str, Stored] = {}
    shared: dict[str, Stored] = {}
    for key, entry in entries.items():
        stored, name = Stored(entry, key, label), key.removeprefix(PREFIX)
        if not entry.spec.is_float and not key.endswith("_topk_indices"):
            raise WorkbenchError(
                f"{label}: adapter key {key} holds {entry.spec.kind} numbers ({entry.spec.stored}), expected floating-point ones",
                "The adapter may be quantized: use the original adapter instead.",
            )
        match = _PART.fullmatch(name)
        if key in _SHARED and _SHARED[key].startswith(start):
            is_new, shared[_SHARED[key]] = True, stored
        elif match:
            kind = match["part"].removesuffix(".weight")
            if not kind.startswith((start, "trainable_")):
                raise WorkbenchError(f"{label}: adapter key {key} does not belong to its peft_type", "Save the adapter again.")
            wrapper = match["module"].removesuffix(".token_adapter")
            module = re.sub(r"(\.base_layer)+$", "", wrapper)
            part = parts.setdefault(wrapper, Part(module, wrapper.count(".base_layer")))
            is_new = kind not in part.fields
            part.fields[kind] = stored
        else:
            tensor_name = re.sub(r"\.(base_layer|modules_to_save)(?=\.)", "", name)
            is_new = tensor_name not in saved
            saved[tensor_name] = stored
        if not is_new:
            raise WorkbenchError(f"{label}: adapter key {key} names the same tensor as another key", "Save the adapter again.")
    for part in parts.values():
        _check_pairs(part, label)
    return Keys(list(parts.values()), saved, shared)


def _check_pairs(part: Part, label: str) -> None:
    """Raise WorkbenchError if a module lacks the other half of a pair, or has no complete update."""
    for first, second in _PAIRS:
        if (first in part.fields) != (second in part.fields):
            present = first if first in part.fields else second
            raise WorkbenchError(
                f"{label}: {part.module} has {present}, but no {second if present == first else first}",
                "Save the adapter again.",
            )
    main_fields = {*USED, "trainable_tokens_delta"}
    kronecker = all(any(f"lokr_{w}{end}" in part.fields for end in ("", "_a")) for w in ("w1", "w2"))
    if not main_fields & set(part.fields) and not kronecker:
        raise WorkbenchError(
            f"{label}: {part.module} has only {', '.join(part.fields)}, which is not a complete update", "Save the adapter again."
        )
    if convolution := {"hada_t1", "hada_t2", "lokr_t2"} & set(part.fields):
        raise WorkbenchError(f"{label}: {part.module} has {min(convolution)}: updates of convolutions are not supported", BAKE)
