"""A CUDA device made of host memory: tensors that say they are on it, mixed devices refused as CUDA refuses them, copies that end late.

Values are the CPU's, so a run "on the card" has the CPU's bytes unless code took another way because of the device. What it cannot show
is what only hardware has: rounding, races between streams, memory that is full, speed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.cuda._utils import _get_device_index
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda")
_HERE = torch.device("cuda", 0)
# Index tensors may lie in host memory; a copy takes any two devices. https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/TensorIndexing.h
_INDEXED = ("aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index.Tensor")
_COPIES = ("aten::copy_", "aten::copy", "aten::_to_copy", "aten::set_.source_Tensor")
# "Does not have a deterministic implementation" on CUDA, whatever is asked for; fused attention repeats only without `warn_only`.
# https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html
_FLOAT_SUMS = ("aten::cumsum", "aten::histc", "aten::put_", "aten::kthvalue", "aten::median.dim", "aten::_fused_")
_FUSED = ("flash_attention", "efficient_attention", "cudnn_attention")


class MixedError(RuntimeError):
    """Tensors of the host and of the card in one operator."""


class Card:
    """What the card saw.

    Attributes:
        unsteady: Operators on its tensors whose results CUDA does not repeat.
        mixed: Refusals, also those that the program caught.
        reads: How often the host waited for one number.
    """

    def __init__(self) -> None:
        self.unsteady: set[str] = set()
        self.mixed: list[str] = []
        self.reads = 0
        self.threads = threading.local()  # a thread that loads must not see where another one works
        self.late: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def inside(self) -> bool:
        """Say whether this thread is in an operator on tensors of the card, which makes what it needs where they are."""
        return getattr(self.threads, "inside", False)

    @inside.setter
    def inside(self, value: bool) -> None:
        self.threads.inside = value

    def arrive(self) -> None:
        """End the copies that are under way: what the host's buffer holds now arrives."""
        for there, here in self.late:
            there.copy_(here)
        self.late.clear()


