"""Rows that done featurize cells were shown, read again and checked against what they were shown.

A worker that begins with a split reads some batches of done cells again; each cell is compared with
those of the same rows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from trak_dist import commands
from trak_dist.cells import FeaturizeCell
from trak_dist.checks.input_digests import InputDigests, batch_digests, featurized, inputs_digest
from trak_dist.coordinates import Rows
from trak_dist.errors import DatasetError
from trak_dist.listing import first_few
from trak_dist.runtime.session import Session
from trak_dist.store.record import Receipt

REREAD_ROWS = 512  # of done cells, by a worker that begins with a split

Done = Mapping[FeaturizeCell, Receipt]


def check_done_rows(session: Session, cell: FeaturizeCell) -> None:
    """Check what done cells of the split of `cell` were shown against the dataset.

    Raises
    ------
    DatasetError
        If they differ, naming the cells.
    """
    run, split = session.run, cell.split
    done = featurized(run, split)
    alike = {(c.rows, inputs_digest(r)): (c, r) for c, r in done.items()}
    session.input_digests.update({(split, rows): digest for rows, digest in alike})
    mixed = len({rows for rows, _ in alike}) < len(alike)
    batches = [
        (c, at, digest)
        for c, r in alike.values()
        for at, digest in enumerate(batch_digests(r.facts))
    ]
    random.Random(cell.key(run.plan)).shuffle(batches)  # noqa: S311
    size = run.plan.spec.featurize.batch_rows
    for c, at, digest in batches[: max(1, REREAD_ROWS // size)]:
        again = _read_digests(session, split, _batch_rows(c.rows, at, size))
        mixed |= again["batch_digests"] != digest
    if mixed or run.receipts.stale(done):
        _check_against_dataset(session, split, done)


def check_same_inputs(session: Session, cell: FeaturizeCell, shown: InputDigests) -> None:
    """Check a cell's input against that of other checkpoints, before it is done.

    Raises
    ------
    DatasetError
        If it is something else.
    """
    digest = shown.facts()["inputs_digest"]
    if session.input_digests.setdefault((cell.split, cell.rows), digest) == digest:
        return
    _check_against_dataset(session, cell.split, featurized(session.run, cell.split))
    raise DatasetError(
        f"the rows {cell.rows} of {cell.split!r} differ when they are read again",
        where=cell.id,
        next="switch random augmentation off: an example must be the same every time",
    )


def _check_against_dataset(session: Session, split: str, done: Done) -> None:
    """Read the rows of all done cells again; mark cells whose input differs."""
    run, size = session.run, session.run.plan.spec.featurize.batch_rows
    now = {rows: _read_digests(session, split, rows) for rows in {c.rows for c in done}}
    stale, mismatched = run.receipts.stale(done), dict[FeaturizeCell, str]()
    for cell, receipt in done.items():
        found = now[cell.rows]
        if inputs_digest(receipt) == found["inputs_digest"]:
            if cell in stale:
                run.receipts.clear_failure(cell)
            continue
        pairs = zip(*map(batch_digests, (receipt.facts, found)), strict=False)
        at = next((i for i, (then, again) in enumerate(pairs) if then != again), None)
        mismatched[cell] = str(cell.rows if at is None else _batch_rows(cell.rows, at, size))
        run.receipts.mark_stale(
            cell, f"computed from other rows than {split!r} has at {mismatched[cell]}"
        )
    if mismatched:
        shown = first_few([f"{c.id} (rows {rows})" for c, rows in mismatched.items()], 5)
        command = commands.launch(run.layout.run_dir, "stage=verify", "repair=true")
        raise DatasetError(
            f"{len(mismatched)} of {len(done)} done cells of {split!r} were computed from other "
            f"rows than the dataset has now: {shown}",
            where=next(iter(mismatched)).id,
            next="if the data were right then, restore them and run the same command again; if "
            f"they are right now, revoke these cells by {command}",
        )


def _read_digests(session: Session, split: str, rows: Rows) -> dict[str, str]:
    shown = InputDigests()
    for batch in session.batches(split, rows.numbers):
        shown.add(batch)
    return shown.facts()


def _batch_rows(rows: Rows, at: int, size: int) -> Rows:
    return Rows(rows.start + at * size, min(rows.start + (at + 1) * size, rows.stop))
