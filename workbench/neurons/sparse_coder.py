"""A dictionary of a model's activations, and its places in the live model.

A feature is a(W_enc z + b_enc), where z is the activation x at a place of a layer, normalized and less the decoder's bias where the dictionary
says so, and a is ReLU, the k largest values, or JumpReLU. An autoencoder writes its place again; a transcoder writes what the feed-forward
part makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from workbench.activations.sites import Site
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.models.architecture import model_depth
from workbench.models.hooks import first_of, hidden_width
from workbench.models.layout import stack_prefix

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Place: TypeAlias = Literal["resid_pre", "resid_post", "mlp_in", "mlp_out"]
"""The residual stream before and after a layer, the input of its feed-forward part behind the norm, and the output of that part."""
Activation: TypeAlias = Literal["relu", "topk", "jumprelu"]
Normalization: TypeAlias = Literal["none", "layer_norm", "expected_average_only_in"]
PRE_GAIN = "ln2.hook_normalized"
"""Place of TransformerLens that is the input of the feed-forward part behind a LayerNorm, but lacks the gain of an RMSNorm."""
_EPSILON = 1e-5  # of SAELens' layer_norm, added to the standard deviation


@dataclass(frozen=True)
class Dictionary:
    """A sparse autoencoder or transcoder of one layer.

    Attributes:
        name: Its folder, in messages.
        layout: Layout of its files.
        layer: The layer.
        hook: Its place as the files call it.
        reads: Place of its input.
        writes: Place that it reconstructs.
        encoder: W_enc [features, inputs].
        bias: b_enc [features].
        decoder: W_dec [features, outputs].
        offset: b_dec [outputs].
        activation: Activation of the features.
        normalization: Normalization of the input.
        k: Number of features that `topk` keeps.
        threshold: Least activation of `jumprelu` [features].
        skip: W_skip [outputs, inputs], which acts beside the features.
        centers: Whether b_dec is subtracted from the input.
    """

    name: str
    layout: Literal["saelens", "sparsify"]
    layer: int
    hook: str
    reads: Place
    writes: Place
    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    offset: Tensor
    activation: Activation
    normalization: Normalization = "none"
    k: int | None = None
    threshold: Tensor | None = None
    skip: Tensor | None = None
    centers: bool = False

    def features(self, x: Tensor) -> Tensor:
        """Return the activations of the features [..., features].

        Args:
            x: Activations at the place that the dictionary reads [..., inputs].

        Raises:
            ValueError: If the input's scale is missing; see `scaled`.
        """
        if self.normalization == "expected_average_only_in":
            raise ValueError("expected a dictionary with the scale of its input: call `scaled`")
        z = x
        if self.normalization == "layer_norm":
            mean, deviation = _moments(x)
            z = (x - mean) / (deviation + _EPSILON)
        if self.centers:
            z = z - self.offset
        before = torch.nn.functional.linear(z, self.encoder, self.bias)
        if self.threshold is not None:
            return before.relu() * (before > self.threshold)
        if self.k is not None:
            largest, index = before.relu().topk(self.k, dim=-1)
            return torch.zeros_like(before).scatter_(-1, index, largest)
        return before.relu()

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return what the dictionary takes for the activations at the place that it writes [..., outputs]; for the rest see `features`."""
        found = self.features(x) @ self.decoder + self.offset
        if self.normalization == "layer_norm" and self.writes == self.reads:  # SAELens leaves a transcoder's output as it is
            mean, deviation = _moments(x)
            found = found * deviation + mean
        return found if self.skip is None else found + x @ self.skip.T

    def scaled(self, mean_norm: float) -> Dictionary:
        """Return the dictionary with the input's scale in its weights, if it needs one.

        With `expected_average_only_in`, training multiplied x by √inputs / mean ‖x‖. Files that still say so lack this number, so that it is
        measured again (Anthropic, April 2024 update; `fold_activation_norm_scaling_factor` of SAELens).

        Args:
            mean_norm: Mean norm of x.
        """
        if self.normalization != "expected_average_only_in":
            return self
        scale = math.sqrt(self.encoder.shape[1]) / mean_norm
        back = scale if self.writes == self.reads else 1.0  # a transcoder's output was not scaled
        parts = {"encoder": self.encoder * scale, "decoder": self.decoder / back, "offset": self.offset / back}
        return replace(self, **parts, normalization="none")  # type: ignore[arg-type]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over the last dimension [..., 1]."""
    return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)


