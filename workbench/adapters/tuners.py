"""Constructors of the dense updates of one layer, with shape checks: (IA)³, OFT, LoHa, LoKr, trained tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.adapters.dense import Ia3, LoHa, LoKr, Oft, TokenRows
from workbench.adapters.keys import Part
from workbench.errors import WorkbenchError
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from workbench.adapters.read import Adapter

_OTHER = "The adapter was trained on another base or vocabulary: set the recipe's `base:` to that model."


def ia3(part: Part, disk: str, spec: TensorSpec, conv1d: bool, label: str) -> Ia3:
    """Build the (IA)³ update of a layer.

    Args:
        part: The adapter's tensors for the layer.
        disk: Name of the weight in the base.
        spec: Shape and dtype of the weight.
        conv1d: Whether the weight is stored as [in, out].
        label: Name of the adapter in error messages.

    Raises:
        WorkbenchError: If the vector does not have one number per input or output of the layer.
    """
    vector = part.fields["ia3_l"]
    forward = vector.shape[0] == 1  # [1, in] of a feed-forward module, else [out, 1]
    along_rows = forward == conv1d
    if len(spec.shape) != 2 or math.prod(vector.shape) != spec.shape[0 if along_rows else 1]:
        raise WorkbenchError(
            f"{label}: {vector.key} is {list(vector.shape)}, which does not fit {disk} {list(spec.shape)} in the base", _OTHER
        )
    return Ia3(vector, along_rows)


def oft(part: Part, disk: str, spec: TensorSpec, adapter: Adapter) -> Oft:
    """Build the OFT update of a linear layer.

    Args:
        part: The adapter's tensors for the layer.
        disk: Name of the weight in the base.
        spec: Shape and dtype of the weight.
        adapter: The adapter.

    Raises:
        WorkbenchError: If the blocks do not add up to the layer's inputs, or have another size than the configuration states.
    """
    config, label = adapter.config, adapter.label
    stored = part.fields["oft_R"]
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann") else None
    update = Oft(stored, bool(config.get("block_share")), terms)
    if len(spec.shape) != 2 or not update.fits(spec.cols):
        raise WorkbenchError(
            f"{label}: {stored.key} is {list(stored.shape)}, which does not fit the {spec.cols} inputs of {disk}", _OTHER
        )
    adapter.check_blocks(part.module, spec.cols, update.size)
    return update


def lycoris(part: Part, disk: str, spec: TensorSpec, adapter: Adapter) -> LoHa | LoKr:
    """Build the LoHa or LoKr update of a linear layer.

    Args:
        part: The adapter's tensors for the layer.
        disk: Name of the weight in the base.
        spec: Shape and dtype of the weight.
        adapter: The adapter.

    Raises:
        WorkbenchError: If the update has another shape than the base's weight, or its factors another rank than the configuration states.
    """
    update: LoHa | LoKr
    f, label = part.fields, adapter.label
    ranks: set[int | None] = {
        stored.shape[1 if name.endswith("_a") else 0] for name, stored in f.items() if name.endswith(("_a", "_b"))
    }
    (scale,) = {adapter.scale(part.module, rank) for rank in ranks or {None}}
    whole = [f[n] for n in ("lokr_w1", "lokr_w2") if n in f and (n == "lokr_w2" or adapter.config.get("decompose_both"))]
    if wide := [stored for stored in whole if adapter.size(part.module, None) < max(stored.shape) / 2]:
        raise adapter.size_error(part.module, f"a whole {list(wide[0].shape)} ({wide[0].key})", "two factors", "r")
    if "hada_w1_a" in part.fields:
        shapes = {(f[f"hada_w{i}_a"].shape[0], f[f"hada_w{i}_b"].shape[1]) for i in (1, 2)}
        update = LoHa(f, scale)
    else:
        update = LoKr(f, scale)
        shapes = {update.shape}
    if shapes != {spec.shape}:
        shape_text = " and ".join(str(list(s)) for s in sorted(shapes))
        raise WorkbenchError(f"{label}: {disk} is {list(spec.shape)} in the base, the adapter's update is {shape_text}", _OTHER)
    return update


def token_rows(part: Part, spec: TensorSpec, config: Mapping[str, Any], label: str) -> TokenRows:
    """Build the update of trained rows of the embeddings.

    Args:
        part: The adapter's tensors for the embeddings.
        spec: Shape and dtype of the embeddings.
        config: The adapter's configuration, which lists the trained tokens.
        label: Name of the adapter in error messages.

    Raises:
        WorkbenchError: If the number of rows differs from the number of tokens, or the base does not have a token.
    """
    stored = part.fields["trainable_tokens_delta"]
    tokens = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(tokens, Mapping):
        tokens = next((v for k, v in tokens.items() if part.module == k or part.module.endswith(f".{k}")), None)
    indices = tuple(int(i) for i in tokens or ())
    if stored.shape != (len(indices), spec.cols) or max(indices, default=0) >= spec.rows:
        raise WorkbenchError(
            f"{label}: {stored.key} is {list(stored.shape)}; expected {len(indices)} rows (trainable_token_indices) of {spec.cols}, "
            f"for tokens below {spec.rows}",
            _OTHER,
        )
    return TokenRows(stored, indices)
