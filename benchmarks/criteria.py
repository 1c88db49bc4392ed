"""Can λ be chosen without retraining? Candidates beside the LDS, for a run with a ground truth.

    python benchmarks/criteria.py RUN_DIR

For each λ of the evaluation: the LDS of the ensemble, and the mean over checkpoints of the squared
leave-one-out residuals of the ridge regression on X of Q (out-to-loss) and of the margins f, each
relative to the mean square of what is regressed. A criterion is of use if its minimum is near the
LDS's maximum.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from trak_dist.cells import EvaluateCell, FeaturizeCell
from trak_dist.coordinates import TRAIN
from trak_dist.runtime.inputs import read_grads
from trak_dist.runtime.session import Session
from trak_dist.store import contents
from trak_dist.store.run import Run


def residual(x: torch.Tensor, y: torch.Tensor, lambdas: list[float]) -> list[float]:
    """Mean squared leave-one-out residual of y on x (rows, k) for each λ / mean diagonal."""
    values, vectors = torch.linalg.eigh(x.T @ x)
    rotated = x @ vectors
    found = []
    for relative in lambdas:
        inverse = 1 / (values.clamp_min(0) + relative * values.mean())
        leverage = (rotated.square() * inverse).sum(1)
        left_out = (y - rotated @ (inverse * (rotated.T @ y))) / (1 - leverage)
        found.append(float(left_out.square().mean() / y.square().mean()))
    return found


def main() -> None:
    run = Run.open(Path(sys.argv[1]))
    session = Session(run, torch.device("cpu"))
    plan = run.plan
    evaluation = json.loads(
        run.layout.file(EvaluateCell(plan.targets[0].name), "figures").read_bytes()
    )
    lambdas = evaluation["lambdas"]
    of_q, of_f = [], []
    for model_id in plan.model_ids:
        cells = list(FeaturizeCell.of_split(plan, model_id, TRAIN))
        x = torch.cat([read_grads(session, cell) for cell in cells]).double()
        q = torch.from_numpy(
            np.concatenate([contents.read(run, cell, "out_to_loss") for cell in cells])
        ).double()
        of_q.append(residual(x, q, lambdas))
        of_f.append(residual(x, -torch.logit(q, eps=1e-12), lambdas))
    members = len(plan.model_ids)
    lds = next(
        [one["mean"] for one in curve["by_lambda"]]
        for curve in evaluation["curves"]
        if (curve["checkpoints"], curve["proj_dim"]) == (members, plan.proj_dim)
    )
    print(f"{'λ':>10}{'LDS':>8}{'of Q':>9}{'of f':>9}")
    columns = (lambdas, lds, np.mean(of_q, axis=0), np.mean(of_f, axis=0))
    for relative, score, q_error, f_error in zip(*columns, strict=True):
        print(f"{relative:>10.4f}{score:>8.3f}{q_error:>9.4f}{f_error:>9.4f}")


if __name__ == "__main__":
    main()
