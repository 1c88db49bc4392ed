"""Model outputs: what of a model is attributed, and how its loss depends on it."""

from trak_dist.ops.model_outputs.classification import (
    ImageClassification,
    TextClassification,
    attention_mask,
)
from trak_dist.ops.model_outputs.clip import CLIP
from trak_dist.ops.model_outputs.dense import MultiLabelClassification, Segmentation
from trak_dist.ops.model_outputs.diffusion import Diffusion, NoisedRows
from trak_dist.ops.model_outputs.labels import BadLabel, bad_label
from trak_dist.ops.model_outputs.language import (
    IGNORED,
    LanguageModeling,
    MaskedLanguageModeling,
    SequenceToSequence,
)
from trak_dist.ops.model_outputs.losses import LossOutput
from trak_dist.ops.model_outputs.preference import Preference
from trak_dist.ops.model_outputs.preparation import forget, prepared
from trak_dist.ops.model_outputs.protocol import (
    BatchedModelOutput,
    ModelOutput,
    Weights,
    out_to_loss,
    own_method,
)
from trak_dist.ops.model_outputs.regression import Regression
from trak_dist.ops.model_outputs.tokens import EachToken

__all__ = [
    "CLIP",
    "IGNORED",
    "BadLabel",
    "BatchedModelOutput",
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
    "Weights",
    "attention_mask",
    "bad_label",
    "forget",
    "out_to_loss",
    "own_method",
    "prepared",
]
