"""Updates that PEFT's own layers compute: VeRA, FourierFT, RandLoRA and VB-LoRA, one module at a time.

A layer of PEFT is built around a weight without memory, gets the stored numbers, and its `get_delta_weight` gives the delta of that module.
No PEFT model of the base is built. VeRA and RandLoRA share random projections among their modules; without `save_projection` these are
drawn from their seed again, by PEFT.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.adapters.dense import DeltaRows, Dense, Rows
from workbench.adapters.keys import Part, Stored
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import no_grad, torch
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

_OTHER = "The adapter was trained on another base: set the recipe's `base:` to that model."
_AGAIN = "Save the adapter again with PEFT: model.save_pretrained(DIR)."
_NAME = "default"
PROJECTIONS = {
    "VERA": ("vera_A", "vera_B"),
    "RANDLORA": ("randlora_A", "randlora_B"),
    "VBLORA": ("vblora_vector_bank", "vblora_vector_bank"),
}
"""peft_type -> names of the tensors that all modules share."""
KINDS = ("VERA", "FOURIERFT", "RANDLORA", "VBLORA")
_RANK = {"VERA": 256, "RANDLORA": 32, "VBLORA": 4}


@dataclass
class Shared:
    """Tensors of an adapter that all its modules share.

    Attributes:
        kind: The peft_type.
        config: The adapter's configuration.
        stored: Name -> tensor of the file.
        label: Name of the adapter in error messages.
        inputs: Largest number of inputs of a module, which decides the shapes of projections that are drawn again.
        outputs: Largest number of outputs of a module.
    """

    kind: str
    config: Mapping[str, Any]
    stored: Mapping[str, Stored]
    label: str
    inputs: int = 0
    outputs: int = 0
    _drawn: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The configuration's rank."""
        return int(self.config.get("r") or _RANK[self.kind])

    @property
    def is_saved(self) -> bool:
        """True if the file holds the shared tensors."""
        return self.kind == "VBLORA" or self.config.get("save_projection") is not False

    def check(self) -> None:
        """Check that the file holds exactly the shared tensors that its configuration promises."""
        expected = set(PROJECTIONS.get(self.kind, ())) if self.is_saved else set()
        if missing := sorted(expected - set(self.stored)):
            hint = (
                _AGAIN
                if self.kind == "VBLORA"
                else f"{_AGAIN} Or set save_projection to false: they are then drawn from their seed."
            )
            raise WorkbenchError(f"{self.label}: the adapter's modules share {missing[0]}, which the file does not hold", hint)
        if unexpected := sorted(set(self.stored) - expected):
            raise WorkbenchError(
                f"{self.label}: the file holds {unexpected[0]}, but its configuration says that it is not saved",
                "Set save_projection to true in adapter_config.json.",
            )
        for name, stored in self.stored.items():
            dims = 3 if self.kind == "RANDLORA" else 2
            if len(stored.shape) != dims:
                raise WorkbenchError(
                    f"{self.label}: {stored.key} is {list(stored.shape)}; expected {dims} dimensions ({name})", _AGAIN
                )

    def read(self) -> tuple[Tensor, Tensor]:
        """Return the two shared tensors in float32 (the bank of VB-LoRA twice): read, or drawn from the seed once."""
        first, second = PROJECTIONS[self.kind]
        if self.is_saved:
            a = self.stored[first].read()
            return a, a if second == first else self.stored[second].read()
        size = (self.inputs, self.outputs)
        if size not in self._drawn:
            self._drawn = {size: _draw(self.kind, self.config, self.rank, *size)}
        return self._drawn[size]


