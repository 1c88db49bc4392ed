"""The console: all that the command line prints. Nothing else in the package prints."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from trak_dist import commands
from trak_dist.cells import ReportCell, scored_by
from trak_dist.errors import TrakDistError
from trak_dist.evaluation import quality
from trak_dist.interface.cost import Cost
from trak_dist.interface.execution import Outcome
from trak_dist.interface.progress import Progress
from trak_dist.interface.summary import description
from trak_dist.listing import first_few
from trak_dist.status.state import Status, read_status
from trak_dist.status.text import by_error, lines
from trak_dist.store.run import Run

if TYPE_CHECKING:
    from trak_dist.executors.submission import SubmissionResult
    from trak_dist.status.verify import Verification

WATCH_SECONDS = 5.0
LINE_SECONDS = 10.0  # between two lines of progress, where there is no terminal
out = Console(soft_wrap=True, highlight=False, markup=False)


def plain(text: str) -> str:
    """`text` for a terminal: no control character of a run directory reaches it."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def note(text: str) -> None:
    """Print what was found worth saying."""
    out.print(plain(text))


def error(found: TrakDistError) -> None:
    """Print an error."""
    print(plain(f"error: {found}"), file=sys.stderr)


def unforeseen() -> None:
    """Print the current exception with its traceback: a bug here or in the problem."""
    traceback.print_exc(file=sys.stderr)


def interrupted() -> None:
    """Print that the user ended the command."""
    print("interrupted; finished cells are kept: the same command resumes the run", file=sys.stderr)


def planned(run: Run) -> None:
    """Print what the run is, in one line."""
    out.print(f"plan: {description(run)}, in {run.layout.run_dir}")


def cost(found: Cost) -> None:
    """Print what a run will cost."""
    out.print(str(found))


class ProgressDisplay:
    """A live line on a terminal, plain lines elsewhere."""

    def __init__(self, *, live: bool) -> None:
        self._live = live and out.is_terminal
        self._bar: Bar | None = None
        self._next_line = 0.0

    def __call__(self, progress: Progress) -> None:
        """Show the progress of a step."""
        if self._live:
            self._show(progress)
        elif progress.finished or time.monotonic() >= self._next_line:
            self._next_line = 0.0 if progress.finished else time.monotonic() + LINE_SECONDS
            out.print(str(progress))

    def _show(self, progress: Progress) -> None:
        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[more]}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=out)
            self._bar.add_task(progress.step, total=progress.total, more="")
            self._bar.start()
        more = [f"{progress.rows_per_second:,.0f} rows/s"] if progress.rows_per_second else []
        more += [f"{progress.failed} failed"] if progress.failed else []
        task = self._bar.task_ids[0]
        self._bar.update(task, completed=progress.done, more=", ".join(more))
        if progress.finished:
            self._bar.stop()
            self._bar = None


def failures(outcome: Outcome) -> None:
    """Print which cells are not done, and why."""
    missing = len(outcome.failed) + len(outcome.not_run)
    what = f"error: {outcome.stage}: {missing} of {outcome.cells} cells are not done"
    print(what, file=sys.stderr)
    for cells_alike in by_error(outcome.failed):
        first = outcome.failed[cells_alike[0]]
        text = first.error if first.expected else first.traceback
        log = f" (log: {first.job['log']})" if first.job.get("log") else ""
        others = len(cells_alike) - 1
        more = f", and {others} more with the same error" if others else ""
        print(plain(f"\n{first.cell}{more}{log}:\n{text.rstrip()}"), file=sys.stderr)
    if outcome.not_run:
        shown = first_few([cell.id for cell in outcome.not_run])
        print(f"\nnot run, or ended silently (killed?): {shown}", file=sys.stderr)
    print(
        "\nnext: fix the cause, then run the same command again; finished cells are kept",
        file=sys.stderr,
    )


