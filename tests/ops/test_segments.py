"""Sums in an order that is fixed beforehand."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICE
from torch import Tensor

from trak_dist.ops import segments
from trak_dist.ops.segments import Segments

pytestmark = pytest.mark.device


def drawn(rows: int, count: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    keys = torch.randint(0, count, (rows,), generator=generator)
    values = torch.randn(rows, width, generator=generator)
    return keys.to(DEVICE), values.to(DEVICE)


SIZES = [(0, 3, 2), (1, 1, 1), (5, 3, 0), (50, 1000, 4), (1000, 5, 7), (100_000, 30, 3)]


@pytest.mark.parametrize(("rows", "count", "width"), SIZES)
def test_sums_are_those_of_equal_keys(rows: int, count: int, width: int) -> None:
    keys, values = drawn(rows, count, width)
    wanted = torch.zeros(count, width, dtype=torch.float64)
    wanted.index_add_(0, keys.cpu(), values.cpu().double())
    found = Segments.of(keys, count).sums(values.double()).cpu()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("rows", "count", "width"), SIZES)
def test_sums_have_the_same_bits_each_time(rows: int, count: int, width: int) -> None:
    keys, values = drawn(rows, count, width)
    first = Segments.of(keys, count).sums(values)
    for _ in range(20):
        assert torch.equal(Segments.of(keys, count).sums(values), first)


def test_the_rows_of_a_sum_are_walked_over_in_their_order() -> None:
    """1 is lost beside 2²⁴, so the sum shows the order."""
    keys = torch.tensor([1, 0, 1, 1, 0], device=DEVICE)
    values = torch.tensor([[1.0], [5], [2.0**24], [-(2.0**24)], [6]], device=DEVICE)
    assert Segments.of(keys, 2).sums(values).tolist() == [[11], [0]]


def test_long_sums_are_those_of_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = drawn(1000, 5, 2)
    monkeypatch.setattr(segments, "MIN_ROWS_PER_PART", 10)
    parted = Segments.of(keys, 5)
    assert len(parted.starts) == 20 * 5
    assert len(parted.order) == 1000
    longest = torch.diff(parted.starts, append=parted.starts.new_tensor([1000])).max()
    assert int(longest) <= 50  # each is of the rows among 50 neighbours that have one key
    monkeypatch.setattr(segments, "MIN_ROWS_PER_PART", 1000)
    torch.testing.assert_close(parted.sums(values), Segments.of(keys, 5).sums(values))


def test_values_need_not_be_contiguous() -> None:
    keys, values = drawn(300, 7, 4)
    across = values.T.contiguous().T
    assert not across.is_contiguous()
    assert torch.equal(Segments.of(keys, 7).sums(across), Segments.of(keys, 7).sums(values))


def test_what_is_not_finite_stays_in_its_column() -> None:
    keys, values = drawn(300, 7, 3)
    values[5, 1] = torch.nan
    found = Segments.of(keys, 7).sums(values)
    assert found.isnan().sum() == 1
    assert found[keys[5], 1].isnan()
