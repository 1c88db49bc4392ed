"""What the command line says of a run: what failed, what is done, what is damaged, what is next."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from trak_dist import commands, resources
from trak_dist.cells import Cell, EvaluateCell, FeaturizeCell, ReportCell, ScoreCell, count
from trak_dist.errors import CorruptChunk, StoreError
from trak_dist.status.state import Status, read_status
from trak_dist.status.text import by_error, lines
from trak_dist.store.run import Run

if TYPE_CHECKING:
    from trak_dist.executors.sending import Submitted

WATCH_SECONDS = 5.0
out = Console(soft_wrap=True, highlight=False, markup=False)


def plain(text: str) -> str:
    """`text` for a terminal: whatever a run directory brings, it moves no cursor."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def planned(run: Run) -> None:
    """Print what the run is, in one line."""
    plan = run.plan
    out.print(
        f"plan: {plan.train.rows} train rows, {len(plan.model_ids)} checkpoints, "
        f"{', '.join(f'{s.name} {s.rows}' for s in plan.targets)} targets, p {plan.parameters:,}, "
        f"gradients by {plan.gradients}, {plan.spec.projection.kind} to {plan.proj_dim}, "
        f"{count(plan)} cells, {resources.disk_bytes(plan) / 2**20:,.0f} MiB, "
        f"in {run.layout.run_dir}"
    )


def all_done(run: Run, stage: str, cells: Sequence[Cell]) -> bool:
    """Whether all of `cells` are done; if not, print which are not and why."""
    done = run.receipts.done(cells)
    missing = [c for c in cells if c not in done]
    if not missing:
        return True
    failures = run.receipts.failures(missing)
    print(f"error: {stage}: {len(missing)} of {len(cells)} cells are not done", file=sys.stderr)
    for cells_alike in by_error(failures):
        first = failures[cells_alike[0]]
        text = first.error if first.expected else first.traceback
        log = f" (log: {first.job['log']})" if first.job.get("log") else ""
        others = len(cells_alike) - 1
        more = f", and {others} more with the same error" if others else ""
        print(plain(f"\n{first.cell}{more}{log}:\n{text.rstrip()}"), file=sys.stderr)
    silent = [c.id for c in missing if c not in failures]
    if silent:
        shown = ", ".join(silent[:10]) + (", …" if len(silent) > 10 else "")
        print(f"\nnot run, or ended without a word (killed?): {shown}", file=sys.stderr)
    print(
        "\nnext: mend the cause, then run the same command again; finished cells are kept",
        file=sys.stderr,
    )
    return False


def status(run: Run) -> Status:
    """Print the status, the machine-readable line last."""
    found = read_status(run)
    for line in (*lines(found), "", found.json_line()):
        print(plain(line))
    return found


def watch(run: Run) -> Status:
    """Show the status again and again, until there is nothing to wait for."""
    with Live(console=out, auto_refresh=False, transient=True) as live:
        while not (found := read_status(run)).idle:
            live.update(Text(plain("\n".join(lines(found))), no_wrap=True), refresh=True)
            time.sleep(WATCH_SECONDS)
    return status(run)


def submitted(run: Run, done: Submitted) -> None:
    """Print what was submitted, and what to type next."""
    if done.lines:
        print(f"{'step':<15}{'job':>10}{'tasks':>8}{'cells':>8}  after")
    for line in done.lines:
        after = line.dependency if len(line.dependency) < 60 else f"{line.dependency[:59]}…"
        counts = f"{line.job_id:>10}{line.tasks:>8}{line.cells:>8}"
        print(f"{line.step:<15}{counts}  {after}".rstrip())
    if done.queued_before:
        print(f"in the queue before, left alone: {done.queued_before} cells")
    if done.left and done.goes_on:
        print(f"no room in the queue for {done.left} cells: job {done.goes_on} submits them")
    elif done.left:
        print(
            f"no room in the queue for {done.left} cells: run the same command again when some "
            "jobs have ended"
        )
    if done.blocked:
        print(
            f"not submitted, since what they need failed or is missing: {len(done.blocked)} cells, "
            f"{done.blocked[0].id} first"
        )
    if not (done.lines or done.queued_before or done.left or done.blocked):
        print("nothing to submit: all cells are done")
    print(f"next:   {_command(run, 'stage=status')}")


