"""`reduce.lambda_reg=auto`: the λ at which the run's own evaluation has the highest LDS.

Without a ground truth, where the curvature is `output`, an ensemble of `ENSEMBLE` checkpoints or
more gets twice the mean squared norm of its curvature rows, whatever the `proj_dim`: less than 0.01
of LDS below the best λ wherever that was measured (docs/evaluation.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trak_dist.cells import EvaluateCell
from trak_dist.configuration.config import Spec
from trak_dist.errors import EvaluationError
from trak_dist.plan import Plan
from trak_dist.store.results import Results
from trak_dist.store.run import Run

ENSEMBLE = 5  # checkpoints, for which the rule without an evaluation was measured


@dataclass(frozen=True)
class LambdaSelection:
    """λ as a multiple of the Gram's mean diagonal, and a sentence on how it was chosen."""

    lambda_reg: float
    why: str


def select_lambda(base: Run | None, spec: Spec, use: Sequence[int]) -> LambdaSelection:
    """The λ with the highest mean LDS over the target sets, or that of the rule above.

    Figures are in `report/<targets>.json` of the run, or of a member of its sweeps. An evaluation
    covers its own projection, curvature, kernel scale and ensemble, and the dimensions that fold
    from its own.

    Parameters
    ----------
    base : Run, optional
        The run.
    spec, use
        The settings and the ensemble (none named: all) that the λ is for.

    Raises
    ------
    EvaluationError
        If nothing is evaluated with these settings, and the rule does not hold for them.
    CorruptChunk
        If the figures are damaged.
    """
    if spec.reduce.lambda_unit != "mean_diagonal":
        raise EvaluationError(
            "auto chooses λ as a multiple of the Gram's mean diagonal",
            where="reduce.lambda_reg",
            next="reduce.lambda_unit=mean_diagonal",
        )
    for run_dir in base.layout.run_dirs() if base else ():
        if found := _best(Run.open(run_dir), spec, use):
            return found
    plan = base.plan.with_settings(spec, use) if base else None
    if plan and _rule_holds(plan):
        value = float(f"{2 * plan.proj_dim / plan.train.rows:.3g}")
        return LambdaSelection(
            value,
            f"λ = {value} of the mean diagonal, which is twice the mean squared norm of the "
            "weighted rows (there is no evaluation to choose it by)",
        )
    raise EvaluationError(
        "auto chooses λ from an evaluation against retrained models, and there is none yet of "
        f"{spec.projection.kind} to {spec.proj_dim}, checkpoints {list(use) or 'all'}",
        where="reduce.lambda_reg",
        next="first the same command with reduce.lambda_reg=1.0 ground_truth.subsets=100 "
        "ground_truth.seeds=3; on Slurm wait until it is done",
    )


def _rule_holds(plan: Plan) -> bool:
    evaluated = any(plan.has_ground_truth(split.name) for split in plan.targets)
    many = plan.ensemble_checkpoints >= ENSEMBLE
    return plan.curvature == "output" and many and not evaluated


def _best(run: Run, spec: Spec, use: Sequence[int]) -> LambdaSelection | None:
    plan = run.plan
    whole = tuple(use) or plan.all_model_ids
    same_settings = (
        plan.spec.projection == spec.projection
        and plan.spec.reduce.kernel_scale == spec.reduce.kernel_scale
        and plan.curvature_id == plan.with_settings(spec, use).curvature_id
        and plan.model_ids == whole
    )
    names = [s.name for s in plan.targets if plan.has_ground_truth(s.name)]
    done = run.receipts.done([EvaluateCell(name) for name in names])
    if not same_settings or not names or len(done) < len(names):
        return None
    dim = plan.proj_dim if spec.projection.kind == "identity" else spec.proj_dim
    found = [Results(run).evaluation(name) for name in names]
    means = [
        [one["mean"] for one in curve["by_lambda"]]
        for evaluation in found
        for curve in evaluation["curves"]
        if (curve["checkpoints"], curve["proj_dim"]) == (len(whole), dim)
    ]
    if not means:
        return None
    average = np.mean(means, axis=0)
    best = int(average.argmax())
    value = float(f"{found[0]['lambdas'][best]:.3g}")
    at_end = ", at the end of their range" if best in (0, len(average) - 1) else ""
    return LambdaSelection(
        value,
        f"λ = {value} of the mean diagonal, the best of {len(average)}{at_end} by the mean LDS of "
        f"{', '.join(names)}: {average[best]:.3f}",
    )
