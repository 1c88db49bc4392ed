"""Refuses what no attempt could finish: a cell that takes longer than Slurm gives to a task."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice

from trak_dist.cells import KINDS, STAGE_STEPS, Cell, FeaturizeCell, FisherCell
from trak_dist.configuration.config import SlurmConfig
from trak_dist.errors import ConfigError
from trak_dist.executors import batch
from trak_dist.interface.cost import START_SECONDS, Rate, Trial, duration, measured_rates
from trak_dist.plan import Plan
from trak_dist.store.run import Run

# How many times the limit an estimate has to be for a refusal. Finished cells: nodes of one cluster
# seldom differ by 2. A trial: another processor, on which others may be at work, and a batch that
# may be smaller. What is refused wrongly can't be run; what is let through says so itself, later.
MARGINS = {"receipts": 2, "trial": 4}
SAMPLE = 200  # finished cells of each kind that are looked at


def check_time(
    plan: Plan, run: Run | None, stages: Iterable[str], cluster: SlurmConfig, trial: Trial
) -> None:
    """Raise `ConfigError` if a cell would take longer than a task may, by a rate that was measured.

    Each attempt at it would be ended amid it. What was measured on a CPU says nothing of a GPU,
    nor the other way round.
    """
    steps = [step for stage in stages for step in STAGE_STEPS[stage]]
    kinds = [kind for kind in KINDS if kind.step in steps and kind.count(plan)]
    some = [cell for kind in kinds for cell in islice(kind.of(plan), SAMPLE)]
    done = run.receipts.done(some) if run else {}
    measured = measured_rates(plan, done)
    for kind in kinds:
        on_gpu = kind.gpu and batch.gpus(cluster, kind.step) > 0
        rate = measured.get(kind) or (None if on_gpu else _by_trial(plan, kind, trial))
        if rate is None or (rate.device == "cpu") == on_gpu:
            continue
        cells = list(kind.one_per_array(plan)) or list(islice(kind.of(plan), SAMPLE))
        largest = max(cells, key=lambda cell: cell.work(plan))
        seconds = largest.work(plan) / rate.per_second
        # The worker finishes a cell after the notice if that takes half of the time that is left.
        limit = 60 * cluster.time - START_SECONDS - cluster.signal_delay / 2
        if seconds > MARGINS[rate.origin] * limit:
            raise ConfigError(
                f"{largest.id} would take about {duration(seconds)}, by {rate.text}; "
                f"cluster.time is {cluster.time} minutes: no attempt would finish it",
                where="cluster.time",
                next=_mend(plan, cluster, largest, rate),
            )


def _by_trial(plan: Plan, kind: type[Cell], trial: Trial) -> Rate | None:
    """For kinds that compute gradients; a forward pass alone is faster than a trial says."""
    if kind not in (FeaturizeCell, FisherCell) or not plan.has_problem:
        return None
    rate = trial()
    return Rate(rate, "trial", f"a trial on this CPU, {rate:,.3g} rows/s")


def _mend(plan: Plan, cluster: SlurmConfig, cell: Cell, rate: Rate) -> str:
    seconds = cell.work(plan) / rate.per_second
    minutes = math.ceil((1.5 * seconds + START_SECONDS + cluster.signal_delay) / 60)
    smaller = type(cell).if_too_long
    if isinstance(cell, FeaturizeCell | FisherCell):
        batch_rows = plan.spec.featurize.batch_rows
        rows = int(rate.per_second * 60 * cluster.time / 2) // batch_rows * batch_rows
        smaller = f"featurize.cell_rows={rows} in a new run" if rows else ""
    return f"cluster.time={minutes}" + (f", or {smaller}" if smaller else "")
