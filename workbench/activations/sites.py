"""Sites of a live model: the places where the activations of its neurons, or of its experts, can be read and changed.

A neuron of a feed-forward layer is one input of the output projection: FFN(x) = Σᵢ aᵢ W_out[:, i] + b. In a layer whose router sends
tokens to experts, an expert takes the place of a neuron: it is a group of neurons, and its activation is the weight that the router
gives it, which is 0 where it is not selected. Weights are never changed, so nothing has to be restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from workbench.activations.labelled import ItemRow, TextPart
from workbench.ground.errors import UsageError
from workbench.ground.lazy import no_grad, torch
from workbench.models.architecture import is_conv1d
from workbench.models.hooks import expert_modules, feed_forward_mixers, has_experts, output_projections, shaped, unread
from workbench.models.layout import stack_prefix
from workbench.models.texts import batch_limit, by_length, side_by_side

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Progress: TypeAlias = Callable[[int, int], None]
"""Takes (done, total)."""
Visitor: TypeAlias = "Callable[[int, Tensor], Tensor | None]"
"""Takes (index of the site, activations [..., units]); returns other activations of the same shape, or None to leave them unchanged."""


@dataclass(frozen=True)
class Site:
    """The neurons, or the experts, of one layer.

    Attributes:
        layer: The layer.
        kind: Neurons of a dense feed-forward layer, or experts that a router selects.
        name: Live name of the output projection, or of the module of experts.
        module: That module.
        units: Number of neurons or experts.
    """

    layer: int
    kind: Literal["neurons", "experts"]
    name: str
    module: torch.nn.Module
    units: int

    def norms(self) -> Tensor:
        """Return the norm of what one unit of activation adds to the output [units], float32: ‖W_out[:, i]‖, or 1 for experts."""
        weight = self.module.weight if self.kind == "neurons" else None
        if not isinstance(weight, torch.Tensor):
            return torch.ones(self.units)
        norms: Tensor = torch.linalg.vector_norm(weight.detach().float(), dim=1 if is_conv1d(self.module) else 0)
        return norms

    def columns(self) -> Tensor:
        """Return what one unit of activation of each neuron adds to the output [units, hidden], a view of the weight.

        Raises:
            ValueError: If the site has experts.
        """
        if self.kind != "neurons":
            raise ValueError("an expert has no single output vector")
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.detach() if is_conv1d(self.module) else weight.detach().T


def find_sites(model: PreTrainedModel, depth: int, device: torch.device) -> tuple[Site, ...]:
    """Return the sites of a model, in the order of its layers. Layers with neither neurons nor experts are left out.

    Args:
        model: The live model.
        depth: Number of its layers.
        device: Device of the model.

    Raises:
        WorkbenchError: If no layer has neurons or experts.
    """
    routed = {layer: (name, count) for name, (layer, count) in expert_modules(model).items()} if has_experts(model) else {}
    prefix = stack_prefix(model, depth)
    stack = model.get_submodule(prefix)
    assert isinstance(stack, torch.nn.ModuleList)
    dense = [n for n in feed_forward_mixers(stack) or range(depth) if n not in routed]
    found: dict[int, Site] = {}
    for layer, (name, count) in routed.items():
        found[layer] = Site(layer, "experts", name, model.get_submodule(name), count)
    for layer, name in output_projections(model, prefix, dense, device).items():
        module = model.get_submodule(name)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        found[layer] = Site(layer, "neurons", name, module, int(weight.shape[0 if is_conv1d(module) else 1]))
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no feed-forward layers whose neurons could be read",
            "Neurons are the inputs of a linear layer outside the attention whose output is as wide as the hidden state.",
        )
    return tuple(found[layer] for layer in sorted(found))


@contextmanager
def visiting(model: PreTrainedModel, sites: Sequence[Site], visit: Visitor) -> Iterator[None]:
    """Pass the activations of every site to a function during each forward pass inside the block.

    Args:
        model: The live model.
        sites: The sites.
        visit: Function of (index of the site, activations [..., units]). If it returns activations, the model continues with them.

    Raises:
        WorkbenchError: During a forward pass, if the experts of a site do not receive the router's choice.
    """
    with ExitStack() as hooks:
        for number, site in enumerate(sites):
            own = partial(_visit_neurons, number, visit)
            hook = own if site.kind == "neurons" else partial(_visit_experts, number, site, visit, model)
            hooks.enter_context(site.module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


def scaling(model: PreTrainedModel, sites: Sequence[Site], units: Mapping[int, Tensor], factor: float = 0.0) -> Any:
    """Return a context in which what some units add to the output is scaled.

    Args:
        model: The live model.
        sites: Its sites.
        units: Layer -> indices of its units. Layers without an entry stay unchanged.
        factor: 0 switches the units off.
    """
    wanted = {n: units[site.layer] for n, site in enumerate(sites) if site.layer in units and len(units[site.layer])}

    def scale(number: int, activations: Tensor) -> Tensor | None:
        index = wanted.get(number)
        if index is None or factor == 1:
            return None  # not even a copy: the same bits
        index = index.to(activations.device)
        if factor == 0:  # a product would keep infinity and NaN
            return activations.index_fill(-1, index, 0.0)
        return activations.index_copy(-1, index, activations[..., index] * factor)

    return visiting(model, [*sites], scale)


def _visit_neurons(number: int, visit: Visitor, _module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Pass the inputs of a projection to a function, as a forward pre-hook."""
    if args:
        changed = visit(number, args[0])
        return None if changed is None else ((changed, *args[1:]), named)
    key, activations = next(iter(named.items()))
    changed = visit(number, activations)
    return None if changed is None else (args, {**named, key: changed})


