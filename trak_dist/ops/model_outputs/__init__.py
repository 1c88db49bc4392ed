"""Model outputs: what of a model is attributed, and how its loss depends on it."""

from trak_dist.ops.model_outputs.classification import (
    TEXT_FIELDS,
    ImageClassification,
    TextClassification,
    attention_mask,
)
from trak_dist.ops.model_outputs.language import LanguageModeling
from trak_dist.ops.model_outputs.negative_loss import LossOutput
from trak_dist.ops.model_outputs.protocol import (
    BatchedModelOutput,
    ModelOutput,
    Weights,
    out_to_loss,
    own_method,
)
from trak_dist.ops.model_outputs.regression import Regression

__all__ = [
    "TEXT_FIELDS",
    "BatchedModelOutput",
    "ImageClassification",
    "LanguageModeling",
    "LossOutput",
    "ModelOutput",
    "Regression",
    "TextClassification",
    "Weights",
    "attention_mask",
    "out_to_loss",
    "own_method",
]
