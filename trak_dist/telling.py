"""What the command line says of a run: what failed, what is done, what is damaged, what is next."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trak_dist.cells import Cell
from trak_dist.stages.status import lines, read_status
from trak_dist.store.run import Run


def all_done(run: Run, stage: str, cells: Sequence[Cell]) -> bool:
    """Whether all of `cells` are done; if not, print which are not and why."""
    done = run.receipts.done(cells)
    missing = [c for c in cells if c not in done]
    if not missing:
        return True
    failures = run.receipts.failures(missing)
    print(f"error: {stage}: {len(missing)} of {len(cells)} cells are not done", file=sys.stderr)
    alike: dict[str, list[Cell]] = {}
    for cell, failure in failures.items():
        alike.setdefault(failure.error.split("\n")[0], []).append(cell)
    for cells_alike in alike.values():
        first = failures[cells_alike[0]]
        text = first.error if first.expected else first.traceback
        log = f" (log: {first.job['log']})" if first.job.get("log") else ""
        others = len(cells_alike) - 1
        more = f", and {others} more with the same error" if others else ""
        print(f"\n{first.cell}{more}{log}:\n{text.rstrip()}", file=sys.stderr)
    silent = [c.id for c in missing if c not in failures]
    if silent:
        shown = ", ".join(silent[:10]) + (", …" if len(silent) > 10 else "")
        print(f"\nnot run, or ended without a word (killed?): {shown}", file=sys.stderr)
    print(
        "\nnext: mend the cause, then run the same command again; finished cells are kept",
        file=sys.stderr,
    )
    return False


def status(run: Run) -> None:
    """Print the status, the machine-readable line last."""
    found = read_status(run)
    for line in (*lines(found), "", found.json_line()):
        print(line)


def verify(run: Run, *, repair: bool) -> bool:
    """Verify, and where asked repair; whether nothing is damaged that is not queued again."""
    from trak_dist.stages.verify import damaged_cells

    found = read_status(run)
    done = sum(len(s.done) for s in found.stages.values())
    missing = sum(s.total for s in found.stages.values()) - done
    damaged = list(damaged_cells(run))
    for cell, reasons in damaged:
        print(f"damaged {cell.id}: {'; '.join(reasons)}")
        if repair:
            run.receipts.revoke(cell, why="; ".join(reasons))
    command = f"python -m trak_dist.launch run_dir={run.layout.run_dir}"
    print(
        f"verify: {done} cells done, {len(damaged)} of them damaged, {missing} cells not done yet"
    )
    if not damaged:
        return True
    if repair:
        print(f"the damaged cells are queued again\nnext: {command}")
        return True
    print(f"next: {command} stage=verify repair=true")
    return False


def tell_what_next(run: Run) -> None:
    """Print where scores and report are, and what to type next."""
    for split in run.plan.targets:
        if run.layout.report(split.name).exists():
            print(f"scores: {run.layout.scores(split.name)}")
            print(f"report: {run.layout.report(split.name)}")
    where = run.layout.run_dir
    if os.path.commonpath([where, Path.cwd()]) == str(Path.cwd()):
        where = where.relative_to(Path.cwd())
    print(f"next:   python -m trak_dist.launch stage=status run_dir={where}")
