"""How one weight is rounded to MXFP4, or to 8-bit floats with a scale for each block.

MXFP4 is rounded as `downcast_to_mxfp` of triton_kernels, which transformers calls: a power of two that holds the largest value, to the nearest,
ties to even. 8-bit floats are rounded as by `Fp8Quantize` of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.ground.lazy import torch
from workbench.quantized.folding import Reader, kind_of, nibbles
from workbench.quantized.mxfp4 import BLOCK, E2M1, as_mxfp4
from workbench.weights.header import Entry
from workbench.weights.specs import TensorSpec, block_elements

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = 448.0


@dataclass(frozen=True)
class BytesSpec(TensorSpec):
    """The spec of plain bytes that a file states as numbers of another dtype, which `stored` does not know.

    Attributes:
        stated: This dtype.
    """

    stated: str

    @property
    def written(self) -> str:
        """The dtype that a file states."""
        return self.stated


class Packer:
    """The way of one weight into a format, unit by unit.

    Args:
        name: The weight.
        entry: Where the base has it.
        published: All tensors of the base's files by their names there.
        config: `quantization_config` of the base.

    Attributes:
        codes: Name and spec of the tensor with the numbers.
        scales: The same of the tensor with their scales.
        edges: For "values", "codes" and "scales", the first row of each unit, and the number of rows.
    """

    codes: tuple[str, TensorSpec]
    scales: tuple[str, TensorSpec]
    edges: Mapping[str, list[int]]

    def __init__(self, name: str, entry: Entry, published: Mapping[str, Entry], config: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def stored(self, reader: Reader, unit: int) -> tuple[Tensor, Tensor]:
        """Return the base's codes and scales of a unit."""
        raise NotImplementedError

    def packed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and scales of values [rows, columns] in float32."""
        raise NotImplementedError

    def kept(self, same: Tensor) -> tuple[Tensor, Tensor]:
        """Return for codes and for scales whether all values of their block are those of the base, from that of each value [rows, columns]."""
        raise NotImplementedError

    def worth(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the numbers of a unit [rows, columns] in float32."""
        raise NotImplementedError


def _edges(sizes: list[int]) -> list[int]:
    """Return the first row of each unit and the number of rows, from the rows of each unit."""
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    return edges


