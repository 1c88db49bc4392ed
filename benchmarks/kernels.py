"""Which weights in the kernel, which ensemble? For a finished run with a ground truth.

    python benchmarks/kernels.py RUN_DIR

Scores are mean_m [s_m X_m K_m G_mᵀ] ⊙ mean_m [Q_m], with TRAK's scale s_m = 1 / mean |K_m|.

Weights: H = Σ v(Q) x xᵀ with v = 1, Q(1 − Q), Q, Q²; at λ = 1 and at the best λ of the grid.
Ensembles, at λ = 1: each checkpoint's product times its own Q_m before the mean; each product
divided by its Frobenius norm, or each target's by its norm, in place of s_m; no scale at all. All
differences are paired: of each target, with a bootstrap interval over targets.
Of a run with known wrong labels: the AUC of its self-influence,
|mean_m [s_m xᵀK_m x] · mean_m [Q_m]|.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from stored_grads import LAMBDAS, WEIGHTS, Checkpoint, Matrix, Predictions, StoredRun, best, table

from trak_dist.ops import lds, ranking

ENSEMBLES = ("own Q", "Frobenius", "per target", "no scale")


class Weighted:
    """LDS (λ, targets) under one of `WEIGHTS`, of the ensemble and of one checkpoint."""

    def __init__(self, stored: StoredRun, weights: str) -> None:
        grid = [*LAMBDAS, 1.0]
        total, single = [torch.zeros(())] * len(grid), [np.zeros(())] * len(grid)
        variants = dict.fromkeys(ENSEMBLES, torch.zeros(()))
        for checkpoint in stored.checkpoints():
            h = checkpoint.curvature(weights)
            of_all, of_one = (
                Predictions.of(h, (stored.masks * q) @ checkpoint.x, checkpoint.g)
                for q in (stored.mean_q, checkpoint.q)
            )
            for i, x in enumerate(grid):
                total[i] = total[i] + of_all.at(x)
                alone = stored.lds(of_one.at(x, scaled=False))
                single[i] = single[i] + alone / stored.members
            plain = of_all.at(1.0, scaled=False)
            norms = target_norms(checkpoint, of_all)
            for name, summand in {
                "own Q": of_one.at(1.0),
                "Frobenius": plain / norms.square().sum().sqrt(),
                "per target": plain / norms,
                "no scale": plain,
            }.items():
                variants[name] = variants[name] + summand
        self.ensemble = np.stack([stored.lds(p) for p in total])
        self.single: Matrix = np.stack(single)
        self.variants = {name: stored.lds(p) for name, p in variants.items()}


def target_norms(checkpoint: Checkpoint, predictions: Predictions) -> torch.Tensor:
    """The norms of the columns of XKGᵀ (t,), at λ = 1."""
    h = predictions.curvature
    solved = h.vectors @ (predictions.g * h.inverse(1.0)).T
    return (checkpoint.x @ solved).norm(dim=0)


def self_influence(stored: StoredRun, weights: str) -> Matrix:
    """|mean_m [s_m xᵀK_m x] · mean_m [Q_m]| of each train row, at λ = 1."""
    total = torch.zeros(())
    for checkpoint in stored.checkpoints():
        h = checkpoint.curvature(weights)
        norms = ((checkpoint.x @ h.vectors).square() * h.inverse(1.0)).sum(1)
        total = total + h.scale(1.0) * norms
    found: Matrix = (total * stored.mean_q).abs().numpy()
    return found


def by_weights(studies: dict[str, Weighted]) -> Iterator[list[object]]:
    """Rows of the table of weights: the last entry of each grid is λ = 1."""
    for name, study in studies.items():
        row: list[object] = [name]
        for which in ("ensemble", "single"):
            grid = getattr(study, which)
            at_best, _ = lds.cross_fitted(grid[:-1])
            base, _ = lds.cross_fitted(getattr(studies["none"], which)[:-1])
            row += [
                lds.interval(grid[-1]),
                f"{LAMBDAS[best(grid[:-1])]:.3g}",
                lds.interval(at_best),
                "" if name == "none" else lds.interval(at_best - base),
            ]
        yield row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    asked = parser.parse_args()
    stored = StoredRun(asked.run_dir)
    print(f"{asked.run_dir}\n")
    wrong = stored.mislabelled
    if wrong is not None:
        found = {name: self_influence(stored, name) for name in ("none", "output")}
        found["Q alone"] = stored.mean_q.abs().numpy()
        rows = ([name, ranking.auc(of, wrong)] for name, of in found.items())
        table(("wrong labels", "AUC"), rows, (16, 24))
    if stored.margins is None:
        return
    studies = {name: Weighted(stored, name) for name in WEIGHTS}
    column = ("λ = 1", "best λ", "cross-fitted", "less none's")
    table(
        ("weights", *(f"{c}" for c in column), *(f"{c}, one" for c in column)),
        by_weights(studies),
        (10, *(22, 8, 22, 25) * 2),
    )
    for name in ("none", "output"):
        study = studies[name]
        today = study.ensemble[-1]
        rows = (
            [variant, lds.interval(values), lds.interval(values - today)]
            for variant, values in {"today": today, **study.variants}.items()
        )
        table((f"ensemble, {name}", "LDS", "less today's"), rows, (18, 24, 25))


if __name__ == "__main__":
    main()
