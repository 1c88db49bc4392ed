"""What the cells of one job share: the run, the problem, the device, and the model in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Subset

from trak_dist import problem as problems
from trak_dist.cells import Rows
from trak_dist.errors import DatasetError, DeviceError, ProblemError
from trak_dist.plan import Split
from trak_dist.problem import MapDataset, Problem
from trak_dist.stages import audit, checkpoints
from trak_dist.stages.loaded import Loaded
from trak_dist.store.run import Run

PROBE_ROWS = 16


class Session:
    """One job's view of a run; holds one checkpoint's model at a time."""

    def __init__(self, run: Run, device: torch.device) -> None:
        self.run = run
        self.device = device
        self._loaded: Loaded | None = None
        self._checked: set[str] = set()
        self.took_back = False  # cells of this job, perhaps, which are to be run again

    @cached_property
    def problem(self) -> Problem:
        """The problem, rebuilt from the plan and held against it."""
        plan = self.run.plan
        if plan.train.fed:  # who feeds rows was not asked whether a problem may be executed
            raise ProblemError(
                "the plan of a run that is fed names a problem for some of its splits",
                where=str(self.run.layout.run_dir),
                next="restore the plan, or use another run_dir",
            )
        problem = problems.rebuild(plan.spec.problem, plan.source)
        for split in (plan.train, *plan.targets):
            check_split(problem, split, plan.spec.limit)
        return problem

    def once(self, what: str, check: Callable[[], None]) -> None:
        """Run a check whose result holds for the whole job, the first time only."""
        if what not in self._checked:
            check()
            self._checked.add(what)

    def dataset(self, split: str) -> MapDataset:
        """The examples of a split, `limit` applied."""
        return limited(self.problem.dataset(split), self.run.plan.spec.limit)

    def load(self, model_id: int) -> Loaded:
        """The model of one checkpoint, on the device, with its gradients and its projection."""
        way = audit.way(self.run, model_id)
        there = self._loaded
        if there is None or (there.model_id, there.way) != (model_id, way):
            plan, problem = self.run.plan, self.problem
            model: nn.Module = problem.model.to(self.device).eval()
            digest = checkpoints.load_into(self.run, model, plan.checkpoint(model_id))
            self._loaded = Loaded(
                plan,
                model_id,
                digest,
                model,
                problem.model_output,
                way=way,
            )
        assert self._loaded
        return self._loaded

    def batches(self, split: str, rows: Rows) -> Iterator[tuple[Any, ...]]:
        """Batches of `batch_rows` examples, on the CPU, none reaching beyond `rows`."""
        subset: Subset[Any] = Subset(self.dataset(split), range(rows.start, rows.stop))  # type: ignore[arg-type]
        loader = DataLoader(
            subset,
            batch_size=self.run.plan.spec.featurize.batch_rows,
            collate_fn=self.problem.collate,
            pin_memory=self.device.type == "cuda",
        )
        # One is read while another is computed. A thread's number of threads is its own in torch.
        threads = self.run.plan.spec.featurize.threads
        with ThreadPoolExecutor(
            1, initializer=torch.set_num_threads, initargs=(threads,)
        ) as beside:
            batches = iter(loader)
            upcoming = beside.submit(next, batches)
            for left in reversed(range(len(loader))):
                batch = upcoming.result()
                if left:
                    upcoming = beside.submit(next, batches)
                yield as_batch(batch)

    def to_device(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """The batch with its tensors on the device."""
        return _converted(batch, lambda t: t.to(self.device, non_blocking=True))


def _converted(batch: tuple[Any, ...], convert: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    converted = pytree.tree_map_only(Tensor, convert, batch)
    assert isinstance(converted, tuple)
    return converted


def as_batch(collated: Any) -> tuple[Any, ...]:
    """What collate gave, as the arguments of a model output."""
    if isinstance(collated, Mapping):
        return (dict(collated),)
    return tuple(collated) if isinstance(collated, list | tuple) else (collated,)


def limited(dataset: MapDataset, limit: int) -> MapDataset:
    """The first `limit` examples; all of them if it is 0."""
    if limit == 0 or limit >= len(dataset):
        return dataset
    subset: Subset[Any] = Subset(dataset, range(limit))  # type: ignore[arg-type]
    return subset


def batch_digest(sha: Any, batch: Any) -> None:
    """Add a batch's content to the hash `sha`."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            sha.update(str((leaf.dtype, tuple(leaf.shape))).encode())
            sha.update(leaf.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            sha.update(repr(leaf).encode())
        else:  # its repr may be shortened, or hold an address
            raise DatasetError(
                f"a batch holds {type(leaf).__module__}.{type(leaf).__qualname__}, not tensors",
                where="problem.collate",
                next="let collate give tensors, in tuples, lists or dicts",
            )


def probe(problem: Problem, dataset: MapDataset) -> str:
    """Digest of some rows spread over the dataset, to tell cheaply whether it is another one."""
    count = min(PROBE_ROWS, len(dataset))
    rows = sorted({round(i * (len(dataset) - 1) / max(1, count - 1)) for i in range(count)})
    collate = problem.collate or torch.utils.data.default_collate
    sha = hashlib.sha256()
    for row in rows:
        batch_digest(sha, collate([dataset[row]]))
    return sha.hexdigest()[:32]


def check_split(problem: Problem, split: Split, limit: int) -> None:
    """Raise `DatasetError` if the problem's dataset is not the one that was planned."""
    if split.fed:
        return
    dataset = limited(problem.dataset(split.name), limit)
    found = (len(dataset), probe(problem, dataset))
    if found != (split.rows, split.probe):
        raise DatasetError(
            f"the dataset {split.name!r} changed since planning: {split.rows} rows with digest "
            f"{split.probe} then, {found[0]} rows with digest {found[1]} now",
            where="problem",
            next="restore the data (without random augmentation), or start a new run_dir",
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
        return torch.device(name)
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
    return torch.device("cuda" if cuda and name == "auto" else "cpu")
