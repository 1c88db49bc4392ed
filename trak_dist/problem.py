"""A problem: what a user provides. A function named by `problem._target_` returns one.

Also how launcher and workers find and call the function.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trak_dist import in_process, source
from trak_dist.errors import ProblemError, TrakDistError
from trak_dist.plan import digest
from trak_dist.plan_inputs import Source

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from trak_dist.ops.model_outputs import ModelOutput


_NAMES = (
    *("mnist", "fashion_mnist", "cifar2"),
    *("causal_lm", "text_classification", "image_folder", "table"),
)
SHIPPED = tuple(f"trak_dist.problems.{name}.problem" for name in _NAMES)


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


@contextlib.contextmanager
def fixed_seeds() -> Iterator[None]:
    """Seed all generators, and restore the state of the process afterwards."""
    import numpy as np
    import torch

    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=cuda):
        try:
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            torch.manual_seed(0)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def locate(
    target: str, *, import_root: str, setting: str = "problem._target_"
) -> tuple[Callable[..., Problem], str]:
    """The function that `target`, the value of `setting`, names, and the digest of its file.

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
    except (Exception, SystemExit) as error:  # an import may raise anything
        raise ProblemError(
            f"{target!r} can't be imported: {type(error).__name__}: {error}",
            where=setting,
            next="name it package.module.function, importable from the directory you launch in",
        ) from error
    file = getattr(module, "__file__", None)
    if not callable(function) or not file:
        raise ProblemError(
            f"{target!r} is not a function of a Python file",
            where=setting,
            next="name a function of a module of yours",
        )
    return function, source.file_digest(Path(file))


def is_shipped(target: str) -> bool:
    """Whether `target` is a problem of this package, which imports nothing of the user's."""
    return target in SHIPPED


def code(spec: Mapping[str, Any]) -> str:
    """What of the user's a problem imports and calls: its function; of a shipped one its model.

    The model of a shipped problem may be `module:function`; else the problem's own function, which
    imports nothing of the user's.
    """
    target, model = str(spec["_target_"]), spec.get("model")
    if is_shipped(target) and isinstance(model, str) and is_import_path(model):
        return model.replace(":", ".")
    return target


def is_import_path(text: str) -> bool:
    """Whether a text is of the form `package.module:function`."""
    module, colon, name = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), name))


def build(spec: Mapping[str, Any], *, import_root: str) -> tuple[Problem, Source]:
    """Call the function that `spec` names with the arguments that it holds.

    Unseeded random numbers are the same in every process.

    Raises
    ------
    ProblemError
        If it can't be imported, does not take the arguments, fails, or returns something else.
    """
    target = spec["_target_"]
    if target == in_process.TARGET:
        problem = in_process.build()
        return problem, _source(problem, None, "", import_root)
    arguments = {k: v for k, v in spec.items() if k != "_target_"}
    with fixed_seeds():
        function, file = locate(target, import_root=import_root)
        own = function
        if code(spec) != target:
            own, file = locate(code(spec), import_root=import_root, setting="problem.model")
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ProblemError(
            f"{target}{inspect.signature(function)} does not take the problem's settings "
            f"{arguments}: {error}",
            where="problem",
            next="problem=custom problem._target_=… +problem.NAME=VALUE for each argument",
        ) from error
    if not Path(import_root).is_dir():
        raise ProblemError(
            "the directory that the run was planned in, and its problem is built in, is not there",
            where=import_root,
            next="put it back: a link with its name to where the files are now will do",
        )
    # Relative paths mean the same from anywhere.
    with user_code_errors(target), contextlib.chdir(import_root), fixed_seeds():
        problem = function(**arguments)
    if not isinstance(problem, Problem):
        raise ProblemError(
            f"{target} returned {type(problem).__name__}, not trak_dist.Problem",
            where="problem._target_",
            next="return trak_dist.Problem(...) from it",
        )
    return problem, _source(problem, own, file, import_root)


def _source(problem: Problem, function: object, file: str, import_root: str) -> Source:
    data = (problem.train, *problem.targets.values(), problem.collate, problem.train_checkpoint)
    parts = [*problem.model.modules(), problem.model_output, *data]
    model = source.model_digest(problem.model, problem.model_output)
    return Source(file, model, import_root, modules=source.modules(function, parts))


def rebuild(spec: Mapping[str, Any], planned: Source) -> Problem:
    """Build the problem in a job, if its source is the planned one.

    Raises
    ------
    ProblemError
        If it changed since planning, or can't be built.
    """
    problem, now = build(spec, import_root=planned.import_root)
    source.check_unchanged(spec, planned, now)
    return problem
