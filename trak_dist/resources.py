"""Memory and disk that a plan's cells need, known before anything runs. Pure: no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import PurePosixPath

from trak_dist.cells import KINDS, Cell, FeaturizeCell, count
from trak_dist.errors import MemoryRefused
from trak_dist.plan import Plan


def disk_bytes(plan: Plan, kinds: Iterable[type[Cell]] = KINDS) -> int:
    """Bytes of what all cells of some kinds write, uncompressed."""
    return sum(kind.disk_bytes(plan) for kind in kinds)


def chunk_files(plan: Plan) -> int:
    """Files that are chunks of arrays."""
    return sum(_array_chunks(plan).values())


def other_files(plan: Plan) -> int:
    """The other files of a finished run: metadata, what else cells own, a receipt of each cell.

    The receipts of a checkpoint's featurize cells are one file in the end. Pictures of a report
    that depend on the examples are not counted, nor what a job logs.
    """
    arrays = _array_chunks(plan)
    groups = {group for path in arrays for group in path.parents}
    firsts = [cell for kind in KINDS for cell in islice(kind.of(plan), 1)]
    own = sum(type(c).count(plan) * sum(f.always for f in c.files().values()) for c in firsts)
    gathered = 0 if plan.train.streamed else FeaturizeCell.count(plan) - len(plan.model_ids)
    checkpoints = len({plan.train_seed(model_id) for model_id in plan.model_ids})
    plain = 1 + bool(plan.ground_truth.subsets) + checkpoints  # plan, masks, checkpoints' digests
    return len(arrays) + len(groups) + own + count(plan) - gathered + plain


def _array_chunks(plan: Plan) -> dict[PurePosixPath, int]:
    return {
        PurePosixPath(owned.path): owned.spec.chunk_files
        for kind in KINDS
        for cell in kind.one_per_array(plan)
        for owned in cell.arrays(plan).values()
    }


def shared_bytes(plan: Plan, base: Plan) -> int:
    """Bytes of what a new member of a sweep finds in the run that it is made from."""
    firsts = [cell for kind in KINDS for cell in islice(kind.of(plan), 1)]
    return sum(
        min(kind.disk_bytes(plan), kind.disk_bytes(base))
        for kind, cell in ((type(cell), cell) for cell in firsts)
        if not cell.per_member and cell.receipt_group(plan) == cell.receipt_group(base)
    )


def fit_workers(plan: Plan, *, requested: int, memory: int) -> int:
    """How many of `requested` workers fit into `memory` bytes, whatever cells they run.

    Raises
    ------
    MemoryRefused
        If not even one fits, saying what would.
    """
    bounded = (kind for kind in KINDS if kind.memory_is_bound and kind.count(plan))
    kind = max(bounded, key=lambda k: k.memory(plan))
    needed = kind.memory(plan)
    if needed <= memory:
        return min(requested, memory // max(1, needed))
    smaller = kind.if_too_large
    if kind is FeaturizeCell and (rows := _batch_rows_within(plan, memory)):
        smaller = f"featurize.batch_rows={rows} would fit"
    raise MemoryRefused(
        f"a {kind.kind} cell needs {needed / 2**30:,.1f} GiB, there are {memory / 2**30:,.1f} GiB",
        where=kind.kind,
        next=f"{smaller}, or cluster.memory_gb=…",
    )


def _batch_rows_within(plan: Plan, limit: int) -> int:
    """The half, quarter, … of the planned batch with which featurize cells fit; 0 if none."""
    rows = plan.spec.featurize.batch_rows // 2
    while rows:
        featurize = replace(plan.spec.featurize, batch_rows=rows)
        smaller = replace(plan, spec=replace(plan.spec, featurize=featurize))
        if FeaturizeCell.memory(smaller) <= limit:
            break
        rows //= 2
    return rows
