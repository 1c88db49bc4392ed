"""Self-influence of the train rows: how far each one's prediction rests on itself.

Koh & Liang 2017, "Understanding Black-box Predictions via Influence Functions", section 5.4: those
with the largest are the ones to look at first for wrong labels.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak_dist.cells import TRAIN, Cell
from trak_dist.errors import ProblemError
from trak_dist.ops import ranking
from trak_dist.stages.session import Session
from trak_dist.store import contents
from trak_dist.store.results import Results

LISTED = 100


def summary(session: Session) -> dict[str, Any]:
    """What `report/train.json` says: the rows with the largest, and whether they are mislabelled.

    Raises
    ------
    ProblemError
        If the problem's `mislabelled` does not fit its train set.
    """
    influence = Results(session.run).self_influence()
    largest = np.argsort(-influence, kind="stable")[:LISTED]
    found: dict[str, Any] = {
        "largest": [{"row": int(row), "self_influence": float(influence[row])} for row in largest]
    }
    wrong = session.problem.mislabelled
    if wrong is not None:
        flags = np.asarray(wrong)[: len(influence)]
        if flags.shape != influence.shape or not 0 < flags.sum() < len(flags):
            raise ProblemError(
                f"mislabelled has {len(wrong)} flags, {int(flags.sum())} of them set, for "
                f"{len(influence)} train rows",
                where="problem.mislabelled",
                next="a flag for each train row, some but not all of them set; or None",
            )
        first = ranking.first_found(influence, flags.astype(bool))
        found["mislabelled"] = {
            "rows": int(flags.sum()),
            "auc": asdict(ranking.auc(influence, flags.astype(bool))),
            # The plainest other ranking: the ensemble's mean 1 − p, or whatever −∂loss/∂f is.
            "auc_of_out_to_loss": asdict(ranking.auc(_out_to_loss(session), flags.astype(bool))),
            "found_by_share": first,
        }
    return found


def _out_to_loss(session: Session) -> NDArray[np.float64]:
    run = session.run
    total = np.zeros(run.plan.train.rows)
    for model_id in run.plan.model_ids:
        cells: list[Cell] = [*run.plan.featurize_cells(model_id, TRAIN)]
        total += np.concatenate([contents.read(run, c, "out_to_loss") for c in cells])
    return np.asarray(total / len(run.plan.model_ids))
