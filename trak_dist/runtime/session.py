"""What the cells of one job share: the run, the problem, the device, and the model in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trak_dist import building, datasets
from trak_dist import problem as problems
from trak_dist.checkpoints import digests
from trak_dist.checkpoints.featurizer import CheckpointFeaturizer, batch_in, model_in
from trak_dist.checks import gradient_audit, pinned_model
from trak_dist.configuration.config import Spec
from trak_dist.coordinates import TRAIN, Rows
from trak_dist.errors import DeviceError, ProblemError
from trak_dist.ops.dropout import thinned
from trak_dist.problem import MapDataset, Problem, Rendered
from trak_dist.store.run import Run


class Sessions:
    """Keeps the last session open: its owner's next job finds problem and model in memory."""

    def __init__(self) -> None:
        self._last: tuple[Run, str, Session] | None = None

    def open(self, run: Run, device: str) -> Session:
        """The last session, if it is of this run, plan and device; else a new one."""
        if self._last is None or self._last[:2] != (run, device):
            self._last = run, device, Session(run, open_device(device))
        return self._last[2]


class Session:
    """One job's view of a run; holds one checkpoint's model at a time.

    One that `only_reads` publishes no digest of a checkpoint that it is the first to load.
    """

    only_reads = False

    def __init__(self, run: Run, device: torch.device) -> None:
        self.run = run
        self.device = device
        self._featurizer: CheckpointFeaturizer | None = None
        self._checked: set[str] = set()
        # digests of rows of splits: runtime.reread
        self.input_digests: dict[tuple[str, Rows], str] = {}
        self.revoked_cells = False  # cells of this job, perhaps, which are to be run again

    @cached_property
    def problem(self) -> Problem:
        """The problem, rebuilt from the plan and checked against it."""
        plan = self.run.plan
        what = plan.spec.problem["_target_"]
        if not plan.has_problem:  # nobody was asked whether one may be executed
            raise ProblemError(
                "the plan of a run whose rows are streamed names a problem for some of its splits",
                where=str(self.run.layout.run_dir),
                next="restore the plan, or use another run_dir",
            )
        problem = building.rebuild(plan.spec.problem, plan.source)
        problem = problems.with_random_policy(problem, plan.spec.featurize.random)
        pinned_model.check_unsaved(plan.source, problem.model, what=what)
        for split in (plan.train, *plan.targets):
            datasets.check_split(problem, split, plan.spec)
        if plan.source.built:
            now = built_signature(problem, plan.spec, plan.source.unsaved, self.device)
            pinned_model.check_built(plan.source, now, what=what)
        return problem

    def run_once(self, what: str, check: Callable[[], None]) -> None:
        """Run a check whose result holds for the whole job, the first time only."""
        if what not in self._checked:
            check()
            self._checked.add(what)

    def dataset(self, split: str) -> MapDataset:
        """The examples of a split, `limit` applied."""
        return datasets.apply_limit(self.problem.dataset(split), self.run.plan.spec.limit)

    def rendered(self, split: str, row: int) -> Rendered | None:
        """How a row is shown, if there is a dataset to read it from and the problem says.

        Raises
        ------
        UnreadableRow, ProblemError
            If it can't be read or shown.
        """
        if self.run.plan.split(split).streamed:
            return None
        return datasets.render_row(self.problem, split, row)

    def featurizer(self, model_id: int) -> CheckpointFeaturizer:
        """The model of one checkpoint, on the device, with its gradients and its projection."""
        method = gradient_audit.gradient_method(self.run, model_id)
        current = self._featurizer
        if current is None or (current.model_id, current.method) != (model_id, method):
            plan, problem = self.run.plan, self.problem
            model: nn.Module = problem.model.to(self.device).eval()
            checkpoint = plan.checkpoint(model_id)
            digest = digests.load_into(self.run, model, checkpoint, publish=not self.only_reads)
            seed = plan.dropout_seed(model_id)
            model = model if seed is None else thinned(model, seed)
            self._featurizer = CheckpointFeaturizer(
                plan,
                model_id,
                digest,
                model,
                problem.model_output,
                method=method,
            )
        assert self._featurizer
        return self._featurizer

    def batches(self, split: str, rows: Sequence[int]) -> Iterator[tuple[Any, ...]]:
        """Batches of `batch_rows` of these rows, on the CPU.

        They are read in this thread, which made the dataset: see `datasets`. A GPU computes one
        batch while the next is read.

        Raises
        ------
        UnreadableRow
            If an example can't be read, naming it, or collate fails.
        """
        size, dataset = self.run.plan.spec.featurize.batch_rows, self.problem.dataset(split)
        for start in range(0, len(rows), size):
            batch = datasets.batch(self.problem, dataset, rows[start : start + size], name=split)
            cuda = self.device.type == "cuda"
            yield _converted(batch, lambda t: t.pin_memory()) if cuda else batch

    def to_device(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """The batch with its tensors on the device."""
        return _converted(batch, lambda t: t.to(self.device, non_blocking=True))


def _converted(batch: tuple[Any, ...], convert: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    converted = pytree.tree_map_only(Tensor, convert, batch)
    assert isinstance(converted, tuple)
    return converted


def built_signature(
    problem: Problem, spec: Spec, unsaved: Collection[str], device: torch.device
) -> dict[str, pinned_model.Numbers]:
    """What pins the problem's model as it is built, from its first and its last train row.

    Parameters
    ----------
    unsaved : collection of str
        The names of the tensors that no checkpoint holds.
    """
    compute, dataset = spec.featurize.compute, datasets.apply_limit(problem.train, spec.limit)
    rows = sorted({0, len(dataset) - 1})[-spec.featurize.batch_rows :]
    batch = datasets.batch(problem, dataset, rows, name=TRAIN)
    return pinned_model.built_values(
        model_in(compute, problem.model.to(device).eval()),
        problem.model_output,
        _converted(batch_in(compute, batch), lambda t: t.to(device)),
        params=spec.featurize.params,
        unsaved=unsaved,
    )


def open_device(name: str) -> torch.device:
    """The device called `auto`, `cpu`, `cuda` or `cuda:<index>`.

    Raises
    ------
    DeviceError
        If what is asked for is not there, or a GPU was granted that torch does not see.
    """
    cuda = torch.cuda.is_available()
    if name.startswith("cuda"):
        if not cuda or (torch.device(name).index or 0) >= torch.cuda.device_count():
            raise DeviceError(
                f"device {name} was asked for, torch sees {torch.cuda.device_count() or 'no'} "
                "CUDA device",
                where="cluster.device",
                next="cluster.device=cpu, or run where there is a GPU",
            )
        return _gpu(name)
    if name not in ("auto", "cpu"):
        raise DeviceError(
            f"device {name} is not one of cpu, cuda", where="device", next="device='cpu'"
        )
    granted = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS")
    if name == "auto" and granted and not cuda and torch.version.cuda:
        raise DeviceError(
            f"Slurm gave this task GPU {granted}, torch {torch.__version__} sees no CUDA device",
            where="cluster.device",
            next="leave the node out (cluster.exclude), or compute without: cluster.device=cpu",
        )
    return _gpu("cuda") if cuda and name == "auto" else torch.device("cpu")


def own_gpu(name: str, local: int) -> str:
    """`auto` or `cuda` for process `local` of several on this node: each computes on another GPU.

    It is what `cuda` means from now on, for the user's code too.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or count < 2:
        return name
    torch.cuda.set_device(local % count)
    return f"cuda:{local % count}"


def _gpu(name: str) -> torch.device:
    # Buffers with which cuBLAS has one order of sums; it reads this when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device(name)
