"""A process that feeds rows of the small CNN's problem into one directory; started by tests.

    python feeding.py CHECKPOINTS SAVE_DIR SEED ROUNDS

Each round is a batch of some rows of one checkpoint, both drawn from the seed; between rounds other
processes do the same. Prints `ready` once it is about to begin.
"""

from __future__ import annotations

import sys

import numpy as np
import small_cnn
import torch

from trak_dist import TRAKer

TRAIN, BATCH = 60, 6


def traker(checkpoints: str, save_dir: str, **arguments: object) -> TRAKer:
    problem = small_cnn.problem(checkpoints)
    settings = {
        "model": small_cnn.net(),
        "task": "image_classification",
        "device": "cpu",
        "proj_dim": 64,
        "use_half_precision": False,
        "lambda_reg": 0.5,
        **arguments,
    }
    return TRAKer(train_set_size=len(problem.train), save_dir=save_dir, **settings)


def batch(images: small_cnn.Images, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return images.images[rows], images.labels[rows]


def main(checkpoints: str, save_dir: str, seed: int, rounds: int) -> None:
    torch.set_num_threads(1)
    problem = small_cnn.problem(checkpoints)
    states = [torch.load(path, weights_only=True) for path in problem.checkpoints]
    random = np.random.default_rng(seed)
    print("ready", flush=True)
    fed = traker(checkpoints, save_dir)
    for _ in range(rounds):
        model_id = int(random.integers(len(states)))
        rows = np.sort(random.choice(TRAIN, BATCH, replace=False))
        fed.load_checkpoint(states[model_id], model_id=model_id)
        fed.featurize(batch(problem.train, rows), inds=torch.from_numpy(rows))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
