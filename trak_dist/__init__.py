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
    from trak_dist.interchange.bergson import import_bergson
    from trak_dist.interchange.trak import import_trak
    from trak_dist.interface.execution import Outcome
    from trak_dist.interface.planned_run import PlannedRun, plan_run
    from trak_dist.interface.progress import Progress
    from trak_dist.interface.summary import Summary
    from trak_dist.ops.model_outputs import (
        CLIP,
        Diffusion,
        EachToken,
        ImageClassification,
        LanguageModeling,
        LossOutput,
        MaskedLanguageModeling,
        ModelOutput,
        MultiLabelClassification,
        NoisedRows,
        Preference,
        Regression,
        Segmentation,
        SequenceToSequence,
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
    "Diffusion",
    "EachToken",
    "FunctionalGradientComputer",
    "ImageClassification",
    "IterativeGradientComputer",
    "LanguageModeling",
    "LossOutput",
    "MaskedLanguageModeling",
    "ModelIDException",
    "ModelOutput",
    "MultiLabelClassification",
    "NoOpProjector",
    "NoisedRows",
    "Outcome",
    "PlannedRun",
    "Preference",
    "Problem",
    "Progress",
    "ProjectionType",
    "Regression",
    "Rendered",
    "Results",
    "Segmentation",
    "SequenceToSequence",
    "Summary",
    "TRAKer",
    "TextClassification",
    "import_bergson",
    "import_trak",
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
    **dict.fromkeys(
        (
            "CLIP",
            "Diffusion",
            "EachToken",
            "ImageClassification",
            "LanguageModeling",
            "LossOutput",
            "MaskedLanguageModeling",
            "ModelOutput",
            "MultiLabelClassification",
            "NoisedRows",
            "Preference",
            "Regression",
            "Segmentation",
            "SequenceToSequence",
            "TextClassification",
        ),
        "trak_dist.ops.model_outputs",
    ),
    "ModelIDException": "trak_dist.errors",
    "Outcome": "trak_dist.interface.execution",
    "PlannedRun": "trak_dist.interface.planned_run",
    "Problem": "trak_dist.problem",
    "Progress": "trak_dist.interface.progress",
    "Rendered": "trak_dist.problem",
    "Results": "trak_dist.store.results",
    "Summary": "trak_dist.interface.summary",
    "TRAKer": "trak_dist.traker",
    "import_bergson": "trak_dist.interchange.bergson",
    "import_trak": "trak_dist.interchange.trak",
    "open_run": "trak_dist.store.results",
    "plan_run": "trak_dist.interface.planned_run",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTED_FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTED_FROM[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
