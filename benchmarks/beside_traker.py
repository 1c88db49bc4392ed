"""TRAK's quickstart on a slice of its data, by TRAK's own TRAKer and by ours: the same calls.

    python benchmarks/beside_traker.py

ResNet-9, one checkpoint, 100 train images and 20 targets of Fashion-MNIST's pullovers and coats,
k = 512, float32; one thread, one process, the two take turns. Seconds of the processor.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import trak
from rounds import Seconds, medians

import trak_dist
from trak_dist.problems.networks import resnet9

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import quickstart

TRAIN, TARGETS, BATCH, DIM, ROUNDS = 100, 20, 50, 512, 3


def main() -> Seconds:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    checkpoint = resnet9(2).state_dict()
    ds_train, ds_val = quickstart.datasets(TRAIN)
    seconds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, kind in (("trak_dist", trak_dist.TRAKer), ("traker", trak.TRAKer)):
            for phase, taken in attributed(kind, checkpoint, ds_train, ds_val).items():
                seconds.setdefault(f"{name}: {phase}", []).append(taken)
    for what, median in medians(seconds).items():
        print(f"{what:<24}{median:>8.2f} s")
    return seconds


def attributed(
    kind: type[Any],
    checkpoint: dict[str, torch.Tensor],
    ds_train: torch.utils.data.TensorDataset,
    ds_val: torch.utils.data.TensorDataset,
) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as save_dir:
        started = time.process_time()
        traker = kind(
            model=resnet9(2),
            task="image_classification",
            train_set_size=TRAIN,
            save_dir=save_dir,
            device="cpu",
            proj_dim=DIM,
            use_half_precision=False,
            lambda_reg=1.0,
            logging_level=logging.ERROR,
        )
        traker.load_checkpoint(checkpoint, model_id=0)
        for start in range(0, TRAIN, BATCH):
            batch = [t[start : start + BATCH] for t in ds_train.tensors]
            traker.featurize(batch=batch, num_samples=len(batch[0]))
        traker.finalize_features()
        featurized = time.process_time()
        traker.start_scoring_checkpoint("val", checkpoint, model_id=0, num_targets=TARGETS)
        traker.score(batch=[t[:TARGETS] for t in ds_val.tensors], num_samples=TARGETS)
        traker.finalize_scores(exp_name="val")
        scored = time.process_time()
    return {"featurize": featurized - started, "score": scored - featurized}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
