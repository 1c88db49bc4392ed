"""Builds a problem: launcher and jobs find the function that a plan names, and call it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trak_dist import in_process, source
from trak_dist.errors import ProblemError
from trak_dist.plan_inputs import Source
from trak_dist.problem import Problem, user_code_errors

_NAMES = (
    *("mnist", "fashion_mnist", "cifar2"),
    *("causal_lm", "text_classification", "image_folder", "table"),
)
SHIPPED = tuple(f"trak_dist.problems.{name}.problem" for name in _NAMES)


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
