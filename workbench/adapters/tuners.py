"""Constructors of the dense updates of one layer, with shape checks: (IA)³, OFT, LoHa, LoKr, trained tokens, BOFT and HRA.

BOFT and HRA rotate the inputs of a layer, W·R − W. As with OFT, each depends on the base's weight and is computed by rows. PEFT's
`get_delta_weight` of these kinds builds R whole, [in, in], and multiplies with it. R is block-diagonal, or a few reflections, so the product
is computed from its parts here; tests compare it with PEFT's merge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.adapters.dense import DeltaRows, Dense, Ia3, LoHa, LoKr, Oft, Rows, TokenRows
from workbench.adapters.flavours import BAKE
from workbench.adapters.keys import Part, Stored
from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.weights.specs import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

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
    """Build the OFT update of a linear layer."""
    config, label = adapter.config, adapter.label
    stored = part.fields["oft_R"]
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann") else None
    update = Oft(stored, bool(config.get("block_share")), terms)
    if len(spec.shape) != 2 or not update.takes(spec.cols):
        raise WorkbenchError(
            f"{label}: {stored.key} is {list(stored.shape)}, which does not fit the {spec.cols} inputs of {disk}", _OTHER
        )
    adapter.check_blocks(part.module, spec.cols, update.size)
    return update


def lycoris(part: Part, disk: str, spec: TensorSpec, adapter: Adapter) -> LoHa | LoKr:
    """Build the LoHa or LoKr update of a linear layer."""
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
    """Build the update of trained rows of the embeddings."""
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


_OTHER_BASE = "The adapter was trained on another base: set the recipe's `base:` to that model."


@dataclass(frozen=True)
class Boft(Dense):
    """s ⊙ W·Rᵀ − W with a block-diagonal rotation R of the inputs and a scale s of the outputs (Liu et al. 2023, arXiv 2311.06243).

    The blocks are Cayley transforms (I + Q)⁻¹(I − Q) of Q = (D − Dᵀ) / 2, where D is stored. There is one butterfly factor.
    """

    blocks: Stored
    """D, [1, blocks, b, b]."""
    scale: Stored
    """s, [out, 1]."""

    def open(self, device: torch.device) -> DeltaRows:
        """Open the delta for reading by rows."""
        data = self.blocks.read(device)[0]
        skew = (data - data.transpose(1, 2)) / 2
        eye = torch.eye(data.shape[-1], device=device).expand_as(skew)
        rotation = torch.linalg.solve(eye + skew, eye - skew, left=False)
        scale = self.scale.read(device).reshape(-1, 1)

        def compute(start: int, stop: int, base: Tensor) -> Tensor:
            blocks = base.view(len(base), -1, data.shape[-1])
            return torch.einsum("nbc,bkc->nbk", blocks, rotation).reshape(base.shape) * scale[start:stop] - base

        return Rows(compute)


@dataclass(frozen=True)
class Hra(Dense):
    """W·(I − 2u₁u₁ᵀ)…(I − 2uᵣuᵣᵀ) − W with unit vectors u (Householder reflection adaptation, Yuan et al. 2024, arXiv 2405.17484)."""

    stored: Stored
    """The vectors as columns, [in, r], of any length."""
    orthogonal: bool
    """True if Gram-Schmidt makes the vectors orthogonal first (`apply_GS`)."""

    def open(self, device: torch.device) -> DeltaRows:
        """Open the delta for reading by rows."""
        vectors = self.stored.read(device)
        lengths = vectors.norm(dim=0)
        if not bool((lengths > 0).all()):
            column = int((lengths == 0).nonzero()[0])
            raise WorkbenchError(
                f"{self.stored.label}: column {column} of {self.stored.key} is zero; expected a direction",
                "Train or download this adapter again.",
            )
        units = _orthonormal(vectors) if self.orthogonal else vectors / lengths

        def compute(start: int, stop: int, base: Tensor) -> Tensor:
            turned = base.clone()
            for unit in units.T:
                turned -= 2 * torch.outer(turned @ unit, unit)
            return turned - base

        return Rows(compute)


def _orthonormal(vectors: Tensor) -> Tensor:
    """Return the vectors made orthonormal in their order, by Gram-Schmidt as in PEFT."""
    units: list[Tensor] = []
    for vector in vectors.T:
        for unit in units:
            vector = vector - (unit @ vector) * unit
        units.append(vector / vector.norm())
    return torch.stack(units, 1)


def rotation(part: Part, disk: str, spec: TensorSpec, conv1d: bool, adapter: Adapter) -> Boft | Hra:
    """Build the BOFT or HRA update of a linear layer.

    Args:
        part: The adapter's tensors for the layer.
        disk: Name of the weight in the base.
        spec: Shape and dtype of the weight.
        conv1d: Whether the weight is stored as [in, out].
        adapter: The adapter.
    """
    config, label = adapter.config, adapter.label
    if conv1d or len(spec.shape) != 2:
        raise WorkbenchError(
            f"{label}: {disk} is no nn.Linear weight, and PEFT applies {config['peft_type']} to those only", _OTHER_BASE
        )
    if "hra_u" in part.fields:
        vectors = part.fields["hra_u"]
        if len(vectors.shape) != 2 or vectors.shape[0] != spec.cols:
            raise _shape_error(vectors, f"[{spec.cols}, r]", disk, label)
        adapter.size(part.module, vectors.shape[1])
        return Hra(vectors, bool(config.get("apply_GS")))
    blocks, scale = part.fields["boft_R"], part.fields["boft_s"]
    if len(blocks.shape) == 4 and blocks.shape[0] != 1:
        raise WorkbenchError(
            f"{label}: {blocks.key} has {blocks.shape[0]} butterfly factors; expected 1, as PEFT itself has without its CUDA kernels",
            BAKE,
        )
    if len(blocks.shape) != 4 or blocks.shape[2] != blocks.shape[3] or blocks.shape[1] * blocks.shape[2] != spec.cols:
        raise _shape_error(blocks, f"[1, blocks, b, b] with blocks · b = {spec.cols}", disk, label)
    if scale.shape != (spec.rows, 1):
        raise _shape_error(scale, f"[{spec.rows}, 1]", disk, label)
    adapter.check_blocks(part.module, spec.cols, blocks.shape[2])
    return Boft(blocks, scale)


def _shape_error(stored: Stored, expected: str, disk: str, label: str) -> WorkbenchError:
    return WorkbenchError(
        f"{label}: {stored.key} is {list(stored.shape)}; expected {expected} for {disk} in the base", _OTHER_BASE
    )
