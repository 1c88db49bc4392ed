"""A problem: what a user provides. A function named by `problem._target_` returns one."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trak_dist.errors import ProblemError, TrakDistError
from trak_dist.plan import digest

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

    def __post_init__(self) -> None:
        shape = tuple(getattr(self.content, "shape", ()))
        picture = hasattr(self.content, "__array_interface__") and shape[2:] in ((), (3,))
        if not isinstance(self.content, str) and not (picture and len(shape) in (2, 3)):
            raise ProblemError(
                f"{type(self.content).__name__} of shape {shape} can't be shown",
                where="trak_dist.Rendered",
                next="content: a numpy array (h, w) or (h, w, 3), or a text",
            )


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
    notes : callable, optional
        What is worth saying of the data when a run of it is planned; jobs do not call it.
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
    notes: Callable[[], Iterable[str]] | None = None

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
        wrong = [f"{name} is {type(getattr(self, name)).__name__}" for name in self._unfit()]
        if wrong:
            raise ProblemError(
                f"unfit fields of a problem: {', '.join(wrong)}",
                where="trak_dist.Problem",
                next="model: a torch.nn.Module; model_output: an object with get_output and "
                "get_out_to_loss_grad; checkpoints: paths; targets: named by strings; collate, "
                "render, train_checkpoint and notes: functions, or None",
            )
        if self.mislabelled is not None and len(self.mislabelled) != len(self.train):
            raise ProblemError(
                f"mislabelled has {len(self.mislabelled)} flags for {len(self.train)} train rows",
                where="trak_dist.Problem",
                next="a flag for each train row, or None",
            )

    def _unfit(self) -> Iterator[str]:
        """The fields that can't be what they should."""
        output = ("get_output", "get_out_to_loss_grad")
        if not hasattr(self.model, "named_parameters") or isinstance(self.model, type):
            yield "model"
        if not all(hasattr(self.model_output, m) for m in output) or isinstance(
            self.model_output, type
        ):
            yield "model_output"
        if not all(isinstance(path, str | os.PathLike) for path in self.checkpoints):
            yield "checkpoints"
        if not all(isinstance(name, str) for name in self.targets):
            yield "targets"
        for name in ("collate", "render", "train_checkpoint", "notes"):
            if not (getattr(self, name) is None or callable(getattr(self, name))):
                yield name

    def dataset(self, split: str) -> MapDataset:
        """The train set or the target set called `split`."""
        return self.train if split == "train" else self.targets[split]


def with_random_policy(problem: Problem, random: str) -> Problem:
    """`problem` whose model output draws random numbers as `featurize.random` says."""
    if random == "refused":
        return problem
    from trak_dist.ops.wrapped_outputs import SeededByExample

    return replace(problem, model_output=SeededByExample(problem.model_output))


def notes(problem: Problem) -> list[str]:
    """What the problem says of its data."""
    with user_code_errors("the problem's notes"):
        return [str(note) for note in problem.notes()] if problem.notes else []


def mislabelled_digest(problem: Problem) -> str | None:
    """Digest of which labels are known to be wrong, if that is known."""
    flags = problem.mislabelled
    return None if flags is None else digest([bool(flag) for flag in flags])


@contextlib.contextmanager
def user_code_errors(what: str, kind: type[TrakDistError] = ProblemError) -> Iterator[None]:
    """Run the user's code; whatever it raises, `SystemExit` too, becomes an error about `what`."""
    try:
        yield
    except TrakDistError:
        raise
    except (Exception, SystemExit) as error:  # user code may raise anything
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise kind(
            f"{what} raised {type(error).__name__}: {error}",
            where=f"{at.filename}, line {at.lineno}",
            next="fix it; cluster=debug and breakpoint() help",
        ) from error
