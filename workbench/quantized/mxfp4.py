"""MXFP4, as gpt-oss stores its experts: numbers of 4 bits (E2M1) in blocks of 32 with a power of two each (OCP Microscaling Formats 1.0).

`X_blocks` [experts, rows, blocks, 16] and `X_scales` [experts, rows, blocks] are the tensor `X` [experts, 32 · blocks, rows].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from workbench.ground.errors import WorkbenchError
from workbench.ground.lazy import torch
from workbench.quantized.folding import AGAIN, Folding, Reader, nibbles
from workbench.weights.header import Entry, Packing
from workbench.weights.packed import Folded
from workbench.weights.packed import Reader as ReadBytes

if TYPE_CHECKING:
    from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The sixteen numbers of 4 bits with one bit of mantissa."""
BLOCK = 32


def fold(entries: Mapping[str, Entry], _config: Mapping[str, object], dtype: str, label: str) -> Folded:
    """Return a checkpoint's tensors with its experts under the names of the model.

    Raises:
        WorkbenchError: If blocks have no scales that fit.
    """
    folding = Folding(entries, dtype, label)
    for name in folding.ending("_blocks"):
        codes = folding.must(f"{name}_blocks", name, "U8", None)
        shape = codes.spec.shape
        if len(shape) != 4 or shape[3] != BLOCK // 2:
            raise WorkbenchError(
                f"{label}: {name}_blocks in {codes.file.name} is U8 {list(shape)}; expected [experts, rows, blocks, 16]", AGAIN
            )
        scales = folding.must(f"{name}_scales", name, "U8 F8_E8M0", shape[:3])
        packing = Packing("MXFP4", codes.nbytes, reader="quantized.mxfp4.Experts", beside=(("scales", scales),))
        said = ("MXFP4", "Rounding changed a value by up to 25 % of the largest value in its block of 32.")
        folding.add(name, codes, (shape[0], BLOCK * shape[2], shape[1]), packing, said)
    return folding.done()


def as_mxfp4(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Round numbers to MXFP4 as triton_kernels does: the smallest power of two with |number| ≤ 6 · 2ⁿ, then to the nearest, ties to even.

    Args:
        blocks: The numbers [..., 32] in float32.

    Returns:
        Bytes [..., 16], and exponents of two with an offset of 127 [...]; both uint8.
    """
    share, exponent = torch.frexp(blocks.abs().amax(-1) / E2M1[7])
    exponent = (exponent - (share == 0.5).int()).clamp(-126, 126)
    size = (blocks * ((127 - exponent) << 23).view(torch.float32)[..., None]).abs()
    codes = torch.where(size < 2, (2 * size).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4))
    codes = codes.to(torch.uint8) | (torch.signbit(blocks).to(torch.uint8) << 3)
    pairs = codes.view(*codes.shape[:-1], -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4), torch.where(share == 0, 0, exponent + 127).to(torch.uint8)


class Experts(Reader):
    """One tensor of experts. The bytes of one expert are kept while its rows are read, which are columns of the file."""

    def __init__(self, entry: Entry, name: str, read_bytes: ReadBytes) -> None:
        super().__init__(entry, name, read_bytes)
        self._kept: tuple[int, Tensor, Tensor] | None = None

    def _values(self, start: int, stop: int) -> Tensor:
        _, cols, rows = self._entry.spec.shape
        out, row = torch.empty(stop - start, rows), start
        while row < stop:
            expert, first = divmod(row, cols)
            last = min(cols, first + stop - row)
            codes, scales = self._expert(expert)
            begin, end = first // BLOCK, math.ceil(last / BLOCK)
            numbers = torch.tensor(E2M1)[nibbles(codes[:, begin:end]).int()] * scales[:, begin:end, None]
            out[row - start : row - start + last - first] = numbers.flatten(1)[:, first - BLOCK * begin : last - BLOCK * begin].T
            row += last - first
        return out

    def _expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the bytes [rows, blocks, 16] and scales [rows, blocks] of an expert."""
        if self._kept is None or self._kept[0] != expert:
            _, cols, rows = self._entry.spec.shape
            count = rows * cols // BLOCK
            codes = self.codes(expert * count * BLOCK // 2, (expert + 1) * count * BLOCK // 2, torch.uint8)
            exponents = self.beside("scales", expert * count, (expert + 1) * count).view(torch.float8_e8m0fnu).float()
            self._kept = expert, codes.view(rows, -1, BLOCK // 2), exponents.view(rows, -1)
        return self._kept[1], self._kept[2]
