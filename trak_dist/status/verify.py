"""verify: read again what done cells wrote, and check it against their receipts.

Receipts are compared with each other too: cells computed from different rows, and what was derived
from them, count as damaged. No code of a problem is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from trak_dist.cells import Cell, FeaturizeCell, FisherCell, of_run
from trak_dist.checkpoints.digests import content_digest
from trak_dist.checkpoints.state_dicts import read
from trak_dist.checks.dependents import derived_from, runs_sharing_grads
from trak_dist.checks.input_digests import cells_with_other_inputs
from trak_dist.coordinates import TRAIN
from trak_dist.errors import CheckpointError, StoreError
from trak_dist.hashing import digest_of
from trak_dist.store import atomic, contents
from trak_dist.store.prepare import prepare
from trak_dist.store.record import Receipt
from trak_dist.store.run import Run


@dataclass(frozen=True)
class Verification:
    """What was found: how many cells are done, and why some of them are damaged.

    `repaired` says that these are missing now, so that the next command makes them again;
    `streamed` that the rows of some of them came from TRAKer, and have to come from there again.
    """

    done: int
    missing: int
    damaged: Mapping[Cell, list[str]]
    repaired: bool
    streamed: bool

    @property
    def intact(self) -> bool:
        """Whether nothing is damaged, or all that was is queued again."""
        return self.repaired or not self.damaged


def verify_run(run: Run, *, repair: bool) -> Verification:
    """Read all that done cells wrote, and hold it against their receipts.

    Raises
    ------
    StoreError
        If receipts to be revoked lie outside of the run directory.
    """
    if repair:
        prepare(run)  # lost metadata is written again, which damages nothing
    cells = list(of_run(run.plan))
    done = len(run.receipts.done(cells))
    damaged = dict(damaged_cells(run))
    if repair:
        for cell in damaged:
            _check_inside(run, cell)
        revoke_damaged_cells(run, list(damaged.items()))
    splits = {cell.split for cell in damaged if isinstance(cell, FeaturizeCell)}
    return Verification(
        done=done,
        missing=len(cells) - done,
        damaged=damaged,
        repaired=repair,
        streamed=any(run.plan.split(name).streamed for name in splits),
    )


def damaged_cells(run: Run) -> Iterator[tuple[Cell, list[str]]]:
    """Each done cell whose bytes are missing or not what its receipt says, with the reasons.

    Also those computed from other rows than others, and what was derived from them.
    """
    invalid = cells_with_other_inputs(run)
    invalid |= derived_from(run, invalid)
    for cell, receipt in run.receipts.done(of_run(run.plan)).items():
        reasons = [invalid[cell]] if cell in invalid else []
        try:
            reasons += _damages(run, cell, receipt)
        except (StoreError, CheckpointError) as error:
            reasons.append(error.what)
        if reasons:
            yield cell, reasons


def revoke_damaged_cells(run: Run, damaged: Sequence[tuple[Cell, list[str]]]) -> None:
    """Revoke damaged cells, and what other plans derived from them.

    What was derived from a cell is revoked before it: the next call after a kill finds the rest.
    """
    invalid = cells_with_other_inputs(run)
    changed = {c.model_id for c in invalid if isinstance(c, FeaturizeCell) and c.split == TRAIN}
    for other in runs_sharing_grads(run) if invalid else ():
        for cell, why in reversed(derived_from(other, invalid).items()):
            other.receipts.revoke(cell, why=why)
        # Their labels were drawn for the same rows.
        drawn = [c for c in FisherCell.of(other.plan) if c.model_id in changed]
        for cell in other.receipts.done(drawn):
            other.receipts.revoke(cell, why="drawn for other rows than the dataset has")
    for cell, reasons in reversed(damaged):
        run.receipts.revoke(cell, why="; ".join(reasons))


def _damages(run: Run, cell: Cell, receipt: Receipt) -> Iterator[str]:
    yield from contents.damages(run, cell, receipt)
    for name, owned in cell.files().items():
        path, written = run.layout.file(cell, name), receipt.digests.get(name)
        if written is None and not owned.always:
            continue
        if owned.tensors:
            found = content_digest(read(path))
        elif atomic.exists(path):
            found = digest_of(atomic.read(path))
        else:
            found = "none"
        if found != written:
            yield f"{name}: digest {found}, the receipt says {written}"


def _check_inside(run: Run, cell: Cell) -> None:
    directory = run.layout.receipts(run.plan, cell)
    if not directory.resolve().is_relative_to(run.layout.base.resolve()):
        raise StoreError(
            f"the receipts lie outside of the run directory, in {directory.resolve()}, by a link",
            where=str(directory),
            next="a directory in place of the link, with the receipts in it",
        )