def results(run: Run) -> None:
    """Print where scores, report and pictures are, what to type next, and how good scores are."""
    for cell, receipt in run.receipts.done(ReportCell.of(run.plan)).items():
        name = cell.id.partition("/")[2]
        first = next(scored_by(run.plan, name))
        array, *_ = first.arrays(run.plan).values()
        print(f"scores: {run.layout.array(first, array)}")
        shown = [run.layout.file(cell, n) for n in cell.files() if n in receipt.digests]
        print("\n".join(f"report: {path}" for path in shown))
    print(f"next:   {_status_command(run)}")
    for line in quality.lines(run):
        print(line)


def submitted(run: Run, done: SubmissionResult, scripts: Iterable[str] = ()) -> None:
    """Print what was submitted, what to type next, and of a dry run the batch scripts."""
    if done.jobs:
        print(f"{'step':<15}{'job':>10}{'tasks':>8}{'cells':>8}  after")
    for line in done.jobs:
        after = line.dependency if len(line.dependency) < 60 else f"{line.dependency[:59]}…"
        counts = f"{line.job_id:>10}{line.tasks:>8}{line.cells:>8}"
        print(f"{line.step:<15}{counts}  {after}".rstrip())
    if done.already_queued:
        print(f"already in the queue: {done.already_queued} cells")
    if done.deferred_cells and done.continuation_job:
        print(
            f"no room in the queue for {done.deferred_cells} cells: job {done.continuation_job} "
            "submits them"
        )
    elif done.deferred_cells:
        print(
            f"no room in the queue for {done.deferred_cells} cells: run the same command again "
            "when some jobs have ended"
        )
    if done.blocked:
        print(
            f"not submitted, since a dependency failed or is missing: {len(done.blocked)} cells, "
            f"{done.blocked[0].id} first"
        )
    if not (done.jobs or done.already_queued or done.deferred_cells or done.blocked):
        print("nothing to submit: all cells are done")
    print(f"next:   {_status_command(run)}")
    for number, script in enumerate(scripts, 1):
        print(f"\n# <{number}> {'-' * 70}\n{script}")


def cancelled(job_ids: Iterable[str]) -> None:
    """Print which jobs were cancelled."""
    ids = ", ".join(job_ids)
    out.print(f"cancelled: {ids or 'nothing, no job of this run is in the queue'}")


def status(run: Run) -> Status:
    """Print the status, the machine-readable line last."""
    found = read_status(run)
    for line in (*lines(found), "", found.json_line()):
        print(plain(line))
    return found


def watch(run: Run) -> Status:
    """Show the status again and again, until there is nothing to wait for."""
    found: Status | None = None
    with Live(console=out, auto_refresh=False, transient=True) as live:
        while not (found := read_status(run, previous=found)).idle:
            live.update(Text(plain("\n".join(lines(found))), no_wrap=True), refresh=True)
            time.sleep(WATCH_SECONDS)
    return status(run)


def verification(run: Run, found: Verification) -> None:
    """Print what is damaged, and what to type next."""
    for cell, reasons in found.damaged.items():
        print(plain(f"damaged {cell.id}: {'; '.join(reasons)}"))
    print(
        f"verify: {found.done} cells done, {len(found.damaged)} of them damaged, "
        f"{found.missing} cells not done yet"
    )
    if found.damaged and found.repaired:
        again = commands.launch(run.layout.run_dir)
        if found.streamed:
            again = (
                f"stream the rows of these cells again, by the same calls of {run.plan.rows_from}"
            )
        print(f"the damaged cells are queued again\nnext: {again}")
    elif found.damaged:
        print(f"next: {commands.launch(run.layout.run_dir, 'stage=verify', 'repair=true')}")


def combination(number: int, of: int, what: str) -> None:
    """Announce one combination of a sweep."""
    out.print(f"\ncombination {number} of {of}: {what}")


def swept(report: Iterable[str]) -> None:
    """Print how a sweep ended."""
    print("\n".join(["", *report]))


def _status_command(run: Run) -> str:
    where = run.layout.run_dir
    if where.is_relative_to(Path.cwd()):
        where = where.relative_to(Path.cwd())
    return commands.launch(where, "stage=status")
