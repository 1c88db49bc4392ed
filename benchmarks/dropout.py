"""Do dropout masks make up for trainings? LDS against the number of trainings, with and without.

    python benchmarks/dropout.py RUN_DIR [RATE]

The MLP of `mnist` with dropout after each hidden layer, in training too. Two runs in RUN_DIR:
`plain`, and `masks` with `checkpoints.dropout_seeds=4`, which takes over the trained models of the
first by their receipts, those of the ground truth too. LDS at the default λ, of the ensembles of
the first 1, 2, 3 and 5 checkpoints: plain; averaged over four seeds of the projection, which costs
as much as masks; with masks; and the difference of the last two for each target. Then with λ chosen
on other targets. An hour on one core.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

import trak_dist
from trak_dist.cells import EvaluateCell
from trak_dist.evaluation.ground_truth import read_ground_truth
from trak_dist.ops import lds
from trak_dist.problems import mnist
from trak_dist.problems.training import classifier_trainer
from trak_dist.store.run import Run

Matrix = NDArray[np.float64]
TRAININGS = (1, 2, 3, 5)
SEEDS = 4
SETTINGS: dict[str, Any] = {
    "proj_dim": 2048,
    "cluster": {"workers": 1},
    "ground_truth": {"subsets": 100, "seeds": 2},
}


def net(rate: float) -> nn.Module:
    """784 → 128 → 64 → 10, of whose hidden units a share `rate` is dropped."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(28 * 28, 128), nn.ReLU(), nn.Dropout(rate)),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Dropout(rate)),
        nn.Linear(64, 10),
    )


def problem(rate: float = 0.1) -> trak_dist.Problem:
    """MNIST-5k with dropout."""
    return replace(
        mnist.problem(),
        model=net(rate),
        train_checkpoint=classifier_trainer(
            lambda: net(rate), epochs=15, batch_size=64, learning_rate=0.05, weight_decay=5e-3
        ),
    )


def plan(run_dir: Path, rate: float, seeds: int, **settings: Any) -> trak_dist.PlannedRun:
    """The run, or with `sweep=True` a member, executed."""
    planned = trak_dist.plan_run(
        run_dir=run_dir,
        problem={"_target_": "benchmarks.dropout.problem", "rate": rate},
        **{"checkpoints.train": TRAININGS[-1], "checkpoints.dropout_seeds": seeds},
        **SETTINGS,
        **settings,
    )
    planned.execute().raise_for_failures()
    return planned


def scores(run_dir: Path, rate: float, seeds: int, size: int, projection: int = 0) -> Matrix:
    """Scores (n_train, targets) with all models of the first `size` checkpoints."""
    use = [] if size == TRAININGS[-1] else list(range(size * max(1, seeds)))
    member = {"sweep": True, "checkpoints.use": use, "projection.seed": projection}
    for stage in ("featurize", "reduce"):
        planned = plan(run_dir, rate, seeds, stage=stage, **member)
    return planned.results().scores("val").astype(np.float64)


def main() -> None:
    root = Path(sys.argv[1])
    rate = float(sys.argv[2]) if len(sys.argv) > 2 else 0.1
    plain, masked = root / "plain", root / "masks"
    plan(plain, rate, 0)
    for part in ("checkpoints", "receipts/train"):
        if not (masked / part).exists():
            shutil.copytree(plain / part, masked / part)
    plan(masked, rate, SEEDS)
    truth = read_ground_truth(Run.open(plain), "val")
    masks, margins = truth.masks.astype(np.float64), truth.margins.mean(axis=1)
    print(f"rate {rate}, LDS at λ = 1")
    print(f"trainings   plain   {SEEDS} projections   {SEEDS} masks   masks - projections")
    for size in TRAININGS:
        projected = [scores(plain, rate, 0, size, seed) for seed in range(SEEDS)]
        ways = projected[0], np.mean(projected, axis=0), scores(masked, rate, SEEDS, size)
        found = [lds.spearman(masks @ way, margins) for way in ways]
        print(size, *map(lds.interval, (*found, found[2] - found[1])), sep="   ")
    print("with λ chosen on other targets: trainings, LDS, λ / mean diagonal")
    for seeds, run_dir in ((0, plain), (SEEDS, masked)):
        path = Run.open(run_dir).layout.file(EvaluateCell("val"), "figures")
        report = json.loads(path.read_bytes())
        print(f"{seeds} masks; bound {report['reliability']['bound']:.3f}")
        for curve in report["curves"]:
            size = curve["checkpoints"] // max(1, seeds)
            if curve["proj_dim"] == SETTINGS["proj_dim"] and size in TRAININGS:
                print(size, lds.Interval(**curve["chosen"]), curve["chosen_lambdas"], sep="   ")


if __name__ == "__main__":
    main()
