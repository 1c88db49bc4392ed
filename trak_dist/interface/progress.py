"""Progress of one step: how many of its cells are done, counted by their receipts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from trak_dist.cells import Cell, FeaturizeCell, FisherCell
from trak_dist.store.run import Run

COUNT_SHARE = 0.1  # at most this share of the time goes into counting receipts
REPORT_SECONDS = 10.0  # between two reports while nothing changes


@dataclass(frozen=True)
class Progress:
    """The cells of one step at one moment.

    Parameters
    ----------
    step : str
        The stage, with the number of its step where it has several: `reduce 1/2`.
    done, failed, running, total : int
        Cells. A worker runs one at a time; one that failed is not tried again.
    rows_per_second : float or None
        Rows featurized by all workers together; None if there were none.
    seconds : float
        Since the step began.
    finished : bool
        Whether this is the step's last.
    """

    step: str
    done: int
    failed: int
    running: int
    total: int
    rows_per_second: float | None
    seconds: float
    finished: bool = False

    @property
    def seconds_left(self) -> float | None:
        """Until the others are done at the pace so far; None if none is done yet."""
        return self.seconds / self.done * (self.total - self.done) if self.done else None

    def __str__(self) -> str:
        parts = [f"{self.step}: {self.done}/{self.total} cells"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{self.rows_per_second:,.0f} rows/s"] if self.rows_per_second else []
        parts += [f"{self.seconds:.1f} s"]
        if not self.finished and self.seconds_left is not None:
            parts += [f"{self.seconds_left:.0f} s left"]
        return ", ".join(parts)


OnProgress = Callable[[Progress], None]


class Counter:
    """Counts the receipts of `cells` whenever ticked, but not too often, and reports them."""

    def __init__(
        self, run: Run, cells: Sequence[Cell], *, step: str, report: OnProgress | None
    ) -> None:
        self._run, self._step, self._report = run, step, report
        self._waiting, self._total = list(cells), len(cells)
        self._rows = self._failed = 0
        self._before = run.receipts.failures(cells) if report else {}
        self._started = self._next_count = time.monotonic()
        self._reported: tuple[int, ...] = ()
        self._next_report = self._started

    def __enter__(self) -> Counter:
        self._show(running=0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._report:
            self._count()
            self._show(running=0, finished=True)

    def tick(self, running: int) -> None:
        """Count and report, if the last count is long enough ago.

        Parameters
        ----------
        running : int
            Workers at work.
        """
        now = time.monotonic()
        if self._report and now >= self._next_count:
            self._count()
            self._next_count = time.monotonic() + (time.monotonic() - now) / COUNT_SHARE
            running = max(0, min(running, len(self._waiting) - self._failed))
            if (len(self._waiting), self._failed, running) != self._reported or (
                now >= self._next_report
            ):
                self._show(running=running)

    def _count(self) -> None:
        done = self._run.receipts.done(self._waiting)
        self._rows += sum(len(c.rows) for c in done if isinstance(c, FeaturizeCell | FisherCell))
        self._waiting = [c for c in self._waiting if c not in done]
        failures = self._run.receipts.failures(self._waiting)
        self._failed = sum(failure != self._before.get(c) for c, failure in failures.items())

    def _show(self, *, running: int, finished: bool = False) -> None:
        if self._report is None:
            return
        now = time.monotonic()
        seconds = now - self._started
        self._reported = (len(self._waiting), self._failed, running)
        self._next_report = now + REPORT_SECONDS
        progress = Progress(
            step=self._step,
            done=self._total - len(self._waiting),
            failed=self._failed,
            running=running,
            total=self._total,
            rows_per_second=self._rows / seconds if self._rows else None,
            seconds=seconds,
            finished=finished,
        )
        self._report(progress)
