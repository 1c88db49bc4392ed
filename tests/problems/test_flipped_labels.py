"""mnist with `problem.flip`: which labels are made wrong, and that it says so."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from trak_dist.errors import ConfigError
from trak_dist.problem import Problem
from trak_dist.problems import mnist


@pytest.fixture(scope="module", autouse=True)
def _read_once() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist, "mnist_data", functools.cache(mnist.mnist_data))
        yield


@pytest.fixture(scope="module")
def clean(_read_once) -> Problem:
    return mnist.problem()


def labels(dataset: object) -> np.ndarray:
    return np.array([int(dataset[row][1]) for row in range(len(dataset))])  # type: ignore[index, arg-type]


@pytest.mark.parametrize("flip", [0.1, 0.33])
def test_exactly_the_share_asked_for_is_wrong_and_marked(clean: Problem, flip: float) -> None:
    flipped = mnist.problem(flip=flip)
    right, now = labels(clean.train), labels(flipped.train)
    assert flipped.mislabelled is not None
    assert flipped.mislabelled.dtype == bool
    assert (right != now).sum() == round(flip * 4000)
    np.testing.assert_array_equal(flipped.mislabelled, right != now)
    assert set(now) == set(range(10))
    np.testing.assert_array_equal(
        labels(flipped.targets["val"]), labels(clean.targets["val"]), "targets stay right"
    )
    for row in (0, 1234, 3999):
        assert torch.equal(flipped.train[row][0], clean.train[row][0])


def test_wrong_labels_are_any_other_digit_and_the_same_every_time(clean: Problem) -> None:
    one, two = mnist.problem(flip=0.2), mnist.problem(flip=0.2)
    np.testing.assert_array_equal(one.mislabelled, two.mislabelled)
    np.testing.assert_array_equal(labels(one.train), labels(two.train))
    moved = (labels(one.train) - labels(clean.train))[one.mislabelled] % 10
    counts = np.bincount(moved, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 60, "800 of them, each step alike"


def test_without_flip_nothing_is_known_to_be_wrong(clean: Problem) -> None:
    assert clean.mislabelled is None


@pytest.mark.parametrize("flip", [-0.1, 1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(flip: float) -> None:
    with pytest.raises(ConfigError) as raised:
        mnist.problem(flip=flip)
    assert str(raised.value) == (
        f"{flip} is no share of labels\n  where: problem.flip\n  next:  problem.flip=0.1"
    )
