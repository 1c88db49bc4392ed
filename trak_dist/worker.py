"""Run cells: what every job does, on any executor.

A job receives a run directory, the fingerprint it was made for, and cell ids. For each cell that is
not done it runs the stage, then publishes the receipt; a failure is recorded and the next cell
tried, unless the failure affects every cell.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import platform
import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trak_dist import graph, machine
from trak_dist.cells import Cell, FeaturizeCell, FisherCell, parse_cell
from trak_dist.errors import (
    DatasetError,
    DeviceError,
    MissingInputs,
    PlanMismatch,
    ProblemError,
    StoreError,
    TrakDistError,
)
from trak_dist.ops import numerics
from trak_dist.runtime.cell_result import CellResult
from trak_dist.runtime.inputs import require
from trak_dist.runtime.session import Session, Sessions
from trak_dist.store.record import Failure
from trak_dist.store.run import Run

log = logging.getLogger(__name__)

STOPS_WORKER = (DatasetError, DeviceError, PlanMismatch, ProblemError, StoreError)


def run_cells(  # noqa: PLR0913, PLR0917
    run_dir: str,
    fingerprint: str,
    device: str,
    cell_ids: Sequence[str],
    should_stop: Callable[[], bool] = lambda: False,
    retry_delays: Sequence[float] = (),
    sessions: Sessions | None = None,
) -> bool:
    """Run those of `cell_ids` that are not done; whether all are done in the end.

    The result of each is in the run directory.

    Parameters
    ----------
    should_stop : callable
        Called before each cell; once it returns True, no further cell is started.
    retry_delays : sequence of float
        Seconds to wait before each further look for missing receipts, from the last finished cell
        on: another node may have published what this one does not see yet. A cell whose inputs
        are not seen in the end has failed, unless one of them has.
    sessions : Sessions, optional
        Of a caller who runs several jobs in this process, which share problem and model.

    Raises
    ------
    PlanMismatch
        If the run's plan has another fingerprint.
    """
    run = Run.open(Path(run_dir))
    if run.plan.fingerprint != fingerprint:
        raise PlanMismatch(
            f"this job was made for fingerprint {fingerprint}, the plan has {run.plan.fingerprint}",
            where=str(run.layout.plan),
            next="run the launch command again",
        )
    sessions = sessions or Sessions()
    session = sessions.open(run, device)
    cells = [parse_cell(cell_id) for cell_id in cell_ids]
    done = run.receipts.done(cells)
    log.info("%d cells, %d of them done before", len(cells), len(done))
    finished, delays = len(done), iter(retry_delays)
    for cell in cells:
        if cell in done:
            continue
        if should_stop():
            return False
        try:
            _run_when_inputs_visible(session, cell, should_stop, delays)
            finished += 1
            delays = iter(retry_delays)
        except MissingInputs as error:
            log.warning("%s: not run: %s", cell.id, error.what)
            if retry_delays and not (should_stop() or _has_failed_dependency(run, cell)):
                _record_failure(session, cell, error)
        # The boundary of a cell: the failure is recorded, for launch and status.
        except (Exception, SystemExit) as error:
            expected = isinstance(error, TrakDistError)
            first, *_ = str(error).splitlines() or [type(error).__name__]
            log.error("%s: failed: %s", cell.id, first, exc_info=None if expected else error)  # noqa: TRY400
            _record_failure(session, cell, error)
            if isinstance(error, STOPS_WORKER):
                return False
    if session.revoked_cells:
        session.revoked_cells = False
        return run_cells(
            run_dir, fingerprint, device, cell_ids, should_stop, retry_delays, sessions
        )
    return finished == len(cells)


def _run_when_inputs_visible(
    session: Session, cell: Cell, should_stop: Callable[[], bool], delays: Iterator[float]
) -> None:
    waited = 0.0
    while True:
        try:
            return _run_cell(session, cell)
        except MissingInputs as error:
            give_up = should_stop() or _has_failed_dependency(session.run, cell)
            delay = None if give_up else next(delays, None)
            if delay is None:
                again = f"after retrying for {waited:.0f} s, " if waited else ""
                raise MissingInputs(
                    again + error.what, where=error.where, next=error.next
                ) from None
            if not waited:
                log.info("%s: %s; retrying, since other nodes may see more", cell.id, error.what)
            time.sleep(delay)
            waited += delay


def _has_failed_dependency(run: Run, cell: Cell) -> bool:
    """Whether a dependency of `cell`, direct or not, has a recorded failure."""
    plan = run.plan
    done = run.progress().done
    return bool(run.receipts.failures(graph.upstream(plan, [cell], done).difference(done)))


def _run_cell(session: Session, cell: Cell) -> None:
    run = session.run
    _fix_numerics(session, cell)
    streamed = isinstance(cell, FeaturizeCell) and run.plan.split(cell.split).streamed
    if isinstance(cell, FeaturizeCell | FisherCell) and not streamed:
        require(run, list(cell.dependencies(run.plan, ())), needed_by=cell)
        # not timed: data shards are sized by rows per second
        session.featurizer(cell.model_id)
        _fix_numerics(session, cell)  # again: a problem's file may change torch's global settings
    started, clock = time.time(), time.perf_counter()
    module, name = cell.run.split(":")  # imported here, so that a score job loads no matplotlib
    stage: Callable[[Session, Cell], CellResult] = getattr(importlib.import_module(module), name)
    result = stage(session, cell)
    seconds = time.perf_counter() - clock  # a monotonic clock
    job = {**_job(session, cell), "started": started, "seconds": round(seconds, 3)}
    run.publish(cell, result.digests, facts=result.facts, job=job)
    rows = result.facts.get("rows")
    rate = f", {rows} rows, {rows / seconds:,.0f} rows/s" if rows else ""
    log.info("%s: done in %.1f s%s", cell.id, seconds, rate)


@contextlib.contextmanager
def cell_numerics(device: torch.device) -> Iterator[None]:
    """Compute as a cell does, and restore random states, threads and flags afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), numerics.preserve():
        threads = torch.get_num_threads()
        states = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            numerics.fix(device)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_num_threads(threads)


def _fix_numerics(session: Session, cell: Cell) -> None:
    """Set everything that could change bits from one executor to another."""
    # For a train_checkpoint or a model output that draws numbers and does not seed them itself.
    seed = int(cell.key(session.run.plan)[:8], 16)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    torch.set_num_threads(cell.threads(session.run.plan))
    numerics.fix(session.device)


def _job(session: Session, cell: Cell) -> dict[str, Any]:
    failed = session.run.receipts.failure(cell)
    before = failed.job.get("attempt", 0) if failed else 0
    device = session.device
    return {
        "attempt": 1 + before if isinstance(before, int) else 1,
        **machine.process(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        **_versions(),
    }


@functools.cache  # reading them takes as long as a small cell
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("trak_dist", "torch", "numpy", "zarr")}


def _record_failure(session: Session, cell: Cell, error: Exception | SystemExit) -> None:
    expected = isinstance(error, TrakDistError)
    failure = Failure(
        cell=cell.id,
        key=cell.key(session.run.plan),
        error=str(error) if expected else f"{type(error).__name__}: {error}",
        error_class=type(error).__name__,
        traceback="".join(traceback.format_exception(error)),
        expected=expected,
        job=_job(session, cell),
    )
    with contextlib.suppress(StoreError):  # a full disk: the log must do
        session.run.receipts.fail(cell, failure)
