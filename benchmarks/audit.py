"""What the audit of featurize cells costs, as a share of featurizing them.

    OMP_NUM_THREADS=1 python benchmarks/audit.py [model …]

One thread, one process; the ways take turns, medians over rounds. Of each cell `ROWS` rows are
computed alone, and of one batch in `BATCHES` the weighted sum is checked against plain autograd
(`trak_dist.checks.gradient_audit`); the shares are of cells of so many rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from featurize import DIM, featurizing
from models import CASES, Case
from rounds import medians, take_turns

from trak_dist.checkpoints.featurizer import projecting_sink
from trak_dist.checks.gradient_audit import BATCHES, ROWS
from trak_dist.ops import audit
from trak_dist.ops.batches import rows_of
from trak_dist.ops.gradients import LoopGradients, select_params
from trak_dist.ops.projection import make_projector

ROUNDS = 5
CELLS = (512, 2048, 16384)


def main(names: Sequence[str] = tuple(CASES)) -> dict[str, dict]:
    torch.set_num_threads(1)
    found = {}
    for name in names:
        torch.manual_seed(0)
        found[name] = measure(CASES[name]())
        report(name, found[name])
    return found


def measure(case: Case) -> dict:
    batch = case.batch(case.rows)
    shapes = select_params(case.model, ["*"])
    project = make_projector("sjlt", dim=DIM, seed=0, model_id=0, shapes=shapes)
    loop = LoopGradients(case.model, case.output, ["*"])

    def alone() -> None:
        loop(rows_of(batch, slice(1)), projecting_sink(project, torch.zeros(1, DIM)))
        audit.out_to_loss_alone(case.model, case.output, batch, [0])

    def whole() -> None:
        weights = audit.random_weights(case.rows, seed=0)
        take = projecting_sink(project, torch.zeros(1, DIM))
        audit.weighted_sum_gradient(case.model, case.output, ["*"], batch, weights, take)

    ways: dict[str, Callable[[], object]] = {
        "a batch": featurizing(case, batch, DIM),
        "a row alone": alone,
        "a batch's sum": whole,
    }
    return {"rows": case.rows, "seconds": take_turns(ways, ROUNDS)}


def share(found: dict, cell_rows: int) -> float:
    """Of the time that a cell's grads take."""
    seconds = medians(found["seconds"])
    batches = cell_rows / found["rows"]
    audits = ROWS * seconds["a row alone"]
    audits += min(1.0, batches / BATCHES) * seconds["a batch's sum"]
    return audits / (batches * seconds["a batch"])


def report(name: str, found: dict) -> None:
    seconds = medians(found["seconds"])
    print(f"{name}, batches of {found['rows']}")
    print("  ".join(f"{way} {median * 1e3:.1f} ms" for way, median in seconds.items()))
    print("  ".join(f"cells of {rows}: {share(found, rows):.1%}" for rows in CELLS))


if __name__ == "__main__":
    main(sys.argv[1:] or tuple(CASES))
