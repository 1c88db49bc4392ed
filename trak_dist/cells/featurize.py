"""Featurize cells: projected per-sample gradients."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.ownership import ArraySpec, OwnedRows
from trak_dist.cells.series import Blocks, Series
from trak_dist.cells.train import TrainCell
from trak_dist.configuration.config import CACHE_BYTES
from trak_dist.coordinates import FULL, Rows
from trak_dist.plan import Plan, cached_on_plan, digest
from trak_dist.plan_inputs import Split

INPUT_DIGEST_BYTES = 16  # of what a streamed row was computed from


@dataclass(frozen=True)
class FeaturizeCell(Cell):
    """Writes one chunk of grads: some rows of one split, for one checkpoint."""

    kind = "featurize"
    step = "featurize"
    depends_on = (TrainCell,)
    run = "trak_dist.stages.featurize:featurize"
    gpu = True
    runs_problem = True
    memory_is_bound = True
    threads_from = "featurize"
    per_member = False
    if_too_large = "a smaller featurize.batch_rows or proj_dim"
    if_too_long = "a smaller featurize.cell_rows, in a new run"
    work_unit = "rows"

    model_id: int
    split: str
    rows: Rows

    @classmethod
    def of(cls, plan: Plan) -> Iterator[Self]:
        for series in cls.series(plan):
            yield from series

    @classmethod
    def of_split(cls, plan: Plan, model_id: int, split: str) -> Iterator[Self]:
        """Those of one checkpoint and split, in order of rows."""
        return iter(cls.blocks(plan, model_id, split))

    @classmethod
    def blocks(cls, plan: Plan, model_id: int, split: str) -> Blocks[Self]:
        """The same, as a series."""
        return Blocks.of(cls, model_id, split, split=plan.split(split))

    @classmethod
    def series(cls, plan: Plan) -> Iterator[Blocks[Self]]:
        for model_id in plan.model_ids:
            yield from (cls.blocks(plan, model_id, split.name) for split in plan.splits)

    @classmethod
    def count(cls, plan: Plan) -> int:
        return len(plan.model_ids) * sum(split.cells for split in plan.splits)

    def identity(self, plan: Plan) -> str:
        return _identity(plan, self.split)

    def receipt_group(self, plan: Plan) -> tuple[str, ...]:
        return plan.projection_id, str(self.model_id)

    def needs(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
        yield from trained_by(plan, self.model_id)

    @property
    def dependency_group(self) -> Hashable:
        return self.model_id

    @property
    def shard(self) -> tuple[Hashable, Rows]:
        return (self.model_id, self.split), self.rows

    def arrays(self, plan: Plan) -> Mapping[str, OwnedRows]:
        """`grads` (n, k), `row_scale` (n,) and `out_to_loss` (n,), chunked alike.

        Of streamed rows also `inputs` (n, 16), digests of what each was computed from.
        """
        split = plan.split(self.split)
        group = f"{of_checkpoint(plan, self.model_id)}/{self.split}"

        def owned(name: str, dtype: str, *columns: int) -> OwnedRows:
            return rows_of_array(plan, f"{group}/{name}", split, self.rows, dtype, *columns)

        arrays = {
            "grads": owned("grads", plan.spec.featurize.dtype, plan.store_dim),
            "row_scale": owned("row_scale", "float32"),
            "out_to_loss": owned("out_to_loss", "float32"),
        }
        if split.streamed:
            arrays["inputs"] = owned("inputs", "uint8", INPUT_DIGEST_BYTES)
        return arrays

    @classmethod
    def one_per_array(cls, plan: Plan) -> Iterator[Self]:
        for model_id in plan.model_ids:
            yield from (next(cls.of_split(plan, model_id, s.name)) for s in plan.splits)

    def work(self, plan: Plan) -> int:
        return len(self.rows)

    @classmethod
    def memory(cls, plan: Plan) -> int:
        """Weights, activations, gradients, rows, and what the projection draws.

        Activations count half as much again for what comes and goes, per-sample gradients twice,
        the cell's rows in two types; what is drawn is cached.

        By vmap a whole batch's gradients are held at once; by hooks one parameter's, of a few
        examples or, for a dense projection, of all; by loop one example's.
        """
        spec, p = plan.spec, plan.parameters
        drawn = {"sjlt": 8 * p, "identity": 0}.get(spec.projection.kind, 4 * p * plan.store_dim)
        sparse = spec.projection.kind in ("sjlt", "identity")
        few = plan.gradients == "loop" or (plan.gradients == "hooks" and sparse)
        examples = 1 if few else spec.featurize.batch_rows
        activations = plan.activations * spec.featurize.batch_rows * 3 // 2
        rows = 8 * largest_cell(plan)
        return 4 * p + activations + 8 * examples * p + rows + min(drawn, CACHE_BYTES)


def rows_of_array(
    plan: Plan, path: str, split: Split, rows: Rows, dtype: str, *columns: int
) -> OwnedRows:
    """A cell's rows of an array that has one for each row of a split, and its cells as chunks."""
    spec = ArraySpec(
        shape=(split.rows, *columns),
        chunks=(min(split.cell_rows, split.rows), *columns),
        dtype=dtype,
        compression=plan.spec.store.compression,
    )
    return OwnedRows(path, spec, rows.start, rows.stop)


def trained_by(plan: Plan, model_id: int) -> Iterator[TrainCell]:
    """The cell that trains a model's checkpoint, if the run does."""
    if plan.checkpoint(model_id).trained:
        yield TrainCell(FULL, plan.train_seed(model_id))


def of_checkpoint(plan: Plan, model_id: int) -> str:
    """The group of what is made of one checkpoint with one projection, relative to the store."""
    return f"models/{model_id}/{plan.projection_id}"


def cells_with(
    plan: Plan, model_id: int, split: str, rows: Rows
) -> Iterator[tuple[FeaturizeCell, Rows]]:
    """The cells that have some of these rows of a split, each with those it has, in order."""
    for block in plan.split(split).blocks(overlapping=rows):
        some = Rows(max(rows.start, block.start), min(rows.stop, block.stop))
        yield FeaturizeCell(model_id, split, block), some


def largest_cell(plan: Plan) -> int:
    """Entries of grads in the largest cell."""
    return max(min(s.cell_rows, s.rows) for s in plan.splits) * plan.store_dim


@cached_on_plan
def _identity(plan: Plan, split: str) -> str:
    return digest([plan.fingerprint, plan.cut(split)])
