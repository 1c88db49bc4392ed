"""counterfactual: what a model says of a target after training without its most helpful rows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from trak_dist.cells import RANDOM, CounterfactualCell
from trak_dist.config import Counterfactuals
from trak_dist.errors import ConfigError
from trak_dist.ops import draws, lds
from trak_dist.plan import Plan
from trak_dist.problem import Problem
from trak_dist.runtime.inputs import require
from trak_dist.runtime.outcome import Outcome
from trak_dist.runtime.session import Session
from trak_dist.stages.train import SEEDS, fit, outputs_of
from trak_dist.store.results import Results
from trak_dist.store.run import Run


def with_counterfactuals(
    plan: Plan, problem: Problem, asked: Counterfactuals, given: Collection[str]
) -> Plan:
    """`plan` with the counterfactuals asked for.

    Parameters
    ----------
    given : collection of str
        The fields of `asked` that count; the others stay as they are.

    Raises
    ------
    ConfigError
        If models can't be retrained, or nothing would be left to train on.
    """
    there = plan.counterfactuals
    wanted = replace(there, **{name: getattr(asked, name) for name in given})
    if wanted.targets and problem.train_checkpoint is None:
        raise ConfigError(
            "the problem has no train_checkpoint to retrain models with",
            where="counterfactuals.targets",
            next="give it one",
        )
    if wanted.targets and max(wanted.remove) >= plan.train.rows:
        raise ConfigError(
            f"{max(wanted.remove)} of {plan.train.rows} train rows can't be removed",
            where="counterfactuals.remove",
            next=f"counterfactuals.remove={max(1, plan.train.rows // 40)}",
        )
    alone = [split.name for split in plan.targets if split.rows == 1]
    if wanted.targets and alone:
        raise ConfigError(
            f"the target set {alone[0]!r} has one target, over which there is no interval",
            where="counterfactuals.targets",
            next="a run with targets=… that has more",
        )
    return replace(plan, counterfactuals=wanted)


def counterfactual(session: Session, cell: CounterfactualCell) -> Outcome:
    """Train without `cell.removed` rows; the outputs on all targets, as a fact.

    Raises
    ------
    MissingInputs
        If scores are missing.
    ProblemError, CheckpointError, NonFiniteGradient
        If training fails, or its outputs are not finite.
    """
    run, plan = session.run, session.run.plan
    left = torch.ones(plan.train.rows, dtype=torch.bool)
    if cell.whose == RANDOM:
        left[draws.some_rows(cell.seed, plan.train.rows, cell.removed)] = False
    else:
        require(run, list(plan.score_cells(cell.targets)), needed_by=cell)
        (top,) = Results(run).top(cell.targets, [int(cell.whose)], cell.removed)
        left[torch.from_numpy(top.helpful)] = False
    seed = draws.stream_key("counterfactual", cell.seed) & SEEDS  # one for all that is compared
    state = fit(session, left.nonzero().flatten(), seed, where=cell.id)
    hint = "counterfactuals.targets=0 leaves these models out"
    found = outputs_of(session, state, cell.targets, where=cell.id, hint=hint)
    run.refuse_if_superseded(cell)
    return Outcome({}, {"outputs": found.tolist()})


def summary(run: Run, targets: str) -> list[dict[str, Any]]:
    """How far outputs drop, for each number of rows removed: with random rows less helpful ones.

    Means over seeds; the interval is over targets and seeds.
    """
    asked = run.plan.counterfactuals
    cells = list(run.plan.counterfactual_cells(targets))
    receipts = run.receipts.done(cells)
    looked_at = run.plan.split(targets).spread(asked.targets)
    outputs = {
        (c.whose, c.removed, c.seed): np.array(receipts[c].fact("outputs", list), dtype=np.float64)
        for c in cells
    }
    found = []
    for removed in sorted(asked.remove):
        seeds = range(asked.seeds)
        random = np.array([outputs[RANDOM, removed, s][looked_at] for s in seeds]).T
        helpful = np.array([[outputs[str(t), removed, s][t] for s in seeds] for t in looked_at])
        found.append(
            {
                "removed": removed,
                "targets": looked_at,
                "without_random": random.mean(axis=1).tolist(),
                "without_helpful": helpful.mean(axis=1).tolist(),
                "drop": asdict(lds.two_way_interval(random - helpful)),
            }
        )
    return found