class Mxfp4(Packer):
    """A tensor of experts in MXFP4; a unit is one expert."""

    def __init__(self, name: str, entry: Entry, published: Mapping[str, Entry], config: Mapping[str, Any]) -> None:
        experts, cols, rows = self._shape = entry.spec.shape
        grid = (experts, rows, cols // BLOCK)
        self.codes = f"{name}_blocks", TensorSpec((*grid, BLOCK // 2), "U8")
        self.scales = f"{name}_scales", BytesSpec(grid, "U8", kind_of(published[f"{name}_scales"]))
        each = {"values": cols, "codes": rows * cols // BLOCK, "scales": rows}
        self.edges = {role: _edges([size] * experts) for role, size in each.items()}

    def stored(self, reader: Reader, unit: int) -> tuple[Tensor, Tensor]:
        """Return the bytes of one expert: codes [rows, blocks, 16], scales [rows, blocks]."""
        _, cols, rows = self._shape
        count = rows * cols // BLOCK
        codes = reader.codes(unit * count * BLOCK // 2, (unit + 1) * count * BLOCK // 2, torch.uint8)
        scales = reader.beside("scales", unit * count, (unit + 1) * count).view(torch.uint8)
        return codes.view(rows, -1, BLOCK // 2), scales.view(rows, -1)

    def packed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return `as_mxfp4` of the blocks, which lie along the columns of the file."""
        step = max(1, block_elements(values.device) // len(values))
        parts = [as_mxfp4(part.T.reshape(part.shape[1], -1, BLOCK)) for part in torch.split(values, step, 1)]
        return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])

    def kept(self, same: Tensor) -> tuple[Tensor, Tensor]:
        """Return masks that fit the codes and the scales of an expert."""
        blocks = same.view(-1, BLOCK, same.shape[1]).all(1).T
        return blocks[..., None], blocks

    def worth(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the numbers of an expert [columns, rows], the transpose of the file."""
        values = torch.empty(self._shape[1:])
        powers = scales.view(torch.float8_e8m0fnu).float()
        step = max(1, block_elements(values.device) // len(values))
        for start in range(0, len(codes), step):
            part = torch.tensor(E2M1)[nibbles(codes[start : start + step]).int()] * powers[start : start + step, :, None]
            values[:, start : start + step] = part.flatten(1).T
        return values


class Fp8(Packer):
    """A weight of 8-bit floats with a scale for each block; a unit is one row of blocks."""

    def __init__(self, name: str, entry: Entry, published: Mapping[str, Entry], config: Mapping[str, Any]) -> None:
        assert entry.packing is not None
        assert entry.packing.scale is not None
        self._entry, (self._rows, self._cols) = entry, entry.packing.scale.blocks[-2:]
        shape, scale = entry.spec.shape, published[f"{name}_scale_inv"]
        kind = kind_of(scale)
        self._exponents = config.get("scale_fmt") == "ue8m0" or kind != "F32"
        self.codes = name, BytesSpec(shape, "U8", "F8_E4M3")
        self.scales = f"{name}_scale_inv", BytesSpec(scale.spec.shape, "F32" if kind == "F32" else "U8", kind)
        matrices, rows = math.prod(shape[:-2]), shape[-2]
        sizes = [min(self._rows, rows - start) for start in range(0, rows, self._rows)] * matrices
        self.edges = {"values": _edges(sizes), "codes": _edges(sizes), "scales": _edges([1] * len(sizes))}

    def stored(self, reader: Reader, unit: int) -> tuple[Tensor, Tensor]:
        """Return the bytes of one row of blocks: codes [rows, columns], scales [blocks]."""
        cols, (first, last) = self._entry.spec.cols, self.edges["codes"][unit : unit + 2]
        codes = reader.codes(first * cols, last * cols, torch.uint8).view(-1, cols)
        return codes, self._written(reader.all_scales().view(len(self.edges["scales"]) - 1, -1)[unit])

    def packed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes, and 1 / (448 / largest) for each block: in this order of roundings, as in transformers."""
        largest = self._blocks(values.abs()).amax((0, 2))
        some = largest > 0
        scales = torch.where(some, _LARGEST / torch.where(some, largest, 1.0), 1.0)
        inverse = 1.0 / scales
        if self._exponents:
            inverse = torch.pow(2.0, torch.ceil(torch.log2(inverse.clamp(min=torch.finfo(torch.float32).tiny))))
            inverse = inverse.to(torch.float8_e8m0fnu).float()
            scales = 1.0 / inverse
        codes = (values * self._wide(scales)).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8), self._written(inverse)

    def kept(self, same: Tensor) -> tuple[Tensor, Tensor]:
        """Return masks that fit the codes and the scales of a row of blocks."""
        blocks = self._blocks(same, fill=True).all(2).all(0)
        return self._wide(blocks)[None], blocks

    def worth(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return codes times scales."""
        wide = self._wide(scales.view(torch.float8_e8m0fnu).float() if scales.dtype == torch.uint8 else scales)
        return codes.view(torch.float8_e4m3fn).float() * wide

    def _blocks(self, values: Tensor, fill: bool = False) -> Tensor:
        """Return values [rows, columns] as [rows, blocks, columns of a block]; the last block is filled up."""
        pad = torch.nn.functional.pad(values, (0, -values.shape[1] % self._cols), value=fill)
        return pad.view(len(values), -1, self._cols)

    def _wide(self, blocks: Tensor) -> Tensor:
        """Return what each block has [blocks] for each column."""
        return blocks.repeat_interleave(self._cols)[: self._entry.spec.cols]

    def _written(self, scales: Tensor) -> Tensor:
        """Return scales as the file has them."""
        return scales if self.scales[1].stored == "F32" else scales.to(torch.float8_e8m0fnu).view(torch.uint8)
