"""Constructors of the dense updates of one layer, with shape checks: (IA)³, OFT, LoHa, LoKr, trained tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from workbench.adapters.dense import Ia3, LoHa, LoKr, Oft, TokenRows
from workbench.adapters.keys import Part
from workbench.errors import WorkbenchError
from workbench.weights.specs import TensorSpec

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


def oft(part: Part, disk: str, spec: TensorSpec, config: Mapping[str, Any], label: str) -> Oft:
    """Build the OFT update of a linear layer.

    Args:
        part: The adapter's tensors for the layer.
        disk: Name of the weight in the base.
        spec: Shape and dtype of the weight.
        config: The adapter's configuration.
        label: Name of the adapter in error messages.

    Raises:
        WorkbenchError: If the blocks do not add up to the layer's inputs.
    """
    stored = part.fields["oft_R"]
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann") else None
    update = Oft(stored, bool(config.get("block_share")), terms)
    if len(spec.shape) != 2 or not update.fits(spec.cols):
        raise WorkbenchError(
            f"{label}: {stored.key} is {list(stored.shape)}, which does not fit the {spec.cols} inputs of {disk}", _OTHER
        )
    return update


def lycoris(part: Part, disk: str, spec: TensorSpec, scale: float, label: str) -> LoHa | LoKr:
    """Build the LoHa or LoKr update of a linear layer.

    Args:
        part: The adapter's tensors for the layer.
        disk: Name of the weight in the base.
        spec: Shape and dtype of the weight.
        scale: alpha / r.
        label: Name of the adapter in error messages.

    Raises:
        WorkbenchError: If the update has another shape than the base's weight.
    """
    update: LoHa | LoKr
    if "hada_w1_a" in part.fields:
        f = part.fields
        shapes = {(f[f"hada_w{i}_a"].shape[0], f[f"hada_w{i}_b"].shape[1]) for i in (1, 2)}
        update = LoHa(f, scale)
    else:
        update = LoKr(part.fields, scale)
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
