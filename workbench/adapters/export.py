"""Writers of PEFT adapter directories: adapter_config.json and adapter_model.safetensors.

PEFT loads every adapter written here. Loaders of plain LoRA, such as vLLM, load those without whole modules and biases: every
update has alpha = r, and all updates have the same rank, padded with zeros. If padding would more than double the file,
`rank_pattern` and `alpha_pattern` state the ranks instead.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.adapters.approximate import AdaptedPart, AdaptedWeights, lost
from workbench.adapters.keys import PREFIX
from workbench.adapters.live import Live, Place
from workbench.adapters.read import CONFIG, WEIGHTS
from workbench.ground.errors import WorkbenchError
from workbench.ground.files import json_digest, write_json, write_text
from workbench.ground.foreign_names import SINGLE
from workbench.ground.lazy import torch
from workbench.weights import lowrank
from workbench.weights.device import each
from workbench.weights.header import save_tensors
from workbench.weights.lowrank import Factors
from workbench.weights.specs import Source, TensorSpec
from workbench.weights.writer import write_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]
SHIFT = (PREFIX, ".lora_B.bias")
"""Beginning and end of the key of a change of a module's bias."""


def write_result(
    adapted: AdaptedWeights,
    out: Path,
    base: str,
    *,
    device: torch.device,
    threads: int,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Compute the update of every tensor and write the adapter.

    Args:
        adapted: The result and its base.
        out: Directory to create and write; the caller publishes it once it is complete.
        base: Value of `base_model_name_or_path`.
        device: Device that computes the updates.
        threads: Number of tensors to compute in parallel.
        dtype: Data type of weights that are saved whole; None keeps the base's.
        progress: Callback that receives the numbers (done, total) of tensors.

    Returns:
        The record: rank, `tensors` (name -> rank, norm, error, rounding), `whole`, `dropped`, relative error of all updates
        together, digests, parameters, bytes.

    Raises:
        WorkbenchError: If nothing differs from the base, an adapter cannot hold a changed weight, or the relative error is larger than the
            policy accepts.
    """
    parts = _parts(adapted, device, threads, progress)
    if not any(part.kind in ("lora", "whole") for part in parts.values()):
        raise WorkbenchError(
            "the result equals the base, so the adapter would be empty",
            "Check the recipe's bricks, weights and `where`, or the checkpoint and --base of `brick extract`.",
        )
    adapted.check_error()
    files = _Files(adapted, parts, dtype)
    written = write_checkpoint(files, out, dtype=None, shard_size=1 << 62, device=torch.device("cpu"), threads=threads)
    digests = written.digests
    (out / SINGLE).rename(out / WEIGHTS)
    write_json(out / CONFIG, files.config(base), indent=2)
    return {
        **record(parts),
        "rank": files.rank,
        "uniform": not files.ranks,
        "plain": not files.saved and not files.biases and not files.parameters,
        "digest": json_digest([digests, files.config("")]),
        "digests": digests,
        "parameters": sum(s.numel for s in files.specs.values()),
        "bytes": sum(s.nbytes for s in files.specs.values()),
    }


def record(parts: Mapping[str, AdaptedPart]) -> dict[str, object]:
    """Return the treatment of every changed tensor as plain data. The total error counts a dropped tensor as lost."""
    lora = {n: p for n, p in parts.items() if p.kind == "lora"}
    norm, error = lost(parts)
    rounding = math.hypot(*(p.norm * p.rounding for p in lora.values()))
    return {
        "tensors": {
            n: {"rank": p.factors.rank if p.factors else 0, "norm": p.norm, "error": p.error, "rounding": p.rounding}
            for n, p in lora.items()
        },
        "whole": [n for n, p in parts.items() if p.kind == "whole"],
        "dropped": [n for n, p in parts.items() if p.kind == "dropped"],
        "norm": norm,
        "error": error / norm if norm else 0.0,
        "rounding": rounding / norm if norm else 0.0,
    }


def _parts(adapted: AdaptedWeights, device: torch.device, threads: int, progress: Progress | None) -> dict[str, AdaptedPart]:
    """Compute the part of every tensor, starting with tensors that may raise an error, before any decomposition is done."""
    parts: dict[str, AdaptedPart] = {}
    lock = threading.Lock()
    names = list(adapted.before.specs)

    def work(name: str) -> None:
        part = adapted.part(name, device)
        if part.factors is not None:
            factors = Factors(part.factors.left.cpu(), part.factors.right.cpu())
            part = replace(part, factors=factors)
        with lock:
            parts[name] = part
            if progress:
                progress(len(parts), len(names))

    def rank(name: str) -> int:
        place = adapted.live.places.get(name)
        return 0 if place is None else 2 if place.kind in ("linear", "conv1d", "parameter") else 1

    each(work, sorted(names, key=rank), threads)
    return {name: parts[name] for name in names}


# Names of layers that PEFT takes for those of experts when it loads `target_modules` of a mixture of experts that older versions of transformers
# stored otherwise. As `target_parameters`, it leaves them alone.
_OF_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


@dataclass(frozen=True)
class _Whole:
    """A tensor that the adapter stores whole, named as in the result."""

    name: str


class _Files:
    """The adapter's tensors as lazy weights, and its configuration."""

    def __init__(self, adapted: AdaptedWeights, parts: Mapping[str, AdaptedPart], dtype: torch.dtype | None) -> None:
        self._adapted = adapted
        self._dtype = dtype
        self._live = live = adapted.live
        lora = {name: part.factors for name, part in parts.items() if part.factors is not None} or self._placeholder(parts)
        whole = {name for name, part in parts.items() if part.kind == "whole"}
        places = {name: live.places[name] for name in whole}
        self.parameters = [name for name, place in live.places.items() if name in lora and self._is_parameter(place)]
        self.targets = {name: live.places[name].module for name in lora if name not in self.parameters}
        targeted = {live.places[name].module for name in lora}
        matrices = {p.module for p in self._live.places.values() if p.kind in ("linear", "conv1d")}
        biases = {n for n, p in places.items() if p.parameter == "bias" and p.module in matrices}
        self.saved = sorted({p.module for n, p in places.items() if n not in biases})
        self.saved = [m for m in self.saved if not any(m.startswith(f"{above}.") for above in self.saved)]
        self.biases = sorted(n for n in biases if not self._is_saved(places[n].module))
        if in_both := sorted(filter(self._is_saved, targeted)):
            raise WorkbenchError(
                f"{in_both[0]}: this result requires both an update and a whole copy of the module, which an adapter cannot hold"
            )
        self.rank = max((f.rank for f in lora.values()), default=1)
        sizes = {name: sum(adapted.before.specs[name].shape[-2:]) * live.places[name].matrices for name in lora}
        grown = sum(sizes.values()) * self.rank > 2 * sum(sizes[n] * f.rank for n, f in lora.items())
        self.ranks = (
            {self.targets.get(n, live.places[n].name): f.rank for n, f in lora.items() if f.rank != self.rank} if grown else {}
        )
        tensors: dict[str, Tensor | _Whole] = {}
        for name, factors in lora.items():
            tensors |= self._pair(name, factors if grown else lowrank.padded(factors, self.rank))
        for name in self.biases:
            module = places[name].module
            tensors[f"{PREFIX}{module}{'.base_layer' if module in targeted else ''}.bias"] = _Whole(name)
        tensors |= self._modules()
        self._tensors = dict(sorted(tensors.items()))
        self.specs = {key: self._spec(value) for key, value in self._tensors.items()}

    def _is_parameter(self, place: Place) -> bool:
        """Return whether the configuration names the parameter (`target_parameters`) and not its module."""
        named = place.kind == "linear" and place.module.rpartition(".")[2] in _OF_EXPERTS
        return place.kind == "parameter" or (named and self._live.mixture)

    def _is_saved(self, module: str) -> bool:
        """Return whether a module or one above it is saved whole."""
        return any(f"{module}.".startswith(f"{saved}.") for saved in self.saved)

    def _placeholder(self, parts: Mapping[str, AdaptedPart]) -> dict[str, Factors]:
        """Return an update of zeros for one module, because PEFT cannot load an adapter that holds whole modules only."""
        kind = "conv1d" if self._live.conv1d else "linear"
        fitting = (
            n
            for n, p in self._live.places.items()
            if p.kind == kind
            and parts[n].kind == "same"
            and p.module not in self._live.ends
            and not self._changes_above(p, parts)
        )
        name = next(fitting, None)
        if name is None:
            return {}
        spec = self._adapted.before.specs[name]
        return {name: Factors(torch.zeros(spec.rows, 1), torch.zeros(1, spec.cols))}

    def _changes_above(self, place: Place, parts: Mapping[str, AdaptedPart]) -> bool:
        """Return whether the module lies in one that is saved whole."""
        return any(parts[n].kind == "whole" and f"{place.module}.".startswith(f"{m}.") for n, m in self._live.loose.items())

    def _pair(self, name: str, factors: Factors) -> dict[str, Tensor | _Whole]:
        """Return lora_A [r, in] and lora_B [out, r] under their keys; A of an embedding is [r, vocabulary].

        A of a stack is [experts · r, in], expert by expert; B is [out, r · experts], term by term.
        """
        place = self._live.places[name]
        module, beside = place.module, [n for n in self.parameters if self._live.places[n].module == place.module]
        after = (
            len(beside) - 1 - beside.index(name) if name in beside else 0
        )  # PEFT wraps the parameters of a module one in another
        key = f"{PREFIX}{module}{'.base_layer' * after}"
        stack = len(place.shape) == 3 and module in self._live.transposed
        turned = stack or place.kind in ("conv1d", "embedding")
        oriented = factors.transposed() if turned else factors
        right, left = oriented.right, oriented.left
        if len(right.shape) == 3:
            right, left = right.flatten(0, 1), left.permute(1, 2, 0).flatten(1, 2)
        a, b = (t.to(self._adapted.policy.dtype).contiguous() for t in (right, left))
        if place.kind == "embedding":
            return {f"{key}.lora_embedding_A": a, f"{key}.lora_embedding_B": b}
        return {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}

    def _modules(self) -> dict[str, Tensor | _Whole]:
        """Return all parameters of modules saved whole, with tied embeddings under the head's name too, as PEFT requires."""
        tensors: dict[str, Tensor | _Whole] = {}
        for name, place in self._live.places.items():
            if self._is_saved(place.module) and self._adapted.before.specs[name].is_float:
                tensors[f"{PREFIX}{place.name}"] = _Whole(name)
                if self._is_tied(place.module):
                    tensors[f"{PREFIX}{self._live.head}.{place.parameter}"] = _Whole(name)
        return tensors

    def _is_tied(self, module: str) -> bool:
        return self._live.head is not None and module in self._live.ends

    def _spec(self, value: Tensor | _Whole) -> TensorSpec:
        if isinstance(value, torch.Tensor):
            return TensorSpec.of(value.shape, value.dtype)
        spec = self._adapted.joined.specs[value.name]
        return TensorSpec.of(spec.shape, self._dtype) if self._dtype else spec

    def origin(self, name: str) -> str | None:
        """Return None, because no brick addresses an adapter's tensors."""
        return None

    def open(self, name: str, device: torch.device) -> Source:
        """Open a factor in memory, or the result's tensor."""
        value = self._tensors[name]
        return _AdapterRows(value) if isinstance(value, torch.Tensor) else self._adapted.joined.open(value.name, device)

    def config(self, base: str) -> dict[str, object]:
        """Return adapter_config.json with alpha = rank, so that the product of the factors is the update without further scaling."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if self._live.generates else None,
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.rank,
            "target_modules": _short_targets(self._live, set(self.targets.values())),
            "target_parameters": [self._live.places[name].name for name in self.parameters] or None,
            "rank_pattern": self.ranks,
            "alpha_pattern": self.ranks,
            "modules_to_save": self.saved or None,
            "ensure_weight_tying": any(map(self._is_tied, self.saved)),
            "bias": "all" if self.biases else "none",
            "fan_in_fan_out": self._live.conv1d,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "inference_mode": True,
        }


class _AdapterRows:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def read(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self._tensor[start:stop])


def _short_targets(live: Live, targets: set[str]) -> list[str]:
    """Return `target_modules`: the short name ("q_proj") if all modules of that name are updated, else full names."""
    last: dict[str, set[str]] = {}
    for module in live.modules:
        last.setdefault(module.rpartition(".")[2], set()).add(module)
    short = {leaf for leaf, modules in last.items() if modules <= targets}
    return sorted(short | {module for module in targets if module.rpartition(".")[2] not in short})


def write_adapter(
    path: Path, factors: Mapping[str, Factors], base: str, *, fan_in_fan_out: bool = False, mixture: bool = False
) -> None:
    """Save low-rank updates as a PEFT adapter in float32, with alpha = rank; changes of biases become `lora_bias`.

    Args:
        path: Directory to create and write.
        factors: Tensor name -> update. A name that ends in ".bias" is that of a module whose weight is updated too; its update is a
            matrix with one column. PEFT then needs a bias in every updated module, and those without a change get one of zero.
        base: Value of `base_model_name_or_path`.
        fan_in_fan_out: Whether the base stores these weights as [in, out].
        mixture: Whether the base has stacks of experts: PEFT would then take the names of shared and dense layers for those of experts.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    shifts = {name.removesuffix(".bias"): u.left @ u.right for name, u in factors.items() if name.endswith(".bias")}
    for name, update in sorted(factors.items()):
        if name.endswith(".bias"):
            continue
        module = name.removesuffix(".weight")
        oriented = update.transposed() if fan_in_fan_out else update
        tensors[f"{PREFIX}{module}.lora_A.weight"] = oriented.right.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = oriented.left.contiguous()
        if shifts:
            shift = shifts.get(module, torch.zeros(oriented.left.shape[0], 1))
            tensors[f"{SHIFT[0]}{module}{SHIFT[1]}"] = shift.flatten().contiguous()
        ranks[module] = oriented.rank
    rank = max(ranks.values(), default=1)
    named = {m: f"{m}.weight" for m in ranks if mixture and not shifts and m.rpartition(".")[2] in _OF_EXPERTS}
    smaller_ranks = {named.get(module, module): r for module, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(ranks.keys() - named),
        **({"target_parameters": sorted(named.values())} if named else {}),
        "rank_pattern": smaller_ranks,
        "alpha_pattern": smaller_ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
    }
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path / WEIGHTS, metadata={"format": "pt"})
    write_text(path / CONFIG, json.dumps({**config, "lora_bias": True} if shifts else config, indent=2) + "\n")
