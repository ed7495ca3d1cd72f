"""A checkpoint brick on the base of a recipe: its weights under the base's tensor names, or why they do not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from workbench.bricks.brick import Brick
from workbench.ground.errors import WorkbenchError, shell
from workbench.models.architecture import is_head, with_head_of
from workbench.models.layout import Model, live_layout
from workbench.weights.specs import Source, TensorSpec, Weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PartlyFitted:
    """A checkpoint's weights under the base's tensor names, where some tensors need no partner. Implements `Weights`.

    Attributes:
        weights: The checkpoint's weights.
        base: The base's weights.
        kept: Tensors of the base that the checkpoint lacks: they are the base's, and no delta touches them.
        dropped: Tensors of the checkpoint that the base lacks.
        why: What the tensors that are kept are.
    """

    weights: Weights
    base: Weights
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    why: str

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Specs of the base's tensors, with the checkpoint's dtypes."""
        kept = {name: self.base.specs[name] for name in self.kept}
        return {name: kept.get(name) or self.weights.specs[name] for name in self.base.specs}

    def origin(self, name: str) -> str | None:
        """Return the name itself: bricks address these tensors by their names."""
        return name

    def open(self, name: str, device: torch.device) -> Source:
        """Open a tensor of the checkpoint, or of the base where the checkpoint lacks it."""
        return (self.base if name in self.kept else self.weights).open(name, device)

    def notes(self, label: str) -> list[str]:
        """Return warnings that name these tensors."""
        from workbench.ground.numbers import few, plural

        kept, dropped = (f"{few(names)} ({plural(len(names), 'tensor')})" for names in (self.kept, self.dropped))
        notes = [f"{label} lacks {kept} of the base: they stay the base's; {self.why}"] if self.kept else []
        left = f"{label}: left out, because its own class in transformers does not load it: {dropped}"
        return [*notes, left] if self.dropped else notes


class Turned:
    """A checkpoint with some stacks of experts [experts, rows, cols] as [experts, cols, rows]; implements `Weights`.

    Args:
        weights: The checkpoint's weights.
        names: The stacks.
    """

    def __init__(self, weights: Weights, names: Collection[str]) -> None:
        self._weights, self._names = weights, names
        self.specs = {
            n: TensorSpec((s.shape[0], *s.shape[:0:-1]), s.stored) if n in names else s for n, s in weights.specs.items()
        }

    def origin(self, name: str) -> str | None:
        """Delegate to the checkpoint."""
        return self._weights.origin(name)

    def open(self, name: str, device: torch.device) -> Source:
        """Open one tensor."""
        if name not in self._names:
            return self._weights.open(name, device)
        experts, rows, cols = shape = self.specs[name].shape
        from workbench.adapters.live import JoinedSource
        from workbench.adapters.lora import Spot

        spots = tuple(Spot(name, e * cols, 0, e, (0, rows), (0, cols), swap=True) for e in range(experts))
        return JoinedSource(self._weights, shape, spots, device)


def _turned(weights: Weights, want: Mapping[str, TensorSpec], config: Mapping[str, object]) -> Weights:
    """Transpose stacks of experts that transformers reads in the brick's order and in the base's (Qwen3-VL-MoE, as published and as saved)."""
    shapes = {name: spec.shape for name, spec in weights.specs.items()}
    swapped = {n for n, s in want.items() if len(s.shape) == 3 and s.shape != shapes.get(n) == (s.shape[0], *s.shape[:0:-1])}
    layouts = [live_layout(specs, config) for specs in (weights.specs, want)] if swapped else []
    for layout in layouts:
        swapped &= {piece.disk for pieces in layout.pieces.values() for piece in pieces} if layout else set()
    return Turned(weights, swapped) if swapped else weights


_UNLOADED = "transformers does not load them, and a speculative head may accept less"
_OUTSIDE = "they lie outside the text decoder, which is what the brick holds"


def lacking(weights: Weights) -> tuple[str, ...]:
    """Return the tensors of the base that a checkpoint lacks, of weights that `fitted` returned."""
    return weights.kept if isinstance(weights, PartlyFitted) else ()


