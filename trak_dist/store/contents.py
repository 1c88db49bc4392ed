"""What each cell wrote, and where: writing, reading back and verifying."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak_dist import commands
from trak_dist.cells import Cell
from trak_dist.cells.ownership import ArraySpec
from trak_dist.errors import CorruptChunk
from trak_dist.store import arrays
from trak_dist.store.record import Receipt
from trak_dist.store.run import Run


@dataclass(frozen=True)
class ArrayRegion:
    """Rows `start` to `stop` of the array at `path`, and what that array is."""

    path: Path
    spec: ArraySpec
    start: int
    stop: int


def array_regions(run: Run, cell: Cell) -> dict[str, ArrayRegion]:
    """The arrays' rows that `cell` owns, by the name of the array; some own none."""
    return {
        name: ArrayRegion(run.layout.array(cell, owned), owned.spec, owned.start, owned.stop)
        for name, owned in cell.arrays(run.plan).items()
    }


def write(run: Run, cell: Cell, values: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Write to disk what `cell` owns; the digests of it, as `write_each`."""
    return write_each(run, cell, values.items())


def write_each(run: Run, cell: Cell, values: Iterable[tuple[str, NDArray[Any]]]) -> dict[str, str]:
    """Write to disk what `cell` owns, each array as it comes; the digests by their names.

    Raises
    ------
    PlanMismatch
        If the plan on disk is no longer the one that this worker runs.
    StoreError
        If the file system refuses.
    """
    run.check_not_superseded(cell)
    owned, digests = array_regions(run, cell), {}
    for name, array in values:
        region = owned.pop(name)
        assert len(array) == region.stop - region.start
        digests[name] = arrays.write_rows(
            region.path, region.spec, region.start, array, plan=_plan(run)
        )
    assert not owned
    return digests


def read(run: Run, cell: Cell, name: str) -> NDArray[Any]:
    """Read back one of the arrays that `cell` wrote.

    Raises
    ------
    CorruptChunk
        If it is gone or damaged, or not finite. Grads were finite when they were written, and have
        a checksum: to look again would take as long as to read them.
    """
    region = array_regions(run, cell)[name]
    with _damage(run, cell, name, region):
        values = _read(run, region)
        if name != "grads" and not np.isfinite(values).all():
            raise CorruptChunk("its entries are not finite")
    return values


def read_pieces(run: Run, cell: Cell, name: str, rows: int) -> Iterator[NDArray[Any]]:
    """The same of a cell with one chunk, so many rows at a time, each in the memory of the last.

    That they are as they were written is known once all are read.
    """
    region = array_regions(run, cell)[name]
    with _damage(run, cell, name, region):
        yield from arrays.read_pieces(
            *(region.path, region.spec, region.start, region.stop), rows=rows, plan=_plan(run)
        )


@contextlib.contextmanager
def _damage(run: Run, cell: Cell, name: str, region: ArrayRegion) -> Iterator[None]:
    """Name the cell whose array is damaged."""
    try:
        yield
    except CorruptChunk as error:
        raise CorruptChunk(
            f"{name} of {cell.id} is damaged: {error.what}",
            where=str(region.path),
            next=f"{commands.launch(run.layout.run_dir, 'stage=verify', 'repair=true')}, then the "
            "same command again",
        ) from error


def _read(run: Run, region: ArrayRegion) -> NDArray[Any]:
    return arrays.read_rows(region.path, region.spec, region.start, region.stop, plan=_plan(run))


def _plan(run: Run) -> str:
    return commands.launch(run.layout.run_dir, "stage=plan")


def damages(run: Run, cell: Cell, receipt: Receipt) -> Iterator[str]:
    """Read all that `cell` wrote; a sentence for each array that is not what its receipt says."""
    for name, region in array_regions(run, cell).items():
        try:
            found = arrays.content_digest(_read(run, region))
        except CorruptChunk as error:
            yield f"{name}: {error.what}"
        else:
            if found != receipt.digests.get(name):
                yield f"{name}: digest {found}, the receipt says {receipt.digests.get(name)}"
