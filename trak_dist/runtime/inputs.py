"""What a cell is made of: receipts that have to be there and to agree, and decoded grads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trak_dist import commands
from trak_dist.cells import Cell, FeaturizeCell, FisherCell
from trak_dist.coordinates import Rows
from trak_dist.errors import MissingInputs, MixedRun
from trak_dist.listing import first_few
from trak_dist.ops import projection
from trak_dist.ops import rows as row_format
from trak_dist.runtime.session import Session
from trak_dist.store import contents
from trak_dist.store.record import Receipt
from trak_dist.store.run import Run

SHARED_FACTS = (
    "checkpoint_digest",
    "projector",
    "projector_seed",
    "projector_dim",
    "projector_version",
    "dtype",
    "gradients",
)


def read_grads(session: Session, cell: FeaturizeCell | FisherCell) -> Float[Tensor, "rows k"]:
    """The grads of a cell, decoded and folded to `proj_dim`, on the device."""
    stored, scale = (
        torch.from_numpy(contents.read(session.run, cell, name)).to(session.device)
        for name in ("grads", "row_scale")
    )
    return projection.fold(row_format.decode(stored, scale), session.run.plan.proj_dim)


def require(run: Run, cells: Sequence[Cell], *, needed_by: Cell) -> dict[Cell, Receipt]:
    """The receipts of `cells`.

    Raises
    ------
    MissingInputs
        Naming those that are not done.
    """
    done = run.receipts.done(cells)
    missing = [c.id for c in cells if c not in done]
    if missing:
        raise MissingInputs(
            f"{len(missing)} of the cells that {needed_by.id} needs are not done: "
            f"{first_few(missing, 5)}",
            where=needed_by.id,
            next=commands.launch(run.layout.run_dir),
        )
    return done


def check_same_origin(receipts: dict[Cell, Receipt]) -> None:
    """Raise `MixedRun` naming the cells of one checkpoint that were made differently."""
    hint = "fix the cause, then start a new run_dir: these cells can't be reduced together"
    for fact in SHARED_FACTS:
        values = [(cell, r.facts.get(fact)) for cell, r in receipts.items()]
        _check_equal(fact, values, next=hint)


def check_same_rows(run: Run, splits: Iterable[str], *, needed_by: Cell) -> None:
    """Check that all checkpoints were shown the same rows of some splits.

    Where the consolidated receipts of each checkpoint say that of all its cells, a digest for each
    checkpoint is read; else the receipt of each cell.

    Raises
    ------
    MissingInputs
        If not all cells of the splits are done.
    MixedRun
        If input rows differ between checkpoints, naming the cells.
    """
    models = run.plan.model_ids
    for split in splits:
        shown = {run.receipts.inputs_digest(m, split) for m in models}
        if len(shown) > 1 or None in shown:
            cells = [c for m in models for c in FeaturizeCell.of_split(run.plan, m, split)]
            _check_each(run, require(run, cells, needed_by=needed_by))


def _check_each(run: Run, receipts: dict[Cell, Receipt]) -> None:
    by_rows: dict[tuple[str, Rows], list[tuple[Cell, object]]] = {}
    for cell, receipt in receipts.items():
        assert isinstance(cell, FeaturizeCell)
        values = by_rows.setdefault((cell.split, cell.rows), [])
        values.append((cell, receipt.facts.get("inputs_digest")))
    command = commands.launch(run.layout.run_dir, "stage=verify", "repair=true")
    back = f"fix the cause; {command} revokes all cells that disagree, to be computed again"
    for values in by_rows.values():
        _check_equal("inputs_digest", values, next=back)


def _check_equal(fact: str, values: Sequence[tuple[Cell, object]], *, next: str) -> None:
    by_value: dict[object, list[str]] = {}
    for cell, value in values:
        by_value.setdefault(value, []).append(cell.id)
    if len(by_value) > 1:
        groups: Iterator[str] = (
            f"{value!r} in {first_few(cells, 3)}" for value, cells in by_value.items()
        )
        hint = (
            " (random augmentation? data that changed? a loader that shuffles?)"
            if fact == "inputs_digest"
            else ""
        )
        raise MixedRun(
            f"cells that belong together disagree on {fact}{hint}: {'; '.join(groups)}",
            where=min(by_value.values(), key=len)[0],
            next=next,
        )
