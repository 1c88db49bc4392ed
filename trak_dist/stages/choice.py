"""`reduce.lambda_reg=auto`: the λ at which the run's own evaluation has the highest LDS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trak_dist.cells import EvaluateCell
from trak_dist.errors import EvaluationError
from trak_dist.store.results import Results
from trak_dist.store.run import Run

AUTO = "auto"


@dataclass(frozen=True)
class Choice:
    """λ as a multiple of the Gram's mean diagonal, and a sentence on how it was chosen."""

    lambda_reg: float
    why: str


def best_lambda(run: Run | None, wanted: Mapping[str, Any]) -> Choice:
    """The λ with the highest mean LDS over the target sets, from `report/<targets>.json`.

    Parameters
    ----------
    run : Run, optional
        The run whose evaluation is asked.
    wanted : mapping
        The settings that the λ is for: an evaluation knows those of its own projection and
        ensemble, and the dimensions that fold from its own.

    Raises
    ------
    EvaluationError
        If nothing is evaluated with these settings.
    CorruptChunk
        If the figures are damaged.
    """
    where = "reduce.lambda_reg"
    if wanted["reduce"]["lambda_unit"] != "mean_diagonal":
        raise EvaluationError(
            "auto chooses λ as a multiple of the Gram's mean diagonal",
            where=where,
            next="reduce.lambda_unit=mean_diagonal",
        )
    truths = [s.name for s in run.plan.targets if run.plan.has_truth(s.name)] if run else []
    done = run.receipts.done([EvaluateCell(name) for name in truths]) if run else {}
    if run is None or not done or len(done) < len(truths):
        raise EvaluationError(
            "auto chooses λ from an evaluation against retrained models, and there is none yet",
            where=where,
            next="-m reduce.lambda_reg=1.0,auto ground_truth.subsets=100 ground_truth.seeds=3 "
            "makes it first; on Slurm the same command again when it is done",
        )
    plan = run.plan
    use = sorted(wanted["checkpoints"]["use"]) or [c.model_id for c in plan.checkpoints]
    alike = (wanted["projection"], use) == (asdict(plan.spec.projection), list(plan.model_ids))
    found = [Results(run).evaluation(name) for name in truths]
    means = [
        [one["mean"] for one in curve["by_lambda"]]
        for evaluation in found
        for curve in evaluation["curves"]
        if (curve["checkpoints"], curve["proj_dim"]) == (len(use), wanted["proj_dim"])
    ]
    if not (alike and means):
        raise EvaluationError(
            f"the evaluation is of {plan.spec.projection.kind} to {plan.proj_dim}, checkpoints "
            f"{list(plan.model_ids)}; it tells nothing of {wanted['projection']['kind']} to "
            f"{wanted['proj_dim']}, checkpoints {use}",
            where=where,
            next="give a λ, and evaluate with these settings first",
        )
    average = np.mean(means, axis=0)
    best = int(average.argmax())
    value = float(f"{found[0]['lambdas'][best]:.3g}")
    return Choice(
        value,
        f"λ = {value} of the mean diagonal, the best of {len(average)} by the mean LDS of "
        f"{', '.join(truths)}: {average[best]:.3f}",
    )
