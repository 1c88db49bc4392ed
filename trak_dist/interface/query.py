"""New targets for a finished run: their gradients, and all stored train rows against them.

`Results.query` calls it. Nothing is written: the examples are a target set of a plan in memory.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trak_dist import datasets, trust
from trak_dist.cells import FeaturizeCell, GramCell, KernelCell
from trak_dist.coordinates import TRAIN, Rows
from trak_dist.errors import ConfigError, MixedRun, NonFiniteScore
from trak_dist.ops import projection
from trak_dist.ops import rows as row_format
from trak_dist.ops.batches import examples_in, rows_of
from trak_dist.ops.scores import Ensemble
from trak_dist.ops.strongest import Strongest
from trak_dist.plan_inputs import ProbedDataset, Split
from trak_dist.runtime.computed_rows import compute_rows
from trak_dist.runtime.curvature import open_kernel
from trak_dist.runtime.inputs import check_same_rows, require
from trak_dist.runtime.session import Session, open_device
from trak_dist.store import contents
from trak_dist.store.kept_tops import Top
from trak_dist.store.run import Run
from trak_dist.worker import cell_numerics

QUERY = "query"
PIECE_BYTES = 2**19  # of rows that are decoded and multiplied at once: in the processor's cache
MIN_ROWS = 32
THREADS = 4

Asked = TypeVar("Asked")
Found = TypeVar("Found")


def strongest_rows(run: Run, examples: Any, *, count: int) -> list[Top]:
    """The strongest train rows for each of some examples; see `Results.query`."""
    check_askable(run, count)
    device = open_device("auto")
    with cell_numerics(device):
        session = _opened(run, device, examples)
        solved = {m: _solved(session, m) for m in run.plan.model_ids}
        return ranked(run, solved, count)


def check_askable(run: Run, count: int) -> None:
    """Raise unless the run has what a query needs, and may be executed."""
    plan = run.plan
    if count < 1:
        raise ConfigError(f"count {count} is not at least 1", where="query", next="count=10")
    if not plan.has_problem:
        raise ConfigError(
            f"the rows of this run were streamed by {plan.rows_from}: it has no problem that would "
            "compute new targets",
            where=str(run.layout.run_dir),
            next="TRAKer.start_scoring_checkpoint and score, for a new exp_name",
        )
    trust.check_trusted(plan, run.layout.run_dir)
    kernels = [KernelCell(m) for m in plan.model_ids]
    require(run, kernels, needed_by=_cell(plan.model_ids[0], 1))
    check_same_rows(run, [TRAIN], needed_by=kernels[0])


class _QuerySession(Session):
    """The session of a run that has the examples as its one target set."""

    only_reads = True

    def __init__(self, run: Run, session: Session, examples: Any) -> None:
        super().__init__(run, session.device)
        self._examples = examples
        self.problem = replace(session.problem, targets={QUERY: examples})

    def batches(self, split: str, rows: Sequence[int]) -> Iterator[tuple[Any, ...]]:
        """Batches of the examples, cut from one that is there, or collated."""
        if not _is_batch(self._examples):
            yield from super().batches(split, rows)
            return
        batch, size = datasets.as_batch(self._examples), self.run.plan.spec.featurize.batch_rows
        for start in range(0, len(rows), size):
            yield rows_of(batch, slice(start, start + size))


def _is_batch(examples: Any) -> bool:
    return isinstance(examples, tuple | Mapping | Tensor)


def _opened(run: Run, device: torch.device, examples: Any) -> _QuerySession:
    batch = _is_batch(examples)
    size = examples_in(datasets.as_batch(examples)) if batch else datasets.length(examples, QUERY)
    if not size:
        raise ConfigError("there are no examples", where="query", next="one at least")
    split = Split(QUERY, size, cell_rows=size, row_source=ProbedDataset(QUERY))
    plan = replace(run.plan, targets=(split,))
    return _QuerySession(replace(run, plan=plan), Session(run, device), examples)


def _cell(model_id: int, size: int) -> FeaturizeCell:
    return FeaturizeCell(model_id, QUERY, Rows(0, size))


def _solved(session: _QuerySession, model_id: int) -> Float[Tensor, "k targets"]:
    """B of one checkpoint, of as many rows as the stored grads have columns."""
    run, plan = session.run, session.run.plan
    cell = _cell(model_id, plan.split(QUERY).rows)
    torch.set_num_threads(FeaturizeCell.threads(plan))
    computed = compute_rows(session, cell, QUERY, cell.rows.numbers)
    (receipt,) = require(run, [GramCell(model_id)], needed_by=cell).values()
    then, now = receipt.fact("checkpoint_digest", str), computed.facts["checkpoint_digest"]
    if then != now:
        raise MixedRun(
            f"the train rows of model_id {model_id} were computed with other weights: digest "
            f"{then} then, {now} now",
            where=str(run.layout.checkpoint(plan.checkpoint(model_id).file)),
            next="restore the checkpoint",
        )
    torch.set_num_threads(KernelCell.threads(plan))
    stored = row_format.encode(computed.grads, plan.spec.featurize.dtype)
    grads = projection.fold(row_format.decode(*stored), plan.proj_dim)
    kernel = open_kernel(session, KernelCell(model_id), needed_by=cell)
    solved = kernel.precondition(grads).to(getattr(torch, plan.precondition_dtype))
    return solved.repeat(plan.store_dim // plan.proj_dim, 1)  # in place of folding each train row


def ranked(run: Run, solved: Mapping[int, Float[Tensor, "k targets"]], count: int) -> list[Top]:
    """The strongest of all train rows, by B of each checkpoint.

    A few threads read and multiply a chunk each, a piece at a time, so memory is little.

    Raises
    ------
    NonFiniteScore
        If a score is not finite.
    """
    targets = next(iter(solved.values())).shape[1]
    best, worst = Strongest(targets, count), Strongest(targets, count)
    multiply = _Multiply(run, solved)
    blocks = list(run.plan.train.blocks())
    cells = (FeaturizeCell(m, TRAIN, rows) for rows in blocks for m in solved)
    products = _in_order(multiply, cells)
    for rows in blocks:
        ensemble = Ensemble()
        for product, out_to_loss in itertools.islice(products, len(solved)):
            ensemble.add(product, out_to_loss)
        scores = ensemble.scores().float().cpu().numpy().T
        if not np.isfinite(scores).all():
            raise NonFiniteScore(
                f"scores of the train rows {rows} are not finite",
                where="query",
                next="stage=verify tells whether what is stored is what was written",
            )
        numbers = np.broadcast_to(np.arange(rows.start, rows.stop), scores.shape)
        best.add(scores, numbers)
        worst.add(-scores, numbers)
    return [
        Top(i, best.rows[i], best.scores[i], worst.rows[i], -worst.scores[i])
        for i in range(targets)
    ]


def _in_order(do: Callable[[Asked], Found], asked: Iterable[Asked]) -> Iterator[Found]:
    """What `do` gives of each, in order; as many threads as there are cores, a few at most."""
    threads = min(THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running: deque[Future[Found]] = deque()
        for one in asked:
            running.append(pool.submit(do, one))
            if len(running) > threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


class _Multiply(threading.local):
    """X B and Q of a chunk of stored rows, decoded in memory that each thread has once."""

    def __init__(self, run: Run, solved: Mapping[int, Float[Tensor, "k targets"]]) -> None:
        some = next(iter(solved.values()))
        self._run, self._solved = run, solved
        rows = max(MIN_ROWS, PIECE_BYTES // (some.itemsize * len(some)))
        self._decoded = some.new_empty(rows, len(some))

    def __call__(self, cell: FeaturizeCell) -> tuple[Tensor, Tensor]:
        b, start = self._solved[cell.model_id], 0
        scale, out_to_loss = (
            torch.from_numpy(contents.read(self._run, cell, name)).to(b.device)
            for name in ("row_scale", "out_to_loss")
        )
        found = b.new_empty(len(cell.rows), b.shape[1])
        for piece in contents.read_pieces(self._run, cell, "grads", len(self._decoded)):
            rows = self._decoded[: len(piece)].copy_(torch.from_numpy(piece))
            torch.mm(rows, b, out=found[start : start + len(piece)])
            start += len(piece)
        return found.mul_(scale.to(found)[:, None]), out_to_loss
