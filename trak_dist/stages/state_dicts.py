"""State dicts: read from what training tools write, without unpickling, and fitted to a model."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from trak_dist.errors import CheckpointError

State = dict[str, Tensor]

# What a directory of Hugging Face holds, the first that is there; an index names its shards.
FILES = (
    *("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"),
)
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel, of torch.compile
# In a PEFT model's names, but not in those that it saves.
ADAPTER = (".modules_to_save.default.", ".default.")
_SAVE = "save model.state_dict() with torch.save, or safetensors"


def unwrapped(model: nn.Module) -> nn.Module:
    """The module in `DataParallel`, `DistributedDataParallel` or `torch.compile`."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def read(path: Path) -> State:
    """The tensors of a checkpoint.

    Parameters
    ----------
    path : Path
        A `.safetensors` file; a `.pt` file, or Lightning's `.ckpt`, read with `weights_only=True`;
        or a directory that a Hugging Face model, or a PEFT adapter, was saved to.

    Raises
    ------
    CheckpointError
        If there is no such file, or it holds no named tensors.
    """
    if path.is_dir():
        return _read_directory(path)
    if path.suffix == ".safetensors":
        stored: State = _told(path, lambda: safetensors.torch.load_file(path))
        return stored
    return named(_told(path, lambda: _load(path)), where=str(path))


def named(loaded: Any, *, where: str) -> State:
    """The named tensors of what a checkpoint holds: itself, or Lightning's beside the optimiser's.

    Raises
    ------
    CheckpointError
        If it holds anything else.
    """
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        found = f"keys {list(loaded)[:5]}" if isinstance(loaded, Mapping) else type(loaded).__name__
        raise CheckpointError(
            f"not a state dict of named tensors: {found}", where=where, next=_SAVE
        )
    return dict(loaded)


def _read_directory(path: Path) -> State:
    there = next((path / name for name in FILES if (path / name).exists()), None)
    if there is None:
        raise CheckpointError(
            f"none of {', '.join(FILES)} is in this directory",
            where=str(path),
            next="a directory that save_pretrained wrote, or a file",
        )
    if there.suffix != ".json":
        return read(there)
    index: Any = _told(there, lambda: json.loads(there.read_bytes())["weight_map"])
    state: State = {}
    for shard in sorted(set(index.values())):
        if Path(shard).name != shard:
            raise CheckpointError(
                f"the index names a shard outside of its directory: {shard!r}", where=str(there)
            )
        state |= read(path / shard)
    return state


def _load(path: Path) -> Any:
    with warnings.catch_warnings():  # of the pickle protocol, before it fails
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(path, map_location="cpu", weights_only=True)


def _told(path: Path, action: Callable[[], Any]) -> Any:
    try:
        return action()
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


@dataclass(frozen=True)
class Fitted:
    """A state dict under a model's own names.

    `said` tells of a prefix that was left out, if one was. `absent` are the model's tensors that
    the checkpoint has not: frozen ones stay as the model has them; the others are tied to one that
    is there.
    """

    state: State
    said: str
    absent: frozenset[str]

    def load_into(self, model: nn.Module) -> None:
        """Give the model these weights."""
        model.load_state_dict(self.state, strict=False)


def fitted(state: Mapping[str, Tensor], model: nn.Module, *, where: str) -> Fitted:
    """`state` as the weights of `model`.

    Raises
    ------
    CheckpointError
        Naming each key and shape that does not fit.
    """
    own = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    renamed, said = _renamed(state, own)
    may_be_absent = {k for k in own if is_frozen(own[k]) or _is_tied(k, own, renamed)}
    expected = {k: tuple(v.shape) for k, v in own.items()}
    found = {k: tuple(v.shape) for k, v in renamed.items()}
    absent = expected.keys() - found.keys()
    faults = [
        *(f"missing {k} {expected[k]}" for k in absent - may_be_absent),
        *(f"unexpected {k} {found[k]}" for k in found.keys() - expected.keys()),
        *(
            f"{k} has shape {found[k]}, the model's {expected[k]}"
            for k in expected.keys() & found.keys()
            if expected[k] != found[k]
        ),
    ]
    if faults or not found:
        shown = sorted(faults)[:10]
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise CheckpointError(
            f"the checkpoint does not fit the model: {'; '.join(shown) or 'it is empty'}{more}",
            where=where,
            next="give the problem the architecture that the checkpoint was saved from",
        )
    return Fitted(renamed, said, frozenset(absent))


def refuse_otherwise_absent(one: Fitted, absent: frozenset[str], *, where: str) -> None:
    """Raise `CheckpointError` if a checkpoint lacks other tensors than the others do.

    One after the other is loaded into one model: what it lacks would be another's.
    """
    differ = sorted(one.absent ^ absent)
    if differ:
        raise CheckpointError(
            f"{differ[0]} is in some checkpoints and not in others",
            where=where,
            next="save all checkpoints alike: with all tensors, or without the frozen ones",
        )


def is_frozen(tensor: Tensor) -> bool:
    """Whether it is a parameter without gradients, which a checkpoint may lack."""
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _is_tied(name: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    return any(own[other] is own[name] for other in state if other in own and other != name)


def _renamed(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[State, str]:
    """The state without prefixes that the model's names don't have; and what was left out."""
    renamed, left_out = dict(state), ""
    while prefix := _foreign_prefix(renamed, own):
        renamed = {name.removeprefix(prefix): tensor for name, tensor in renamed.items()}
        left_out += prefix
    adapters = {name.replace(p, "."): name for p in reversed(ADAPTER) for name in own if p in name}
    renamed = {
        name if name in own else adapters.get(name, name): tensor
        for name, tensor in renamed.items()
    }
    return renamed, f"the prefix {left_out!r} of its names is left out" if left_out else ""


def _foreign_prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """A wrapper's prefix, or the one attribute that a training module keeps the model in."""
    if not state or any(name in own for name in state):
        return ""
    first = next(iter(state)).partition(".")[0] + "."
    if not all(name.startswith(first) for name in state):
        return ""
    fits = all(name.removeprefix(first) in own for name in state)
    return first if first in WRAPPERS or fits else ""
