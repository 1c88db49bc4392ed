"""Checkpoints: read without unpickling, digested, and held to one set of weights per `model_id`."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from trak_dist.errors import CheckpointError
from trak_dist.plan import Checkpoint
from trak_dist.store import atomic
from trak_dist.store.run import Run

_SAVE = "save model.state_dict() with torch.save, or safetensors"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pt` file read with `weights_only=True`.

    Raises
    ------
    CheckpointError
        If there is no such file, or it holds anything but named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():  # of the pickle protocol, before it fails
            warnings.simplefilter("ignore", UserWarning)
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(
            "no checkpoint found", where=str(path), next="stage=train, or mend the problem's paths"
        ) from None
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks for {asked[1]}" if asked else "holds more than tensors"
        raise CheckpointError(
            f"a pickle where a state dict should be: it {what}, and is not loaded",
            where=str(path),
            next=_SAVE,
        ) from None
    except Exception as error:  # torch's unpickler lets through whatever it stumbles over
        raise CheckpointError(
            f"not a readable state dict: {type(error).__name__}: {error}",
            where=str(path),
            next=_SAVE,
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        found = f"keys {list(loaded)[:5]}" if isinstance(loaded, dict) else type(loaded).__name__
        raise CheckpointError(
            f"not a state dict of named tensors: {found}",
            where=str(path),
            next=_SAVE,
        )
    return loaded


def check_fit(state: Mapping[str, Tensor], model: nn.Module, *, where: str) -> None:
    """Raise `CheckpointError` naming each key and shape of `state` that does not fit `model`."""
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    found = {k: tuple(v.shape) for k, v in state.items()}
    faults = [
        *(f"missing {k} {expected[k]}" for k in expected.keys() - found.keys()),
        *(f"unexpected {k} {found[k]}" for k in found.keys() - expected.keys()),
        *(
            f"{k} has shape {found[k]}, the model's {expected[k]}"
            for k in expected.keys() & found.keys()
            if expected[k] != found[k]
        ),
    ]
    if faults:
        shown = sorted(faults)[:10]
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        wrapped = all(name.startswith("module.") for name in found)
        raise CheckpointError(
            f"the checkpoint does not fit the model: {'; '.join(shown)}{more}",
            where=where,
            next="save model.module.state_dict(), without the wrapper's prefix 'module.'"
            if wrapped and found
            else "give the problem the architecture that the checkpoint was saved from",
        )


def content_digest(state: Mapping[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and bytes, in order of name."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:32]


def load_into(run: Run, model: nn.Module, checkpoint: Checkpoint) -> str:
    """Load a checkpoint's weights into `model`; the digest of their content.

    The first worker to load a checkpoint publishes its digest; the others compare.

    Raises
    ------
    CheckpointError
        If the checkpoint can't be read or does not fit, if other weights were seen under this
        `model_id`, or the same weights under another.
    """
    path = run.layout.checkpoint(checkpoint.path)
    state = read_state_dict(path)
    check_fit(state, model, where=str(path))
    digest = content_digest(state)
    refuse_other_weights(run, checkpoint.model_id, digest, publish=True)
    refuse_twins(run, checkpoint.model_id, digest)
    model.load_state_dict(state)
    return digest


def refuse_other_weights(run: Run, model_id: int, digest: str, *, publish: bool) -> None:
    """Raise `CheckpointError` if other weights were seen under `model_id`.

    The first worker to load a checkpoint publishes its digest; all compare.
    """
    if publish:
        content = json.dumps({"digest": digest}).encode()
        atomic.write_once(run.layout.checkpoint_digest(model_id), content)
    first = _published(run, model_id)
    if first is None and publish:  # damaged: what is there now takes its place
        atomic.write(run.layout.checkpoint_digest(model_id), content)
    elif first not in (None, digest):
        raise CheckpointError(
            f"model_id {model_id} has other weights than those it was first featurized with: "
            f"digest {digest} now, {first} then",
            where=_path(run, model_id),
            next="restore the checkpoint, or start a new run with another run_dir",
        )


def twins(run: Run, model_id: int, digest: str) -> list[int]:
    """The other ids under which these weights are known.

    Asked after the own digest is published, so that of two workers at once at least one sees it.
    """
    others = (c.model_id for c in run.plan.checkpoints if c.model_id != model_id)
    return [other for other in others if _published(run, other) == digest]


def refuse_twins(run: Run, model_id: int, digest: str) -> None:
    """Raise `CheckpointError` if these weights are known under another id."""
    for other in twins(run, model_id, digest):
        raise CheckpointError(
            f"model_ids {min(other, model_id)} and {max(other, model_id)} have the same "
            f"weights (digest {digest})",
            where=_path(run, model_id),
            next="give each model_id its own checkpoint, in a new run_dir",
        )


def _path(run: Run, model_id: int) -> str:
    return str(run.layout.checkpoint(run.plan.checkpoint(model_id).path))


def _published(run: Run, model_id: int) -> str | None:
    try:
        return str(json.loads(run.layout.checkpoint_digest(model_id).read_bytes())["digest"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
