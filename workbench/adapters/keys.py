"""The tensors of an adapter's file: the module and the role of every key, reads that check for NaN and infinity, and tied embeddings."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from workbench.adapters.flavours import BAKE
from workbench.ground.errors import WorkbenchError
from workbench.ground.identity import open_unchanged
from workbench.ground.lazy import np, torch
from workbench.models.architecture import is_embedding_module, is_head_module, tied_embeddings
from workbench.weights.digests import entry_digest
from workbench.weights.header import Entry
from workbench.weights.specs import NUMPY, Array, as_array, block_elements, buffer, matrix

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.models.layout import Model


# Magnitude bits of infinity; those of finite numbers are smaller, those of NaN larger.
_INFINITIES = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}


@dataclass(frozen=True)
class Stored:
    """One tensor of an adapter's file.

    Attributes:
        entry: File, offset, shape and dtype of the tensor.
        key: Its name in the file.
        label: Name of the adapter in error messages, such as "brick 'math'".
    """

    entry: Entry
    key: str
    label: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.entry.spec.shape

    def read(self, device: torch.device | None = None) -> Tensor:
        """Read the whole tensor as float32.

        Raises:
            WorkbenchError: If the tensor holds NaN or infinity, or the file ends early.
        """
        return self.rows(0, self.entry.spec.rows, device).view(self.shape)

    def rows(self, start: int, stop: int, device: torch.device | None = None) -> Tensor:
        """Read rows of the tensor's 2-D view as float32, [stop - start, cols].

        Args:
            start: First row.
            stop: Row after the last one.
            device: Device of the result; None is the CPU. For `NUMPY`, the tensor's dtype must be one of the compiled loops.

        Raises:
            WorkbenchError: If the rows hold NaN or infinity, or the file ends early.
        """
        spec, raw = self.entry.spec, self._bytes(start, stop)
        if device is NUMPY:
            elements = Array(np.frombuffer(raw, np.uint8), "U8").typed(spec.stored)
            array = cast("Tensor", elements.view(stop - start, spec.cols).float())
            self._check(array, start, 0, 1)
            return array
        if not raw:
            return torch.empty(stop - start, spec.cols, device=device)
        value = torch.frombuffer(raw, dtype=spec.dtype).view(stop - start, spec.cols).float()
        self._check(value, start, 0, 1)
        return value.to(device) if device is not None else value

    def is_zero(self) -> bool:
        """Return whether every number is zero, without torch for the usual dtypes.

        Raises:
            WorkbenchError: If the tensor holds NaN or infinity, or the file ends early.
        """
        spec = self.entry.spec
        if spec.stored not in _INFINITIES:
            return not bool(self.read().any())
        bits = np.frombuffer(self._bytes(0, spec.rows), f"<u{spec.itemsize}")
        magnitudes = bits & ((1 << 8 * spec.itemsize - 1) - 1)
        if magnitudes.size and magnitudes.max() >= _INFINITIES[spec.stored]:
            self.read()  # raises the error, with the number's place
        return not magnitudes.any()

    def columns(self, first: int, step: int) -> Tensor:
        """Read columns first, first + step, … of the tensor's 2-D view as float32.

        Raises:
            WorkbenchError: If the columns hold NaN or infinity.
        """
        spec = self.entry.spec
        size = spec.itemsize
        with open_unchanged(self.entry.file, self.entry.identity) as stream:
            mapped = np.memmap(stream, np.uint8, "r", self.entry.offset, (spec.rows, spec.cols, size))
            chosen = torch.from_numpy(np.ascontiguousarray(mapped[:, first::step]))
        value = chosen.view(spec.dtype).view(spec.rows, -1).float()
        self._check(value, 0, first, step)
        return value

    def _bytes(self, start: int, stop: int) -> bytearray:
        """Read the stored bytes of rows start..stop."""
        width = self.entry.spec.cols * self.entry.spec.itemsize
        with open_unchanged(self.entry.file, self.entry.identity) as stream:
            stream.seek(self.entry.offset + start * width)
            raw = bytearray(stream.read((stop - start) * width))
        if len(raw) != (stop - start) * width:
            raise WorkbenchError(
                f"{self.label}: {self.entry.file} ends early", "The file changed while it was being read: run the command again."
            )
        return raw

    def _check(self, value: Tensor, start: int, first: int, step: int) -> None:
        array = as_array(value)
        if value.isfinite().all() if array is None else np.isfinite(array.data).all():
            return
        numbers = value.numpy()
        row, col = (int(i) for i in np.argwhere(~np.isfinite(numbers))[0])
        index = [int(i) for i in np.unravel_index((start + row) * self.entry.spec.cols + first + col * step, self.shape)]
        raise WorkbenchError(
            f"{self.label}: {self.key} holds {float(numbers[row, col])} at {index}; expected finite numbers",
            "Train or download this adapter again.",
        )


PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_B\.bias|lora_[ABE]|lora_embedding_[AB]|lora_magnitude_vector|oft_R"
    r"|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|ia3_l|trainable_tokens_delta|vera_lambda_[bd]|boft_[Rs]|hra_u"
    r"|fourierft_spectrum|randlora_(?:lambda|gamma|[AB])|vblora_logits_[AB](?:_topk_(?:indices|weights))?)(?:\.weight)?"
)
_PAIRS = [
    ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"),
    ("hada_w1_a", "hada_w2_a"), ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"), ("vera_lambda_b", "vera_lambda_d"),
    ("boft_R", "boft_s"), ("randlora_lambda", "randlora_gamma"), ("vblora_logits_A", "vblora_logits_B"),
    ("vblora_logits_A_topk_indices", "vblora_logits_A_topk_weights"),
    ("vblora_logits_B_topk_indices", "vblora_logits_B_topk_weights"),
    ("vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices"),
]  # fmt: skip
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

    @property
    def vocabulary(self) -> set[str]:
        """Live modules with one row per token that are updated, or of which tensors are stored."""
        modules = {*(part.module for part in self.parts), *(name.rpartition(".")[0] for name in self.saved)}
        return {module for module in modules if is_embedding_module(module) or is_head_module(module)}


def sort_keys(entries: Mapping[str, Entry], start: str, label: str) -> Keys:
    """Assign every key of an adapter to a module and a role.

    Raises:
        WorkbenchError: If a tensor is not floating-point, a key belongs to another tuner, one half of a pair is missing, or
            two keys with different values name one tensor.
    """
    parts: dict[str, Part] = {}
    saved: dict[str, Stored] = {}
    shared: dict[str, Stored] = {}
    for key, entry in entries.items():
        stored, name = Stored(entry, key, label), key.removeprefix(PREFIX)
        if ".original_module." in name:  # `bias: all` also stores biases of the modules that `modules_to_save` replaces
            continue
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
            tensor_name = re.sub(r"\.(base_layer|modules_to_save|token_adapter)(?=\.)", "", name)
            is_new = tensor_name not in saved or _same_tensor(saved[tensor_name], stored)  # `bias: all` stores it once more
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
                f"{label}: {part.module} has {present}, but no {second if present == first else first}", "Save the adapter again."
            )
    main_fields = {*USED, "trainable_tokens_delta"}
    kronecker = all(any(f"lokr_{w}{end}" in part.fields for end in ("", "_a")) for w in ("w1", "w2"))
    if not main_fields & set(part.fields) and not kronecker:
        raise WorkbenchError(
            f"{label}: {part.module} has only {', '.join(part.fields)}, which is not a complete update", "Save the adapter again."
        )
    if convolution := {"hada_t1", "hada_t2", "lokr_t2"} & set(part.fields):
        raise WorkbenchError(f"{label}: {part.module} has {min(convolution)}: updates of convolutions are not supported", BAKE)


def unties(keys: Keys, base: Model) -> str | None:
    """Describe how an adapter unties a tied base's head from its embeddings; return None if they stay one tensor.

    The result follows PEFT's forward pass. LoRA on one of the two, or a saved copy of one, changes that one only. Factors or
    copies of both (`ensure_weight_tying`) and trained tokens change both.
    """
    tied = tied_embeddings(base.weights.specs, base.config)
    if tied is None or updates_both_alike(keys):
        return None
    rows = _updates(keys, is_head_module).get("tokens")
    changed = []
    for end, is_end in (("head", is_head_module), ("embeddings", is_embedding_module)):
        updates = _updates(keys, is_end)
        saved = updates.pop("saved", ())
        tokens = updates.pop("tokens", None)
        if updates or (tokens and rows) or any(not is_copy(keys, s, tied[0], base) for s in saved):
            changed.append(end)
    if not changed:
        return None
    return f"updates only the {changed[0]}" if len(changed) == 1 else "updates head and embeddings in different ways"


def updates_both_alike(keys: Keys) -> bool:
    """Return whether an adapter changes a tied head and the embeddings in the same way.

    This holds for no update at all, transposed factors, equal copies, equal rows, and rows of the embeddings only, which PEFT
    shares with a tied head.
    """
    heads, first = _updates(keys, is_head_module), _updates(keys, is_embedding_module)
    rows, first_rows = heads.pop("tokens", None), first.pop("tokens", None)
    if rows and not (first_rows and _same_tensor(rows[0], first_rows[0])):
        return False
    if set(heads) != set(first) or "other" in heads:
        return False
    if "saved" in heads and not _same_tensor(heads["saved"][0], first["saved"][0]):
        return False
    if "factors" not in heads:
        return True
    (a, b), (left, right) = heads["factors"], first["factors"]
    if a.shape != right.shape[::-1] or b.shape != left.shape[::-1]:
        return False
    return torch.equal(a.read(), right.read().T) and torch.equal(b.read(), left.read().T)


def _updates(keys: Keys, is_end: Callable[[str], bool]) -> dict[str, tuple[Stored, ...]]:
    """Return the updates of modules with one of these names: "factors", "saved" (a whole weight), "tokens" (rows) or "other"."""
    updates: dict[str, tuple[Stored, ...]] = {}
    for part in keys.parts:
        if is_end(part.module):
            is_lora = set(part.fields) in ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})
            kind = "tokens" if "trainable_tokens_delta" in part.fields else "factors" if is_lora else "other"
            updates[kind] = tuple(part.fields[name] for name in sorted(part.fields))
    for name, stored in keys.saved.items():
        if name.endswith(".weight") and is_end(name.removesuffix(".weight")):
            updates["saved"] = (stored,)
    return updates


def _same_tensor(first: Stored, second: Stored) -> bool:
    """Return whether two stored tensors are equal."""
    return first.entry.spec == second.entry.spec and entry_digest(first.entry) == entry_digest(second.entry)


def is_copy(keys: Keys, stored: Stored, name: str, base: Model | None) -> bool:
    """Return whether a whole tensor of an adapter equals the base's; PEFT stores such copies of embeddings and heads.

    The comparison uses the adapter's dtype, so a bfloat16 copy of a float32 base counts as equal.
    """
    if base is None or base.weights.specs[name].shape != stored.shape:
        return False
    place = (stored.key, name)
    if place not in keys.copies:
        keys.copies[place] = _equals_base(stored, name, base)
    return keys.copies[place]


def _equals_base(stored: Stored, name: str, base: Model) -> bool:
    """Return whether a stored tensor equals the base's, cast to its dtype."""
    spec, cpu = base.weights.specs[name], torch.device("cpu")
    source, scratch = base.weights.open(name, cpu), buffer(spec, cpu)
    for start, stop in spec.blocks(block_elements(cpu)):
        block = matrix(scratch, start, stop, spec.cols)
        source.read(start, stop, block)
        if not torch.equal(block.to(stored.entry.spec.dtype).float(), stored.rows(start, stop)):
            return False
    return True
