"""Rows as stored: what float16 or int8 with a scale per row keeps, whatever the size of the row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trak_dist.ops.rows import decode, encode

HALF_ULP = 2.0**-11  # float16 keeps 11 bits: rounding is at most this, relative to the entry
steady = settings(derandomize=True, deadline=None, max_examples=60)


def row(size: float, seed: int = 0) -> Tensor:
    """Entries over six orders of magnitude, the largest of them `size`."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, 64, generator=generator, dtype=torch.float64)
    values *= 10 ** (-6 * torch.rand(1, 64, generator=generator, dtype=torch.float64))
    return (values / values.abs().max() * size).float()


def assert_kept(rows: Tensor) -> None:
    """Each entry to half a unit in its last place, or to 2⁻⁴⁰ of its row's largest.

    Entries below 2⁻²⁹ of the largest are subnormal in float16, with steps of 2⁻²⁴ where the
    largest is 2¹⁵: half a step is 2⁻⁴⁰ of it. The factor allows for float32's own roundings.
    """
    stored, scale = encode(rows, "float16")
    assert stored.dtype == torch.float16
    assert scale.dtype == torch.float32
    assert stored.isfinite().all()
    found = decode(stored, scale)
    assert found.dtype == torch.float32
    exact, error = rows.double(), (found.double() - rows.double()).abs()
    peak = exact.abs().amax(1, keepdim=True)
    bound = torch.maximum(HALF_ULP * exact.abs(), 2.0**-40 * peak) * (1 + 2.0**-9)
    assert (error <= bound).all()


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-8, 1.0, 65504.0, 1e6, 1e30, 3.4e38])
def test_float16_rows_keep_eleven_bits_at_any_size(size: float) -> None:
    assert_kept(row(size))


@steady
@given(exponent=st.floats(-35, 38), seed=st.integers(0, 2**32))
def test_the_round_trip_error_is_bounded_row_by_row(exponent: float, seed: int) -> None:
    assert_kept(row(10**exponent, seed))


@pytest.mark.parametrize("size", [1e-35, 1e-8, 1.0, 1e30, 3.4e38])
def test_int8_rows_keep_each_entry_to_half_a_step_of_the_largest_ones(size: float) -> None:
    rows = torch.cat([row(size, seed) for seed in range(50)])
    stored, scale = encode(rows, "int8")
    assert (stored.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert stored.int().abs().amax(1).tolist() == [127] * 50
    error = (decode(stored, scale).double() - rows.double()).abs().amax(1)
    assert (error <= rows.double().abs().amax(1) / 127 / 2 * (1 + 2.0**-9)).all()


def test_int8_rows_are_rounded_to_nearest_and_are_never_the_number_of_a_missing_chunk() -> None:
    rows = torch.tensor([[127.0, -127.0, 2.4, -2.6, 0.4], [-1.27, 0.0, 0.006, -0.004, 0.0]])
    stored, _ = encode(rows, "int8")
    assert stored.tolist() == [[127, -127, 2, -3, 0], [-127, 0, 1, 0, 0]]


def test_rows_of_unlike_size_do_not_disturb_each_other() -> None:
    rows = torch.cat([row(1e-30), row(1e30), row(1.0)])
    assert_kept(rows)
    stored, scale = encode(rows, "float16")
    for i in range(3):
        alone, own_scale = encode(rows[i : i + 1], "float16")
        assert torch.equal(stored[i : i + 1], alone)
        assert torch.equal(scale[i : i + 1], own_scale)


def test_naive_float16_would_lose_these_rows() -> None:
    for size, lost in ((1e-30, 0.0), (1e30, torch.inf)):
        assert row(size).half().abs().max() == lost


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_zero_rows_stay_zero(dtype: str) -> None:
    rows = torch.cat([row(1.0), torch.zeros(1, 64), row(1e-30)])
    found = decode(*encode(rows, dtype))
    assert (found[1] == 0).all()
    assert (found[[0, 2]].abs().amax(1) > 0).all()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_float32_rows_are_kept_to_the_bit(size: float) -> None:
    rows = row(size)
    stored, scale = encode(rows, "float32")
    assert torch.equal(stored, rows)
    assert torch.equal(decode(stored, scale), rows)


def test_no_rows_are_no_rows() -> None:
    stored, scale = encode(torch.empty(0, 8), "float16")
    assert (stored.shape, scale.shape) == ((0, 8), (0,))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_row_of_smallest_numbers_is_not_divided_by_zero(dtype: str) -> None:
    """Below about 4e-34 the scale itself would be subnormal; it stops at the smallest normal."""
    for size in (1e-37, 1e-40, 1e-44):
        stored, scale = encode(row(size), dtype)
        assert (scale >= torch.finfo(torch.float32).tiny).all()
        assert decode(stored, scale).isfinite().all()
