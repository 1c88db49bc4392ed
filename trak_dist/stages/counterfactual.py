"""counterfactual: the output for a target after training without its most helpful rows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from trak_dist.cells import CounterfactualCell, scored_by
from trak_dist.coordinates import AtRandom, HelpfulTo
from trak_dist.ops import draws, lds
from trak_dist.runtime.cell_result import CellResult
from trak_dist.runtime.inputs import require
from trak_dist.runtime.session import Session
from trak_dist.spacing import evenly_spaced
from trak_dist.stages.train import SEEDS, fit, outputs_of
from trak_dist.store.results import Results
from trak_dist.store.run import Run


def counterfactual(session: Session, cell: CounterfactualCell) -> CellResult:
    """Train without `cell.removed` rows; the outputs on all targets, as a fact.

    Raises
    ------
    MissingInputs
        If scores are missing.
    ProblemError, CheckpointError, NonFiniteGradient
        If training fails, or its outputs are not finite.
    """
    run, plan = session.run, session.run.plan
    remaining = torch.ones(plan.train.rows, dtype=torch.bool)
    match cell.selection:
        case AtRandom():
            remaining[draws.some_rows(cell.seed, plan.train.rows, cell.removed)] = False
        case HelpfulTo(target):
            require(run, list(scored_by(plan, cell.targets)), needed_by=cell)
            (top,) = Results(run).top(cell.targets, [target], cell.removed)
            remaining[torch.from_numpy(top.helpful)] = False
    seed = draws.stream_key("counterfactual", cell.seed) & SEEDS  # one for all that is compared
    state = fit(session, remaining.nonzero().flatten(), seed, where=cell.id)
    hint = "counterfactuals.targets=0 leaves these models out"
    found = outputs_of(session, state, cell.targets, where=cell.id, hint=hint)
    run.check_not_superseded(cell)
    return CellResult({}, {"outputs": found.tolist()})


def summary(run: Run, targets: str) -> list[dict[str, Any]]:
    """How far outputs drop, for each number of rows removed: with random rows less helpful ones.

    Means over seeds; the interval is over targets and seeds.
    """
    config = run.plan.counterfactuals
    cells = list(CounterfactualCell.of_targets(run.plan, targets))
    receipts = run.receipts.done(cells)
    target_rows = evenly_spaced(run.plan.split(targets).rows, config.targets)
    outputs = {
        (c.selection, c.removed, c.seed): np.array(
            receipts[c].fact("outputs", list), dtype=np.float64
        )
        for c in cells
    }
    found = []
    for removed in sorted(config.remove):
        seeds = range(config.seeds)
        random = np.array([outputs[AtRandom(), removed, s][target_rows] for s in seeds]).T
        helpful = np.array(
            [[outputs[HelpfulTo(t), removed, s][t] for s in seeds] for t in target_rows]
        )
        found.append(
            {
                "removed": removed,
                "targets": target_rows,
                "without_random": random.mean(axis=1).tolist(),
                "without_helpful": helpful.mean(axis=1).tolist(),
                "drop": asdict(lds.two_way_interval(random - helpful)),
            }
        )
    return found
