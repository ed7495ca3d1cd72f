"""Arrays as buffers: the same bits as tensors, and no warning where numbers overflow."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from workbench.weights import kernels
from workbench.weights.lowrank import Factors, summed
from workbench.weights.specs import NUMPY, Array, TensorSpec, as_array, as_tensor, buffer, empty, typed

CPU = torch.device("cpu")
EVERY_16_BITS = np.arange(1 << 16, dtype=np.uint16)


def in_both(bits: Any, stored: str) -> tuple[Any, Any]:
    """Return a tensor and an array of a dtype with the same bytes."""
    raw = np.ascontiguousarray(bits)
    tensor = typed(torch.from_numpy(raw.copy()).view(torch.uint8), stored)
    return tensor, Array(raw.view(np.uint8), "U8").typed(stored)


def bits_of(x: Any) -> Any:
    """Return the bits of float32 numbers."""
    return as_tensor(x).numpy().view(np.uint32)


@pytest.mark.parametrize("stored", ["BF16", "F16"])
def test_every_number_of_16_bits_is_widened_like_a_tensor(stored: str) -> None:
    tensor, array = in_both(EVERY_16_BITS, stored)
    number = ~tensor.isnan().numpy()  # of NaN, the payload may differ
    assert number.sum() > 60_000
    wide = empty(len(EVERY_16_BITS), "F32", NUMPY)
    expected = bits_of(tensor.float())[number]
    for result in (array.float(), wide.copy_(array)):
        assert np.array_equal(bits_of(result)[number], expected)
    assert torch.equal(as_tensor(array).view(torch.uint8), tensor.view(torch.uint8))


def test_arrays_have_the_bits_of_torch() -> None:
    generator = np.random.default_rng(0)
    x, y = (generator.integers(0, 1 << 32, 4096, dtype=np.uint32) for _ in range(2))
    for name in ("add_", "sub_"):
        (tensor, array), (other, other_array) = in_both(x, "F32"), in_both(y, "F32")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            getattr(array, name)(other_array)
        getattr(tensor, name)(other)
        number = ~tensor.isnan().numpy()
        assert number.sum() > 4000
        assert np.array_equal(bits_of(array)[number], bits_of(tensor)[number])
        assert np.array_equal(np.isnan(array.numpy()), ~number)
    spec = TensorSpec((3, 5), "BF16")
    array, tensor = buffer(spec, NUMPY), buffer(spec, CPU)
    assert as_array(array) is array
    assert as_array(tensor) is None
    assert (array.numel(), as_array(array).stored) == (tensor.numel(), "F32")  # type: ignore[union-attr]
    assert as_array(buffer(TensorSpec((3, 5), "I64"), NUMPY)).stored == "I64"  # type: ignore[union-attr]
    rows = array.view(3, 5)[1:3]
    assert rows.shape == (2, 5)
    assert rows.data_ptr() == array.data_ptr() + 5 * 4
    assert (str(NUMPY), NUMPY.type) == ("cpu", "cpu")
    # Products of factors with weights, an update of rank 0, and numbers that overflow.
    generator = np.random.default_rng(1)
    shapes = ((6, 2), (2, 5), (6, 3), (3, 5))
    drawn = [generator.standard_normal(shape).astype(np.float32) * np.float32(1e30) for shape in shapes]
    results = []
    for made, device in ((torch.from_numpy, CPU), (lambda x: Array(x, "F32"), NUMPY)):
        one, two, three, four = map(made, drawn)
        none = Factors.zero(TensorSpec((6, 5), "BF16"), device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            whole = summed([(0.1, Factors(one, two)), (1.0, none), (-1e10, Factors(three, four))])
        turned = whole.transposed()
        assert (whole.rank, turned.left.shape, turned.right.shape) == (5, (5, 5), (5, 6))
        results.append([bits_of(x).copy() for x in (whole.left, whole.right, turned.left, turned.right)])
    for tensor, array in zip(*results, strict=True):
        assert np.array_equal(tensor, array)
    assert np.isinf(results[0][1].view(np.float32)).any()


@pytest.mark.skipif(not kernels.compiled(), reason="no C compiler")
@pytest.mark.parametrize("stored", ["F32", "BF16", "F16"])
def test_a_rounded_result_is_checked_in_its_dtype(stored: str) -> None:
    """The largest float32 is finite in float32 alone; NaN in none."""
    for number, fits in ((1.5, True), (3.4028235e38, stored == "F32"), (float("nan"), False), (-float("inf"), False)):
        values = Array(np.array([0.1, number, -2.5], np.float32), "F32")
        rounded = empty(3, stored, NUMPY)
        assert kernels.narrow(values, rounded) is fits  # type: ignore[arg-type]
        expected = torch.empty(3, dtype=as_tensor(rounded).dtype)
        assert kernels.narrow(torch.tensor([0.1, number, -2.5]), expected) is fits
        if number == number:
            assert torch.equal(as_tensor(rounded), expected)
