"""Neurons of a live feed-forward block that write nothing or little, and their changes.

A neuron is a row of each matrix into the block (one, or a gate and an up matrix) and a column of the matrix out of it:
a = σ(k·x + b) or a = σ(g·x + b) · (u·x + c), and the block's output gets a · v.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from workbench.adapters.lora import Places
from workbench.edit.gradient.tuning import chunks
from workbench.edit.places.parts import EditRow, Parts, padded
from workbench.edit.places.passes import packer, run
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import no_grad, torch
from workbench.models.architecture import is_conv1d
from workbench.models.hooks import Stopped, hooked, is_attention, n_outputs
from workbench.models.texts import batch_limit, by_length
from workbench.steps import MethodContext
from workbench.weights.lowrank import Factors

if TYPE_CHECKING:
    from torch import Tensor, nn


ROWS_AT_ONCE = 32
"""Number of rows with shared beginnings in a forward pass."""
_OFF, _ON = -1e4, 1e2
"""Pre-activations at which a gate is off and on."""
_INSTEAD = "Choose another edit method, such as `edit: memit`, or `edit: memory`."


@dataclass(frozen=True)
class Block:
    """The feed-forward block of one layer.

    Attributes:
        parts: Parts of the model.
        layer: The layer.
        gate: Live name of the module whose output passes through the activation function.
        up: Live name of the module whose output multiplies it; None in a block without a gate.
        biased: True if all modules of the block have a bias, so that a neuron can have one.
        free: Indices of the neurons that write nothing: their weights of the output projection are zero.
        others: Indices of the other neurons whose biases are zero or can be changed.
        lent: Neuron among `free` that wrote something -> the column that it had [width], float32.
    """

    parts: Parts
    layer: int
    gate: str
    up: str | None
    biased: bool
    free: tuple[int, ...]
    others: tuple[int, ...]
    lent: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def out(self) -> str:
        """Live name of the output projection."""
        return self.parts.modules[self.layer]

    def module(self, name: str) -> nn.Module:
        """Return a module by its live name."""
        found: nn.Module = self.parts.model.get_submodule(name)
        return found


@dataclass(frozen=True)
class Neurons:
    """Changes of neurons, as they are added to the weights.

    Attributes:
        index: The neurons' indices.
        rows: Live name of a module into the block -> what is added to the neurons' rows [neuron, width], float32.
        shifts: Live name of such a module -> what is added to the neurons' biases [neuron], float32; empty without biases.
        columns: What is added to the neurons' columns of the output projection [neuron, width], float32.
    """

    index: tuple[int, ...]
    rows: dict[str, Tensor]
    shifts: dict[str, Tensor]
    columns: Tensor

    def factors(self, block: Block) -> dict[str, Factors]:
        """Return the low-rank update of every changed tensor, by live name; a bias is a matrix with one column."""
        width = block.parts.width(block.layer)
        places = torch.zeros(width, len(self.index))
        places[list(self.index), list(range(len(self.index)))] = 1.0
        nothing = torch.zeros(self.columns.shape[1])
        columns = self.columns - torch.stack([block.lent.get(neuron, nothing) for neuron in self.index])
        updates = {f"{name}.weight": _stored(block, name, Factors(places.clone(), rows)) for name, rows in self.rows.items()}
        updates[f"{block.out}.weight"] = _stored(block, block.out, Factors(columns.T.contiguous(), places.T.contiguous()))
        for name, shift in self.shifts.items():
            updates[f"{name}.bias"] = Factors((places @ shift)[:, None], torch.ones(1, 1))
        return updates


def find_block(parts: Parts, layer: int, context: MethodContext) -> Block:
    """Find the matrices into and out of the neurons of a layer, and check by forward passes what they compute.

    Raises:
        WorkbenchError: If the block has other matrices, transformers fuses or renames one, or neurons depend on one another.
    """
    width, prefix = parts.width(layer), f"{parts.prefix}.{layer}"
    names = [
        f"{prefix}.{inner}"
        for inner, module in parts.layers[layer].named_modules()
        if n_outputs(module) == width and not is_attention(inner) and f"{prefix}.{inner}" != parts.modules[layer]
    ]
    if len(names) not in (1, 2):
        raise WorkbenchError(
            f"edit patch: layer {layer} of {type(parts.model).__name__} has {len(names)} modules with {width} outputs, one for each "
            "neuron; expected one, or a gate and an up projection",
            f"A block whose matrices are fused (gate_up_proj) cannot be patched. {_INSTEAD}",
        )
    on_disk = Places(context.layout.weights.specs, context.layout.config)
    for name in names:
        if on_disk.whole(f"{name}.weight") is None:
            raise WorkbenchError(
                f"edit patch: {name} is not stored as a weight of its own, because transformers fuses or renames it", _INSTEAD
            )
    biases = [getattr(parts.model.get_submodule(name), "bias", None) for name in (*names, parts.modules[layer])]
    biased = all(bias is not None for bias in biases)
    silent = ~_by_neuron(parts.out(layer), inputs=True).any(dim=1)
    usable = torch.ones_like(silent)
    for bias in biases[:-1] if not biased else []:
        if bias is not None:  # a bias that the edit cannot change has to be zero
            usable &= bias.data == 0
    free, others = (tuple(chosen.nonzero().flatten().tolist()) for chosen in (usable & silent, usable & ~silent))
    gate, up = _roles(parts, layer, names, free[0] if free else 0)
    return Block(parts, layer, gate, up, biased, free, others)


_SHARP = 10
"""Length of a key, relative to the block's median, above which a neuron may hold an earlier edit: keys of patch neurons are about 100."""