def check_fit(dictionary: Dictionary, model: PreTrainedModel, config: Mapping[str, object], sites: tuple[Site, ...]) -> Site:
    """Return the neurons of the dictionary's layer, if the dictionary fits the model.

    Args:
        dictionary: The dictionary.
        model: The live model.
        config: The content of its config.json.
        sites: The model's neurons.

    Raises:
        WorkbenchError: If the model has no such layer, another width, no dense neurons in the layer, or not the place that the files name.
    """
    name, layer, width, depth = dictionary.name, dictionary.layer, hidden_width(model), model_depth(config)
    if layer >= depth:
        raise WorkbenchError(
            f"{name}: a dictionary of layer {layer}, but the model has {depth} layers, from 0", "Take one of this model."
        )
    for what, size in (("reads", dictionary.encoder.shape[1]), ("writes", dictionary.decoder.shape[1])):
        if size != width:
            raise WorkbenchError(
                f"{name}: the dictionary {what} {size} numbers a token, but the model's hidden state has {width}",
                "Take a dictionary that was trained on this model.",
            )
    site = next((site for site in sites if site.layer == layer and site.kind == "neurons"), None)
    if site is None:
        raise WorkbenchError(
            f"{name}: layer {layer} has no dense feed-forward neurons to compare with", "Take one of another layer."
        )
    if dictionary.hook.endswith(PRE_GAIN) and hasattr(model.config.get_text_config(), "rms_norm_eps"):
        raise WorkbenchError(
            f"{name}: {dictionary.hook} lies before the gain of this model's RMSNorm, and the model shows only what lies behind it",
            f"Divide each row of W_enc by the norm's gain and set hook_name to blocks.{layer}.mlp.hook_in.",
        )
    inner = model.get_submodule(f"{stack_prefix(model, depth)}.{layer}")
    behind = dictionary.layout == "saelens" and "mlp_out" in (dictionary.reads, dictionary.writes)
    if behind and hasattr(inner, "post_feedforward_layernorm"):
        raise WorkbenchError(f"{name}: hook_mlp_out of this model lies behind a second norm, which is not supported", None)
    if dictionary.reads == "mlp_in" and _feed_forward(model, site) is inner:
        raise WorkbenchError(
            f"{name}: the feed-forward part of {type(model).__name__} is no module whose input could be read", None
        )
    return site


@contextmanager
def seeing(
    model: PreTrainedModel,
    config: Mapping[str, object],
    site: Site,
    places: tuple[Place, ...],
    see: Callable[[Place, Tensor], None],
) -> Iterator[None]:
    """Pass the activations at places of one layer to a function during each forward pass inside the block.

    Args:
        model: The live model.
        config: The content of its config.json.
        site: The layer's neurons.
        places: The places.
        see: Takes a place and a copy of its activations [..., hidden]; the model may change its own.
    """
    layer = model.get_submodule(f"{stack_prefix(model, model_depth(config))}.{site.layer}")

    def before(place: Place) -> Any:
        return lambda _module, args, named: see(place, (args[0] if args else next(iter(named.values()))).clone())

    def after(place: Place) -> Any:
        return lambda _module, _args, output: see(place, first_of(output).clone())

    with ExitStack() as hooks:
        for place in dict.fromkeys(places):
            if place in ("resid_pre", "mlp_in"):
                module = layer if place == "resid_pre" else _feed_forward(model, site)
                hooks.enter_context(module.register_forward_pre_hook(before(place), with_kwargs=True))
            else:  # the output projection's own output: some feed-forward modules add the residual stream to it
                module = layer if place == "resid_post" else site.module
                hooks.enter_context(module.register_forward_hook(after(place)))
        yield


def _feed_forward(model: PreTrainedModel, site: Site) -> torch.nn.Module:
    """Return the module around the output projection."""
    module: torch.nn.Module = model.get_submodule(site.name.rpartition(".")[0])
    return module
