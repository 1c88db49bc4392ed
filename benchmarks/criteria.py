"""Which λ, and can it be chosen without retraining? For a finished run with a ground truth.

    python benchmarks/criteria.py RUN_DIR [--weight-decay 5e-3] [--time 120] [--proj-dim 512]
                                  [--kernels none output]

Prints the LDS by λ, of the ensemble and of one checkpoint (the mean over those of the ensemble),
with curvature Σ x xᵀ (`none`) and Σ Q(1 − Q) x xᵀ (`output`, the generalised Gauss–Newton matrix
of the loss through f; Q = 1 − p). Then for each rule the λ that it chooses for each checkpoint, and
its regret: the LDS at the best λ, less that at the rule's. The rules:

`weight decay`
    SGD with weight decay w descends mean_i loss_i + (w/2)‖θ‖²; times n, the sum of losses and
    (n·w/2)‖θ‖², whose Hessian is Jᵀ diag(loss″(f)) J + n·w·I. Stored grads are J/√p, sketched; a
    sketch keeps ⟨x, x'⟩ in expectation, and by
    X(XᵀWX + λI)⁻¹Gᵀ = W⁻¹(XXᵀ + λW⁻¹)⁻¹XGᵀ only such products count. So XXᵀ ≈ JJᵀ/p, and
    λ = n·w/p. `none` has I for W: for it W is taken to be its mean,
    λ = n·w / (p · mean Q(1 − Q)).
`time`
    The same with w + 1/T: gradient flow for a time T is about a ridge of 1/T (Ali, Kolter &
    Tibshirani 2019, "A continuous-time view of early stopping for least squares"). T is the sum of
    learning rates ÷ (1 − momentum), of a model retrained on a subset.
`evidence`
    MacKay's (1992): the prior precision δ with δ‖θ‖² = d, which maximises the evidence of Laplace's
    approximation; λ = δ/p. d is the effective dimension Σ w_i / (w_i + λ). It asks for no weight
    decay, but for the weights.
    These three need a loss that is curved in f: not if Q = 1 for all rows, as of a language model,
    of which only `--kernels none` can be asked.
`row`
    2 tr(H)/n, twice the mean of v‖x‖² over rows: XXᵀ does not grow with k, nor does this λ, while
    the mean diagonal falls as 1/k. At k = n/2 they are the same.
`fixed`
    1.0, 0.3, 0.1 of the mean diagonal.

ξ is the cosine between a target's scores and their derivative by λ, mean over targets of the first
checkpoint, train rows counted by H: the correlation of scores with anything rises with λ
where ξ is above the ratio of that thing's correlations with the derivative and with the scores.
What of that can be known without retraining is ξ, so a rule could be to hold it at some value.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from stored_grads import (
    LAMBDAS,
    WEIGHTS,
    Checkpoint,
    Curvature,
    Matrix,
    Predictions,
    StoredRun,
    best,
    table,
)

from trak_dist.ops import lds

FIXED = (1.0, 0.3, 0.1)


def root(function: Callable[[float], float]) -> float:
    """Where a function that rises with λ is zero, in 10⁻⁵ … 10⁵ of the mean diagonal."""
    low, high = -5.0, 5.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if function(10**middle) > 0 else (middle, high)
    return float(10**high)


def cosine(predictions: Predictions, relative: float) -> float:
    """ξ: of gᵀKX and gᵀK²X in the metric of H, r / √(t·o) with t = gᵀKHKg, o = gᵀK²HK²g."""
    inverse = predictions.curvature.inverse(relative)
    scores = predictions.g * inverse * predictions.curvature.values.sqrt()
    return float(torch.cosine_similarity(scores, scores * inverse).mean())


def choices(
    checkpoint: Checkpoint, h: Curvature, kernel: str, *, parameters: int, decay: float, time: float
) -> dict[str, float]:
    """λ by each rule, in units of the mean diagonal of this checkpoint's H."""
    weight = WEIGHTS["output"](checkpoint.q).mean().item() if kernel == "none" else 1.0
    unit = parameters * weight * h.mean  # of λ, in the Hessian of the sum of losses

    def evidence(relative: float) -> float:
        dimension = float((h.values * h.inverse(relative)).sum())
        return relative * unit * checkpoint.squared_norm - dimension

    of_training = {
        "weight decay": lambda: len(checkpoint.x) * decay / unit,
        "time": lambda: len(checkpoint.x) * (decay + 1 / time) / unit,
        "evidence": lambda: root(evidence),
    }
    return {
        **{rule: choose() for rule, choose in of_training.items() if unit},
        "row": 2 * len(h.values) / len(checkpoint.x),
        **{f"fixed {x}": x for x in FIXED},
    }


