"""Evaluate cells: how good the scores are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.counterfactual import CounterfactualCell
from trak_dist.cells.featurize import FeaturizeCell, largest_cell
from trak_dist.cells.fisher import FisherCell
from trak_dist.cells.gram import GramCell, kernel_dim
from trak_dist.cells.kernel import KernelCell
from trak_dist.cells.margins import MarginsCell
from trak_dist.cells.ownership import OwnedFile
from trak_dist.cells.score import ScoreCell, scores_identity
from trak_dist.cells.series import Series
from trak_dist.cells.top import TopCell, scored_by
from trak_dist.cells.train import retrained, training_on_subsets
from trak_dist.configuration.config import SCALE_ROWS
from trak_dist.coordinates import TRAIN
from trak_dist.plan import Plan, cached_on_plan, digest

PREDICTIONS = 20 * 16  # values of λ, and ensembles and dimensions, of an evaluation
ENSEMBLES = 8  # sizes of them


@dataclass(frozen=True)
class EvaluateCell(Cell):
    """Compares the scores of one target set, or self-influence, with retrained models or labels."""

    kind = "evaluate"
    step = "evaluate"
    depends_on = (
        *(ScoreCell, TopCell, CounterfactualCell, MarginsCell, KernelCell, GramCell),
        *(FeaturizeCell, FisherCell),
    )
    run = "trak_dist.stages.evaluate:evaluate"
    gpu = False
    runs_problem = True
    memory_is_bound = True
    threads_from = "reduce"
    per_member = True
    if_too_large = "fewer ground_truth.subsets or a smaller proj_dim"
    if_too_long = "a smaller proj_dim, or fewer ground_truth.subsets"
    work_unit = "products"

    targets: str

    @classmethod
    def of(cls, plan: Plan) -> Iterator[Self]:
        yield from (cls(name) for name in plan.scored_names() if plan.is_evaluated(name))

    @classmethod
    def count(cls, plan: Plan) -> int:
        return sum(1 for _ in cls.of(plan))

    def identity(self, plan: Plan) -> str:
        return _identity(plan, self.targets)

    def receipt_group(self, plan: Plan) -> tuple[str, ...]:
        return ()

    def needs(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
        scores = list(scored_by(plan, self.targets))
        yield from scores
        if self.targets == TRAIN:
            for model_id in plan.model_ids if scores[0] in done else ():
                yield FeaturizeCell.blocks(plan, model_id, TRAIN)
            return
        yield from CounterfactualCell.of_targets(plan, self.targets)
        yield from (MarginsCell(*model, self.targets) for model in retrained(plan))
        for_truth = plan.has_ground_truth(self.targets) and scores[0] in done
        for model_id in plan.model_ids if for_truth else ():
            kernel = KernelCell(model_id)
            yield kernel
            if kernel in done:
                yield GramCell(model_id)
                yield from FisherCell.blocks(plan, model_id)
                yield FeaturizeCell.blocks(plan, model_id, TRAIN)
                yield FeaturizeCell.blocks(plan, model_id, self.targets)

    def files(self) -> Mapping[str, OwnedFile]:
        return {"figures": OwnedFile(f"report/{self.targets}.json")}

    def work(self, plan: Plan) -> int:
        """Of each checkpoint eigenvectors, sums over subsets, predictions by λ and ensemble."""
        subsets, d, k = plan.ground_truth.subsets, kernel_dim(plan), plan.proj_dim
        if not plan.has_ground_truth(self.targets):
            return 0
        each = ENSEMBLES * plan.train.rows + PREDICTIONS * plan.split(self.targets).rows
        return len(plan.model_ids) * (5 * d**3 + subsets * k * each)

    @classmethod
    def memory(cls, plan: Plan) -> int:
        """The Gram, its vectors, temporaries; masks; predictions by λ and ensemble."""
        subsets, d = plan.ground_truth.subsets, kernel_dim(plan)
        t = max((split.rows for split in plan.targets), default=0)
        per_subset = plan.train.rows + PREDICTIONS * 8 * t
        k = plan.proj_dim
        sums = 8 * k * (SCALE_ROWS + ENSEMBLES * subsets + 3 * t)
        rows = 16 * largest_cell(plan) + sums if plan.dual else 0
        return 6 * 8 * d * d + rows + subsets * per_subset if subsets else 0


def evaluated_on(plan: Plan, targets: str) -> list[object]:
    """What determines the figures of one target set."""
    ground_truth, imported = plan.ground_truth, plan.imported_truth
    truth = [
        *(training_on_subsets(plan), imported.digest if imported else ""),
        *(ground_truth.subsets, ground_truth.seeds),
    ]
    content: list[object] = ["evaluate", scores_identity(plan), plan.cut(targets)]
    content += [truth] if plan.has_ground_truth(targets) else []
    if plan.counterfactuals.targets and targets != TRAIN:
        content += [asdict(plan.counterfactuals)]
    content += [plan.mislabelled or ""] if targets == TRAIN else []
    return content


@cached_on_plan
def _identity(plan: Plan, targets: str) -> str:
    return digest(evaluated_on(plan, targets))
