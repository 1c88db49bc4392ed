"""Progress of one phase: a live line on a terminal, plain lines elsewhere. Counts receipts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from trak_dist.cells import Cell, FeaturizeCell
from trak_dist.store.run import Run

COUNT_SHARE = 0.1  # at most this share of the time goes into counting receipts
PLAIN_LINE_SECONDS = 10.0


class Progress:
    """Counts the receipts of `cells` whenever ticked, but not too often."""

    def __init__(
        self, run: Run, cells: Sequence[Cell], *, label: str, console: Console, live: bool
    ) -> None:
        self._run, self._label, self._console = run, label, console
        self._waiting = list(cells)
        self._total, self._rows = len(cells), 0
        self._started = time.monotonic()
        self._next_count = self._next_line = self._started
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._live = RichProgress(*columns, console=console) if live else None
        self._task = self._live.add_task(label, total=self._total, rate="") if self._live else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._count()
        self._show(last=True)
        if self._live:
            self._live.stop()

    def tick(self) -> None:
        """Count and show, if the last count is long enough ago."""
        now = time.monotonic()
        if now >= self._next_count:
            self._count()
            self._next_count = time.monotonic() + (time.monotonic() - now) / COUNT_SHARE
            self._show(last=False)

    def _count(self) -> None:
        done = self._run.receipts.done(self._waiting)
        self._rows += sum(len(c.rows) for c in done if isinstance(c, FeaturizeCell))
        self._waiting = [c for c in self._waiting if c not in done]

    def _show(self, *, last: bool) -> None:
        now = time.monotonic()
        done, seconds = self._total - len(self._waiting), now - self._started
        rate = f"{self._rows / seconds:,.0f} rows/s" if self._rows else ""
        if self._live and self._task is not None:
            self._live.update(self._task, completed=done, rate=rate)
        elif last or now >= self._next_line:
            self._next_line = now + PLAIN_LINE_SECONDS
            left = seconds / done * len(self._waiting) if done else 0
            parts = [f"{self._label}: {done}/{self._total} cells", rate, f"{seconds:.1f} s"]
            if not last and done:
                parts.append(f"{left:.0f} s left")
            self._console.print(", ".join(p for p in parts if p), highlight=False, markup=False)
