"""Live transformers models, loaded by their names on disk, and checkpoints under the tensor names of another one.

Checkpoints of one architecture can name, prefix and fuse weights in several ways: `h.0.…` or `transformer.h.0.…`, one tensor per expert
(`experts.3.w1.weight`) or one for all experts (`experts.gate_up_proj` [experts, rows, cols]). transformers maps all of them to its live
model. This module combines two such maps: a tensor with a base's name is read from those rows of the brick's tensors that become the
same rows of the live model. Nothing is converted in memory.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import no_grad, torch
from workbench.models.layout import Model
from workbench.models.skeleton import decoder_class, groups_of, parse_config, part_for, skeleton
from workbench.weights.device import load_all
from workbench.weights.specs import Source, TensorSpec, Weights

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


# A row is numbered by its tensor's index in the list of names (high bits) and its row in the tensor (low bits).
_ROW_BITS = 40
_ROW_MASK = (1 << _ROW_BITS) - 1


@dataclass(frozen=True)
class RowRun:
    """Consecutive rows of a tensor on disk that are consecutive rows of a live tensor.

    Attributes:
        live: First row in the live tensor.
        name: Tensor on disk.
        row: First row in the tensor on disk.
        count: Number of rows.
    """

    live: int
    name: str
    row: int
    count: int


def live_names(config: Mapping[str, object], specs: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
    """Map each tensor on disk to the live model's tensors that it becomes or is part of; to none if the model does not use it."""
    targets: dict[str, list[str]] = {name: [] for name in specs}
    for live, runs in live_runs(config, specs).items():
        for name in dict.fromkeys(run.name for run in runs):
            targets[name].append(live)
    return {name: [] if live == [f"?{name}"] else live for name, live in targets.items()}


def unloaded(config: Mapping[str, object], specs: Mapping[str, TensorSpec]) -> set[str]:
    """Return the tensors on disk that the model's own class does not load, such as a head that predicts several tokens; none if it is unknown."""
    try:
        return {live[1:] for live in live_runs(config, specs) if live.startswith("?")}
    except WorkbenchError:
        return set()


def place_in(own: Mapping[str, object], whole: Mapping[str, object]) -> tuple[str, str] | None:
    """Find a text model's decoder within a multimodal model, by its class in transformers.

    Returns:
        The decoder's prefix in the text model and in the whole one, such as ("model.", "model.language_model."). None if the models have
        the same class, or if the whole one has no such decoder, or several.
    """
    try:
        text, model = (skeleton(json.dumps(config, sort_keys=True)) for config in (own, whole))
    except WorkbenchError:
        return None
    # Llama 4's prefix names a module that it lacks.
    prefix = text.base_model_prefix if hasattr(text, text.base_model_prefix) else "model"
    for inner, stem in ((text, ""), (getattr(text, prefix, None), f"{prefix}.")):
        found = [name for name, module in model.named_modules() if name and type(module) is type(inner)]
        if len(found) == 1 and type(text) is not type(model) and f"{found[0]}." != stem:
            return stem, f"{found[0]}."
    return None


class Aligned:
    """A checkpoint with another checkpoint's tensor names; implements `Weights`.

    Args:
        weights: The checkpoint's weights.
        specs: The other checkpoint's tensors.
        config: The other checkpoint's config.json, which is used for both.
        own: The checkpoint's own config.json, and its decoder's place in the other model (`place_in`), if that is another model.

    Attributes:
        specs: The tensors that the checkpoint has, with the other's names and shapes and its own dtypes.
        missing: Tensors of the other checkpoint that it lacks completely or in part.
        unused: Its own tensors that are not used completely.
    """

    def __init__(
        self,
        weights: Weights,
        specs: Mapping[str, TensorSpec],
        config: Mapping[str, object],
        own: tuple[Mapping[str, object], tuple[str, str]] | None = None,
    ) -> None:
        self._weights = weights
        target_runs, own_runs = live_runs(config, specs), live_runs(own[0] if own else config, weights.specs)
        if own:
            here, there = own[1]
            own_runs = {
                there + live.removeprefix(here) if live.startswith(here) else live: runs for live, runs in own_runs.items()
            }
        self._parts: dict[str, list[tuple[int, RowRun]]] = {name: [] for name in specs}
        self.specs: dict[str, TensorSpec] = {}
        unused_rows = {name: spec.rows for name, spec in weights.specs.items()}
        self._whole = _one_to_one(target_runs, own_runs)
        for live, runs in target_runs.items():
            for target in runs:
                self._parts[target.name].extend(_overlap(target, own_runs.get(live, [])))
        for name, spec in specs.items():
            self._parts[name].sort(key=lambda part: part[0])
            sources = [weights.specs[run.name] for _, run in self._parts[name]]
            if name in self._whole and sources and len(sources[0].shape) == len(spec.shape):
                self.specs[name] = sources[0]  # only renamed: the tensor keeps its own shape, which may differ
                unused_rows[self._whole[name]] = 0
            elif sum(run.count for _, run in self._parts[name]) == spec.rows and {s.cols for s in sources} == {spec.cols}:
                self.specs[name] = TensorSpec(spec.shape, sources[0].stored)
                for _, run in self._parts[name]:
                    unused_rows[run.name] -= run.count
        self.missing = [name for name in specs if name not in self.specs]
        self.unused = [name for name, rows in unused_rows.items() if rows > 0]

    def origin(self, name: str) -> str | None:
        """Return the name itself: bricks address these tensors by their names."""
        return name

    def sources(self, name: str) -> list[str]:
        """Return the stored tensors that a tensor is read from."""
        return [run.name for _, run in self._parts[name]]

    def open(self, name: str, device: torch.device) -> Source:
        """Open one tensor; the reader reads the stored tensors that have its rows."""
        if name in self._whole:
            return self._weights.open(self._whole[name], device)
        return _RunReader(self._parts[name], partial(self._weights.open, device=device))