def fitted(brick: Brick, base: Model, weights: Weights | None = None) -> Weights:
    """Return a checkpoint brick's weights under the base's tensor names, converted from another layout if necessary.

    Tensors that only one of both has, and that its own class does not load, need no partner, nor do those of a multimodal base around the
    decoder that a text-only brick holds (`PartlyFitted`).

    Args:
        brick: The brick.
        base: The base, with the output's vocabulary.
        weights: The brick's weights aligned to that vocabulary; None uses the checkpoint's own.

    Raises:
        WorkbenchError: If tensors are missing, added, or of another shape or kind. The message names them.
    """
    want = base.weights.specs
    stored = _turned(weights or with_head_of(brick.checkpoint, base.weights, brick.checkpoint.config), want, base.config)
    fitting: Weights = stored
    missing, extra = [n for n in want if n not in stored.specs], [n for n in stored.specs if n not in want]
    reason, sources = None, dict[str, Sequence[str]]()
    kept, dropped, place = list[str](), list[str](), None
    if missing or extra:
        from workbench.models.live import Aligned, live_names, place_in, unloaded

        config = brick.checkpoint.config
        place = place_in(config, base.config) if config.get("model_type") != base.config.get("model_type") else None
        try:
            aligned = Aligned(stored, want, base.config, (config, place) if place else None)
            fitting, missing, extra = aligned, aligned.missing, aligned.unused
            sources = {name: aligned.sources(name) for name in want}
        except WorkbenchError as error:
            reason = error.message
        if missing and place:
            around = {
                name for name, live in live_names(base.config, want).items() if not any(n.startswith(place[1]) for n in live)
            }
            kept = [name for name in missing if name in around and not is_head(name)]
        elif missing:
            kept = [name for name in missing if name in unloaded(base.config, want)]
        if extra:
            dropped = [name for name in extra if name in unloaded(brick.checkpoint.config, stored.specs)]
        missing, extra = ([n for n in names if n not in known] for names, known in ((missing, kept), (extra, dropped)))
    for name in want:
        if name in fitting.specs and fitting.specs[name].shape != want[name].shape:
            raise WorkbenchError(
                f"{brick.label}: {name} is {list(fitting.specs[name].shape)}, the base has {list(want[name].shape)}",
                "All bricks of a recipe must have the base's shapes.",
            )
        for source in sources.get(name, [name]):
            spec = stored.specs.get(source, want[name])
            if spec.kind != want[name].kind:
                raise WorkbenchError(
                    f"{brick.label}: {source} holds {spec.kind} numbers ({spec.stored}), the base has {want[name].kind} numbers "
                    f"({want[name].stored})",
                    "The checkpoint may be quantized: use the floating-point model that it was made from."
                    if want[name].is_float
                    else "Use a fine-tune that keeps the base's kind of numbers.",
                )
    if missing and (prefixes := _other_prefix(stored.specs, want)):
        raise WorkbenchError(
            f"{brick.label}: its tensors begin with '{prefixes[1]}' where the base's begin with '{prefixes[0]}'; otherwise names and shapes are the same",
            "Some releases of transformers (5.5.0 to 5.5.3) saved such names. Save it again under the base's: "
            f"{_renaming(brick, *prefixes)}",
        )
    if missing or extra:
        text = [f"lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}"] if missing else []
        text += [f"has {', '.join(extra[:3])}{' …' if len(extra) > 3 else ''} that the base does not"] if extra else []
        raise WorkbenchError(
            f"{brick.label}: {' and '.join(text)} ({len(stored.specs)} tensors, the base has {len(want)})",
            _unfit(brick, base, extra, reason),
        )
    if not kept and not dropped:
        return fitting
    why = _OUTSIDE if place else _UNLOADED
    return PartlyFitted(fitting, base.weights, tuple(kept), tuple(dropped), why)


def _other_prefix(stored: Mapping[str, TensorSpec], want: Mapping[str, TensorSpec]) -> tuple[str, str] | None:
    """Return (the base's prefix, the brick's) if all names that differ do so in one prefix and have the same shapes; else None.

    No other name of the brick begins with its prefix, so that `_renaming` renames these alone.
    """
    missing, extra = [n for n in want if n not in stored], {n for n in stored if n not in want}
    for other in extra:
        mine, theirs = missing[0].split("."), other.split(".")
        same = next(
            (i for i, (a, b) in enumerate(zip(mine[::-1], theirs[::-1], strict=False)) if a != b), min(len(mine), len(theirs))
        )
        ours, own = (".".join([*parts[: len(parts) - same], ""]) if len(parts) > same else "" for parts in (mine, theirs))
        named = {name: own + name.removeprefix(ours) for name in missing if name.startswith(ours)}
        if (
            own
            and len(named) == len(missing)
            and {*named.values()} == extra == {name for name in stored if name.startswith(own)}
            and all(stored[b].shape == want[a].shape for a, b in named.items())
        ):
            return ours, own
    return None


def _renaming(brick: Brick, ours: str, own: str) -> str:
    """Return a line of Python that renames a brick's tensors in place, and in the index of its shards."""
    code = (
        f"import sys, pathlib; from safetensors.torch import load_file, save_file; own, ours, at = {own!r}, {ours!r}, pathlib.Path(sys.argv[1]); "
        "[save_file({(ours + n[len(own):] if n.startswith(own) else n): t for n, t in load_file(f).items()}, f, metadata={'format': 'pt'}) "
        "for f in at.glob('*.safetensors')]; "
        "[f.write_text(f.read_text().replace(chr(34) + own, chr(34) + ours)) for f in at.glob('*.safetensors.index.json')]"
    )
    return shell("python", "-c", code, str(brick.path))


def _unfit(brick: Brick, base: Model, extra: list[str], reason: str | None) -> str:
    """Return a hint for a checkpoint whose tensors differ from the base's."""
    from workbench.bricks.language import component_configs

    mine, theirs = brick.whole.config.get("model_type"), base.config.get("model_type")
    if brick.part:
        return f"Set `base:` to the text model that the language part of this {mine} model was made from."
    if mine != theirs and component_configs(brick.whole.config) and not component_configs(base.config):
        return (
            f"The brick is a {mine} model with encoders, the base a {theirs} model. To merge its text decoder alone, write `{brick.name}: "
            f"{{checkpoint: ..., part: language}}`; the last step `- {{grow: components, from: {brick.name}}}` gives the result its encoders."
        )
    if mine != theirs and component_configs(base.config) and not component_configs(brick.whole.config):
        return (
            f"The brick is a {mine} model, the base a {theirs} model with encoders. Make the text model the base, list the {theirs} model "
            "as a brick with `part: language`, and add `- {grow: components, from: BRICK}` as the last step. A merge step before it names "
            "its `bricks`, without that one: with it, the result would have the base's own decoder."
        )
    if mine != theirs:
        return f"The brick is a {mine} model, the base a {theirs} model: set `base:` to the model that the brick was fine-tuned from."
    if extra and all(is_head(name) for name in extra):
        return (
            "The base ties its head to its embeddings and the brick does not. If the brick's head equals its embeddings, set "
            "tie_word_embeddings in its config.json; otherwise use a base with untied embeddings."
        )
    hint = "A checkpoint brick must be a fine-tune of the recipe's base, with the same architecture and the same tensors."
    return f"{hint} Converting the tensor names with transformers failed, too: {reason}" if reason else hint