@dataclass(frozen=True)
class Computed(Dense):
    """The delta of one module, computed whole by PEFT when it is opened."""

    kind: str
    fields: Mapping[str, Stored]
    shared: Shared
    inputs: int
    outputs: int
    conv1d: bool
    """True if the weight is stored as [in, out]."""

    @property
    def held_bytes(self) -> int:
        """Bytes while the delta is computed: the delta with its intermediates, and the shared tensors."""
        numel = 4 * self.inputs * self.outputs
        if self.kind == "FOURIERFT":
            return 8 * numel  # a random order of all places, two complex spectra, the delta twice
        shared = 8 * sum(stored.entry.spec.numel for stored in self.shared.stored.values())
        return (6 if self.kind == "RANDLORA" else 2) * numel + shared

    @no_grad
    def open(self, device: torch.device) -> DeltaRows:
        """Compute the delta and open it for reading by rows."""
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # PEFT starts a layer with random numbers
            warnings.simplefilter("ignore")
            layer = self._layer()
        delta: Tensor = layer.eval().get_delta_weight(_NAME)
        if self.kind == "FOURIERFT" and self.conv1d:
            delta = delta.T
        if not bool(delta.isfinite().all()):
            stored = next(iter(self.fields.values()))
            raise WorkbenchError(
                f"{stored.label}: the update that {stored.key} belongs to holds NaN or infinity",
                "Train or download this adapter again.",
            )
        delta = delta.to(device)
        return Rows(lambda start, stop, base: delta[start:stop])

    def _layer(self) -> Any:
        """Build PEFT's layer with the stored numbers."""
        config = self.shared.config
        if self.kind == "FOURIERFT":
            from peft import FourierFTConfig
            from peft.tuners.fourierft.layer import FourierFTLinear

            chosen = {name: config[name] for name in ("scaling", "random_loc_seed") if config.get(name) is not None}
            spectrum = self.fields["fourierft_spectrum"]
            layer = FourierFTLinear(
                _weightless(self.inputs, self.outputs),
                _NAME,
                FourierFTConfig(init_weights=False, **chosen),
                n_frequency=spectrum.shape[0],
            )
            return self._filled(layer, {"fourierft_spectrum": spectrum.read()})
        first, second = self.shared.read()
        if self.kind == "VBLORA":
            return self._bank_layer(first)
        rank, base = self.shared.rank, _weightless(self.inputs, self.outputs)
        banks = {_NAME: first}, {_NAME: second}
        if self.kind == "VERA":
            from peft import VeraConfig
            from peft.tuners.vera.layer import Linear as Vera

            layer = Vera(base, *banks, _NAME, VeraConfig(r=rank, init_weights=False, fan_in_fan_out=self.conv1d), r=rank)
        else:
            from peft import RandLoraConfig
            from peft.tuners.randlora.layer import Linear as RandLora

            alpha = 640 if config.get("randlora_alpha") is None else config["randlora_alpha"]
            made = RandLoraConfig(r=rank, randlora_alpha=alpha, init_weights=False, fan_in_fan_out=self.conv1d)
            layer = RandLora(base, *banks, _NAME, made, r=rank)
        for name, bank in zip(PROJECTIONS[self.kind], (first, second), strict=True):
            copy = self.fields.get(name)  # PEFT writes RandLoRA's projections once more for each module
            if copy is not None and not torch.equal(copy.read(), bank):
                raise WorkbenchError(f"{copy.label}: {copy.key} differs from base_model.{name}, which all modules share", _AGAIN)
        values = {name: stored.read() for name, stored in self.fields.items() if name not in PROJECTIONS[self.kind]}
        return self._filled(layer, values)

    def _bank_layer(self, bank: Tensor) -> Any:
        """Build PEFT's VB-LoRA layer; of `save_only_topk_weights`, the logits are computed from the stored weights as PEFT does."""
        from peft import VBLoRAConfig
        from peft.tuners.vblora.layer import Linear as VBLoRA

        rank = self.shared.rank
        made = VBLoRAConfig(
            r=rank,
            num_vectors=bank.shape[0],
            vector_length=bank.shape[1],
            topk=int(self.shared.config.get("topk") or 2),
            fan_in_fan_out=self.conv1d,
        )
        layer = VBLoRA(_weightless(self.inputs, self.outputs), {_NAME: bank}, _NAME, made, r=rank)
        values = {}
        for name in ("vblora_logits_A", "vblora_logits_B"):
            if name in self.fields:
                values[name] = self.fields[name].read()
                continue
            weights, stored = self.fields[f"{name}_topk_weights"].read(), self.fields[f"{name}_topk_indices"]
            indices = stored.read().long()
            if not bool(((indices >= 0) & (indices < len(bank))).all()):
                raise WorkbenchError(
                    f"{stored.label}: {stored.key} holds {int(indices.max())}; the bank has {len(bank)} vectors", _AGAIN
                )
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
            values[name] = torch.full((*weights.shape[:-1], len(bank)), -math.inf).scatter(-1, indices, weights.log())
        return self._filled(layer, values)

    def _filled(self, layer: Any, values: Mapping[str, Tensor]) -> Any:
        for name, value in values.items():
            getattr(layer, name)[_NAME].data = value
        return layer


