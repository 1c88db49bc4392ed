"""Counterfactual cells: models retrained without the rows that scores point at."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.score import ScoreCell, scores_identity
from trak_dist.cells.series import Series
from trak_dist.cells.top import TopCell, scored_by
from trak_dist.cells.train import training, training_bytes
from trak_dist.coordinates import AtRandom, HelpfulTo, Selection
from trak_dist.plan import Plan, cached_on_plan, digest
from trak_dist.spacing import evenly_spaced


@dataclass(frozen=True)
class CounterfactualCell(Cell):
    """The model outputs on some targets after training without `removed` rows of the train set.

    `selection` says which rows: those most helpful to one of the targets, or random ones. Its
    outputs are in its receipt.
    """

    kind = "counterfactual"
    step = "counterfactual"
    depends_on = (ScoreCell, TopCell)
    run = "trak_dist.stages.counterfactual:counterfactual"
    gpu = True
    runs_problem = True
    memory_is_bound = False
    threads_from = "featurize"
    if_too_large = "a smaller model or batch in train_checkpoint"
    if_too_long = ""
    work_unit = "train_rows"

    targets: str
    selection: Selection
    removed: int
    seed: int

    @classmethod
    def of(cls, plan: Plan) -> Iterator[Self]:
        for split in plan.targets:
            yield from cls.of_targets(plan, split.name)

    @classmethod
    def of_targets(cls, plan: Plan, targets: str) -> Iterator[Self]:
        """Those of one target set, the ones without random rows last."""
        requested = plan.counterfactuals
        rows = evenly_spaced(plan.split(targets).rows, requested.targets)
        selections: list[Selection] = [HelpfulTo(row) for row in rows]
        for selection in (*selections, AtRandom()) if selections else ():
            for removed in requested.remove:
                for seed in range(requested.seeds):
                    yield cls(targets, selection, removed, seed)

    @classmethod
    def count(cls, plan: Plan) -> int:
        requested = plan.counterfactuals
        chosen = [min(requested.targets, split.rows) for split in plan.targets]
        return sum(c + 1 for c in chosen if c) * len(requested.remove) * requested.seeds

    def identity(self, plan: Plan) -> str:
        identity = _without_helpful if self.needs_scores else _without_random
        return identity(plan, self.targets)

    @property
    def needs_scores(self) -> bool:
        """Whether its rows are selected by scores."""
        return isinstance(self.selection, HelpfulTo)

    @property
    def per_member(self) -> bool:
        return self.needs_scores

    def receipt_group(self, plan: Plan) -> tuple[str, ...]:
        return ()

    def needs(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
        if self.needs_scores:
            yield from scored_by(plan, self.targets)

    @property
    def dependency_group(self) -> Hashable:
        return self.targets if self.needs_scores else None

    @property
    def chain(self) -> Hashable:
        return self.targets, self.selection

    def work(self, plan: Plan) -> int:
        return plan.train.rows - self.removed

    @classmethod
    def memory(cls, plan: Plan) -> int:
        return training_bytes(plan)


def _retraining(plan: Plan, targets: str) -> list[object]:
    return ["counterfactual", training(plan), plan.cut(targets)]


@cached_on_plan
def _without_random(plan: Plan, targets: str) -> str:
    return digest(_retraining(plan, targets))


@cached_on_plan
def _without_helpful(plan: Plan, targets: str) -> str:
    return digest([*_retraining(plan, targets), scores_identity(plan)])
