"""Models that a user wrote, named `module:function` by a setting of a shipped problem."""

from __future__ import annotations

import importlib

from torch import nn

from trak_dist.errors import ProblemError
from trak_dist.problem import user_code_errors


def own_model(name: str, *sizes: int) -> nn.Module:
    """What `module:function` returns for classes, or for features and outputs; in `eval()`.

    The module was imported, and the user's trust asked for, before the problem is built
    (`trak_dist.building.code`).

    Raises
    ------
    ProblemError
        If it fails, or returns anything but a module.
    """
    module, _, function = name.partition(":")
    with user_code_errors(f"{name}{sizes}"):
        made = getattr(importlib.import_module(module), function)(*sizes)
    if not isinstance(made, nn.Module):
        raise ProblemError(
            f"{name} returned {type(made).__name__}, no torch.nn.Module",
            where="problem.model",
            next="a function of the sizes that returns the model",
        )
    return made.eval()
