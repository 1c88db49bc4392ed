"""Margins cells: what retrained models say of the targets."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.ownership import ArraySpec, OwnedRows
from trak_dist.cells.series import Series
from trak_dist.cells.train import TrainCell, retrained, training_on_subsets
from trak_dist.plan import Plan, cached_on_plan, digest


@dataclass(frozen=True)
class MarginsCell(Cell):
    """The model outputs on one target set of a checkpoint that was trained on a subset."""

    kind = "margins"
    step = "train"
    depends_on = (TrainCell,)
    run = "trak_dist.stages.train:margins"
    gpu = True
    runs_problem = True
    memory_is_bound = True
    threads_from = "featurize"
    per_member = False
    if_too_large = "a smaller featurize.batch_rows"
    if_too_long = ""
    work_unit = "rows"

    subset: str
    seed: int
    targets: str

    @classmethod
    def of(cls, plan: Plan) -> Iterator[Self]:
        yield from (cls(*model, split.name) for model in retrained(plan) for split in plan.targets)

    @classmethod
    def count(cls, plan: Plan) -> int:
        return plan.ground_truth.subsets * plan.ground_truth.seeds * len(plan.targets)

    def identity(self, plan: Plan) -> str:
        return _identity(plan, self.targets)

    def receipt_group(self, plan: Plan) -> tuple[str, ...]:
        return ()

    def needs(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
        yield TrainCell(self.subset, self.seed)

    @property
    def dependency_group(self) -> Hashable:
        return self.subset, self.seed

    @property
    def chain(self) -> Hashable:
        return self.subset

    @property
    def chain_order(self) -> int:
        """A model's margins follow its training."""
        return self.seed

    def arrays(self, plan: Plan) -> Mapping[str, OwnedRows]:
        """`margins` (subsets, t) float32, a row per subset.

        Members of one sweep may ask for different numbers of subsets.
        """
        t, row = plan.split(self.targets).rows, int(self.subset)
        spec = ArraySpec(
            shape=(plan.ground_truth.subsets, t),
            chunks=(1, t),
            dtype="float32",
            if_changed="grow",
        )
        path = f"ground_truth/margins/{self.targets}/{self.seed}"
        return {"margins": OwnedRows(path, spec, row, row + 1)}

    @classmethod
    def one_per_array(cls, plan: Plan) -> Iterator[Self]:
        seeds = range(plan.ground_truth.seeds if plan.ground_truth.subsets else 0)
        yield from (cls("0", seed, split.name) for split in plan.targets for seed in seeds)

    def work(self, plan: Plan) -> int:
        return plan.split(self.targets).rows

    @classmethod
    def memory(cls, plan: Plan) -> int:
        """Weights; activations of a batch, of which a forward pass without gradients keeps few."""
        return 4 * plan.parameters + plan.activations * plan.spec.featurize.batch_rows


@cached_on_plan
def _identity(plan: Plan, targets: str) -> str:
    return digest([training_on_subsets(plan), plan.split(targets).content])
