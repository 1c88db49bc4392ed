"""The curvature rows U of one checkpoint, read from the store, and the kernel made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from trak_dist.cells import Cell, FeaturizeCell, FisherCell, KernelCell
from trak_dist.cells.gram_part import curvature_cells
from trak_dist.errors import CorruptChunk
from trak_dist.ops import curvature, projection
from trak_dist.ops.dual import Dual
from trak_dist.ops.kernel import Primal
from trak_dist.runtime.inputs import read_grads, require
from trak_dist.runtime.session import Session
from trak_dist.store import contents


class CurvatureRows:
    """U in blocks of rows, each read from the store when it is asked for.

    Without curvature U = X; of `output` √W X; of `fisher` the grads of drawn labels, by a factor
    that makes UᵀU the estimate of the sum over all train rows.

    Parameters
    ----------
    dim : int
        Columns that the rows are folded to.
    """

    def __init__(self, session: Session, model_id: int, dim: int) -> None:
        self._session, self._dim = session, dim
        self._cells = curvature_cells(session.run.plan, model_id)

    def __len__(self) -> int:
        return len(self._cells)

    def __iter__(self) -> Iterator[Float[Tensor, "rows k"]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Float[Tensor, "rows k"]:
        """A block of U, float32; float64 where rows are weighted.

        Raises
        ------
        CorruptChunk
            If a row's out-to-loss can't be of a logistic loss.
        """
        cell, plan = self._cells[index], self._session.run.plan
        rows = projection.fold(read_grads(self._session, cell), self._dim)
        if isinstance(cell, FisherCell):
            drawn = plan.spec.reduce.fisher_draws * plan.fisher_rows / plan.train.rows
            return rows if drawn == 1 else rows / math.sqrt(drawn)
        if plan.curvature == "output":
            return rows.double().mul_(self._weights(cell).sqrt()[:, None])
        return rows

    def _weights(self, cell: FeaturizeCell) -> Tensor:
        q = torch.from_numpy(contents.read(self._session.run, cell, "out_to_loss"))
        if not bool(((q >= 0) & (q <= 1)).all()):
            at = int((~((q >= 0) & (q <= 1))).nonzero()[0])
            raise CorruptChunk(
                f"out-to-loss of row {cell.rows.start + at} is {float(q[at]):.6g}; of a logistic "
                "loss it is from 0 to 1",
                where=cell.id,
                next="reduce.curvature=none, for a model output of another loss",
            )
        return curvature.row_weights(q).to(self._session.device)


def open_kernel(session: Session, cell: KernelCell, *, needed_by: Cell) -> Primal | Dual:
    """A checkpoint's kernel, from the store."""
    run, plan = session.run, session.run.plan
    (receipt,) = require(run, [cell], needed_by=needed_by).values()
    factor = torch.from_numpy(contents.read(run, cell, "kernel")).to(session.device)
    scale = receipt.fact("scale", (int, float))
    if not plan.dual:
        return Primal(factor, scale)
    rows = CurvatureRows(session, cell.model_id, plan.proj_dim)
    return Dual(factor, scale, receipt.fact("lambda_absolute", (int, float)), rows)
