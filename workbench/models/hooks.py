"""Live models from the inside: hooks, attention masks, experts and feed-forward projections, and passes without gradients of parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from workbench.ground.errors import InvalidRecipeError, WorkbenchError
from workbench.ground.lazy import torch
from workbench.models.architecture import EXPERT_COUNTS, is_conv1d

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def windows(config: Any) -> dict[str, int | None]:
    """Map each kind of attention in a model to its sliding window, or to None if it has none."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if not kinds:
        return {"full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def additive_masks(
    visible: Tensor, queries: Tensor, keys: Tensor, kinds: Mapping[str, int | None], dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Return the `attention_mask` that makes each query see exactly the given keys.

    Args:
        visible: [batch, query, key], true if a query may see a key.
        queries: [batch, query], positions.
        keys: [batch, key], positions. Sliding attention does not see keys that are a window or more before a query.
        kinds: Result of `windows`.
        dtype: The model's dtype.

    Returns:
        One mask, or one for each kind of attention if they differ.
    """
    longest = int(queries.max())
    if not any(window and longest >= window for window in kinds.values()):
        return _additive_mask(visible, queries, keys, None, dtype)  # all kinds of attention see the same keys
    masks = {kind: _additive_mask(visible, queries, keys, window, dtype) for kind, window in kinds.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _additive_mask(visible: Tensor, queries: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return an additive mask [row, 1, query, key]: 0 for visible keys, the lowest number of the dtype for others."""
    if window:
        visible = visible & (queries[:, :, None] - keys[:, None, :] < window)
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


CACHES = ("past_key_values", "cache_params", "cache", "state")
"""Arguments of forward that hold the state of earlier tokens, and the fields of its output that do; names differ between versions and models."""


def cache_name(model: nn.Module) -> str:
    """Return the name of the model's argument for the keys and values of earlier positions."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@contextmanager
def head_sees(head: nn.Module, places: Tensor) -> Iterator[None]:
    """Pass only some positions to the output head, so that the logits are [1, places, vocabulary].

    This works because models process logits afterwards (soft caps, scales) element by element.

    Args:
        head: The model's output embedding.
        places: Positions in the flattened [batch, width].
    """

    def choose(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        return (hidden.reshape(-1, hidden.shape[-1])[places][None], *inputs[1:])

    with hooked(head, before=choose):
        yield


def has_experts(model: PreTrainedModel) -> bool:
    """Return True if a layer of the model sends tokens to experts."""
    return bool(_candidates(model))


def expert_modules(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return the modules of experts, each with its layer and its number of experts.

    Raises:
        WorkbenchError: If the model has no experts, several mixtures in a layer, or layers with different numbers of experts.
    """
    modules, kind = _candidates(model), model.config.get_text_config().model_type
    if not modules:
        raise InvalidRecipeError(
            f"model_type {kind} has no experts: no layer is a mixture", "`grow: experts` turns a dense model into a mixture."
        )
    if len({count for _, count in modules.values()}) > 1 or len({layer for layer, _ in modules.values()}) < len(modules):
        raise InvalidRecipeError(
            f"model_type {kind}: layers with several mixtures, or with different numbers of experts, are not supported"
        )
    return modules


def _candidates(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return module of experts -> (layer, number of experts)."""
    config: Any = model.config.get_text_config()
    modules: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        layer = re.search(r"\.(\d+)\.", name)
        count = next((n for f in EXPERT_COUNTS for n in [getattr(module, f, None) or getattr(config, f, None)] if n), None)
        if name.endswith(".experts") and layer and count:
            modules[name] = int(layer[1]), int(count)
    return modules


@contextmanager
def chosen(model: PreTrainedModel, modules: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record the selected experts inside the block: module of experts -> (numbers, weights), each [tokens, top_k]."""
    selected: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], given: dict[str, object]) -> None:
            handed = [*args, *given.values()]
            if len(handed) != 3 or handed[1].is_floating_point() or handed[1].shape != handed[2].shape:
                raise unread(name, model)
            selected[name] = handed[1], handed[2]

        return hook

    with ExitStack() as hooks:
        for name in modules:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(see(name), with_kwargs=True))
        yield selected


def unread(name: str, model: PreTrainedModel) -> WorkbenchError:
    """Return the error for experts that do not receive the router's choice."""
    return InvalidRecipeError(
        f"{name}: the experts of model_type {model.config.model_type} do not receive (tokens, numbers, weights), so the router's "
        "choice cannot be read",
        "Report this architecture.",
    )


_ATTENTION = re.compile(r"att(n|ention)")


def is_attention(module: str) -> bool:
    """Return whether a module, by its name inside a layer, belongs to the attention."""
    return bool(_ATTENTION.search(module))


