"""Self-influence of the train rows: how far each one's prediction rests on itself.

Those with the largest are the ones to look at first for wrong labels (the idea is Koh & Liang's,
2017, "Understanding Black-box Predictions via Influence Functions", section 5.4, with the influence
on an example's own loss; here it is its score, so it has the sign of Q: what counts is its size).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak_dist.cells import Cell, FeaturizeCell
from trak_dist.coordinates import TRAIN
from trak_dist.ops import ranking
from trak_dist.runtime.session import Session
from trak_dist.store import contents
from trak_dist.store.results import Results

LISTED = 100


def summary(session: Session) -> dict[str, Any]:
    """What `report/train.json` says: the rows with the largest, and how many are mislabelled."""
    influence = Results(session.run).self_influence()
    size = np.abs(influence)
    largest = np.argsort(-size, kind="stable")[:LISTED]
    found: dict[str, Any] = {
        "largest": [{"row": int(row), "self_influence": float(influence[row])} for row in largest]
    }
    wrong = session.problem.mislabelled
    flags = np.asarray([] if wrong is None else wrong, dtype=bool)[: len(influence)]
    if 0 < flags.sum() < len(flags):  # a `limit` may have left none
        found["mislabelled"] = {
            "rows": int(flags.sum()),
            "auc": asdict(ranking.auc(size, flags)),
            # The plainest other ranking: the ensemble's mean 1 − p, or whatever −∂loss/∂f is.
            "auc_of_out_to_loss": asdict(ranking.auc(np.abs(_out_to_loss(session)), flags)),
            "found_by_share": ranking.first_found(size, flags),
        }
    return found


def _out_to_loss(session: Session) -> NDArray[np.float64]:
    run = session.run
    total = np.zeros(run.plan.train.rows)
    for model_id in run.plan.model_ids:
        cells: list[Cell] = [*FeaturizeCell.of_split(run.plan, model_id, TRAIN)]
        total += np.concatenate([contents.read(run, c, "out_to_loss") for c in cells])
    return np.asarray(total / len(run.plan.model_ids))
