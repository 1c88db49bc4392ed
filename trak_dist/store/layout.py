"""The names inside a run directory; no other module knows them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trak_dist.cells import Cell, FeaturizeCell
from trak_dist.cells.ownership import OwnedRows
from trak_dist.plan import Plan
from trak_dist.store import atomic

SWEEPS = "sweeps"
CONSOLIDATED = "consolidated.npz"


@dataclass(frozen=True)
class Layout:
    """Where the run at `run_dir` keeps its things.

    The member of a sweep, at `sweeps/<reduce_id>` of its base run, shares with that run everything
    up to the kernels; plans, scores, reports and their receipts are its own.
    """

    run_dir: Path

    @cached_property
    def base(self) -> Path:
        """The run whose sweep this one is a member of; `run_dir` itself if there is none."""
        base = self.run_dir.parent.parent
        swept = self.run_dir.parent.name == SWEEPS and atomic.exists(Layout(base).plan(0))
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
        names = sorted(atomic.names(self.sweeps))
        return [name for name in names if atomic.exists(self.sweeps / name / "plan.json")]

    def run_dirs(self) -> list[Path]:
        """The base run's directory, then those of the members of its sweeps."""
        return [self.base, *(self.sweeps / name for name in self.members())]

    def plan(self, generation: int) -> Path:
        """The plan as first made, or as extended so many times."""
        return self.run_dir / (f"plan.{generation}.json" if generation else "plan.json")

    def generation(self) -> int | None:
        """How often the plan was extended; None if there is none."""
        if not atomic.exists(self.plan(0)):
            return None
        last = max(_numbers(self.run_dir, r"plan\.([1-9][0-9]*)\.json"), default=0)
        while atomic.exists(self.plan(last + 1)):  # on NFS a listing may be older than the file
            last += 1
        return last

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
        return _numbers(self.base / "jobs", r"([1-9][0-9]*)\.json")

    def job_logs(self, number: int) -> Path:
        """The batch script of an array, and what its tasks print."""
        return self.base / "logs" / "slurm" / str(number)

    def task_logs(self, number: int) -> dict[tuple[int, int], Path]:
        """What the tasks of an array that ever began printed, by index and process."""
        found = self.job_logs(number).glob("*_*_*_log.out")
        by_place = ((path.name.split("_")[1:3], path) for path in found)
        return {(int(i), int(p)): f for (i, p), f in by_place if i.isdecimal() and p.isdecimal()}

    def attempt(self, job: str, index: int, process: int = 0) -> Path:
        """The record of the last attempt of one process at one task of a job."""
        name = f"{index}.{process}.json" if process else f"{index}.json"
        return self.base / "jobs" / job / name

    def checkpoint(self, path: str) -> Path:
        """A checkpoint as the plan names it."""
        return self.base / path  # an absolute path stays what it is

    def checkpoint_digest(self, model_id: int) -> Path:
        """The content digest that the first worker to load a checkpoint publishes."""
        return self.base / "receipts" / "checkpoints" / f"{model_id}.json"

    def audit_failure(self, model_id: int) -> Path:
        """There if an audit of a checkpoint failed: its gradients are computed one by one."""
        return self.base / "receipts" / "distrusted" / f"{model_id}.json"

    def receipts(self, plan: Plan, cell: Cell) -> Path:
        """The directory of the cell's receipt, shared with those that are read together."""
        owner = self.run_dir if cell.per_member else self.base
        return owner.joinpath("receipts", cell.kind, *cell.receipt_group(plan))

    def receipt(self, plan: Plan, cell: Cell) -> Path:
        """The cell's own receipt."""
        return self.receipts(plan, cell) / receipt_name(cell.id)

    def consolidated(self, plan: Plan, cell: FeaturizeCell) -> Path:
        """The file of columns of one checkpoint's featurize receipts."""
        return self.receipts(plan, cell) / CONSOLIDATED

    def failure(self, plan: Plan, cell: Cell) -> Path:
        """What went wrong in the cell's last attempt."""
        return self.receipts(plan, cell) / "failed" / self.receipt(plan, cell).name

    def array(self, cell: Cell, owned: OwnedRows) -> Path:
        """The array of which `cell` owns some rows."""
        store = self.store / SWEEPS / self.member if self.member and cell.per_member else self.store
        return store / owned.path

    def file(self, cell: Cell, name: str) -> Path:
        """A file that `cell` owns, by its name there."""
        return (self.run_dir if cell.per_member else self.base) / cell.files()[name].path

    def parts(self, plan: Plan, model_id: int, split: str) -> Path:
        """The parts of a checkpoint's streamed split."""
        return self.base / "parts" / str(model_id) / plan.projection_id / split

    @property
    def masks(self) -> Path:
        """Which train rows each subset of the ground truth has."""
        return self.base / "ground_truth" / "masks.npy"


def receipt_name(cell_id: str) -> str:
    """The name of a cell's receipt, in its directory."""
    return f"{cell_id.replace('/', '_')}.json"


def _numbers(directory: Path, pattern: str) -> list[int]:
    """The numbers in the names in `directory` that match, in order."""
    found = (re.fullmatch(pattern, name) for name in atomic.names(directory))
    return sorted(int(match[1]) for match in found if match)
