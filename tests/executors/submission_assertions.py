"""What the tests of submission say: what was told, what was submitted, what became of cells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from trak_dist.cells import Cell, parse_cell
from trak_dist.configuration.config import SlurmConfig
from trak_dist.store.jobs import JobRecord, JobRecords
from trak_dist.store.record import Failure, Receipt
from trak_dist.store.run import Run


class Ended(Protocol):
    """How a command ended."""

    code: int
    out: str
    err: str


def refuses(ended: Ended, error: str) -> None:
    """It ended as a mistake of the user's, with exactly these words."""
    assert ended.err == f"error: {error}\n"
    assert ended.code == 2


def table(ended: Ended) -> list[tuple[str, str, int, int, str]]:
    """Step, job, tasks, cells and dependency of each submitted array."""
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    begin = next((i for i, line in enumerate(lines, 1) if line.startswith("step ")), len(lines))
    rows = (line.split() for line in lines[begin:])
    return [
        (row[0], row[1], int(row[2]), int(row[3]), "".join(row[4:]))
        for row in rows
        if row[1:2] and row[1].isdecimal()
    ]


def told(ended: Ended) -> list[str]:
    """What a launch said after the plan and the table, but for what to type next."""
    assert ended.code == 0, ended.err
    lines = [line for line in ended.out.splitlines() if not line.startswith(("plan:", "step "))]
    arrays = {f"{step} {job}" for step, job, *_ in table(ended)}
    rest = [line for line in lines if " ".join(line.split()[:2]) not in arrays]
    return [line for line in rest if not line.startswith(("next: ", "from the plan: "))]


def opened(path: Path) -> Run:
    return Run.open(path / "run")


def records(path: Path) -> list[int]:
    """The numbers of the published jobs."""
    return JobRecords(opened(path)).numbers()


def cells_of(path: Path, number: int) -> list[str]:
    """The cells of a published job."""
    return [cell for task in JobRecords(opened(path)).read(number).tasks for cell in task]


def publish(
    run: Run,
    *tasks: Iterable[str],
    step: str = "featurize",
    device: str = "cpu",
    generation: int = 0,
    plan: str = "",
    **cluster: Any,
) -> int:
    """Write the record of an array, as if it was submitted; return its number."""
    job = JobRecord(
        launch="a launch",
        step=step,
        fingerprint=run.plan.fingerprint,
        device=device,
        tasks=tuple(tuple(task) for task in tasks),
        cluster=asdict(SlurmConfig(**cluster)),
        stages=("featurize",),
        generation=generation,
        plan=plan,
    )
    return JobRecords(run).publish(job)


def finish(run: Run, cells: Iterable[Cell | str]) -> None:
    """Make cells done, by their receipts alone."""
    for named in cells:
        cell = parse_cell(named) if isinstance(named, str) else named
        receipt = Receipt(cell=cell.id, key=cell.key(run.plan), fingerprint=run.plan.fingerprint)
        run.receipts.publish(cell, receipt)


def fail(run: Run, cell_id: str) -> None:
    """Let a cell's last attempt have failed."""
    cell = parse_cell(cell_id)
    key = cell.key(run.plan)
    failure = Failure(cell=cell_id, key=key, error="bad luck", traceback="", expected=True)
    run.receipts.fail(cell, failure)