class _RunReader:
    """Reader of rows from several tensors. Only one is open at a time, since a fused tensor can have hundreds of parts with a buffer each."""

    def __init__(self, parts: list[tuple[int, RowRun]], opener: Callable[[str], Source]) -> None:
        self._parts = parts
        self._opener = opener
        self._current: tuple[str, Source] | None = None

    def read(self, start: int, stop: int, out: Tensor) -> None:
        after = bisect_right(self._parts, start, key=lambda part: part[0])
        for first, run in self._parts[max(0, after - 1) :]:
            low, high = max(start, first), min(stop, first + run.count)
            if low >= high:
                break
            if self._current is None or self._current[0] != run.name:
                self._current = (run.name, self._opener(run.name))
            self._current[1].read(run.row + low - first, run.row + high - first, out[low - start : high - start])


def _one_to_one(target_runs: Mapping[str, list[RowRun]], own_runs: Mapping[str, list[RowRun]]) -> dict[str, str]:
    """Map target tensors to stored ones where both fill the same live tensor alone, and no other live tensor."""
    counts = [Counter(run.name for runs in model_runs.values() for run in runs) for model_runs in (target_runs, own_runs)]
    pairs = [
        (runs[0].name, own_runs[live][0].name)
        for live, runs in target_runs.items()
        if len(runs) == 1 and len(own_runs.get(live, [])) == 1
    ]
    return {target: source for target, source in pairs if counts[0][target] == 1 and counts[1][source] == 1}


def _overlap(target: RowRun, stored: list[RowRun]) -> Iterator[tuple[int, RowRun]]:
    """Yield (first row in the target tensor, rows on disk) for the live rows that `target` and `stored` share."""
    for run in stored:
        low, high = max(target.live, run.live), min(target.live + target.count, run.live + run.count)
        if low < high:
            yield target.row + low - target.live, RowRun(low, run.name, run.row + low - run.live, high - low)


def live_runs(config: Mapping[str, object], specs: Mapping[str, TensorSpec]) -> dict[str, list[RowRun]]:
    """Map each live tensor to the rows on disk that it consists of.

    Returns:
        Live tensor -> rows on disk. A tensor that the model does not use has the key "?name".

    Raises:
        WorkbenchError: If two tensors become the same weight, or if transformers computes or reshapes values instead of moving rows.
    """
    from transformers.core_model_loading import SkipParameters

    model = skeleton(json.dumps(config, sort_keys=True))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    names = list(specs)
    place = {name: i for i, name in enumerate(names)}
    runs: dict[str, list[RowRun]] = {}
    for key, transform, members in groups_of(model, names):
        if transform is None:
            if len(members) > 1:
                raise WorkbenchError(
                    f"{' and '.join(name for name, _ in members[:2])} are the same weight, {key}", "Save the model again."
                )
            ((name, _),) = members
            runs[key] = [RowRun(0, name, 0, specs[name].rows)]
            continue
        inputs = [_numbered(place[name], specs[name]) for name, _ in members]
        for (name, pattern), numbers in zip(members, inputs, strict=True):
            transform.add_tensor(key, name, pattern, numbers)
        try:
            made = transform.convert(key, model=model, config=model.config)
        except (SkipParameters, RuntimeError, ValueError, IndexError, KeyError) as error:
            raise WorkbenchError(
                f"{members[0][0]}: transformers cannot make {key} from this group of tensors ({str(error).splitlines()[0][:200] if str(error) else type(error).__name__})",
                "Tensors of the group are missing or differ in shape: download the checkpoint again.",
            ) from None
        converted = {live: value[0] if isinstance(value, list) else value for live, value in made.items()}
        # Every row must come out once, because a tensor whose values are computed cannot be read row by row.
        before, after = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (inputs, list(converted.values())))
        if after.dtype != before.dtype or not torch.equal(before.sort().values, after.sort().values):
            raise WorkbenchError(
                f"{members[0][0]}: transformers computes {key} from it instead of only moving rows, which is not supported between layouts",
                "Save the brick with the base's tensor names and shapes.",
            )
        for live, rows in converted.items():
            _check_rows(rows, shapes.get(live), live, members[0][0])
            runs[live] = list(_compress(rows.reshape(-1), names))
    return runs