class Study:
    """LDS (targets,) of the ensemble and of one checkpoint, by λ of the grid and by rule."""

    def __init__(self, stored: StoredRun, kernel: str, decay: float, time: float) -> None:
        self.lambdas: dict[str, list[float]] = {}
        together: dict[str, torch.Tensor] = {}
        self.ensemble: dict[str, Matrix] = {}
        self.single: dict[str, Matrix] = {}
        for checkpoint in stored.checkpoints():
            h = checkpoint.curvature(kernel)
            of_all, of_one = (
                Predictions.of(h, (stored.masks * q) @ checkpoint.x, checkpoint.g)
                for q in (stored.mean_q, checkpoint.q)
            )
            parameters = stored.plan.parameters
            chosen = choices(checkpoint, h, kernel, parameters=parameters, decay=decay, time=time)
            if not self.lambdas:
                self.cosines = [cosine(of_all, x) for x in LAMBDAS]
            for name, x in {**{f"{x}": x for x in LAMBDAS}, **chosen}.items():
                self.lambdas.setdefault(name, []).append(x)
                together[name] = together.get(name, 0) + of_all.at(x)
                alone = stored.lds(of_one.at(x, scaled=False)) / stored.members
                self.single[name] = self.single.get(name, 0) + alone
        self.rules = list(chosen)
        self.ensemble = {name: stored.lds(total) for name, total in together.items()}

    def by_lambda(self, of: dict[str, Matrix]) -> Matrix:
        """(λ of the grid, targets)."""
        return np.stack([of[f"{x}"] for x in LAMBDAS])

    def regret(self, of: dict[str, Matrix], rule: str) -> float:
        grid = self.by_lambda(of)
        return float(grid[best(grid)].mean() - of[rule].mean())

    def row(self, rule: str) -> tuple[str, float, float]:
        """The median over checkpoints of a rule's λ, and its regrets."""
        chosen = f"{np.median(self.lambdas[rule]):.3g}"
        return chosen, self.regret(self.ensemble, rule), self.regret(self.single, rule)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--weight-decay", type=float, default=5e-3)
    parser.add_argument("--time", type=float, default=120.0)
    parser.add_argument("--proj-dim", type=int, default=0)
    parser.add_argument("--kernels", nargs="+", default=["none", "output"], choices=WEIGHTS)
    asked = parser.parse_args()
    stored = StoredRun(asked.run_dir, asked.proj_dim)
    print(
        f"{asked.run_dir}: {len(stored.mean_q)} rows, k {stored.proj_dim}, p "
        f"{stored.plan.parameters}, {stored.members} checkpoints, mean Q(1 − Q) "
        f"{float(WEIGHTS['output'](stored.mean_q).mean()):.3g}\n"
    )
    studies = {k: Study(stored, k, asked.weight_decay, asked.time) for k in asked.kernels}
    cases = [(s, of) for s in studies.values() for of in (s.ensemble, s.single)]
    heads = [f"{kernel}, {of}" for kernel in studies for of in ("ensemble", "one")]
    widths = (16, *(25 for _ in cases))
    table(
        ("LDS at λ", *heads, *(f"ξ, {kernel}" for kernel in studies)),
        (
            [
                f"{x:.3g}",
                *(lds.interval(of[f"{x}"]) for _, of in cases),
                *(s.cosines[i] for s in studies.values()),
            ]
            for i, x in enumerate(LAMBDAS)
        ),
        (*widths, *(11 for _ in studies)),
    )
    grids = [study.by_lambda(of) for study, of in cases]
    fitted = [lds.cross_fitted(grid)[0] for grid in grids]
    at_one = [of["fixed 1.0"] for _, of in cases]
    summary: dict[str, list[object]] = {
        "best λ": [f"{LAMBDAS[best(grid)]:.3g}" for grid in grids],
        "LDS at 1.0": [lds.interval(values) for values in at_one],
        "cross-fitted": [lds.interval(values) for values in fitted],
        "cross. − 1.0": [lds.interval(f - o) for f, o in zip(fitted, at_one, strict=True)],
        "less first's": [lds.interval(f - fitted[i % 2]) for i, f in enumerate(fitted)],
    }
    table(("", *heads), ([name, *row] for name, row in summary.items()), widths)
    table(
        ("regret of", *(h for k in studies for h in (f"λ, {k}", f"{k}, ensemble", f"{k}, one"))),
        (
            [rule, *(cell for s in studies.values() for cell in s.row(rule))]
            for rule in next(iter(studies.values())).rules
        ),
        (16, *(width for _ in studies for width in (12, 19, 14))),
    )


if __name__ == "__main__":
    main()
