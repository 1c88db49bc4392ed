"""The ground truth of a plan: models to retrain on subsets, or files of the user's."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from trak_dist.configuration.config import GroundTruth
from trak_dist.errors import ConfigError, PlanMismatch
from trak_dist.evaluation.ground_truth import import_ground_truth
from trak_dist.plan import Plan
from trak_dist.plan_inputs import ImportedTruth
from trak_dist.problem import Problem


def with_ground_truth(
    plan: Plan,
    problem: Problem,
    config: GroundTruth,
    explicit_fields: Collection[str],
    *,
    others: Collection[GroundTruth] = (),
    notify: Callable[[str], None],
) -> Plan:
    """`plan` with the ground truth asked for; of one that is there more or fewer models count.

    Parameters
    ----------
    explicit_fields : collection of str
        The fields of `config` that count; the others stay as they are.
    others : collection of GroundTruth
        Those of the other members of its sweep, which share the models.

    Raises
    ------
    PlanMismatch
        If it has another one.
    ConfigError
        If models can't be retrained, or a subset would be empty or all.
    EvaluationError
        If the imported files do not fit.
    """
    planned = plan.ground_truth
    requested = replace(planned, **{name: getattr(config, name) for name in explicit_fields})
    if requested.masks:
        masks, margins = (str(Path(p).absolute()) for p in (requested.masks, requested.margins))
        requested = replace(requested, masks=masks, margins=margins)
    for known in (planned, *others):  # of one run and its members: their models are the same files
        alike = (requested.alpha, requested.masks) == (known.alpha, known.masks)
        if requested.subsets and (requested.masks or (known.subsets and not alike)):
            raise PlanMismatch(
                f"the run has another ground truth: {known.subsets} subsets, {known.seeds} seeds, "
                f"alpha {known.alpha}, masks {known.masks!r}",
                where="ground_truth",
                next=f"ground_truth.alpha={known.alpha} and no masks, or use another run_dir",
            )
    if requested.subsets and problem.train_checkpoint is None:
        raise ConfigError(
            "the problem has no train_checkpoint to retrain models with",
            where="ground_truth.subsets",
            next="give it one, or set ground_truth.masks and ground_truth.margins",
        )
    if requested.subsets and not 0 < round(requested.alpha * plan.train.rows) < plan.train.rows:
        raise ConfigError(
            f"a share of {requested.alpha} of {plan.train.rows} train rows is none or all of them",
            where="ground_truth.alpha",
            next="ground_truth.alpha=0.5",
        )
    if not requested.masks:
        return replace(plan, ground_truth=requested, imported_truth=None)
    rows = {split.name: split.rows for split in plan.targets}
    found = import_ground_truth(requested, plan.train.rows, rows, notify=notify)
    imported = ImportedTruth(found.digest, found.targets)
    return replace(plan, ground_truth=requested, imported_truth=imported)