@no_grad
def least_used(block: Block, rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the neurons that write least first, by the mean over tokens of |activation| times the length of the column.

    Neurons with sharp keys are left out: texts hardly activate them, because they hold the facts of an earlier edit.

    Args:
        block: The block.
        rows: Rows of tokens of ordinary text.
    """
    out, total = block.parts.out(block.layer), torch.zeros(())
    for chosen in chunks(rows, ROWS_AT_ONCE):
        total = total + torch.stack([states.abs().sum(0) for states in inputs_of(block.parts, out, chosen)]).sum(0)
    lengths = _by_neuron(block.module(block.gate), inputs=False).norm(dim=1).cpu()
    written = total * _by_neuron(out, inputs=True).norm(dim=1).cpu()
    blunt = (lengths <= _SHARP * lengths.median()).tolist()
    return tuple(sorted((i for i in block.others if blunt[i]), key=written.tolist().__getitem__))


@contextmanager
def lending(block: Block, order: Sequence[int], count: int) -> Iterator[Block]:
    """Silence the first neurons in an order until `count` write nothing, and yield the block with them; their columns return at the end."""
    taken, view = list(order[: max(0, count - len(block.free))]), _by_neuron(block.module(block.out), inputs=True)
    own = view[taken].clone()
    view[taken] = 0
    try:
        yield replace(block, free=(*block.free, *taken), lent=dict(zip(taken, own.float().cpu(), strict=True)))
    finally:
        view[taken] = own


def _roles(parts: Parts, layer: int, names: Sequence[str], neuron: int) -> tuple[str, str | None]:
    """Return which module is the gate, and which one multiplies it, from the activations for set outputs of a free neuron."""
    usual = _activations(parts, layer, {}, neuron)
    gates = []
    for name in names:
        values = dict.fromkeys(names, _ON) | {name: _OFF}
        if not _activations(parts, layer, values, neuron)[:, neuron].any():
            gates.append(name)
    if len(gates) == 1:
        others = [name for name in names if name != gates[0]]
        up = others[0] if others else None
        once, twice = (_activations(parts, layer, {gates[0]: _ON, **({up: x} if up else {})}, neuron) for x in (1.0, 2.0))
        rest = [i for i in range(usual.shape[1]) if i != neuron]
        ratio = 2.0 if up else 1.0
        if (
            bool((once[:, neuron] > 0).all())
            and torch.allclose(twice[:, neuron], ratio * once[:, neuron])
            and torch.equal(once[:, rest], usual[:, rest])
        ):
            return gates[0], up
    raise WorkbenchError(
        f"edit patch: the neurons of layer {layer} of {type(parts.model).__name__} are not σ(k·x) or σ(g·x) · (u·x) with a σ that is "
        "zero far below zero, or they depend on one another",
        f"A patch neuron could not be silent there. {_INSTEAD}",
    )


@no_grad
def _activations(parts: Parts, layer: int, values: dict[str, float], neuron: int) -> Tensor:
    """Return the neurons' activations [token, neuron] for two tokens, with set outputs of modules for one neuron."""
    seen: list[Tensor] = []

    def set_to(value: float, _module: Any, _args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[..., neuron] = value
        return changed

    def record(_module: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].reshape(-1, args[0].shape[-1]).float())
        raise Stopped

    with hooked(parts.out(layer), before=record), ExitStack() as hooks:
        for name, value in values.items():
            hooks.enter_context(hooked(parts.model.get_submodule(name), after=partial(set_to, value)))
        run(parts, padded([whole_row([0, 1])], parts.model.device))
    return seen[0]


def whole_row(tokens: Sequence[int]) -> EditRow:
    """Return a row of tokens whose places are all of them."""
    return EditRow(tuple(tokens), 0, 0, tuple(tokens), (0, 1))


@no_grad
def inputs_of(
    parts: Parts, module: nn.Module, rows: Sequence[Sequence[int]], chosen: Sequence[int] | None = None, *, alike: bool = False
) -> list[Tensor]:
    """Return a module's inputs at every token of some rows: for each row [token, width], on the CPU.

    Args:
        parts: Parts of the model.
        module: A linear module; what follows it is not run.
        rows: Rows of tokens.
        chosen: Indices of the inputs that are returned; None: all.
        alike: True if many rows begin with the same tokens.
    """
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    listed, device = [whole_row(row) for row in rows], parts.model.device
    if alike:
        batched, groups = packer(parts, listed), chunks(sorted(range(len(rows)), key=lambda i: listed[i].tokens), ROWS_AT_ONCE)
    else:
        batched, groups = partial(padded, device=device), by_length(list(map(len, rows)), batch_limit(device))
    for numbers in groups:
        seen: list[Tensor] = []

        def record(_module: Any, args: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            seen.append(args[0])
            raise Stopped

        batch = batched([listed[i] for i in numbers])
        with hooked(module, before=record):
            run(parts, batch)
        states = seen[0].reshape(batch.tokens.numel(), -1)
        states = (states if chosen is None else states[:, list(chosen)])[batch.places].float().cpu()
        for i, own in zip(numbers, torch.split(states, [len(rows[i]) for i in numbers]), strict=True):
            found[i] = own
    return found


def _by_neuron(module: nn.Module, *, inputs: bool) -> Tensor:
    """Return a view of a module's weight with one row for each neuron, which are its inputs or its outputs."""
    weight = module.weight
    assert isinstance(weight, torch.nn.Parameter)
    return weight.data.T if is_conv1d(module) != inputs else weight.data


def _stored(block: Block, name: str, factors: Factors) -> Factors:
    """Return the update [out, in] of a module for its weight as it is stored."""
    return factors.transposed() if is_conv1d(block.module(name)) else factors


def old_values(block: Block, name: str, index: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Return the rows [neuron, width] and biases [neuron] of neurons in a module into the block, on the CPU."""
    module, chosen = block.module(name), list(index)
    bias = getattr(module, "bias", None)
    rows = _by_neuron(module, inputs=False)[chosen].float().cpu()
    return rows, None if bias is None else bias.data[chosen].float().cpu()


@contextmanager
def installed(block: Block, neurons: Neurons) -> Iterator[None]:
    """Add changes of neurons to the live weights within the block; the model's own weights are restored after it."""
    index = list(neurons.index)
    saved: list[tuple[Tensor, Tensor]] = []

    def add(view: Tensor, change: Tensor) -> None:
        saved.append((view, view[index].clone()))
        view[index] += change.to(view.device, view.dtype)

    try:
        for name, rows in neurons.rows.items():
            add(_by_neuron(block.module(name), inputs=False), rows)
        for name, shift in neurons.shifts.items():
            bias = block.module(name).bias
            assert isinstance(bias, torch.nn.Parameter)
            add(bias.data, shift)
        add(_by_neuron(block.module(block.out), inputs=True), neurons.columns)
        yield
    finally:
        for view, own in saved:
            view[index] = own
