"""The binder, which turns every part of an adapter into an update of a tensor on disk, or raises an error that names the part."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from workbench.adapters import tuners
from workbench.adapters.computed import KINDS, Shared, computed
from workbench.adapters.dense import BiasShift, Dora, Replaced, Update, added
from workbench.adapters.flavours import BAKE, TITLES
from workbench.adapters.keys import USED, Part, Stored, is_copy, updates_both_alike
from workbench.adapters.lora import FactorPair, LowRank, Patch, Places, Spot
from workbench.adapters.tuners import rotation
from workbench.ground.errors import WorkbenchError, shell
from workbench.ground.project import relative
from workbench.models.architecture import UntiedWeights, disk_weight, is_embedding, is_head

if TYPE_CHECKING:
    from workbench.adapters.read import Adapter
    from workbench.models.layout import Model
    from workbench.weights.specs import TensorSpec

_UNSAVE = (
    "It is a copy of the base's own weight, which PEFT adds for embeddings and heads. Save the adapter again with "
    "model.save_pretrained(DIR, save_embedding_layers=False)."
)
_ADDED = (
    "A `merge` into a checkpoint keeps rows of added tokens if the adapter has them whole (save_embedding_layers=True) and the tokenizer that it "
    "was trained with. For other uses, bake it, and use the result as a `checkpoint:`:"
)
_NO_BIAS = (
    "PEFT cannot merge this adapter either. Add a bias of zeros to the base (set attention_bias or mlp_bias in config.json and store "
    "the tensors), or train the adapter with lora_bias=False."
)


class Binder:
    """Builder of the updates of one adapter on one base.

    Args:
        adapter: The adapter.
        specs: The base's tensors.
        base: The base itself, if available. Its configuration determines layer types and fused modules. Its weights serve
            to detect unchanged copies, and DoRA on transposed layers reads them.
    """

    def __init__(self, adapter: Adapter, specs: Mapping[str, TensorSpec], base: Model | None) -> None:
        self.adapter, self.label, self.config = adapter, adapter.label, adapter.config
        self.specs, self.base = specs, base
        self.places = Places(specs, base.config if base else None)
        self.updates: dict[str, Update] = {}
        self.notes: list[str] = []
        self._kinds: Counter[str] = Counter()
        self._replaced: list[str] = []
        self._untied = base.weights if base and isinstance(base.weights, UntiedWeights) else None
        self._shared = Shared(self.config["peft_type"], self.config, adapter.keys.shared, adapter.label)
        self._skips_head = self.places.tied is not None and updates_both_alike(adapter.keys)

    def bind(self) -> None:
        """Build the update of every part of the adapter."""
        if self.config["peft_type"] in KINDS:
            self._shared.check()
        for name, stored in self.adapter.keys.saved.items():
            self._saved(name, stored)
        owners: dict[str, Part] = {}
        for part in self.adapter.keys.parts:
            for disk in self._part(part):
                first = owners.setdefault(disk, part)
                # Different modules may update one tensor if the base stores them fused. Names of one module differ by a root prefix.
                pair = first.module, part.module
                same = first.depth == part.depth and any(a == b or a.endswith(f".{b}") for a, b in (pair, pair[::-1]))
                if first is not part and same:
                    raise WorkbenchError(f"{self.label}: two modules of the adapter update {disk}", "Save the adapter again.")
        for disk in self.updates:
            if not self.specs[disk].is_float:
                raise WorkbenchError(
                    f"{self.label}: the adapter updates {disk}, which holds {self.specs[disk].kind} numbers in the base",
                    "Only floating-point tensors can be merged. Set the recipe's base to the model that the adapter was trained on.",
                )
        for kind, count in self._kinds.items():
            self.notes.append(f"{self.label}: {kind} on {count} tensors is applied as dense deltas, which are not low-rank")
        if self._replaced:
            names = ", ".join(self._replaced[:3]) + (" …" if len(self._replaced) > 3 else "")
            self.notes.append(
                f"{self.label}: holds whole tensors ({names}; {len(self._replaced)} in total), which are merged as dense deltas"
            )

    def _part(self, part: Part) -> list[str]:
        """Add the updates of one module and return the tensors on disk that they change."""
        if "trainable_tokens_delta" in part.fields:
            return self._tokens(part)
        name = f"{part.module}.weight"
        if bool(self.config.get("use_dora")) != ("lora_magnitude_vector" in part.fields) and not part.depth:
            if self.config.get("use_dora"):
                problem = "has no lora_magnitude_vector, but the configuration sets use_dora"
            else:
                problem = "has a lora_magnitude_vector, but the configuration does not set use_dora"
            raise WorkbenchError(f"{self.label}: {part.module} {problem}", "Save the adapter again.")
        if self.places.is_tied_head(name):
            if self._skips_head:
                return []
            disk_weight(part.module, self.specs, self.label)  # raises, because the base ties its head
        self._check_fields(part, name)
        if self.config["peft_type"] in TITLES:
            return self._tuner(part)
        if "lora_embedding_A" in part.fields:
            return self._embedding(part)
        return self._parameter(part) if self._adapts_parameter(part, name) else self._linear(part)

    def _adapts_parameter(self, part: Part, name: str) -> bool:
        """Return whether the update belongs to a parameter (`target_parameters`) rather than to a linear layer."""
        stack = len(self.places.shape(name) or ()) == 3 and self._is_target_parameter(name)
        return bool(part.depth or stack or (self.config.get("target_parameters") and not self.places.pieces(name)))

    def _check_fields(self, part: Part, name: str) -> None:
        """Raise WorkbenchError if the module has a field that its kind of update does not use."""
        fields = set(part.fields)
        kind = next(used for first, used in USED.items() if first in fields or first == "lokr")
        used = {"lora_A", "lora_B"} if kind is USED["lora_A"] and self._adapts_parameter(part, name) else kind
        redundant = {f"lokr_{w}" for w in ("w1", "w2") if {f"lokr_{w}", f"lokr_{w}_a"} <= fields}
        if unused := fields - used | redundant:
            key = part.fields[min(unused)].key
            raise WorkbenchError(f"{self.label}: adapter key {key} cannot be combined with the other keys of {part.module}", BAKE)

    def _linear(self, part: Part) -> list[str]:
        """Add LoRA on a linear layer."""
        a, b = part.fields["lora_A"], part.fields["lora_B"]
        name = f"{part.module}.weight"
        shape = self.places.shape(name)
        if shape is None or not self.places.pieces(name):
            if shape is not None and not is_head(name):
                raise self._layout_error(name)
            disk_weight(part.module, self.specs, self.label)  # raises
            raise AssertionError(name)
        update = (b.shape[0], a.shape[-1])
        flag = bool(self.config.get("fan_in_fan_out"))
        flip = self.places.stores_in_out(part.module, update, shape, flag)
        if self._is_target_parameter(name):  # PEFT updates a parameter as it is stored, also that of a Conv1D
            flip = False if update == shape else None
        if flip is None or len(a.shape) != 2 or b.shape[1:] != (a.shape[0],):
            raise self._shape_error(name, b, a)
        place = name if self._is_target_parameter(name) else part.module
        pair = FactorPair(a, b, self.adapter.scale(place, a.shape[0]), flip, singular_values=self._singular_values(part))
        disks = self._magnitude(part, pair, name) if "lora_magnitude_vector" in part.fields else self._low_rank(pair, name)
        if "lora_B.bias" in part.fields:
            self._shift(part, part.fields["lora_B.bias"], pair.scale)
        return disks

    def _singular_values(self, part: Part) -> Stored | None:
        """Return AdaLoRA's singular values; raise WorkbenchError if they are missing, unexpected or of another number."""
        values = part.fields.get("lora_E")
        rank = part.fields["lora_A"].shape[0]
        if (values is not None) != (self.config["peft_type"] == "ADALORA") or (values and math.prod(values.shape) != rank):
            description = f"lora_E {list(values.shape)}" if values else "no lora_E"
            raise WorkbenchError(
                f"{self.label}: {part.module} has {description}; expected {rank} numbers with peft_type ADALORA, and no lora_E otherwise",
                "Save the adapter again.",
            )
        return values

    def _embedding(self, part: Part) -> list[str]:
        """Add LoRA on an embedding."""
        a, b = part.fields["lora_embedding_A"], part.fields["lora_embedding_B"]
        name = f"{part.module}.weight"
        shape = self.places.shape(name)
        if shape is None:
            disk_weight(part.module, self.specs, self.label)  # raises
        if len(a.shape) != 2 or b.shape[1:] != (a.shape[0],) or shape != (a.shape[1], b.shape[0]):
            raise self._shape_error(name, b, a)
        pair = FactorPair(a, b, self.adapter.scale(part.module, a.shape[0]), flip=True)
        return self._magnitude(part, pair, name) if "lora_magnitude_vector" in part.fields else self._low_rank(pair, name)

    def _parameter(self, part: Part) -> list[str]:
        """Add LoRA on a parameter (`target_parameters`), such as stacked experts or a weight outside a linear layer."""
        a, b = part.fields["lora_A"], part.fields["lora_B"]
        targets = [n for n in self.places.parameters(part.module) if self._is_target_parameter(n)]
        if not part.depth < len(targets):
            raise WorkbenchError(
                f"{self.label}: adapter key {a.key} {list(a.shape)} updates a parameter of {part.module}, which the base does not have",
                "The adapter was trained on another architecture. Set the recipe's base to the model that it was trained on.",
            )
        name = targets[len(targets) - 1 - part.depth]  # the first parameter has the innermost wrapper
        shape = self.places.shape(name) or ()
        if not self.places.spots(name):
            raise self._layout_error(name)
        experts = shape[0] if len(shape) == 3 else 1
        transposed = len(shape) == 3 and self.places.stores_experts_in_out(part.module)
        out, width = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
        if a.shape[1:] != (width,) or b.shape != (out, a.shape[0]) or a.shape[0] % experts:
            raise self._shape_error(name, b, a)
        pair = FactorPair(a, b, self.adapter.scale(name, a.shape[0] // experts), transposed)
        return self._low_rank(pair, name, experts if len(shape) == 3 else None)

    def _low_rank(self, pair: FactorPair, name: str, experts: int | None = None) -> list[str]:
        """Add a product to the tensors on disk that store the live tensor."""
        spots = self.places.spots(name)
        if not spots or len(self.places.shape(name) or ()) > 3:
            raise self._layout_error(name)
        updates: dict[str, LowRank] = {}
        for spot in spots:
            expert = (spot.expert or 0, experts) if experts is not None else None
            part = replace(pair, expert=expert, rows=spot.rows, cols=spot.cols, swap=spot.swap)
            updates.setdefault(spot.disk, LowRank(self.specs[spot.disk])).patches.append(Patch(part, spot.row, spot.col))
        for disk, update in updates.items():
            self.updates[disk] = added(self.updates.get(disk), update)
        return list(updates)

    def _layout_error(self, name: str) -> WorkbenchError:
        return WorkbenchError(
            f"{self.label}: the adapter updates {name}, which the base does not have or stores in a layout that is not supported",
            BAKE,
        )

    def _magnitude(self, part: Part, pair: FactorPair, name: str) -> list[str]:
        """Add a DoRA update, which depends on the base's weight."""
        disk, magnitude = self._whole(name, "DoRA"), part.fields["lora_magnitude_vector"]
        if math.prod(magnitude.shape) != pair.b.shape[0]:
            raise WorkbenchError(
                f"{self.label}: {magnitude.key} is {list(magnitude.shape)}, expected {pair.b.shape[0]} numbers, one per output",
                "Save the adapter again.",
            )
        if disk in self.updates:
            raise self._double_update_error("DoRA", disk)
        if self.base is None:
            raise WorkbenchError(f"{self.label}: DoRA on {disk} requires the base's weights", BAKE)
        self._kinds["DoRA"] += 1
        self.updates[disk] = Dora(pair, magnitude, self.specs[disk], partial(self.base.weights.open, disk))
        return [disk]

    def _tuner(self, part: Part) -> list[str]:
        """Add the update of one module of (IA)³, OFT, LoHa, LoKr and the kinds that PEFT computes."""
        kind = self.config["peft_type"]
        disk = self._whole(f"{part.module}.weight", TITLES[kind])
        spec = self.specs[disk]
        update: Update
        conv1d = self.places.is_conv1d(part.module, bool(self.config.get("fan_in_fan_out")))
        if kind in KINDS:
            update = computed(part, disk, spec, conv1d, self._shared)
            if kind == "FOURIERFT":
                self.adapter.size(part.module, part.fields["fourierft_spectrum"].shape[0])
        elif kind in ("LOHA", "LOKR"):
            update = tuners.lycoris(part, disk, spec, self.adapter)
        elif disk in self.updates:
            raise self._double_update_error(TITLES[kind], disk)
        elif kind == "OFT":
            update = tuners.oft(part, disk, spec, self.adapter)
        elif kind in ("BOFT", "HRA"):
            update = rotation(part, disk, spec, conv1d, self.adapter)
        else:
            update = tuners.ia3(part, disk, spec, conv1d, self.label)
            if part.fields["ia3_l"].shape[0] != 1 and (bias := self.places.direct(f"{part.module}.bias")):
                if bias in self.updates:
                    raise self._double_update_error(TITLES[kind], bias)
                self._shift(part, part.fields["ia3_l"], None)
        self._kinds[TITLES[kind]] += 1
        self.updates[disk] = added(self.updates.get(disk), update)
        return [disk]

    def _double_update_error(self, description: str, disk: str) -> WorkbenchError:
        return WorkbenchError(f"{self.label}: the adapter has both {description} and another update on {disk}", BAKE)

    def _tokens(self, part: Part) -> list[str]:
        """Add trained rows of the embeddings, and the same rows of a head that shares the embeddings."""
        if self._skips_head and self.places.is_tied_head(f"{part.module}.weight"):
            return []
        if len(part.fields) > 1:
            raise WorkbenchError(f"{self.label}: {part.module} has both trained tokens and LoRA factors", BAKE)
        disk = self._whole(f"{part.module}.weight", "trainable_token_indices")
        if disk in self.updates:  # rows replace those of the whole tensor, so that the sum of both deltas is another matrix
            raise self._double_update_error("trained tokens", disk)
        update = tuners.token_rows(part, self.specs[disk], self.config, self.label)
        self._kinds["trainable_token_indices"] += 1
        targets = [disk]
        if self._untied and disk == self._untied.embeddings:
            trained = [p.module for p in self.adapter.keys.parts if "trainable_tokens_delta" in p.fields]
            if not any(self.places.direct(f"{module}.weight") == self._untied.head for module in trained):
                targets.append(self._untied.head)
        for name in targets:
            self.updates[name] = added(self.updates.get(name), update)
        return targets

    def _saved(self, name: str, stored: Stored) -> None:
        """Add a whole tensor of the adapter as its difference from the base, unless it is a copy of the base's tensor."""
        if self.places.is_tied_head(name):
            assert self.places.tied is not None
            if self._skips_head or is_copy(self.adapter.keys, stored, self.places.tied[0], self.base):
                return
            disk_weight(name.removesuffix(".weight"), self.specs, self.label)  # raises, because the base ties its head
        spots = self.places.spots(name)
        if not spots:
            raise WorkbenchError(
                f"{self.label}: adapter key {stored.key} {list(stored.shape)} is neither a tensor of the base nor part of a supported "
                "update",
                BAKE,
            )
        shape = self.places.shape(name)
        if shape != stored.shape:
            vocabulary = " (another vocabulary)" if is_embedding(name) or is_head(name) else ""
            raise WorkbenchError(
                f"{self.label}: {stored.key} is {list(stored.shape)}, the base has {list(shape or ())}{vocabulary}",
                self._trained_on_hint(name, *stored.shape),
            )
        if ".base_layer." in stored.key and self.base is None:
            raise WorkbenchError(f"{self.label}: adapter key {stored.key} is a weight, not an update", _UNSAVE)
        if len(spots) == 1 and is_copy(self.adapter.keys, stored, spots[0].disk, self.base):
            return
        for spot in spots:
            self._replace(name, stored, spot, shape)

    def _replace(self, name: str, stored: Stored, spot: Spot, shape: tuple[int, ...]) -> None:
        """Add a whole tensor of the adapter as a replacement of the base's rows."""
        spec = self.specs[spot.disk]
        height, width = (shape[-2], shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)
        if spot.swap or spot.cols != (0, width) or spot.col or spec.cols != width:
            raise WorkbenchError(f"{self.label}: {name} is stored in some columns of {spot.disk}, which is not supported", BAKE)
        row = (spot.expert or 0) * height + spot.rows[0]
        update = Replaced(stored, row, spot.row, spot.rows[1] - spot.rows[0])
        self.updates[spot.disk] = added(self.updates.get(spot.disk), update)
        self._replaced.append(spot.disk)

    def _shift(self, part: Part, stored: Stored, scale: float | None) -> None:
        """Add a change of the layer's bias."""
        disk = self.places.whole(f"{part.module}.bias")
        if disk is None:
            raise WorkbenchError(
                f"{self.label}: the adapter has lora_bias on {part.module}, which has no bias in the base", _NO_BIAS
            )
        if math.prod(stored.shape) != self.specs[disk].numel:
            raise WorkbenchError(
                f"{self.label}: {stored.key} is {list(stored.shape)}, {disk} is {list(self.specs[disk].shape)} in the base",
                self._trained_on_hint(),
            )
        self.updates[disk] = added(self.updates.get(disk), BiasShift(stored, scale))
        self._kinds["lora_bias" if scale is not None else TITLES["IA3"]] += 1

    def _whole(self, name: str, description: str) -> str:
        """Return the one tensor on disk that stores a live tensor; raise WorkbenchError if there is none or it is split or fused."""
        disk = self.places.whole(name)
        if disk is None:
            if not self.places.pieces(name):
                disk_weight(name.removesuffix(".weight"), self.specs, self.label)  # raises
            raise WorkbenchError(
                f"{self.label}: {description} on {name} is not supported, because the base stores that tensor split or fused with others",
                BAKE,
            )
        return disk

    def _is_target_parameter(self, name: str) -> bool:
        """Return whether the adapter's configuration lists a parameter under `target_parameters`."""
        return any(re.fullmatch(rf"(.*\.)?{re.escape(t)}", name) for t in self.config.get("target_parameters") or ())

    def _shape_error(self, name: str, b: Stored, a: Stored) -> WorkbenchError:
        disk = self.places.direct(name) or name
        return WorkbenchError(
            f"{self.label}: {disk} is {list(self.places.shape(name) or ())} in the base, the adapter's update is "
            f"{list(b.shape)} x {list(a.shape)}",
            self._trained_on_hint(name, *b.shape, *a.shape),
        )

    def _trained_on_hint(self, name: str = "", *sizes: int) -> str:
        """Return how to use an adapter of another shape; of one with more rows of the vocabulary than the base, how to keep them."""
        trained_on = self.config.get("base_model_name_or_path")
        if (is_embedding(name) or is_head(name)) and max(sizes) > max(self.places.shape(name) or ()):
            typed = str(relative(self.adapter.path))
            return (
                f"{_ADDED} {shell('workbench', 'brick', 'bake', typed, '--base', trained_on or 'BASE', '-o', f'{typed}-baked')}"
            )
        return f"The adapter was trained on {trained_on}: set the recipe's `base:` to that model."
