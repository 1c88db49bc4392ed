"""Top cells: of each target the train rows with the highest and the lowest scores."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.ownership import ArraySpec, OwnedRows
from trak_dist.cells.precondition import largest_block, target_blocks
from trak_dist.cells.score import ScoreCell, keeps_top
from trak_dist.cells.series import Series
from trak_dist.cells.top_part import (
    HALVES_COUNT,
    TopPartCell,
    halves_within,
    kept,
    tops_identity,
    with_tops,
)
from trak_dist.coordinates import Rows
from trak_dist.plan import Plan


@dataclass(frozen=True)
class TopCell(Cell):
    """Merges the parts of a block of targets into the strongest of all train rows."""

    kind = "top"
    step = "top"
    depends_on = (TopPartCell,)
    run = "trak_dist.stages.top:top"
    gpu = False
    runs_problem = False
    memory_is_bound = True
    threads_from = "reduce"
    per_member = True
    if_too_large = "a smaller scores.block_targets or scores.count"
    if_too_long = "a smaller scores.block_targets or scores.count"
    work_unit = "products"

    targets: str
    block: Rows

    @classmethod
    def of(cls, plan: Plan) -> Iterator[Self]:
        for name in with_tops(plan):
            yield from cls.of_targets(plan, name)

    @classmethod
    def of_targets(cls, plan: Plan, targets: str) -> Iterator[Self]:
        """Those of one target set, in order of targets."""
        return (cls(targets, block) for block in target_blocks(plan, targets))

    @classmethod
    def count(cls, plan: Plan) -> int:
        return sum(len(target_blocks(plan, name)) for name in with_tops(plan))

    def identity(self, plan: Plan) -> str:
        return tops_identity(plan, self.targets)

    def receipt_group(self, plan: Plan) -> tuple[str, ...]:
        return ()

    def needs(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
        yield from TopPartCell.of_block(plan, self.targets, self.block)

    def arrays(self, plan: Plan) -> Mapping[str, OwnedRows]:
        """`top` (targets, 2, 2, count) float64: [highest, lowest][train row, score].

        The lowest by their negatives. Of an ensemble also `halves` (some targets, 2, 2, ≤ 100):
        the highest by [either half][train row, score].
        """

        def owned(name: str, *shape: int) -> OwnedRows:
            spec = ArraySpec(
                shape=shape,
                chunks=shape,
                dtype="float64",
                attributes={"model_ids": list(plan.model_ids)},
                if_changed="replace",
            )
            return OwnedRows(f"top/{self.targets}/{self.block}/{name}", spec, 0, shape[0])

        found = {"top": owned("top", len(self.block), 2, 2, kept(plan))}
        if some := halves_within(plan, self.targets, self.block):
            found["halves"] = owned("halves", len(some), 2, 2, kept(plan, HALVES_COUNT))
        return found

    @classmethod
    def one_per_array(cls, plan: Plan) -> Iterator[Self]:
        return cls.of(plan)

    def work(self, plan: Plan) -> int:
        """The scores that are compared, as if each were a product."""
        parts = sum(1 for _ in TopPartCell.of_block(plan, self.targets, self.block))
        return 2 * parts * len(self.block) * kept(plan)

    @classmethod
    def memory(cls, plan: Plan) -> int:
        """What is kept, a part, and both while they are sorted."""
        return 128 * largest_block(plan) * kept(plan)


def scored_by(plan: Plan, targets: str) -> Iterator[ScoreCell | TopCell]:
    """The cells that make what is kept of a target set's scores, or of self-influence."""
    kind = TopCell if keeps_top(plan, targets) else ScoreCell
    return kind.of_targets(plan, targets)
