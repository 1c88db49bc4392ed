"""Train cells: checkpoints that the run makes itself."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.ownership import OwnedFile
from trak_dist.cells.series import Series
from trak_dist.coordinates import FULL
from trak_dist.plan import Plan, cached_on_plan, digest


@dataclass(frozen=True)
class TrainCell(Cell):
    """Trains the checkpoint of one seed on one subset of the train set (`full`: all of it)."""

    kind = "train"
    step = "train"
    depends_on = ()
    run = "trak_dist.stages.train:train"
    gpu = True
    runs_problem = True
    memory_is_bound = False
    threads_from = "featurize"
    per_member = False
    if_too_large = "a smaller model or batch in train_checkpoint"
    if_too_long = ""
    work_unit = "train_rows"

    subset: str
    seed: int

    @classmethod
    def of(cls, plan: Plan) -> Iterator[Self]:
        yield from (cls(FULL, seed) for seed in _seeds(plan))
        yield from (cls(subset, seed) for subset, seed in retrained(plan))

    @classmethod
    def count(cls, plan: Plan) -> int:
        return len(_seeds(plan)) + plan.ground_truth.subsets * plan.ground_truth.seeds

    def identity(self, plan: Plan) -> str:
        return training(plan) if self.subset == FULL else training_on_subsets(plan)

    def receipt_group(self, plan: Plan) -> tuple[str, ...]:
        return ()

    def needs(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
        yield from ()

    def checkpoint(self, plan: Plan) -> int | None:
        return self.seed if self.subset == FULL else None

    @property
    def dependency_group(self) -> Hashable:
        return None

    @property
    def chain(self) -> Hashable:
        return self if self.subset == FULL else self.subset

    @property
    def chain_order(self) -> int:
        return self.seed

    def files(self) -> Mapping[str, OwnedFile]:
        return {"checkpoint": OwnedFile(checkpoint_path(self.subset, self.seed), tensors=True)}

    @classmethod
    def disk_bytes(cls, plan: Plan) -> int:
        return 4 * plan.parameters * cls.count(plan)

    def work(self, plan: Plan) -> int:
        share = 1.0 if self.subset == FULL else plan.ground_truth.alpha
        return round(share * plan.train.rows)

    @classmethod
    def memory(cls, plan: Plan) -> int:
        return training_bytes(plan)


def checkpoint_path(subset: str, seed: int) -> str:
    """The checkpoint that a train cell makes, relative to the run directory."""
    return f"checkpoints/{subset}/{seed}.safetensors"


def retrained(plan: Plan) -> Iterator[tuple[str, int]]:
    """Subset and seed of each model of the ground truth, subset by subset."""
    for subset in range(plan.ground_truth.subsets):
        yield from ((str(subset), seed) for seed in range(plan.ground_truth.seeds))


def _seeds(plan: Plan) -> list[int]:
    """Those of the ensemble's checkpoints that the run trains, each once."""
    trained = (m for m in plan.model_ids if plan.checkpoint(m).trained)
    return list(dict.fromkeys(map(plan.train_seed, trained)))


@cached_on_plan
def training(plan: Plan) -> str:
    """Digest of what determines a checkpoint that is trained on all rows."""
    return digest([plan.trained_from, plan.settings_of("featurize.threads")])


@cached_on_plan
def training_on_subsets(plan: Plan) -> str:
    """Digest of what determines the models of the ground truth."""
    return digest([training(plan), plan.ground_truth.alpha])


def training_bytes(plan: Plan) -> int:
    """An estimate of the bytes that training holds, since `train_checkpoint` is the user's.

    Weights, what they were, their gradients and an optimizer's two moments; activations of a batch
    as large as featurize's, and half as much for what comes and goes.
    """
    activations = plan.activations * plan.spec.featurize.batch_rows * 3 // 2
    return 5 * 4 * plan.parameters + activations
