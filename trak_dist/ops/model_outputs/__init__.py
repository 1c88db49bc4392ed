"""Model outputs: what of a model is attributed, and how its loss depends on it."""

from trak_dist.ops.model_outputs.classification import (
    TEXT_FIELDS,
    ImageClassification,
    TextClassification,
    attention_mask,
)
from trak_dist.ops.model_outputs.clip import CLIP
from trak_dist.ops.model_outputs.language import LanguageModeling
from trak_dist.ops.model_outputs.preparation import forget, prepared
from trak_dist.ops.model_outputs.protocol import (
    BatchedModelOutput,
    ModelOutput,
    Weights,
    out_to_loss,
    own_method,
)

__all__ = [
    "CLIP",
    "TEXT_FIELDS",
    "BatchedModelOutput",
    "ImageClassification",
    "LanguageModeling",
    "ModelOutput",
    "TextClassification",
    "Weights",
    "attention_mask",
    "forget",
    "out_to_loss",
    "own_method",
    "prepared",
]