def _visit_experts(
    number: int, site: Site, visit: Visitor, model: PreTrainedModel, _module: Any, args: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    """Pass the weights that a router gives to experts to a function, as a forward pre-hook."""
    values = [*args, *named.values()]
    if len(values) != 3 or values[1].is_floating_point() or values[1].shape != values[2].shape:
        raise unread(site.name, model)
    index, weights = values[1], values[2]
    dense = weights.new_zeros(*weights.shape[:-1], site.units + 1)
    slots = index.clamp(max=site.units)  # higher numbers are experts that compute nothing
    dense.scatter_(-1, slots, weights)
    changed = visit(number, dense[..., : site.units])
    if changed is None:
        return None
    padded = torch.cat([changed, dense[..., site.units :]], -1)
    new = torch.where(index < site.units, padded.gather(-1, slots), weights)
    if len(args) == 3:
        return (*args[:2], new), named
    key = list(named)[2 - len(args)]
    return args, {**named, key: new}


@dataclass(frozen=True)
class Tokens:
    """A batch of rows during a pass.

    Attributes:
        rows: Index of each row of the batch [batch].
        counted: [batch, time] bool: tokens that count, without padding and first tokens.
    """

    rows: Tensor
    counted: Tensor


Consumer: TypeAlias = "Callable[[int, Tensor, Tokens], None]"
"""Takes (index of the site, activations [batch, time, units], the batch)."""


@no_grad
def stream(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Sequence[ItemRow],
    consume: Consumer,
    part: TextPart = "prompt",
    *,
    done: int = 0,
    after: Callable[[int], None] = lambda _: None,
) -> None:
    """Pass the activations of all sites on some rows to a consumer, batch by batch.

    The output head is not computed. Rows of similar length form a batch, so the order of rows is that of their lengths. The first token of
    a text does not count unless it is the only one: it attracts attention and has activations that are many times larger than others.

    Args:
        model: The live model.
        sites: Its sites.
        rows: The texts.
        consume: Consumer of a site's activations.
        part: What the model reads of each text.
        done: Number of rows, in the order of lengths, that an earlier pass has consumed.
        after: Called after each batch with the number of rows consumed.
    """
    device = next(model.parameters()).device
    backbone = getattr(model, model.base_model_prefix, model)
    current: list[Tokens] = []

    def visit(number: int, activations: Tensor) -> None:
        batch, time = current[0].counted.shape
        consume(number, shaped(activations, batch, time), current[0])

    with visiting(model, sites, visit):
        for index in by_length([len(row.read(part)) for row in rows], batch_limit(device), done):
            tokens = side_by_side([rows[i].read(part) for i in index], device)
            lengths = tokens.mask.sum(1)
            position = torch.arange(tokens.mask.shape[1], device=device)
            counts = tokens.mask.bool() & (position >= lengths.sub(1).clamp_max(1)[:, None])
            current[:] = [Tokens(torch.tensor(index), counts)]
            backbone(input_ids=tokens.tokens, attention_mask=tokens.mask, use_cache=False)
            done += len(index)
            after(done)


def sample_places(lengths: Sequence[int], size: int, *, seed: int = 0) -> Tensor:
    """Draw tokens of rows without replacement; the first token of a row only if it is the row's only one.

    Args:
        lengths: Number of tokens of each row.
        size: Number of tokens to draw; all tokens if there are fewer.
        seed: Seed of the draw.

    Returns:
        Row and position of each token [tokens, 2], in ascending order.
    """
    places = torch.tensor([(i, t) for i, length in enumerate(lengths) for t in range(min(1, length - 1), length)])
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:size]
    return places[order.sort().values]
