"""PEFT's adapters: found among checkpoints, and put on the model that they were trained on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from trak_dist.errors import CheckpointError, ProblemError
from trak_dist.listing import first_few
from trak_dist.problems.extras import package
from trak_dist.problems.model_files import files_named, read_json

ADAPTER = "adapter_config.json"
# Adapters that are built from their configuration alone.
_BUILT = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "HRA", "LN_TUNING")
_NOT_OF_THE_ADAPTER = ("inference_mode", "base_model_name_or_path", "revision", "peft_version")


def find_adapter(checkpoints: Sequence[str]) -> Path | None:
    """The directory of the first adapter among the checkpoints; all are of one configuration.

    Raises
    ------
    CheckpointError
        If they are not.
    """
    files = files_named(ADAPTER, checkpoints)
    if not files:
        return None
    first, *others = (
        {k: v for k, v in read_json(f).items() if k not in _NOT_OF_THE_ADAPTER} for f in files
    )
    for file, now in zip(files[1:], others, strict=True):
        keys = sorted(k for k in first.keys() | now.keys() if first.get(k) != now.get(k))
        if keys:
            key = keys[0]
            raise CheckpointError(
                f"adapters of other configurations: {key} is {json.dumps(first.get(key))} in "
                f"{files[0]}, {json.dumps(now.get(key))} here",
                where=str(file),
                next="adapters of one configuration in a run",
            )
    return files[0].parent


def with_adapter(base: nn.Module, directory: Path, missing: Sequence[str]) -> nn.Module:
    """A model with an adapter's parameters, which are the only ones with gradients.

    Parameters
    ----------
    missing : sequence of str
        Parameters of `base` that its own checkpoint did not have.

    Raises
    ------
    ProblemError, CheckpointError
        If it is of a kind that is refused, or not of this model.
    """
    peft = package("peft", needed_for="an adapter")
    config = peft.PeftConfig.from_pretrained(str(directory))
    kind = str(config.peft_type.value)
    if kind not in _BUILT or getattr(config, "megatron_config", None):
        raise ProblemError(
            f"adapters of {kind}{' with a megatron_config' * (kind in _BUILT)} are not built: what "
            "their configuration names could be loaded or imported",
            where=str(directory / ADAPTER),
            next=f"adapters of {', '.join(_BUILT)}; or make the model in a problem of your own "
            "(docs/your-problem.md)",
        )
    replaced = tuple(config.modules_to_save or ()) if hasattr(config, "modules_to_save") else ()
    unknown = [name for name in missing if name.split(".")[-2] not in replaced]
    if unknown:
        raise CheckpointError(
            f"neither the base model nor the adapter has {first_few(unknown, 3)}",
            where=str(directory),
            next="problem.model=… the model that the adapter was trained on",
        )
    config.inference_mode = False  # in which PEFT freezes what is to be attributed
    config.base_model_name_or_path = None
    with warnings.catch_warnings():  # of names that transformers will leave behind
        warnings.simplefilter("ignore", FutureWarning)
        made = peft.get_peft_model(base, config)
    assert isinstance(made, nn.Module)
    return made
