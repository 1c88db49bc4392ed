"""trak_dist: TRAK data attribution at cluster scale.

Importing the package loads neither torch nor zarr; a name loads what it needs when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trak_dist.ops.model_outputs import ImageClassification, ModelOutput
    from trak_dist.problem import Problem, Rendered
    from trak_dist.store.results import Results, open_run

__version__ = "0.1.0"
__all__ = ["ImageClassification", "ModelOutput", "Problem", "Rendered", "Results", "open_run"]

_HOME = {
    "ImageClassification": "trak_dist.ops.model_outputs",
    "ModelOutput": "trak_dist.ops.model_outputs",
    "Problem": "trak_dist.problem",
    "Rendered": "trak_dist.problem",
    "Results": "trak_dist.store.results",
    "open_run": "trak_dist.store.results",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
