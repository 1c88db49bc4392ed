"""The counterfactuals of a plan: models to retrain without the rows most helpful to targets."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from trak_dist.cells.score import keeps_top
from trak_dist.configuration.config import Counterfactuals
from trak_dist.errors import ConfigError
from trak_dist.plan import Plan
from trak_dist.problem import Problem


def with_counterfactuals(
    plan: Plan, problem: Problem, config: Counterfactuals, explicit_fields: Collection[str]
) -> Plan:
    """`plan` with the counterfactuals asked for.

    Parameters
    ----------
    explicit_fields : collection of str
        The fields of `config` that count; the others stay as they are.

    Raises
    ------
    ConfigError
        If models can't be retrained, or nothing would be left to train on.
    """
    planned = plan.counterfactuals
    requested = replace(planned, **{name: getattr(config, name) for name in explicit_fields})
    if requested.targets and problem.train_checkpoint is None:
        raise ConfigError(
            "the problem has no train_checkpoint to retrain models with",
            where="counterfactuals.targets",
            next="give it one",
        )
    if requested.targets and max(requested.remove) >= plan.train.rows:
        raise ConfigError(
            f"{max(requested.remove)} of {plan.train.rows} train rows can't be removed",
            where="counterfactuals.remove",
            next=f"counterfactuals.remove={max(1, plan.train.rows // 40)}",
        )
    for split in plan.targets if requested.targets else ():
        if keeps_top(plan, split.name) and max(requested.remove) > plan.spec.scores.count:
            raise ConfigError(
                f"the {max(requested.remove)} most helpful rows are to be removed, and of the "
                f"scores of {split.name!r} the {plan.spec.scores.count} highest are kept",
                where="counterfactuals.remove",
                next=f"scores.count={max(requested.remove)}, or scores.keep=all",
            )
    single_target_sets = [split.name for split in plan.targets if split.rows == 1]
    if requested.targets and single_target_sets:
        raise ConfigError(
            f"the target set {single_target_sets[0]!r} has one target, over which there is no "
            "interval",
            where="counterfactuals.targets",
            next="a run with targets=… that has more",
        )
    return replace(plan, counterfactuals=requested)