def verify(run: Run, *, repair: bool) -> bool:
    """Verify, and where asked repair; whether nothing is damaged that is not queued again."""
    from trak_dist.status.verify import damaged_cells, take_back
    from trak_dist.store.prepare import prepare

    if repair:
        prepare(run)  # lost metadata is made anew, which damages nothing
    found = read_status(run)
    done = sum(len(s.done) for s in found.stages.values())
    missing = sum(len(s.cells) for s in found.stages.values()) - done
    damaged = list(damaged_cells(run))
    for cell, reasons in damaged:
        print(plain(f"damaged {cell.id}: {'; '.join(reasons)}"))
    if repair:
        for cell, _ in damaged:
            _refuse_outside(run, cell)
        take_back(run, damaged)
    print(
        f"verify: {done} cells done, {len(damaged)} of them damaged, {missing} cells not done yet"
    )
    if not damaged:
        return True
    if repair:
        cells = [cell for cell, _ in damaged if isinstance(cell, FeaturizeCell)]
        mend = commands.launch(run.layout.run_dir)
        if any(run.plan.split(cell.split).streamed for cell in cells):
            mend = "feed the rows of these cells again, by the calls of TRAKer that did before"
        print(f"the damaged cells are queued again\nnext: {mend}")
        return True
    print(f"next: {commands.launch(run.layout.run_dir, 'stage=verify', 'repair=true')}")
    return False


def _refuse_outside(run: Run, cell: Cell) -> None:
    home = run.layout.receipts(run.plan, cell)
    if not home.resolve().is_relative_to(run.layout.base.resolve()):
        raise StoreError(
            f"the receipts lie outside of the run directory, in {home.resolve()}, by a link",
            where=str(home),
            next="a directory in place of the link, with the receipts in it",
        )


def tell_what_next(run: Run) -> None:
    """Print where scores, report and pictures are, what to type next, and the LDS."""
    for cell, receipt in run.receipts.done(ReportCell.of(run.plan)).items():
        name = cell.id.partition("/")[2]
        first = next(ScoreCell.of_targets(run.plan, name))
        print(f"scores: {run.layout.array(first, first.arrays(run.plan)['scores'])}")
        shown = [run.layout.file(cell, n) for n in cell.files() if n in receipt.digests]
        print("\n".join(f"report: {path}" for path in shown))
    print(f"next:   {_command(run, 'stage=status')}")
    for line in proofs(run):
        print(line)


def proofs(run: Run) -> Iterator[str]:
    """What was found of the scores' worth: overlaps, counterfactuals, AUC, LDS last."""
    done = run.receipts.done([*ReportCell.of(run.plan), *EvaluateCell.of(run.plan)])
    facts = [(cell.id.partition("/")[2], receipt.facts) for cell, receipt in done.items()]
    for tell in (_halves, _removed, _labels):
        for name, found in facts:
            with _odd_facts_told(name):
                yield from tell(name, found)
    yield from lds(run)


def _halves(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    for rows, share in found.get("stability", {}).items():
        yield (
            f"halves: {name} share {_interval(share)} of the {rows} most helpful rows, by "
            f"chance {share['chance']:.2g}"
        )


def _removed(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    for one in found.get("counterfactuals", []):
        yield (
            f"remove: {name} {one['removed']} most helpful rows: output drops by "
            f"{_interval(one['drop'])}, against random rows"
        )


def _labels(_: str, found: Mapping[str, Any]) -> Iterator[str]:
    if wrong := found.get("mislabelled"):
        yield (
            f"labels: AUC {_interval(wrong['auc'])} of self-influence, "
            f"{_interval(wrong['auc_of_out_to_loss'])} of out-to-loss alone, "
            f"for {wrong['rows']} wrong ones"
        )


@contextlib.contextmanager
def _odd_facts_told(name: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptChunk(
            f"the facts of a receipt can't be read: {type(error).__name__}: {error}",
            where=name,
            next="remove its evaluate and report receipts, then the same command again",
        ) from error


def lds(run: Run) -> Iterator[str]:
    """The LDS of each target set that was held against retrained models."""
    flattered = ", λ chosen on these targets" if run.plan.lambda_from else ""
    for cell, receipt in run.receipts.done(EvaluateCell.of(run.plan)).items():
        name = cell.id.partition("/")[2]
        with _odd_facts_told(name):
            yield from _lds(name, receipt.facts, flattered)


def _lds(name: str, found: Mapping[str, Any], flattered: str) -> Iterator[str]:
    if "lds" in found:
        own, fair = _interval(found["lds"]), _interval(found["chosen"]["lds"])
        few = f"; {found['left_out']} constant targets left out" if found["left_out"] else ""
        yield (
            f"LDS:    {name} {own} (95 %{flattered}), with λ chosen on other targets {fair}{few}"
        )


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _command(run: Run, arguments: str) -> str:
    where = run.layout.run_dir
    if where.is_relative_to(Path.cwd()):
        where = where.relative_to(Path.cwd())
    return commands.launch(where, arguments)
