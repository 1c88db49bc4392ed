"""A problem: what a user brings. A function named by `problem._target_` returns one.

Also how the function is found and its source pinned, which launcher and workers do alike.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trak_dist.errors import ProblemError, TrakDistError
from trak_dist.plan import Source, digest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from trak_dist.ops.model_outputs import ModelOutput


SHIPPED = tuple(f"trak_dist.problems.{n}.problem" for n in ("mnist", "fashion_mnist", "cifar2"))


class MapDataset(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int:
        """Its number of examples."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """One example."""
        ...


@dataclass(frozen=True)
class Rendered:
    """How an example is shown in a report: a picture (h, w) or (h, w, 3) or a text, and a label."""

    content: NDArray[np.generic] | str
    label: str


TrainCheckpoint = Callable[["MapDataset", int, "torch.device"], Mapping[str, "torch.Tensor"]]


@dataclass(frozen=True)
class Problem:
    """What to attribute: a model, its output, its data and its checkpoints.

    Parameters
    ----------
    model : torch.nn.Module
        The architecture; its weights are replaced by each checkpoint's.
    model_output : ModelOutput
        The scalar f(z; θ) that TRAK linearises, and its out-to-loss Q.
    train : map-style dataset
        The training examples, in the order of the rows of the scores.
    targets : mapping of names to map-style datasets
        The target sets, each in the order of the columns of its scores.
    checkpoints : sequence of paths
        State dicts (`.pt` read with `weights_only=True`, or `.safetensors`); the position is the
        `model_id`. Empty if `stage=train` is to make them with `train_checkpoint`.
    collate : callable, optional
        Examples to one batch; torch's default where left out.
    render : callable, optional
        One example to `Rendered`, for the report.
    train_checkpoint : callable, optional
        `(train, seed, device)` to a state dict.
    mislabelled : (n_train,) bool, optional
        Which train labels are known to be wrong, so that finding them can be checked.
    """

    model: torch.nn.Module
    model_output: ModelOutput
    train: MapDataset
    targets: Mapping[str, MapDataset]
    checkpoints: Sequence[str | Path]
    collate: Callable[[list[Any]], Any] | None = None
    render: Callable[[Any], Rendered] | None = None
    train_checkpoint: TrainCheckpoint | None = None
    mislabelled: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        listed = isinstance(self.checkpoints, Sequence) and not isinstance(self.checkpoints, str)
        named = isinstance(self.targets, Mapping)
        datasets = [self.train, *(self.targets.values() if named else ())]
        mapped = all(hasattr(d, "__len__") and hasattr(d, "__getitem__") for d in datasets)
        if not (listed and named and mapped):
            raise ProblemError(
                "checkpoints must be a sequence of paths, train a map-style dataset, targets a "
                f"mapping of names to such; got {type(self.checkpoints).__name__}, "
                f"{type(self.train).__name__}, {type(self.targets).__name__}",
                where="trak_dist.Problem",
                next="checkpoints=[path, …], train=dataset, targets={name: dataset, …}",
            )
        if self.mislabelled is not None and len(self.mislabelled) != len(self.train):
            raise ProblemError(
                f"mislabelled has {len(self.mislabelled)} flags for {len(self.train)} train rows",
                where="trak_dist.Problem",
                next="a flag for each train row, or None",
            )

    def dataset(self, split: str) -> MapDataset:
        """The train set or the target set called `split`."""
        return self.train if split == "train" else self.targets[split]


def flags_digest(problem: Problem) -> str:
    """Digest of which labels are known to be wrong; empty if that is not known."""
    flags = problem.mislabelled
    return "" if flags is None else digest([bool(flag) for flag in flags])


def locate(target: str, *, import_root: str) -> tuple[Callable[..., Problem], str]:
    """The function that `target` names, and the digest of its file.

    Raises
    ------
    ProblemError
        If it can't be imported.
    """
    module_name, _, name = target.rpartition(".")
    if import_root not in sys.path and not is_shipped(target):
        sys.path.insert(0, import_root)
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, name)
    except Exception as error:  # whatever the user's module does when imported
        raise ProblemError(
            f"{target!r} can't be imported: {type(error).__name__}: {error}",
            where="problem._target_",
            next="name it package.module.function, importable from the directory you launch in",
        ) from error
    file = getattr(module, "__file__", None)
    if not callable(function) or not file:
        raise ProblemError(
            f"{target!r} is no function of a Python file",
            where="problem._target_",
            next="name a function that returns a trak_dist.Problem",
        )
    return function, file_digest(Path(file))


def file_digest(path: Path) -> str:
    """Digest of a source file."""
    return digest(path.read_bytes().decode(errors="replace"))


def is_shipped(target: str) -> bool:
    """Whether `target` is a problem of this package, which imports nothing of the user's."""
    return target in SHIPPED


def build(spec: Mapping[str, Any], *, import_root: str) -> tuple[Problem, Source]:
    """Call the function that `spec` names with the arguments that it holds.

    Raises
    ------
    ProblemError
        If it can't be imported, does not take the arguments, fails, or returns something else.
    """
    target = spec["_target_"]
    arguments = {k: v for k, v in spec.items() if k != "_target_"}
    function, file = locate(target, import_root=import_root)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ProblemError(
            f"{target}{inspect.signature(function)} does not take the problem's settings "
            f"{arguments}: {error}",
            where="problem",
            next="problem=custom problem._target_=… +problem.NAME=VALUE for each argument",
        ) from error
    try:
        with contextlib.chdir(import_root):  # relative paths mean the same from anywhere
            problem = function(**arguments)
    except TrakDistError:
        raise
    except Exception as error:  # whatever the user's function does
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise ProblemError(
            f"{target} raised {type(error).__name__}: {error}",
            where=f"{at.filename}, line {at.lineno}",
            next="mend it; cluster=debug and breakpoint() help",
        ) from error
    if not isinstance(problem, Problem):
        raise ProblemError(
            f"{target} returned {type(problem).__name__}, not trak_dist.Problem",
            where="problem._target_",
            next="return trak_dist.Problem(...) from it",
        )
    return problem, Source(file, model_digest(problem.model, problem.model_output), import_root)


def model_digest(model: torch.nn.Module, model_output: ModelOutput) -> str:
    """Digest of a model's layers, of a model output's class and of its settings.

    Its settings are the attributes whose text is the same in every process: numbers and strings.
    """
    settings = {
        name: value
        for name, value in getattr(model_output, "__dict__", {}).items()
        if isinstance(value, bool | int | float | str | None)
    }
    return digest([repr(model), type(model_output).__qualname__, repr(sorted(settings.items()))])


def rebuild(spec: Mapping[str, Any], planned: Source) -> Problem:
    """Build the problem in a job, if it is the one that was planned.

    Raises
    ------
    ProblemError
        If it changed since planning, or can't be built.
    """
    problem, source = build(spec, import_root=planned.import_root)
    refuse_changed_source(spec, planned, source)
    return problem


def refuse_changed_source(spec: Mapping[str, Any], planned: Source, now: Source) -> None:
    """Raise `ProblemError` if the problem is not the planned one."""
    if now.model != planned.model:
        raise ProblemError(
            f"the model or the model output of {spec['_target_']} changed since planning",
            where="problem._target_",
            next="restore them, or start a new run with another run_dir",
        )
    if now.file not in (planned.file, *planned.accepted):
        raise ProblemError(
            f"the source of {spec['_target_']} changed since planning: digest {planned.file} "
            f"then, {now.file} now",
            where="problem._target_",
            next="accept_source=true if it computes the same gradients as before (a render was "
            "mended, a target set added); else restore the file, or use another run_dir",
        )
