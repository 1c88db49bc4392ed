"""Whether a plan's curvature is one that its model output offers, and can be computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from trak_dist.checkpoints.featurizer import batch_in, model_in
from trak_dist.coordinates import TRAIN
from trak_dist.errors import ConfigError
from trak_dist.ops import curvature
from trak_dist.ops.batches import Batch
from trak_dist.plan import Plan
from trak_dist.planning import gradient_method
from trak_dist.planning.dry_run import first_batch
from trak_dist.problem import Problem

WHERE = "reduce.curvature"


def with_curvatures(plan: Plan, problem: Problem) -> Plan:
    """`plan` with the curvatures that the model output offers.

    Raises
    ------
    ConfigError
        If the one that is asked for is not offered.
    ProblemError
        If the model output's loss is not the one that it declares.
    """
    plan = replace(plan, curvatures=curvature.offered(problem.model_output))
    check_curvature(plan)
    if plan.curvature == "output":
        compute = plan.spec.featurize.compute
        batch = batch_in(compute, first_batch(problem, problem.train, name=TRAIN))
        model = model_in(compute, problem.model.eval())
        curvature.check_logistic(model, problem.model_output, batch)
    return plan


def check_fisher_rows(plan: Plan, problem: Problem, batches: Mapping[str, Batch]) -> None:
    """Raise `ConfigError` if the plan's gradient method can't compute Fisher rows.

    Parameters
    ----------
    batches : mapping
        Whole batches of train rows, by what they are of.
    """
    gradient_method.select_gradient_method(
        problem.model,
        curvature.LogLikelihood(cast(curvature.FisherModelOutput, problem.model_output)),
        batches,
        params=plan.spec.featurize.params,
        requested=plan.gradients,
    )


def check_curvature(plan: Plan) -> None:
    """Raise `ConfigError` if the curvature that is asked for can't be had, saying what can."""
    reduce, offered = plan.spec.reduce, plan.curvatures
    if reduce.curvature == "auto" and not offered:
        raise ConfigError(
            "auto is settled when a run is planned, and this one was planned by an earlier version",
            where=WHERE,
            next=f"{WHERE}=output for classification, or none",
        )
    if not offered and not plan.has_problem and plan.curvature != "none":
        raise ConfigError(
            f"{plan.curvature} is not known to suit the model output of this run, whose rows come "
            "from TRAKer",
            where=WHERE,
            next="TRAKer(…, curvature='output'), which checks it, or reduce.curvature=none",
        )
    if offered and plan.curvature not in offered:
        needed = {
            "output": "loss = 'logistic', where its loss is log(1 + exp(−f))",
            "fisher": "draw_labels and get_batch_log_likelihood",
        }[plan.curvature]
        raise ConfigError(
            f"{plan.curvature} is not offered by the model output, which has {', '.join(offered)}",
            where=WHERE,
            next=f"{WHERE}={offered[0]}, or a model output with {needed} (docs/your-problem.md)",
        )
    if plan.curvature == "fisher" and reduce.fisher_rows > plan.train.rows:
        raise ConfigError(
            f"labels of {reduce.fisher_rows} rows can't be drawn from {plan.train.rows} train rows",
            where="reduce.fisher_rows",
            next=f"reduce.fisher_rows={plan.train.rows}, or 0 for all",
        )
