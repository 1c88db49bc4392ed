"""Image and text classification for TRAKer and for the package traker; a process that feeds one.

    python parity.py CASE SAVE_DIR PART PARTS

features every checkpoint's rows PART, PART + PARTS, … of a shuffled order, in small batches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import small_cnn
import torch
from torch import Tensor, nn

from trak_dist import NoOpProjector, TRAKer

TRAIN, TARGETS, CHECKPOINTS, LAMBDA = 60, 7, 3, 0.05


@dataclass(frozen=True)
class Case:
    """A model, its checkpoints and its data."""

    task: str
    net: Callable[[], nn.Module]
    states: list[dict[str, Tensor]]
    train: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]


def image() -> Case:
    train, targets = small_cnn.Images(TRAIN, seed=1), small_cnn.Images(TARGETS, seed=2)
    return Case(
        "image_classification",
        small_cnn.net,
        [small_cnn.state(seed) for seed in range(CHECKPOINTS)],
        (train.images, train.labels),
        (targets.images, targets.labels),
    )


def text() -> Case:
    import tiny_bert  # of a library that takes seconds to import

    return Case(
        "text_classification",
        tiny_bert.Logits,
        [tiny_bert.state(seed) for seed in range(CHECKPOINTS)],
        tiny_bert.batch(TRAIN, seed=1),
        tiny_bert.batch(TARGETS, seed=2),
    )


CASES = {"image": image, "text": text}


def arguments(case: Case, save_dir: str) -> dict[str, object]:
    """What both are made with, but for the projector."""
    return {
        "model": case.net(),
        "task": case.task,
        "train_set_size": TRAIN,
        "save_dir": save_dir,
        "device": "cpu",
        "use_half_precision": False,
        "lambda_reg": LAMBDA,
    }


def main(name: str, save_dir: str, part: int, parts: int) -> None:
    torch.set_num_threads(1)
    case = CASES[name]()
    traker = TRAKer(projector=NoOpProjector(), **arguments(case, save_dir))
    for model_id in np.random.default_rng(part).permutation(CHECKPOINTS):
        traker.load_checkpoint(case.states[model_id], model_id=int(model_id))
        rows = np.random.default_rng(7).permutation(TRAIN)[part::parts]
        for some in np.array_split(rows, 4):
            inds = torch.from_numpy(some)
            traker.featurize(batch=tuple(t[inds] for t in case.train), inds=inds)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
