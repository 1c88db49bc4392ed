"""trak_dist: TRAK data attribution at cluster scale.

Importing the package loads neither torch nor zarr; a name loads what it needs when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trak_dist.compat import (
        AbstractModelOutput,
        BasicProjector,
        FunctionalGradientComputer,
        IterativeGradientComputer,
        NoOpProjector,
        ProjectionType,
    )
    from trak_dist.errors import ModelIDException
    from trak_dist.interface.execution import Outcome
    from trak_dist.interface.planned_run import PlannedRun, plan_run
    from trak_dist.interface.progress import Progress
    from trak_dist.interface.summary import Summary
    from trak_dist.ops.model_outputs import (
        CLIP,
        ImageClassification,
        LanguageModeling,
        ModelOutput,
        TextClassification,
    )
    from trak_dist.problem import Problem, Rendered
    from trak_dist.store.results import Results, open_run
    from trak_dist.traker import TRAKer

__version__ = "0.1.0"
__all__ = [
    "CLIP",
    "AbstractModelOutput",
    "BasicProjector",
    "FunctionalGradientComputer",
    "ImageClassification",
    "IterativeGradientComputer",
    "LanguageModeling",
    "ModelIDException",
    "ModelOutput",
    "NoOpProjector",
    "Outcome",
    "PlannedRun",
    "Problem",
    "Progress",
    "ProjectionType",
    "Rendered",
    "Results",
    "Summary",
    "TRAKer",
    "TextClassification",
    "open_run",
    "plan_run",
]

_EXPORTED_FROM = {
    **dict.fromkeys(
        (
            *("AbstractModelOutput", "BasicProjector", "FunctionalGradientComputer"),
            *("IterativeGradientComputer", "NoOpProjector", "ProjectionType"),
        ),
        "trak_dist.compat",
    ),
    "CLIP": "trak_dist.ops.model_outputs",
    "ImageClassification": "trak_dist.ops.model_outputs",
    "LanguageModeling": "trak_dist.ops.model_outputs",
    "ModelIDException": "trak_dist.errors",
    "ModelOutput": "trak_dist.ops.model_outputs",
    "Outcome": "trak_dist.interface.execution",
    "PlannedRun": "trak_dist.interface.planned_run",
    "Problem": "trak_dist.problem",
    "Progress": "trak_dist.interface.progress",
    "Rendered": "trak_dist.problem",
    "Results": "trak_dist.store.results",
    "Summary": "trak_dist.interface.summary",
    "TRAKer": "trak_dist.traker",
    "TextClassification": "trak_dist.ops.model_outputs",
    "open_run": "trak_dist.store.results",
    "plan_run": "trak_dist.interface.planned_run",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTED_FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTED_FROM[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