def _check_rows(rows: Tensor, shape: tuple[int, ...] | None, live: str, example: str) -> None:
    """Check that a converted tensor keeps its rows, and has the shape that the model expects."""
    if shape is None or rows.shape == shape or (len(shape) > 1 and rows.shape[:-1] == shape[:-1]):
        return
    if rows.dim() == len(shape) and rows.shape[-1] == 1:
        raise WorkbenchError(
            f"the group of {example} makes {live} [{', '.join(map(str, rows.shape[:-1]))}, …], the model has {list(shape)}",
            "Tensors of the group are missing or differ in shape: download the checkpoint again.",
        )
    raise WorkbenchError(
        f"{example}: transformers makes {live} from it by moving columns, which is not supported between layouts",
        "Save the brick with the base's tensor names and shapes.",
    )


def _numbered(place: int, spec: TensorSpec) -> Tensor:
    """Return a tensor with one column that holds the number of each row."""
    shape = (*spec.shape[:-1], 1) if len(spec.shape) > 1 else spec.shape
    return (torch.arange(spec.rows, dtype=torch.int64) + (place << _ROW_BITS)).reshape(shape)


def _compress(numbers: Tensor, names: list[str]) -> Iterator[RowRun]:
    """Yield the runs of consecutive row numbers."""
    breaks = (numbers.diff() != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
        first = int(numbers[start])
        yield RowRun(start, names[first >> _ROW_BITS], first & _ROW_MASK, stop - start)


_INCOMPLETE = "The base's files are incomplete, or its config.json belongs to another model: download both again."


def compute(model: Model, dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
    """Load all tensors of a configuration, computed in float32 and cast once; a dtype of None keeps each tensor's dtype."""
    return load_all(model.weights, dtype, device)


def carries_state(config: dict[str, object]) -> bool:
    """Return True if a model's layers pass a state from token to token (Mamba, RWKV, hybrids), which no mask can hide from a token."""
    return bool(getattr(decoder_class(parse_config(config), config), "_is_stateful", False))


def live_model(config: dict[str, object], tensors: dict[str, Tensor], source: Path, device: torch.device) -> PreTrainedModel:
    """Return a transformers model with tensors in memory, which have the names of the checkpoint on disk.

    transformers converts names (fused experts, prefixes) itself, as if it read the tensors from files.

    Args:
        config: The content of config.json.
        tensors: Name -> tensor; all floating-point tensors have the same dtype. They are used without a copy.
        source: Directory with generation_config.json, which may be missing.
        device: The device of the model.

    Raises:
        WorkbenchError: If the architecture is not a causal language model, or if the tensors lack weights that the model needs.
    """
    from transformers import GenerationConfig

    parsed = parse_config(config)
    dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    kind = decoder_class(parsed, config)
    try:
        model, info = kind.from_pretrained(
            None,
            config=part_for(kind, parsed),
            state_dict=dict(tensors),
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except RuntimeError as error:
        live_names(
            config, {n: TensorSpec.of(t.shape, t.dtype) for n, t in tensors.items()}
        )  # raises an error that names the tensor
        raise WorkbenchError(
            f"{source}: transformers cannot load these weights ({str(error).strip()[:200]})", _INCOMPLETE
        ) from error
    # A mismatch is a tuple: name, actual shape, expected shape.
    missing = [name if isinstance(name, str) else name[0] for name in (*info["missing_keys"], *info["mismatched_keys"])]
    if missing:
        raise WorkbenchError(
            f"{source}: no tensor fits {min(missing)} of {kind.__name__} ({len(missing)} such tensors): its values would be random",
            _INCOMPLETE,
        )
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    live: PreTrainedModel = model.to(device).eval()
    return live


@no_grad
def check_causal(model: PreTrainedModel, label: str) -> None:
    """Check on four tokens that what a model, with this label in messages, predicts does not depend on later tokens.

    BERT and its kin see all tokens unless `is_decoder` is set. transformers loads them as causal language models all the same, and
    the probability of a token that the model has already read says nothing.

    Raises:
        WorkbenchError: If it does.
    """
    size = model.config.get_text_config().vocab_size
    row = [size * (2 * i + 1) // 10 for i in range(5)]
    tokens = torch.tensor([row[:4], [*row[:3], row[4]]], device=model.device)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :3].float()
    if float((logits[0] - logits[1]).abs().max()) > _NOISE * float(logits.std()):
        raise WorkbenchError(
            f"{label}: what it predicts depends on later tokens, so that it is no causal language model ({type(model).__name__})",
            "If it was trained as a decoder, set `is_decoder: true` in its config.json.",
        )


_NOISE = 0.1  # of the logits' standard deviation: rounding in bfloat16, where experts are batched, stays far below
