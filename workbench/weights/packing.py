"""Layouts of weights that a file stores in fewer bits: 8-bit floats with scales, or the blocks of a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.identity import FileIdentity

# Dtypes of safetensors that hold 8-bit floats -> name in torch.
PACKED = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}

# Largest change of a value when it is rounded to a kind of storage. The fp8 bounds are half a step of the mantissa; they hold for
# values that are not close to zero. The bounds of GGUF kinds follow from the steps of a block (llama.cpp, ggml-quants.c); kinds with
# scales of scales have no such bound.
BOUNDS = {
    "F8_E4M3": "6.25 % of the value (more for values near zero)",
    "F8_E5M2": "12.5 % of the value (more for values near zero)",
    "Q8_0": "0.5 % of the largest value in a block of 32",
    "Q5_0": "6.3 % of the largest value in a block of 32",
    "Q5_1": "1.7 % of the range of a block of 32",
    "Q4_0": "12.5 % of the largest value in a block of 32",
    "Q4_1": "3.4 % of the range of a block of 32",
}


@dataclass(frozen=True)
class Scale:
    """The scales that a packed tensor is multiplied by.

    Attributes:
        file: The file that holds them.
        start: Offset of the first scale; None if only the file's header was downloaded.
        stored: Their dtype in safetensors. "U8" are exponents of two with an offset of 127, which is what F8_E8M0 means.
        shape: Their shape, with one dimension for each dimension of the tensor.
        blocks: For each dimension, how many consecutive rows or columns share a scale. The last block may be incomplete.
        identity: Identity of the file when its header was read.
    """

    file: Path
    start: int | None
    stored: str
    shape: tuple[int, ...]
    blocks: tuple[int, ...]
    identity: FileIdentity | None = None


@dataclass(frozen=True)
class Packing:
    """The way from a tensor's bytes to its numbers.

    Attributes:
        kind: Dtype in safetensors ("F8_E4M3"), or type in a GGUF file ("Q4_K", "F32").
        nbytes: Number of stored bytes, without the scales.
        scale: The scales that 8-bit floats are multiplied by.
        heads: Number of attention heads whose rows are interleaved, as llama.cpp stores them; 0 if no row moves.
        shift: Number that is added to every value.
    """

    kind: str
    nbytes: int
    scale: Scale | None = None
    heads: int = 0
    shift: float = 0.0

    def meaning(self) -> list[Any]:
        """Return what gives the bytes their meaning, as plain data for digests."""
        scale = self.scale
        return [self.kind, self.heads, self.shift, [scale.stored, list(scale.shape), list(scale.blocks)] if scale else None]

    def identity(self) -> list[Any]:
        """Return `meaning` and the identity of the file with the scales, for keys of cached digests."""
        scale = self.scale
        stored = scale.identity.storable if scale and scale.identity else None
        return [*self.meaning(), [str(scale.file.resolve()), scale.start, stored] if scale else None]
