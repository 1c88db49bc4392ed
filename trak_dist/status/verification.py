"""Verify a run, and where asked have its damaged cells made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trak_dist.cells import Cell, FeaturizeCell, of_run
from trak_dist.errors import StoreError
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
    from trak_dist.status.verify import damaged_cells, revoke_damaged_cells
    from trak_dist.store.prepare import prepare

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


def _check_inside(run: Run, cell: Cell) -> None:
    directory = run.layout.receipts(run.plan, cell)
    if not directory.resolve().is_relative_to(run.layout.base.resolve()):
        raise StoreError(
            f"the receipts lie outside of the run directory, in {directory.resolve()}, by a link",
            where=str(directory),
            next="a directory in place of the link, with the receipts in it",
        )
