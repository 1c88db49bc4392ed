"""evaluate: compare the scores with a ground truth."""

from __future__ import annotations

import json
from typing import Any

from trak_dist.cells import CounterfactualCell, EvaluateCell, FeaturizeCell, scored_by
from trak_dist.coordinates import TRAIN
from trak_dist.evaluation import self_influence
from trak_dist.evaluation.datamodeling import datamodeling_scores
from trak_dist.hashing import digest_of
from trak_dist.runtime.cell_result import CellResult
from trak_dist.runtime.inputs import require
from trak_dist.runtime.session import Session
from trak_dist.stages import counterfactual
from trak_dist.store import atomic

# in the receipt too
RECEIPT_FACTS = ("lds", "left_out", "chosen", "counterfactuals", "mislabelled")


def evaluate(session: Session, cell: EvaluateCell) -> CellResult:
    """Write `report/<targets>.json`.

    Raises
    ------
    MissingInputs
        If scores, grads, margins or retrained models are missing.
    EvaluationError
        If the ground truth can't be used.
    """
    run, plan = session.run, session.run.plan
    require(run, list(scored_by(plan, cell.targets)), needed_by=cell)
    found: dict[str, Any] = {"targets": cell.targets, "model_ids": list(plan.model_ids)}
    if cell.targets == TRAIN:
        grads = [c for m in plan.model_ids for c in FeaturizeCell.of_split(plan, m, TRAIN)]
        require(run, grads, needed_by=cell)
        found |= self_influence.summary(session)
    if plan.has_ground_truth(cell.targets):
        found |= datamodeling_scores(session, cell)
    if cell.targets != TRAIN and plan.counterfactuals.targets:
        require(run, list(CounterfactualCell.of_targets(plan, cell.targets)), needed_by=cell)
        found["counterfactuals"] = counterfactual.summary(run, cell.targets)
    text = json.dumps(found, indent=1, allow_nan=False).encode()
    run.check_not_superseded(cell)
    atomic.write(run.layout.file(cell, "figures"), text)
    facts = {name: found[name] for name in RECEIPT_FACTS if name in found}
    return CellResult({"figures": digest_of(text)}, facts)
