"""The status for people: stages, the checkpoint × shard grid, what went wrong. Does no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak_dist.cells import Cell, FeaturizeCell
from trak_dist.listing import first_few
from trak_dist.status.state import MARKS, QUEUED, RUNNING, SHOWN, STATES, StageStatus, Status
from trak_dist.store.record import Failure

GRID_COLUMNS = 40
TRACEBACK_LINES = 12


def lines(status: Status) -> list[str]:
    """The report as text: stages, the checkpoint × shard grid, failures."""
    run = status.run
    found_lines = [f"run    {run.layout.run_dir}", f"plan   {run.plan.fingerprint}"]
    layout = run.layout
    members = status.members
    if layout.member:
        found_lines += [f"sweep  a member of the run {layout.base}"]
    elif members:
        named = first_few(members, SHOWN)
        found_lines += [f"sweep  {len(members)} members in {layout.sweeps}: {named}"]
    found_lines += [f"note   {status.note}"] if status.note else []
    heads = ("done", "total", "running", "queued", "failed", "missing", "rows/s", "left")
    found_lines += ["", f"{'stage':<10}" + "".join(f"{head:>9}" for head in heads)]
    for name, stage in status.stages.items():
        counts = (stage.done, stage.cells, stage.running, stage.queued, stage.failed, stage.missing)
        rate = stage.rows_per_second
        shown = [
            *(str(len(c)) for c in counts),
            f"{rate:,.0f}" if rate else "",
            _time_left(status, stage, rate),
        ]
        found_lines.append((f"{name:<10}" + "".join(f"{text:>9}" for text in shown)).rstrip())
    return [
        *found_lines,
        "",
        *_audits(status),
        *_grid(status),
        *_waiting(status),
        *_failures(status),
        *_vanished(status),
    ]


def _audits(status: Status) -> Iterator[str]:
    summary = status.stages["featurize"].audit_summary
    if summary:
        yield f"audit  {summary}"
    for model_id, why in status.audit_failures.items():
        yield f"audit  checkpoint {status.run.plan.named_model(model_id)} by loop, since {why}"


def _time_left(status: Status, stage: StageStatus, rate: float) -> str:
    """Time until what is running and queued is done, if as many tasks keep running as now."""
    cells = stage.states.where(RUNNING, QUEUED, kinds=stage.kinds)
    rows = cells.rows
    workers = status.queue.workers(cells)
    if not rate or not rows or not workers:
        return ""
    seconds = rows / rate / workers
    return f"{seconds / 60:,.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _grid(status: Status) -> Iterator[str]:
    plan, stage = status.run.plan, status.stages["featurize"]
    splits = (plan.train, *plan.targets)
    widths = {
        s.name: max(len(s.name), min(GRID_COLUMNS, -(-s.rows // s.cell_rows))) for s in splits
    }
    legend = "  ".join(f"{mark} {name}" for name, mark in reversed(MARKS.items()))
    yield "checkpoint  " + "  ".join(f"{s.name:<{widths[s.name]}}" for s in splits) + f"   {legend}"
    for model_id in plan.model_ids:
        series = (FeaturizeCell.blocks(plan, model_id, s.name) for s in splits)
        rows = (f"{_marks(stage.states.view(s)):<{widths[s.split.name]}}" for s in series)
        yield f"{plan.named_model(model_id):<12}" + "  ".join(rows).rstrip()


def _marks(states: NDArray[np.uint8]) -> str:
    columns, marks = min(GRID_COLUMNS, len(states)), dict(zip(STATES, MARKS.values(), strict=True))
    starts = [i * len(states) // columns for i in range(columns)]
    return "".join(marks[state] for state in np.minimum.reduceat(states, starts).tolist())


def _waiting(status: Status) -> Iterator[str]:
    reasons: dict[str, int] = {}
    for task, _ in status.queue.tasks:
        if not task.has_started:
            reasons[task.reason] = reasons.get(task.reason, 0) + 1
    if reasons:
        summary = ", ".join(f"{count} for {reason}" for reason, count in sorted(reasons.items()))
        yield ""
        yield f"tasks waiting in the queue: {summary}"


def by_error(failures: Mapping[Cell, Failure]) -> list[list[Cell]]:
    """Failed cells, those with the same error together, in the order of `failures`."""
    alike: dict[str, list[Cell]] = {}
    for cell, failure in failures.items():
        alike.setdefault(failure.error.split("\n")[0], []).append(cell)
    return list(alike.values())


def _failures(status: Status) -> Iterator[str]:
    failures = {c: f for s in status.stages.values() for c, f in s.failed.items()}
    alike = by_error(failures)
    for cells in alike[:SHOWN]:
        failure = failures[cells[0]]
        yield ""
        more = _and(cells[1:], "cells, with the same error")
        yield f"failed {cells[0].id}{more} {_origin(failure.job)}"
        yield _indent(failure.error)
        if not failure.expected:
            yield _indent("\n".join(failure.traceback.splitlines()[-TRACEBACK_LINES:]))
    others = sum(map(len, alike[SHOWN:]))
    if others:
        yield ""
        yield f"failed with other errors: {others} cells"


def _vanished(status: Status) -> Iterator[str]:
    for task in status.vanished[:SHOWN]:
        job = {"host": task.host, "job_id": task.job_id, "log": task.log}
        ended = "silently" if task.worker else "before its worker began"
        slurm_state = f"; Slurm says {task.state}" if task.state else ""
        yield ""
        what = "the job that was to submit " if task.submits else ""
        yield f"lost   {what}{task.cells[0].id}{_and(task.cells[1:], 'cells')} {_origin(job)}"
        yield f"  the task ended {ended}{slurm_state}"
        yield from (_indent(line) for line in task.end)
    if len(status.vanished) > SHOWN:
        yield ""
        yield f"lost as well: {len(status.vanished) - SHOWN} tasks"


def _and(others: Sequence[Cell], what: str) -> str:
    return f" and {len(others)} more {what}" if others else ""


def _origin(job: Mapping[str, Any]) -> str:
    """Where it ran: `on n2, job 12_3, attempt 2, log …`."""
    parts = [f"on {job.get('host', '?')}"]
    parts += [f"job {job['job_id']}"] if job.get("job_id") else []
    parts += [f"attempt {job['attempt']}"] if job.get("attempt", 1) != 1 else []
    parts += [f"log {job['log']}"] if job.get("log") else []
    return ", ".join(parts)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