def output_projections(model: PreTrainedModel, prefix: str, layers: Sequence[int], device: torch.device) -> dict[int, str]:
    """Find the feed-forward output projection of each layer.

    It is the last linear module outside the attention that a one-token forward pass runs and whose output is as wide as the hidden
    state.

    Returns:
        Layer -> live name of the module. Layers without such a module are left out.
    """
    stack = model.get_submodule(prefix)
    assert isinstance(stack, torch.nn.ModuleList)
    ran = _linear_modules_run(model, stack, device)
    width = hidden_width(model)
    names = {id(m): name for name, m in model.named_modules()}
    modules: dict[int, str] = {}
    for number in layers:
        projections = [
            m for m in ran[number] if n_outputs(m) == width and not is_attention(names[id(m)].removeprefix(f"{prefix}."))
        ]
        if projections:
            modules[number] = names[id(projections[-1])]
    return modules


def feed_forward_mixers(layers: torch.nn.ModuleList) -> list[int]:
    """Return the feed-forward layers of a model whose layers are one mixer each (Nemotron-H); empty for other models.

    Each layer of such a model is an attention, a state-space model, a set of experts or a feed-forward part.
    """
    mixers = [getattr(layer, "mixer", None) for layer in layers]
    if any(mixer is None for mixer in mixers) or not any(hasattr(mixer, "q_proj") for mixer in mixers):
        return []
    return [number for number, mixer in enumerate(mixers) if isinstance(getattr(mixer, "down_proj", None), torch.nn.Linear)]


def hidden_width(model: PreTrainedModel) -> int:
    """Return the width of the hidden state."""
    if hasattr(model.config, "hidden_size"):
        return int(model.config.hidden_size)
    return int(model.get_input_embeddings().weight.shape[1])


def n_outputs(module: torch.nn.Module) -> int | None:
    """Return the number of outputs of a linear module; None for other modules."""
    if isinstance(module, torch.nn.Linear):
        return int(module.weight.shape[0])
    weight = getattr(module, "weight", None)
    return int(weight.shape[1]) if is_conv1d(module) and isinstance(weight, torch.Tensor) else None


def _linear_modules_run(model: PreTrainedModel, layers: torch.nn.ModuleList, device: torch.device) -> list[list[torch.nn.Module]]:
    """Return the linear modules of every layer in the order in which a one-token forward pass runs them."""
    ran: list[list[torch.nn.Module]] = [[] for _ in layers]
    with ExitStack() as stack, torch.no_grad():
        for number, layer in enumerate(layers):
            for module in layer.modules():
                if n_outputs(module) is not None:
                    stack.enter_context(hooked(module, after=lambda m, _args, _out, number=number: ran[number].append(m)))
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    return ran


def mean_divergence(wanted: Tensor, logits: Tensor) -> Tensor:
    """Return the mean of KL(wanted ‖ model) over tokens in nats, differentiable in `logits`.

    Rows beyond the vocabulary that both models have are padding and do not count.

    Args:
        wanted: Logits of the teacher [tokens, vocabulary].
        logits: Logits of the model [tokens, vocabulary].
    """
    count = min(logits.shape[-1], wanted.shape[-1])
    aim = wanted[..., :count].float().log_softmax(-1)
    return torch.nn.functional.kl_div(logits[..., :count].float().log_softmax(-1), aim, reduction="batchmean", log_target=True)


class Stopped(Exception):  # noqa: N818  not an error: the rest of the forward pass is skipped
    """Exception that a hook raises to end a forward pass early."""


@contextmanager
def hooked(
    module: torch.nn.Module, *, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Register a forward pre-hook, a forward hook, or both, within the block."""
    with (
        module.register_forward_pre_hook(before) if before else nullcontext(),
        module.register_forward_hook(after) if after else nullcontext(),
    ):
        yield


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Compute no gradients of parameters inside the block."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def shaped(flat: Tensor, batch: int, time: int) -> Tensor:
    """Reshape the input or output of a linear layer to [batch, time, width]; OPT flattens the first two dimensions."""
    return flat.reshape(batch, time, flat.shape[-1])


def first_of(output: Any) -> Tensor:
    """Return the hidden state from a block's output, which is a tuple or a list in some architectures."""
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def states_of(output: Any, tokens: Tensor) -> Tensor:
    """Return the hidden states [row, token, width] from a block's output.

    Args:
        output: The block's output.
        tokens: Tokens [row, token] of the batch.

    Raises:
        WorkbenchError: If the block does not return one state for each token: some architectures carry several states of a token from
            block to block, and some add tokens of their own.
    """
    hidden = first_of(output)
    if hidden.shape[:-1] != tokens.shape:
        raise WorkbenchError(
            f"a block returns states of shape {list(hidden.shape)} for tokens of shape {list(tokens.shape)}; expected one state for each token",
            "This architecture can be merged, but not edited, routed or analyzed by its hidden states.",
        )
    return hidden


def with_first(output: Any, hidden: Tensor) -> Any:
    """Return a block's output with another hidden state."""
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
