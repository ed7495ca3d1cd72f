"""Components: put the text model into a multimodal model, whose encoders and projectors are carried over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from workbench.bricks.language import EMBEDDINGS, HEAD, component_configs, component_of, language_names
from workbench.ground.errors import InvalidRecipeError, nearest
from workbench.models.architecture import head_of, untied_config
from workbench.models.layout import Model
from workbench.steps import GrowMethod, Grown, Growth, Learns, Preserves, Problem, register

_SHARE = "All models must share one text architecture: the same layers, widths and number of tokens."


@register
class Components(GrowMethod):
    """Put the text model into a multimodal model (Chen et al. 2024).

    Encoders, projectors, configuration and processor come from a brick, and the language part is the configuration so far. The
    result has the brick's class and tensor names. If the language part is the brick's own, the result answers as the brick does.

    The recipe's base is a text model. Its bricks are text models of that architecture, and multimodal models with `part: language`.
    """

    paper = "Chen et al. 2024, Model Composition for Multimodal Large Language Models, arXiv 2402.12750"
    formula = "θ = (θ_components of the brick, θ_language of the configuration so far)"
    preserves: ClassVar[Preserves] = "no"
    learns: ClassVar[Learns] = "when_selected"
    composes: ClassVar[bool] = True

    grow: Literal["components"]
    source: str = Field(alias="from")
    """Multimodal brick with `part: language`, whose class, configuration, processor and tokenizer the result has."""
    components: dict[str, str] = Field(default_factory=dict)
    """Component -> another brick of the same class that it is taken from, such as {vision_tower: OTHER}. A component is the first part
    of a tensor's name outside the text decoder: vision_tower, multi_modal_projector, visual, audio_tower."""

    @field_validator("source", mode="before")
    @classmethod
    def _check_source(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            raise ValueError(
                "expected one brick, found a list: transformers has no class with the encoders of two multimodal models. Write one result "
                "for each of them; a component of another brick of the same class is `components: {NAME: BRICK}`"
            )
        return value

    @model_validator(mode="after")
    def _check_train(self) -> Components:
        if self.train is not None:
            raise ValueError("`train` trains text models, and this step adds encoders: train the result with its own processor")
        return self

    def names(self) -> list[str]:
        """Return the bricks that the result has components of, in order."""
        return list(dict.fromkeys([self.source, *self.components.values()]))

    def whole_models(self) -> list[str]:
        """Return the same bricks: their components have no counterpart in the base."""
        return self.names()

    def tokenizer_brick(self) -> str | None:
        """Return the brick whose tokenizer and processor the result has."""
        return self.source

    def check_names(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Problem]:
        """Yield the errors in the brick names of the step."""
        if self.source not in known:
            yield Problem(("from",), f"no brick '{self.source}' under `bricks`. {nearest(self.source, known)}")
        for component, name in self.components.items():
            if name not in known:
                yield Problem(("components", component), f"no brick '{name}' under `bricks`. {nearest(name, known)}")

    def check_kinds(self, kinds: Mapping[str, str]) -> Iterator[Problem]:
        """Yield an error for each brick that is no checkpoint."""
        for name, kind in kinds.items():
            if kind != "checkpoint":
                path = ("from",) if name == self.source else ("components",)
                yield Problem(path, f"brick '{name}' is of kind {kind}, but this step takes encoders of multimodal checkpoints")

    def expand(self, model: Model) -> Growth:
        """Plan the result: the brick's tensors in their order, those of the text decoder from the configuration so far.

        Raises:
            WorkbenchError: If the text decoders differ in tensors or shapes, or components of two bricks do not fit each other.
        """
        whole = self._whole_sources.models[self.source]
        label = f"brick '{self.source}'"
        places = self._decoder(model, whole, label)
        taken = self._taken(whole, label, places)
        tensors = {
            name: Grown(places[name]) if name in places else Grown(name, model=taken[name], new=True)
            for name in (*whole.weights.specs, *(n for n in places if n not in whole.weights.specs))
        }
        config = untied_config(whole.config) if any(name not in whole.weights.specs for name in places) else whole.config
        kept: dict[str, list[str]] = {}
        for name, brick in taken.items():
            kept.setdefault(brick, [])
            if (component := component_of(name)) not in kept[brick]:
                kept[brick].append(component)
        record = {"from": self.source, "language_tensors": len(places), "component_tensors": len(taken), "components": kept}
        return Growth(tensors, config, record, models={name: self._whole_sources.models[name] for name in self.names()})

    def _decoder(self, model: Model, whole: Model, label: str) -> dict[str, str]:
        """Return name in the result -> tensor of the current model, for the text decoder."""
        if component_configs(model.config):
            raise InvalidRecipeError(
                f"grow components: the configuration so far is a {model.config.get('model_type')} model, which has encoders of its own",
                "The recipe's `base` must be the text model; multimodal models are bricks with `part: language`.",
            )
        own = {text: name for name, text in language_names(model.weights.specs, "the configuration so far").items()}
        if unknown := sorted(set(model.weights.specs) - set(own.values())):
            raise InvalidRecipeError(
                f"grow components: {unknown[0]} of the configuration so far is no part of a text decoder", _SHARE
            )
        theirs = {text: name for name, text in language_names(whole.weights.specs, label).items()}
        if HEAD in own and HEAD not in theirs:
            theirs[HEAD] = head_of(whole.config, theirs[EMBEDDINGS])
        if different := sorted(own.keys() ^ theirs.keys()):
            name = different[0]
            holder, other = ("the configuration so far", label) if name in own else (label, "the configuration so far")
            raise InvalidRecipeError(f"grow components: {holder} has {name} in its text decoder, {other} has not", _SHARE)
        for text, name in theirs.items():
            spec = whole.weights.specs.get(name)
            shape = model.weights.specs[own[text]].shape
            if spec is not None and spec.shape != shape:
                rows = spec.shape[1:] == shape[1:] and text in (HEAD, EMBEDDINGS)
                raise InvalidRecipeError(
                    f"grow components: {name} of {label} is {list(spec.shape)}, the configuration so far has {list(shape)}",
                    f"Add `tokenizer: {{source: {self.source}}}` to the recipe, which gives every model this brick's tokens."
                    if rows
                    else _SHARE,
                )
        return {name: own[text] for text, name in theirs.items()}

    def _taken(self, whole: Model, label: str, decoder: Mapping[str, str]) -> dict[str, str]:
        """Return tensor outside the text decoder -> the brick that it is taken from."""
        names = [name for name in whole.weights.specs if name not in decoder]
        known = list(dict.fromkeys(map(component_of, names)))
        if unknown := [component for component in self.components if component not in known]:
            raise InvalidRecipeError(
                f"grow components: {label} has no component '{unknown[0]}'. {nearest(unknown[0], known)}",
                f"Components: {', '.join(known)}.",
            )
        for component, brick in self.components.items():
            other = self._whole_sources.models[brick]
            text = f"grow components: {component} of brick '{brick}' collides with that of {label}: "
            mine, theirs = (component_configs(m.config) for m in (whole, other))
            if mine != theirs:
                field = next(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
                raise InvalidRecipeError(f"{text}{field} of their config.json differs", "Take all components from one brick.")
            shapes, others = (
                {n: s.shape for n, s in m.weights.specs.items() if component_of(n) == component} for m in (whole, other)
            )
            if shapes != others:
                name = next(n for n in sorted(shapes.keys() | others.keys()) if shapes.get(n) != others.get(n))
                raise InvalidRecipeError(
                    f"{text}{name} is {_shape(others.get(name))} there and {_shape(shapes.get(name))} here",
                    "Take all components from one brick.",
                )
        return {name: self.components.get(component_of(name), self.source) for name in names}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
