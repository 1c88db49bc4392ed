"""verify: re-read all that done cells wrote, and hold it against their receipts.

Receipts are held against each other too: where cells were shown different rows, they, and what was
made of them, count as damaged. None of a problem's code is run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence

from trak_dist import graph
from trak_dist.cells import STAGE_CELLS, Cell, EvaluateCell, ReportCell, TrainCell
from trak_dist.errors import CheckpointError, StoreError
from trak_dist.plan import Plan
from trak_dist.stages.checkpoints import content_digest
from trak_dist.stages.inputs import of_other_rows
from trak_dist.stages.state_dicts import read
from trak_dist.store import atomic, contents
from trak_dist.store.layout import Layout
from trak_dist.store.receipts import Receipt
from trak_dist.store.run import Run


def damaged_cells(run: Run) -> Iterator[tuple[Cell, list[str]]]:
    """Each done cell whose bytes are missing or not what its receipt says, with the reasons.

    Also those that were shown other rows than others, and what was made of them.
    """
    odd = of_other_rows(run)
    odd |= made_of(run, odd)
    for stage in STAGE_CELLS:
        for cell, receipt in run.receipts.done(run.plan.cells(stage)).items():
            reasons = [odd[cell]] if cell in odd else []
            try:
                reasons += _damages(run, cell, receipt)
            except (StoreError, CheckpointError) as error:
                reasons.append(error.what)
            if reasons:
                yield cell, reasons


def made_of(run: Run, sources: Collection[Cell]) -> dict[Cell, str]:
    """The done cells that were made of `sources`, or of what was; and of which."""
    found: dict[Cell, str] = {}
    cells = dict.fromkeys(c for stage in STAGE_CELLS for c in run.plan.cells(stage))
    for cell in cells if sources else ():  # each after those it needs, done or taken back before
        needed = graph.needs(run.plan, cell, cells)
        of = next((other for other in needed if other in sources or other in found), None)
        if of and cell not in sources:
            found[cell] = f"made of {of.id}"
    done = run.receipts.done(found)
    return {cell: why for cell, why in found.items() if cell in done}


def take_back(run: Run, damaged: Sequence[tuple[Cell, list[str]]]) -> None:
    """Make damaged cells missing again; and what other plans made of other rows of this run.

    What was made of a cell is taken back before it: the next call after a kill finds the rest.
    """
    odd = of_other_rows(run)
    for other in _sharing(run) if odd else ():
        for cell, why in reversed(made_of(other, odd).items()):
            other.receipts.revoke(cell, why=why)
    for cell, reasons in reversed(damaged):
        run.receipts.revoke(cell, why="; ".join(reasons))


def _sharing(run: Run) -> Iterator[Run]:
    """The run and its members by all plans that they ever had, if of the same grads."""
    base = Layout(run.layout.base)
    for layout in (base, *(Layout(base.sweeps / name) for name in base.members())):
        for generation in range((layout.generation() or 0) + 1):
            path = layout.plan(generation)
            plan = Plan.from_json(path.read_bytes(), where=str(path))
            if plan.projection_id == run.plan.projection_id:
                yield Run(layout, plan, generation)


def _damages(run: Run, cell: Cell, receipt: Receipt) -> Iterator[str]:
    if isinstance(cell, TrainCell):
        path = run.layout.checkpoint(run.layout.trained_checkpoint(cell.subset, cell.seed))
        found = content_digest(read(path))
        if found != receipt.digests.get("checkpoint"):
            written = receipt.digests.get("checkpoint")
            yield f"checkpoint: digest {found}, the receipt says {written}"
    elif isinstance(cell, EvaluateCell):
        path = run.layout.evaluation(cell.targets)
        there = atomic.exists(path)
        found = hashlib.sha256(atomic.read(path)).hexdigest()[:32] if there else "none"
        if found != receipt.digests.get("figures"):
            yield f"figures: digest {found}, the receipt says {receipt.digests.get('figures')}"
    elif isinstance(cell, ReportCell):
        page = run.layout.report(cell.targets)
        pictures = [page.with_suffix(f"{name}.png") for name in receipt.fact("pictures", list)]
        for path in (page, *pictures):
            if not atomic.exists(path):
                yield f"report: {path.name} is missing"
    else:
        yield from contents.damages(run, cell, receipt)
