"""Draws: SplitMix64 as published, and what is made of its bits."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trak_dist.ops import draws

MASK = 2**64 - 1
KEYS = st.integers(-(2**63), 2**63 - 1)
steady = settings(derandomize=True, deadline=None, max_examples=50)


def splitmix64(key: int, counter: int) -> int:
    """The `counter`-th output of the generator seeded with `key`, in Python's whole numbers."""
    z = (key + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def unsigned(values: torch.Tensor) -> list[int]:
    return [v & MASK for v in values.flatten().tolist()]


def test_draws_are_the_published_outputs_of_splitmix64() -> None:
    # The generator's known answers: the first output for seed 0, five for seed 1234567.
    assert unsigned(draws.draw(0, torch.arange(1))) == [0xE220A8397B1DCDAF]
    assert unsigned(draws.draw(1234567, torch.arange(5))) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@steady
@given(key=KEYS, counters=st.lists(st.integers(0, 2**62), min_size=1, max_size=8))
def test_draws_agree_with_whole_number_arithmetic(key: int, counters: list[int]) -> None:
    found = unsigned(draws.draw(key, torch.tensor(counters)))
    assert found == [splitmix64(key, c) for c in counters]


@steady
@given(key=KEYS, rows=st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
def test_signs_are_the_bits_of_a_rows_own_words(key: int, rows: list[int]) -> None:
    columns, words = 70, 2
    found = draws.signs(key, torch.tensor(rows), columns)
    wanted = [
        [2 * (splitmix64(key, r * words + c // 64) >> (c % 64) & 1) - 1 for c in range(columns)]
        for r in rows
    ]
    assert found.dtype == torch.float32
    assert found.tolist() == wanted


@steady
@given(key=KEYS, rows=st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
def test_normals_are_quantiles_at_the_16_bit_lanes_of_a_rows_own_words(
    key: int, rows: list[int]
) -> None:
    columns, words = 6, 2
    found = draws.normals(key, torch.tensor(rows), columns)
    lanes = [
        [splitmix64(key, r * words + c // 4) >> (16 * (c % 4)) & 0xFFFF for c in range(columns)]
        for r in rows
    ]
    # The lane's quantile, up to the table's own scaling and float32.
    probability = 0.5 * (1 + torch.erf(found.double() / math.sqrt(2)))
    wanted = (torch.tensor(lanes, dtype=torch.float64) + 0.5) / 2**16
    torch.testing.assert_close(probability, wanted, rtol=0, atol=1e-5)


@steady
@given(key=KEYS, buckets=st.integers(1, 5000), counters=st.lists(st.integers(0, 2**40), max_size=5))
def test_bucket_and_sign_are_disjoint_bits_of_one_draw(
    key: int, buckets: int, counters: list[int]
) -> None:
    bucket, sign = draws.bucket_and_sign(key, torch.tensor(counters, dtype=torch.int64), buckets)
    bits = [splitmix64(key, c) for c in counters]
    assert bucket.tolist() == [(b >> 1) % buckets for b in bits]
    assert sign.tolist() == [2 * (b & 1) - 1 for b in bits]


def test_the_normal_table_has_mean_0_and_variance_1() -> None:
    table = draws._normal_table(torch.device("cpu"))
    assert table.shape == (2**16,)
    assert (table[1:] > table[:-1]).all()
    assert torch.equal(table, -table.flip(0))
    assert abs(float(table.double().mean())) < 1e-12
    assert float(table.double().square().mean()) == pytest.approx(1, abs=1e-6)


def test_bits_are_balanced_and_buckets_uniform() -> None:
    n, buckets = 2**16, 12
    key = draws.stream_key("balance")
    bits = draws.draw(key, torch.arange(n))
    ones = np.array([int(((bits >> i) & 1).sum()) for i in range(64)])
    assert (np.abs(ones - n / 2) < 5 * math.sqrt(n / 4)).all()  # 5 σ of a fair coin
    bucket, sign = draws.bucket_and_sign(key, torch.arange(n), buckets)
    # Bucket and sign jointly: χ² with 23 degrees of freedom exceeds 65 once in 10⁵ draws.
    cells = torch.bincount(bucket * 2 + (sign > 0), minlength=2 * buckets).double()
    expected = n / (2 * buckets)
    assert float(((cells - expected) ** 2 / expected).sum()) < 65


def test_stream_keys_hash_version_and_parts_and_never_change() -> None:
    raw = hashlib.blake2b(b"(1, 0, 2, 'layer.weight', (3, 4))", digest_size=8).digest()
    key = draws.stream_key(0, 2, "layer.weight", (3, 4))
    assert key == int.from_bytes(raw, "little", signed=True)
    assert key == PINNED_KEY
    others = [(1, 2, "layer.weight", (3, 4)), (0, 3, "layer.weight", (3, 4))]
    others += [(0, 2, "layer.bias", (3, 4)), (0, 2, "layer.weight", (4, 3))]
    assert len({key, *(draws.stream_key(*parts) for parts in others)}) == 5


PINNED_KEY = -4394272982596643119


BELOW_1 = 1 - 2.0**-24  # the largest float32


def test_classes_are_drawn_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, -torch.inf, 1.0])
    u = torch.rand(50_000, generator=torch.Generator().manual_seed(0))
    found = draws.categorical(logits.expand(len(u), -1), u).bincount(minlength=5) / len(u)
    wanted = np.exp(logits.double().numpy()) / np.exp(logits.double().numpy()).sum()
    spread = np.sqrt(wanted * (1 - wanted) / len(u))
    assert (np.abs(found.numpy() - wanted) <= 4 * spread).all()
    assert found[3] == 0


@pytest.mark.parametrize("impossible", [0, 2, 4])
def test_a_class_of_probability_0_is_never_drawn_not_even_at_the_ends(impossible: int) -> None:
    logits = torch.zeros(5)
    logits[impossible] = -torch.inf
    ends = torch.tensor([0.0, 0.25, 0.5, 0.75, BELOW_1])
    found = draws.categorical(logits.expand(5, -1), ends).tolist()
    possible = [c for c in range(5) if c != impossible]
    assert found == [*possible, possible[-1]]  # a number at a step belongs to the class after it


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_of_many_classes() -> None:
    ends = torch.tensor([[0.0, BELOW_1]])
    assert draws.categorical(torch.zeros(1, 2, 50_000), ends).tolist() == [[0, 49_999]]
