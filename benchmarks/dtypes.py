"""What `featurize.dtype` costs: rows, scores and LDS of each type, beside those of float32.

    python benchmarks/dtypes.py RUN_DIR

For a finished run with a ground truth and `featurize.dtype=float32`: its rows are stored in the
other types as a run would store them, and kernels and scores made of them in float64. `rows` is
‖stored − row‖ ÷ ‖row‖, the mean over train rows; `scores` the same of each target's scores, the
mean over targets; `top 10` the share of its ten most helpful rows that it keeps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from stored_grads import Checkpoint, StoredRun, table
from torch import Tensor

from trak_dist.ops import lds
from trak_dist.ops.rows import decode, encode

DTYPES = {"float32": 4, "float16": 2, "int8": 1}
LAMBDAS = (1.0, 0.1, 0.01)


def main(run_dir: str) -> None:
    stored = StoredRun(Path(run_dir))
    assert stored.plan.spec.featurize.dtype == "float32"
    found = {dtype: scored(stored, dtype) for dtype in DTYPES}
    heads = ("", "bytes", "rows", "λ", "scores", "top 10", "LDS", "less float32's")
    table(heads, lines(stored, found), [10, 7, 10, 7, 10, 8, 23, 16])


def scored(stored: StoredRun, dtype: str) -> tuple[float, list[Tensor]]:
    """The error of rows; and scores (n, t) for each λ."""
    error, totals = 0.0, [torch.zeros(())] * len(LAMBDAS)
    for checkpoint in stored.checkpoints():
        kept = replace(
            checkpoint, x=as_stored(checkpoint.x, dtype), g=as_stored(checkpoint.g, dtype)
        )
        error += float(of_rows(kept.x, checkpoint.x).mean()) / stored.members
        for i, product in enumerate(products(kept, stored.plan.curvature)):
            totals[i] = totals[i] + product
    return error, [total * stored.mean_q[:, None] for total in totals]


def as_stored(rows: Tensor, dtype: str) -> Tensor:
    return decode(*encode(rows.float(), dtype)).double()


def products(checkpoint: Checkpoint, curvature: str) -> Iterator[Tensor]:
    """X K Gᵀ with TRAK's scale, for each λ."""
    h = checkpoint.curvature(curvature)
    g = (checkpoint.g @ h.vectors).T
    x = checkpoint.x @ h.vectors
    for relative in LAMBDAS:
        yield h.scale(relative) * (x * h.inverse(relative)) @ g


def of_rows(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).norm(dim=1) / wanted.norm(dim=1)


def lines(
    stored: StoredRun, found: dict[str, tuple[float, list[Tensor]]]
) -> Iterator[tuple[object, ...]]:
    exact = found["float32"][1]
    for dtype, (error, by_lambda) in found.items():
        for relative, scores, wanted in zip(LAMBDAS, by_lambda, exact, strict=True):
            own, theirs = (stored.lds(stored.masks @ s) for s in (scores, wanted))
            yield (
                *(dtype, DTYPES[dtype], f"{error:.1e}", relative),
                f"{float(of_rows(scores.T, wanted.T).mean()):.1e}",
                float(np.mean([shared(a, b) for a, b in zip(scores.T, wanted.T, strict=True)])),
                *(lds.interval(own), f"{own.mean() - theirs.mean():+.4f}"),
            )


def shared(a: Tensor, b: Tensor) -> float:
    tops = (set(s.topk(10).indices.tolist()) for s in (a, b))
    return len(set.intersection(*tops)) / 10


if __name__ == "__main__":
    main(*sys.argv[1:])
