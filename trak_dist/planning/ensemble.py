"""The ensemble of a plan: the checkpoints that scores are averaged over."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from trak_dist import commands
from trak_dist.cells import FeaturizeCell, FisherCell
from trak_dist.errors import ConfigError, MissingInputs
from trak_dist.plan import Plan
from trak_dist.store.receipts import Receipts
from trak_dist.store.run import Run


def check_ensemble(plan: Plan) -> None:
    """Raise `ConfigError` if the ensemble names a checkpoint twice, or one that is not there."""
    known = plan.all_model_ids
    bad = [f"{i} is unknown" for i in dict.fromkeys(plan.use) if i not in known]
    bad += [f"{i} is there {n} times" for i, n in Counter(plan.use).items() if n > 1]
    if bad:
        raise ConfigError(
            f"checkpoints.use={list(plan.use)} is no ensemble: {', '.join(bad)}",
            where="checkpoints.use",
            next=f"name each checkpoint once; there are 0 to {known[-1]}",
        )


def without_missing(run: Run, plan: Plan) -> Plan:
    """`plan` with only its featurized checkpoints as the ensemble.

    Raises
    ------
    MissingInputs
        If there are none.
    ConfigError
        If the run is a member of a sweep, whose name is that of its ensemble.
    """
    if run.layout.member:
        raise ConfigError(
            "a member of a sweep keeps its ensemble",
            where="checkpoints.allow_missing",
            next=f"the same with -m {commands.on(run.layout.base)}",
        )
    check_ensemble(plan)
    receipts, featurized = Receipts(run.layout, plan), []
    for model_id in plan.model_ids:
        splits = (plan.train, *plan.targets)
        grads = (c for s in splits for c in FeaturizeCell.of_split(plan, model_id, s.name))
        cells = [*grads, *FisherCell.of_checkpoint(plan, model_id)]
        if len(receipts.done(cells)) == len(cells):
            featurized.append(model_id)
    if not featurized:
        raise MissingInputs(
            f"checkpoints.allow_missing leaves no ensemble: none of the {len(plan.model_ids)} "
            "checkpoints is featurized",
            where=str(run.layout.run_dir),
            next=commands.launch(run.layout.run_dir, "stage=featurize"),
        )
    return plan if len(featurized) == len(plan.model_ids) else replace(plan, use=tuple(featurized))
