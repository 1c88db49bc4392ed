"""A problem: what a user brings. A function named by `problem._target_` returns one.

Also how the function is found and its source pinned, which launcher and workers do alike.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trak_dist.errors import ProblemError
from trak_dist.plan import Source

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from trak_dist.ops.model_outputs import ModelOutput


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
    checkpoints : sequence of paths, or int
        State dicts (`.pt` read with `weights_only=True`, or `.safetensors`); the position is the
        `model_id`. A number says how many `stage=train` makes with `train_checkpoint`.
    collate : callable, optional
        Examples to one batch; torch's default where left out.
    render : callable, optional
        One example to `Rendered`, for the report.
    train_checkpoint : callable, optional
        `(train, seed, device)` to a state dict.
    """

    model: torch.nn.Module
    model_output: ModelOutput
    train: MapDataset
    targets: Mapping[str, MapDataset]
    checkpoints: Sequence[str | Path] | int
    collate: Callable[[list[Any]], Any] | None = None
    render: Callable[[Any], Rendered] | None = None
    train_checkpoint: TrainCheckpoint | None = None

    def dataset(self, split: str) -> MapDataset:
        """The train set or the target set called `split`."""
        return self.train if split == "train" else self.targets[split]


def locate(target: str, *, import_root: str) -> tuple[Callable[..., Problem], Source]:
    """The function that `target` names, and its source.

    Raises
    ------
    ProblemError
        If it can't be imported.
    """
    module_name, _, name = target.rpartition(".")
    if import_root not in sys.path:
        sys.path.insert(0, import_root)
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ProblemError(
            f"{target!r} can't be imported: {error}",
            where="problem._target_",
            next="name it package.module.function, importable from the directory you launch in",
        ) from error
    file = inspect.getsourcefile(module)
    content = Path(file).read_bytes() if file else b""
    return function, Source(hashlib.sha256(content).hexdigest()[:32], import_root)


def build(spec: Mapping[str, Any], *, import_root: str) -> tuple[Problem, Source]:
    """Call the function that `spec` names with the arguments that it holds.

    Raises
    ------
    ProblemError
        If it can't be imported, does not take the arguments, or returns something else.
    """
    target = spec["_target_"]
    arguments = {k: v for k, v in spec.items() if k != "_target_"}
    function, source = locate(target, import_root=import_root)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ProblemError(
            f"{target}{inspect.signature(function)} does not take the problem's settings "
            f"{arguments}: {error}",
            where="problem",
            next="problem=custom problem._target_=… +problem.NAME=VALUE for each argument",
        ) from error
    problem = function(**arguments)
    if not isinstance(problem, Problem):
        raise ProblemError(
            f"{target} returned {type(problem).__name__}, not trak_dist.Problem",
            where="problem._target_",
            next="return trak_dist.Problem(...) from it",
        )
    return problem, source


def rebuild(spec: Mapping[str, Any], planned: Source) -> Problem:
    """Build the problem in a job, if its source is the one that was planned.

    Raises
    ------
    ProblemError
        If the source changed since planning, or the problem can't be built.
    """
    _, source = locate(spec["_target_"], import_root=planned.import_root)
    refuse_changed_source(spec, planned, source)
    return build(spec, import_root=planned.import_root)[0]


def refuse_changed_source(spec: Mapping[str, Any], planned: Source, now: Source) -> None:
    """Raise `ProblemError` if the file of the problem's function is not the planned one."""
    if now.digest != planned.digest:
        raise ProblemError(
            f"the source of {spec['_target_']} changed since planning: digest {planned.digest} "
            f"then, {now.digest} now",
            where="problem._target_",
            next="restore the file, or start a new run with another run_dir",
        )
