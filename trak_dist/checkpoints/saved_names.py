"""State dicts under the names that transformers saves, where they are not those of its modules.

`save_pretrained` writes some models (ViT, mixtures of experts) as earlier versions had them, one
tensor for each expert say; transformers' own loading code puts them together.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn

from trak_dist.checkpoints.names import State


def as_transformers_reads(state: State, model: nn.Module) -> State | None:
    """What transformers makes of a whole state dict for a model of its own; None if it does not.

    No file is read, and `model` stays as it is.
    """
    transformers: Any = sys.modules.get("transformers")  # loaded, where a model is of it
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            made, found = type(model).from_pretrained(
                None,
                config=copy.deepcopy(model.config),
                state_dict=dict(state),
                dtype=model.dtype,
                output_loading_info=True,
            )
    except Exception:  # of other sizes; what does not fit is said by our own reading
        return None
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
    return None if any(found.values()) else State(made.state_dict())
