"""The LDS of simpler and of other scores beside TRAK's, for a finished run with a ground truth.

    python benchmarks/rivals.py RUN_DIR

Of the first 1, 2, … checkpoints of the ensemble, of each target set:

- TRAK: from the run's evaluation, at the λ that is best for other targets, at its `proj_dim`;
- dot product: mean of X Gᵀ, times mean Q, from the stored grads (at `store_dim`);
- cosine: the same with the rows of X and of G normalised, without Q (the cosine of the loss's
  gradients does not depend on it) and times mean Q;
- EK-FAC: the mean of `benchmarks/ekfac.py`, where kronfluence is installed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from trak_dist import open_run
from trak_dist.cells import FeaturizeCell
from trak_dist.coordinates import TRAIN
from trak_dist.evaluation.ground_truth import GroundTruthData, read_ground_truth
from trak_dist.ops import lds
from trak_dist.ops import rows as row_format
from trak_dist.ops.lds import Interval
from trak_dist.runtime.session import Session, open_device
from trak_dist.store import contents
from trak_dist.store.run import Run

Scores = NDArray[np.float64]  # (n_train, n_targets)


def stored(run: Run, model_id: int, split: str) -> tuple[Tensor, Tensor]:
    """X (rows, store_dim) and Q (rows,), float32, of one checkpoint and split."""
    cells = list(FeaturizeCell.of_split(run.plan, model_id, split))
    grads, scale, q = (
        torch.from_numpy(np.concatenate([contents.read(run, cell, name) for cell in cells]))
        for name in ("grads", "row_scale", "out_to_loss")
    )
    return row_format.decode(grads, scale), q


def similarities(run: Run, targets: str) -> Iterator[dict[str, Scores]]:
    """The scores by dot product and by cosine of the first 1, 2, … checkpoints."""
    dots, cosines, qs = [], [], []
    for model_id in run.plan.model_ids:
        x, q = stored(run, model_id, TRAIN)
        g, _ = stored(run, model_id, targets)
        dots.append((x @ g.T).double())
        cosines.append((F.normalize(x) @ F.normalize(g).T).double())
        qs.append(q.double())
        dot, cosine, mean_q = (torch.stack(one).mean(0) for one in (dots, cosines, qs))
        by_q = mean_q[:, None]
        yield {
            "dot product": (dot * by_q).numpy(),
            "cosine": cosine.numpy(),
            "cosine × Q": (cosine * by_q).numpy(),
        }


def ekfac(session: Session, targets: str) -> Iterator[dict[str, Scores]]:
    """The scores by EK-FAC of the first 1, 2, … checkpoints."""
    import ekfac as of_kronfluence

    found = []
    for model_id in session.run.plan.model_ids:
        found.append(of_kronfluence.scores(session, model_id, targets))
        yield {"EK-FAC": np.mean(found, axis=0)}


def lds_of(scores: Scores, truth: GroundTruthData) -> Interval:
    """The LDS over the targets whose outputs differ between subsets."""
    margins = truth.margins.mean(axis=1)
    informative = np.ptp(margins, axis=0) > 0
    predicted = truth.masks.astype(np.float64) @ scores
    return lds.interval(lds.spearman(predicted[:, informative], margins[:, informative]))


def main() -> None:
    run = Run.open(Path(sys.argv[1]))
    for split in run.plan.targets:
        truth = read_ground_truth(run, split.name)
        subsets, seeds, _ = truth.margins.shape
        print(f"{split.name}: LDS, {subsets} subsets × {seeds} models", flush=True)
        for curve in open_run(sys.argv[1]).evaluation(split.name)["curves"]:
            if curve["proj_dim"] == run.plan.proj_dim:
                report(f"TRAK, k {run.plan.proj_dim}", curve["checkpoints"], **curve["chosen"])
        for count, found in enumerate(similarities(run, split.name), 1):
            for name, scores in found.items():
                report(name, count, **vars(lds_of(scores, truth)))
        if importlib.util.find_spec("kronfluence"):
            session = Session(run, open_device("cpu"))
            for count, found in enumerate(ekfac(session, split.name), 1):
                report("EK-FAC", count, **vars(lds_of(found["EK-FAC"], truth)))


def report(name: str, checkpoints: int, mean: float, low: float, high: float) -> None:
    print(f"{name:<16}{checkpoints:>3} checkpoints  {Interval(mean, low, high)}", flush=True)


if __name__ == "__main__":
    main()
