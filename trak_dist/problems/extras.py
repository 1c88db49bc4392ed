"""Packages that only some problems need, imported where they are."""

from __future__ import annotations

import importlib
from typing import Any

from trak_dist.errors import ProblemError


def package(name: str, *, needed_for: str) -> Any:
    """An imported package of the extra `hf`.

    Raises
    ------
    ProblemError
        If it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ProblemError(
            f"{needed_for} needs the package {name.partition('.')[0]}: {error}",
            where="problem",
            next="pip install 'trak_dist[hf]'",
        ) from error
