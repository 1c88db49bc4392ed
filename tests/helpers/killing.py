"""A process that is killed amid its work, within a test."""

from __future__ import annotations

import pytest


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def kill_at(patch: pytest.MonkeyPatch, at: int, *steps: tuple[object, str]) -> list[str]:
    """From the `at`-th call of any of `steps` on, none can be made any more.

    Returns the names of the calls so far, as they are made.
    """
    made: list[str] = []
    for owner, name in steps:
        do = getattr(owner, name)

        def step(*args, do=do, name=name, **kwargs) -> object:
            made.append(name)
            if len(made) >= at:
                raise Killed
            return do(*args, **kwargs)

        patch.setattr(owner, name, step)
    return made