def on_card(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is the card's."""
    return _marked(tensor, "card")


def _marked(tensor: torch.Tensor, name: str) -> bool:
    try:
        return bool(getattr(tensor.untyped_storage(), name, False))
    except (NotImplementedError, RuntimeError):  # tensors without memory
        return False


def _mark(value: Any, card: bool) -> Any:
    for tensor in tree_leaves(value):
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
            tensor.untyped_storage().card = card  # type: ignore[attr-defined]
    return value


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses mixed devices, and marks results."""

    def __init__(self, card: Card) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
        there = [t for t in inputs if on_card(t)]
        if self.card.late and any(
            t.untyped_storage()._cdata == c.untyped_storage()._cdata for t in there for c, _ in self.card.late
        ):
            self.card.arrive()
        if there:
            self._check(name, args, inputs)
        counts = name == "aten::histc" and not args[0].is_floating_point()  # which the CPU's does not take
        out = func(args[0].float(), *args[1:]).to(args[0].dtype) if counts else func(*args, **(kwargs or {}))
        if not inputs and self.card.inside:
            _mark(out, True)
        if there:
            known = {t.untyped_storage()._cdata for t in inputs}
            _mark([t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.device.type == "cpu"
                   and t.untyped_storage()._cdata not in known], True)  # fmt: skip
        return out

    def _check(self, name: str, args: Any, inputs: list[torch.Tensor]) -> None:
        self.card.reads += name == "aten::_local_scalar_dense"
        if any(part in name for part in _FUSED) or (
            name.startswith(_FLOAT_SUMS) and inputs[0].is_floating_point() and inputs[0].dim()
        ):
            self.card.unsteady.add(name)
        if name == "aten::bincount" and len(inputs) > 1:
            self.card.unsteady.add(name)
        if name in _COPIES:
            return
        if name in _INDEXED:
            inputs = [t for t in (args[0], *args[2:3]) if isinstance(t, torch.Tensor)] if on_card(args[0]) else inputs
        here = [t for t in inputs if not on_card(t) and (t.dim() or (name in _INDEXED and t is args[0]))]
        if here:
            shapes = [f"{'card' if on_card(t) else 'host'}{list(t.shape)}" for t in inputs]
            self.card.mixed.append(f"{name}: expected all tensors to be on the same device: {', '.join(shapes)}")
            raise MixedError(self.card.mixed[-1])


class _Functions(TorchFunctionMode):
    """Answers where tensors are, and makes and moves them."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__" and on_card(args[0]):
            place = {"device": _HERE, "is_cuda": True, "is_cpu": False}.get(func.__self__.__name__)
            if place is not None:
                return place
        elif name in ("to", "cpu", "cuda"):
            return self._move(func, name, args, kwargs)
        elif name in ("numpy", "__array__") and on_card(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        elif name == "get_device":
            return 0 if on_card(args[0]) else -1
        pinned = kwargs.pop("pin_memory", False)
        wanted = kwargs.get("device")
        if wanted is None:
            outer, self.card.inside = (
                self.card.inside,
                any(on_card(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)),
            )
            try:
                out = func(*args, **kwargs)
            finally:
                self.card.inside = outer
            if name == "__get__" and func.__self__.__name__ == "grad" and isinstance(out, torch.Tensor):
                _mark(out, on_card(args[0]))
        else:
            target = torch.device(wanted)
            out = func(*args, **{**kwargs, "device": "cpu" if target.type == "cuda" else wanted})
            shared = {
                t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor) and on_card(t) != (target.type == "cuda")
            }
            if isinstance(out, torch.Tensor) and target.type != "meta":
                out = _mark(out.clone() if out.untyped_storage()._cdata in shared else out, target.type == "cuda")
        if pinned:
            assert wanted is None or torch.device(wanted).type == "cpu", "only host memory can be page-locked"
            out.untyped_storage().pinned = True
        return out

    def _move(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor, *rest = args
        other = next((a for a in (*rest, kwargs.get("other")) if isinstance(a, torch.Tensor)), None)
        named = next((a for a in (*rest, kwargs.get("device")) if isinstance(a, str | torch.device)), None)
        wanted = (
            torch.device("cuda" if name == "cuda" else "cpu") if name != "to" else None if named is None else torch.device(named)
        )
        if tensor.device.type != "cpu" or (wanted and wanted.type not in ("cpu", "cuda")):
            return func(*args, **kwargs)
        flags = [a for a in rest if isinstance(a, bool)]
        late = kwargs.pop("non_blocking", flags[:1] == [True])
        dtype = next(
            (a for a in (*rest, kwargs.get("dtype")) if isinstance(a, torch.dtype)), None if other is None else other.dtype
        )
        was = on_card(tensor)
        target = on_card(other) if other is not None else wanted.type == "cuda" if wanted else was
        if was and not target:
            self.card.arrive()
        form: dict[str, Any] = {key: kwargs[key] for key in ("copy", "memory_format") if key in kwargs}
        form |= {"copy": True} if flags[1:] == [True] else {}
        out = torch.Tensor.to(tensor, dtype or tensor.dtype, **form)
        if target == was:
            return out
        if out.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            out = out.clone()
        _mark(out, target)
        if target and late and _marked(tensor, "pinned"):
            self.card.late.append((out.detach(), tensor.detach()))
        return out


@contextmanager
def card() -> Iterator[Card]:
    """Give this process a CUDA device, in the calling thread and in the threads of `weights.device.each`."""
    from workbench.weights import device

    state = Card()

    class Event:
        """Ends the copies when it is waited for."""

        def record(self, _stream: object) -> None: ...

        def synchronize(self) -> None:
            state.arrive()

    begins = device._begin

    def begin(place: torch.device) -> None:
        begins(place)
        _Functions(state).__enter__()  # type: ignore[no-untyped-call]
        _Operators(state).__enter__()  # type: ignore[no-untyped-call]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_begin", begin)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.cuda, "set_device", _get_device_index)  # refuses "cuda" without a number, as `set_device` does
        patch.setattr(torch.cuda, "current_stream", lambda device: None)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 0)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: state.arrive())
        with _Functions(state), _Operators(state):
            yield state