def computed(part: Part, disk: str, spec: TensorSpec, conv1d: bool, shared: Shared) -> Computed:
    """Build the update of one module from the adapter's headers.

    Args:
        part: The adapter's tensors for the module.
        disk: Name of the weight in the base.
        spec: Shape and dtype of the weight.
        conv1d: Whether the weight is stored as [in, out].
        shared: The tensors that all modules share.
    """
    if len(spec.shape) != 2:
        raise WorkbenchError(f"{shared.label}: {disk} is {list(spec.shape)} in the base; expected a matrix", _OTHER)
    outputs, inputs = spec.shape[::-1] if conv1d else spec.shape
    hint = _OTHER if shared.kind == "FOURIERFT" else f"{_OTHER} The configuration says r: {shared.rank}."
    for name, (found, expected) in _shapes(part, shared, inputs, outputs).items():
        if found != expected:
            raise WorkbenchError(
                f"{shared.label}: {name} of {part.module} is {list(found)}; expected {list(expected)} for {disk} {list(spec.shape)} in the base",
                hint,
            )
    shared.inputs, shared.outputs = max(shared.inputs, inputs), max(shared.outputs, outputs)
    return Computed(shared.kind, part.fields, shared, inputs, outputs, conv1d)


def _shapes(part: Part, shared: Shared, inputs: int, outputs: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return name of a tensor -> (its shape, the expected shape). Shared projections may be larger than a module needs."""
    fields, stored = part.fields, shared.stored
    if shared.kind == "FOURIERFT":
        found = fields["fourierft_spectrum"].shape
        return {"fourierft_spectrum": (found, (max(1, min(math.prod(found), inputs * outputs)),))}
    rank, expected = shared.rank, dict[str, tuple[int, ...]]()
    if shared.kind == "VERA":
        expected = {"vera_lambda_b": (outputs,), "vera_lambda_d": (rank,)}
        shapes = {name: fields[name].shape for name in expected}
        if shared.is_saved:
            a, b = stored["vera_A"].shape, stored["vera_B"].shape
            shapes |= {"vera_A": a, "vera_B": b}
            expected |= {"vera_A": (rank, max(inputs, a[1])), "vera_B": (max(outputs, b[0]), rank)}
    elif shared.kind == "RANDLORA":
        small, large = sorted((inputs, outputs))
        bases = -(-small // rank)
        expected = {"randlora_lambda": (rank, bases), "randlora_gamma": (bases, small)}
        shapes = {name: fields[name].shape for name in expected}
        if shared.is_saved:
            a, b = stored["randlora_A"].shape, stored["randlora_B"].shape
            shapes |= {"randlora_A": a, "randlora_B": b}
            expected |= {"randlora_A": (rank, 1, max(small, a[2])), "randlora_B": (max(large, b[0]), max(bases, b[1]), rank)}
    else:
        count, length = stored["vblora_vector_bank"].shape
        topk = int(shared.config.get("topk") or 2)
        if not length or inputs % length or outputs % length:
            raise WorkbenchError(
                f"{shared.label}: vectors of {length} numbers do not divide the {inputs} inputs and {outputs} outputs of {part.module}",
                _OTHER,
            )
        tiles = {"A": (rank, inputs // length), "B": (outputs // length, rank)}
        sizes = {"": count, "_topk_indices": topk, "_topk_weights": topk - 1}
        names = {f"vblora_logits_{x}{end}": (*tiles[x], size) for x in "AB" for end, size in sizes.items()}
        expected = {name: shape for name, shape in names.items() if name in fields}
        shapes = {name: fields[name].shape for name in expected} | {"vblora_vector_bank": (count, length)}
        expected["vblora_vector_bank"] = (max(count, topk), length)
    return {name: (shapes[name], expected[name]) for name in expected}


def _weightless(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer whose weight has a shape and no memory; PEFT reads the shape alone."""
    with torch.device("meta"):
        layer = torch.nn.Linear(inputs, outputs, bias=False)
    layer.weight = torch.nn.Parameter(torch.zeros(1).expand(outputs, inputs), requires_grad=False)
    return layer


def _draw(kind: str, config: Mapping[str, Any], rank: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Draw the shared projections of VeRA or RandLoRA from their seed, by a PEFT model of one layer of the largest shape."""
    from peft import RandLoraConfig, VeraConfig, get_peft_model

    stub: Any = torch.nn.Module()
    stub.place = _weightless(inputs, outputs)
    common = {
        "r": rank,
        "target_modules": ["place"],
        "projection_prng_key": int(config.get("projection_prng_key") or 0),
        "save_projection": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "VERA":
            model: Any = get_peft_model(stub, VeraConfig(**common)).base_model
            return model.vera_A[_NAME].float(), model.vera_B[_NAME].float()
        sparse = {name: bool(config.get(name)) for name in ("sparse", "very_sparse")}
        model = get_peft_model(stub, RandLoraConfig(**common, **sparse)).base_model
        return model.randlora_A[_NAME].float(), model.randlora_B[_NAME].float()
