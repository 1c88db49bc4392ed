"""Gram and scores, against the machine's rate of float32 matrix products.

    python benchmarks/reduce.py

One thread, one process, the ways take turns; a cell's rows of k = 4096 as they come from the
store. The rate counts a multiplication and an addition for each entry of XᵀX and each row, though
the Gram, being symmetric, needs but half of them (in float64); the floor is a plain float32
product of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rounds import medians, ratios, take_turns

from trak_dist.ops import kernel, rows
from trak_dist.ops.scores import Ensemble

DIM, ROWS, TARGETS, ROUNDS = 4096, 8192, 1024, 3
GRAM, SCORES = "float32 XᵀX", "float32 XB"


def main() -> dict[str, list[float]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, b = torch.randn(ROWS, DIM), torch.randn(DIM, TARGETS)
    stored, scale = rows.encode(x, "float16")
    q = torch.rand(ROWS)

    def scores() -> torch.Tensor:
        ensemble = Ensemble()
        ensemble.add(rows.decode(stored, scale) @ b, q)
        return ensemble.scores()

    ways: dict[str, Callable[[], object]] = {
        GRAM: lambda: x.T @ x,
        "Gram": lambda: kernel.sum_gram([rows.decode(stored, scale)], DIM, x.device),
        SCORES: lambda: x @ b,
        "scores": scores,
    }
    seconds = take_turns(ways, ROUNDS)
    work = {GRAM: DIM, "Gram": DIM, SCORES: TARGETS, "scores": TARGETS}
    print(f"a cell of {ROWS} rows, k = {DIM}, {TARGETS} targets")
    print(f"{'':<14}{'ms':>8}{'GFLOP/s':>10}{'share':>8}")
    for way, median in medians(seconds).items():
        rate = 2e-9 * ROWS * DIM * work[way] / median
        share = 1 / ratios(seconds, GRAM if work[way] == DIM else SCORES)[way]
        print(f"{way:<14}{median * 1e3:>8.0f}{rate:>10.1f}{share:>8.2f}")
    return seconds


if __name__ == "__main__":
    main()
