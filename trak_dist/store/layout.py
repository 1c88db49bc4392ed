"""The names inside a run directory. No other module knows them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trak_dist.cells import (
    RANDOM,
    TRAIN,
    Cell,
    CounterfactualCell,
    EvaluateCell,
    FeaturizeCell,
    GramCell,
    KernelCell,
    PreconditionCell,
    ReportCell,
    ScoreCell,
)
from trak_dist.plan import Plan

SWEEPS = "sweeps"
# What no other member of a sweep can use, but for models without random rows.
OF_MEMBER = (ScoreCell, CounterfactualCell, EvaluateCell, ReportCell)


@dataclass(frozen=True)
class Layout:
    """Where the run at `run_dir` keeps its things.

    The member of a sweep, at `sweeps/<reduce_id>` of its base run, borrows from that run all that
    does not depend on how it reduces; its own are plans, scores, reports and their receipts.
    """

    run_dir: Path

    @cached_property
    def base(self) -> Path:
        """The run whose sweep this one is a member of; `run_dir` itself if there is none."""
        base = self.run_dir.parent.parent
        swept = self.run_dir.parent.name == SWEEPS and Layout(base).plan(0).exists()
        return base if swept else self.run_dir

    @property
    def member(self) -> str:
        """Its name if this is the member of a sweep, else nothing."""
        return "" if self.base == self.run_dir else self.run_dir.name

    @property
    def sweeps(self) -> Path:
        """The members of the run's sweeps."""
        return self.base / SWEEPS

    def members(self) -> list[str]:
        """The names of the members of the run's sweeps, in order."""
        return sorted(path.parent.name for path in self.sweeps.glob("*/plan.json"))

    def plan(self, generation: int) -> Path:
        """The plan as first made, or as extended so many times."""
        return self.run_dir / (f"plan.{generation}.json" if generation else "plan.json")

    def generation(self) -> int | None:
        """How often the plan was extended; None if there is none."""
        if not self.plan(0).exists():
            return None
        found = (path.name.split(".")[1] for path in self.run_dir.glob("plan.*.json"))
        return max((int(g) for g in found if g.isdecimal()), default=0)

    @property
    def store(self) -> Path:
        """The root group of all arrays."""
        return self.base / "store.zarr"

    @property
    def logs(self) -> Path:
        """What local workers print."""
        return self.run_dir / "logs"

    def job(self, number: int) -> Path:
        """What an array of tasks was submitted to do."""
        return self.base / "jobs" / f"{number}.json"

    def jobs(self) -> list[int]:
        """The numbers of the arrays that were submitted, in order."""
        found = (path.stem for path in (self.base / "jobs").glob("*.json"))
        return sorted(int(n) for n in found if n.isdecimal())

    def job_logs(self, number: int) -> Path:
        """The batch script of an array, and what its tasks print."""
        return self.base / "logs" / "slurm" / str(number)

    def task_logs(self, number: int) -> dict[int, Path]:
        """What the tasks of an array that ever began printed, by index."""
        found = self.job_logs(number).glob("*_*_0_log.out")
        return {int(path.name.split("_")[1]): path for path in found}

    def attempt(self, job: str, index: int) -> Path:
        """What the last attempt at one task of a job began with."""
        return self.base / "jobs" / job / f"{index}.json"

    def checkpoint(self, path: str) -> Path:
        """A checkpoint as the plan names it."""
        return self.base / path  # an absolute path stays what it is

    @staticmethod
    def trained_checkpoint(subset: str, seed: int) -> str:
        """The checkpoint that a train cell makes, relative to the run directory."""
        return f"checkpoints/{subset}/{seed}.safetensors"

    def checkpoint_digest(self, model_id: int) -> Path:
        """The content digest that the first worker to load a checkpoint publishes."""
        return self.base / "receipts" / "checkpoints" / f"{model_id}.json"

    def distrusted(self, model_id: int) -> Path:
        """There if an audit of a checkpoint failed: its gradients are computed one by one."""
        return self.base / "receipts" / "distrusted" / f"{model_id}.json"

    def receipts(self, plan: Plan, cell: Cell) -> Path:
        """The directory of the cell's receipt, shared with others that are read along with it."""
        shared = isinstance(cell, CounterfactualCell) and cell.whose == RANDOM
        owner = self.run_dir if isinstance(cell, OF_MEMBER) and not shared else self.base
        root = owner / "receipts" / cell.stage
        match cell:
            case FeaturizeCell():
                return root / plan.projection_id / str(cell.model_id)
            case GramCell():
                return root / plan.projection_id / str(plan.proj_dim)
            case KernelCell() | PreconditionCell():
                return root / plan.projection_id / plan.kernel_id
            case _:
                return root

    def receipt(self, plan: Plan, cell: Cell) -> Path:
        """The cell's own receipt."""
        name = cell.id.replace("/", "_")
        return self.receipts(plan, cell) / f"{name}.json"

    def consolidated(self, plan: Plan, cell: FeaturizeCell) -> Path:
        """The columnar file of one checkpoint's featurize receipts."""
        return self.receipts(plan, cell) / "consolidated.npz"

    def failure(self, plan: Plan, cell: Cell) -> Path:
        """What went wrong in the cell's last attempt."""
        return self.receipts(plan, cell) / "failed" / self.receipt(plan, cell).name

    def grads(self, plan: Plan, model_id: int, split: str) -> Path:
        """The group of `grads`, `row_scale`, `out_to_loss`, and `inputs` where rows are fed."""
        assert split == TRAIN or any(s.name == split for s in plan.targets)
        return self._model(plan, model_id) / split

    def parts(self, plan: Plan, model_id: int, split: str) -> Path:
        """The parts of a checkpoint's split that is fed."""
        return self.base / "parts" / str(model_id) / plan.projection_id / split

    def gram(self, plan: Plan, model_id: int) -> Path:
        """The array XᵀX."""
        return self._model(plan, model_id) / "gram" / str(plan.proj_dim)

    def kernel(self, plan: Plan, model_id: int) -> Path:
        """The group of `kernel` and `precond/<targets>`."""
        return self._model(plan, model_id) / "reduce" / plan.kernel_id

    def scores(self, targets: str) -> Path:
        """The array of the ensemble's scores; of `train` their self-influence."""
        return self._own / "scores" / targets

    def halves(self, targets: str) -> Path:
        """The array of the scores of either half of the ensemble, for some targets."""
        return self._own / "halves" / targets

    @property
    def masks(self) -> Path:
        """Which train rows each subset of the ground truth has."""
        return self.base / "ground_truth" / "masks.npy"

    def margins(self, targets: str, seed: int) -> Path:
        """The array of one seed's model outputs, a row per subset."""
        return self.store / "ground_truth" / "margins" / targets / str(seed)

    def evaluation(self, targets: str) -> Path:
        """What `stage=evaluate` found, in figures."""
        return self.run_dir / "report" / f"{targets}.json"

    def report(self, targets: str) -> Path:
        """The page; its picture lies beside it as `.png`."""
        return self.run_dir / "report" / f"{targets}.html"

    @property
    def _own(self) -> Path:
        return self.store / SWEEPS / self.member if self.member else self.store

    def _model(self, plan: Plan, model_id: int) -> Path:
        return self.store / "models" / str(model_id) / plan.projection_id
