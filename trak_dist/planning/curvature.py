"""Whether a plan's curvature is one that its model output offers, and can be computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch

from trak_dist.checkpoints.featurizer import batch_in, model_in
from trak_dist.coordinates import TRAIN
from trak_dist.errors import ConfigError, ProblemError
from trak_dist.ops import curvature
from trak_dist.ops.batches import Batch, clone_batch, examples_in
from trak_dist.ops.model_outputs import prepared
from trak_dist.plan import Plan
from trak_dist.planning import gradient_method
from trak_dist.planning.dry_run import first_batch
from trak_dist.problem import Problem, user_code_errors

WHERE = "reduce.curvature"


def with_curvatures(plan: Plan, problem: Problem) -> Plan:
    """`plan` with the curvatures that the model output offers, if it does not say.

    Raises
    ------
    ConfigError
        If the one that is asked for is not offered.
    ProblemError
        If the model output's loss is not the one that it declares.
    """
    if not plan.curvatures:
        plan = replace(plan, curvatures=curvature.offered(problem.model_output))
    check_curvature(plan)
    if plan.curvature == "output":
        compute = plan.spec.featurize.compute
        batch = batch_in(compute, first_batch(problem, problem.train, name=TRAIN))
        model = model_in(compute, problem.model.eval())
        curvature.check_logistic(model, problem.model_output, batch)
    return plan


def check_fisher_rows(plan: Plan, problem: Problem, batches: Mapping[str, Batch]) -> None:
    """Draw labels, and try the plan's gradient method on their log-likelihood.

    Parameters
    ----------
    batches : mapping
        Whole batches of train rows, by what they are of.

    Raises
    ------
    ConfigError
        If the method can't compute it.
    ProblemError
        If labels can't be drawn, or not one batch of them for a batch.
    """
    output = cast(curvature.FisherModelOutput, problem.model_output)
    model, drawn = problem.model.eval(), {}
    state = dict(model.named_parameters()), dict(model.named_buffers())
    for name, batch in batches.items():
        size = examples_in(batch)
        uniform = curvature.uniform_of_rows(range(size), 0, torch.device("cpu"))
        where = f"draw_labels of {type(output).__qualname__}, of examples of {name}"
        with user_code_errors(where), torch.no_grad():
            found = tuple(
                prepared(output, model).draw_labels(model, *state, clone_batch(batch), uniform)
            )
        if examples_in(found) != size:
            raise ProblemError(
                f"a batch of {size} examples came back with {examples_in(found)}",
                where=where,
                next="draw_labels must give the batch that it got, with other labels",
            )
        drawn[name] = found
    gradient_method.select_gradient_method(
        problem.model,
        curvature.LogLikelihood(output),
        drawn,
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
            f"from {plan.rows_from}",
            where=WHERE,
            next="TRAKer(…, curvature='output'), which checks it, or reduce.curvature=none"
            if plan.rows_from == "TRAKer"
            else "reduce.curvature=none",
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
