"""A problem that is an object of this process: a notebook's, which no other process can import."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from trak_dist.errors import ProblemError

TARGET = "trak_dist.Problem"  # what the plan names in place of an import path


_saved_names: ContextVar[Any] = ContextVar("in_process", default=None)


@contextlib.contextmanager
def holding(problem: Any) -> Iterator[None]:
    """While this lasts, `problem`, a `trak_dist.Problem` or None, is what cells are made of."""
    before = _saved_names.set(problem)
    try:
        yield
    finally:
        _saved_names.reset(before)


def build() -> Any:
    """The problem with a copy of its model, so that the user's stays unchanged.

    Raises
    ------
    ProblemError
        If none is, or its model can't be copied.
    """
    problem = _saved_names.get()
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
