"""A problem that is an object of this process: a notebook's, which no other process can import."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

from trak_dist import commands
from trak_dist.errors import ProblemError
from trak_dist.plan import Plan

TARGET = "trak_dist.Problem"  # what the plan names in place of an import path


_held_problem: ContextVar[Any] = ContextVar("in_process", default=None)


@contextlib.contextmanager
def holding(problem: Any) -> Iterator[None]:
    """While this lasts, `problem`, a `trak_dist.Problem` or None, is what cells are made of."""
    before = _held_problem.set(problem)
    try:
        yield
    finally:
        _held_problem.reset(before)


def build() -> Any:
    """The problem with a copy of its model, so that the user's stays unchanged.

    Raises
    ------
    ProblemError
        If none is, or its model can't be copied.
    """
    problem = _held_problem.get()
    if problem is None:
        raise ProblemError(
            "the problem of this run is an object of the Python process that planned it",
            where="problem",
            next="trak_dist.plan_run(problem=…, run_dir=…).execute() there, with the same object",
        )
    try:
        model = copy.deepcopy(problem.model)
    except Exception as error:  # whatever the user's model does
        raise ProblemError(
            f"the model can't be copied: {type(error).__name__}: {error}",
            where="trak_dist.Problem.model",
            next="problem='module:function', which builds it again",
        ) from error
    return replace(problem, model=model)


def command(run_dir: Path, plan: Plan, *settings: str) -> str:
    """What to type next, to compute something of a run: the launcher, if it can build the problem.

    Of a problem that is an object, the call that has it; `settings` are overrides, `key=value`.
    """
    if plan.spec.problem.get("_target_") != TARGET:
        return commands.launch(run_dir, *settings)
    arguments = ["problem=…", f"run_dir={str(run_dir)!r}", *map(_argument, settings)]
    return f"trak_dist.plan_run({', '.join(arguments)}).execute()"


def _argument(setting: str) -> str:
    key, _, value = setting.partition("=")
    literals = {"true": "True", "false": "False"}
    value = value if value.isdecimal() else literals.get(value, repr(value))
    return f"**{{{key!r}: {value}}}" if "." in key else f"{key}={value}"
