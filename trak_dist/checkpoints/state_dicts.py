"""State dicts as training tools write them, read without unpickling and fitted to a model."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from trak_dist.checkpoints.fit import Fit, one_line, same_weights
from trak_dist.checkpoints.names import Names, State, adapters
from trak_dist.checkpoints.saved_names import as_transformers_reads
from trak_dist.errors import CheckpointError, CheckpointNotFound, UnreadableCheckpoint
from trak_dist.listing import first_few
from trak_dist.ops.model_outputs import forget

# What a directory of Hugging Face holds, the first that is there; an index names its shards.
FILES = (
    *("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"),
)
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
        If there is no such file, it can't be read, or it holds no named tensors.
    """
    try:
        directory = path.is_dir()
    except OSError as error:
        raise _read_error(path, error) from error
    if directory:
        return _read_directory(path)
    if path.suffix == ".safetensors":
        return State(_load_or_explain(path, lambda: safetensors.torch.load_file(path)))
    return named(_load_or_explain(path, lambda: _load(path)), where=str(path))


def named(loaded: Any, *, where: str) -> State:
    """The named tensors of a checkpoint: itself, or the `state_dict` of Lightning's.

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
    return State(loaded, getattr(loaded, "_metadata", None))


def _read_directory(path: Path) -> State:
    existing = next((path / name for name in FILES if (path / name).exists()), None)
    if existing is None:
        _check_not_distributed(path)
        inside = sorted({file.parent.name for name in FILES for file in path.glob(f"*/{name}")})
        suggestion = f": {', '.join(inside)} in it" if inside else ""
        raise CheckpointError(
            f"none of {', '.join(FILES)} is in this directory",
            where=str(path),
            next=f"a directory that save_pretrained wrote{suggestion}, or a file",
        )
    if existing.suffix != ".json":
        return read(existing)
    index: Any = _load_or_explain(existing, lambda: json.loads(existing.read_bytes())["weight_map"])
    state = State({})
    for shard in sorted(set(index.values())):
        if Path(shard).name != shard:
            raise CheckpointError(
                f"the index names a shard outside of its directory: {shard!r}", where=str(existing)
            )
        state.update(read(path / shard))
    return state


def _check_not_distributed(path: Path) -> None:
    """Raise `CheckpointError` for what `torch.distributed.checkpoint` wrote.

    Its `.metadata` is a pickle that may ask for anything, so it is not read.
    """
    found = next(iter(sorted([*path.glob(".metadata"), *path.glob("*/.metadata")])), None)
    if found is not None:
        command = ["-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch"]
        file = path.with_name(f"{path.name}.pt")
        raise CheckpointError(
            "a checkpoint of torch.distributed.checkpoint, whose .metadata is a pickle that is not "
            "loaded",
            where=str(found.parent),
            next=f"{shlex.join(['python', *command, str(found.parent), str(file)])}, if you trust "
            f"it, and name {file}",
        )


def _load(path: Path) -> Any:
    with warnings.catch_warnings():  # of the pickle protocol, before it fails
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(path, map_location="cpu", weights_only=True)


def _load_or_explain(path: Path, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except FileNotFoundError:
        raise CheckpointNotFound(
            "no checkpoint found",
            where=str(path),
            next="fix the problem's path, or run the stage train if the run is to train it",
        ) from None
    except OSError as error:
        raise _read_error(path, error) from error
    except pickle.UnpicklingError as error:
        callable_name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks for {callable_name[1]}" if callable_name else "holds more than tensors"
        raise CheckpointError(
            f"a pickle instead of a state dict: it {what}, and is not loaded",
            where=str(path),
            next=_SAVE,
        ) from None
    except Exception as error:  # torch's unpickler raises many types
        raise CheckpointError(
            f"not a readable state dict: {type(error).__name__}: {error}",
            where=str(path),
            next=_SAVE,
        ) from error


def _read_error(path: Path, error: OSError) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(
        f"not readable: {error.strerror or error}",
        where=str(path),
        next="check permissions and the file system, then run it again",
        errno=error.errno,
    )


@dataclass(frozen=True)
class Fitted:
    """A state dict under a model's own names, or under older ones that its modules read.

    `notes` says what was left out or converted. `absent` are the model's tensors that the
    checkpoint does not give: they stay as the model has them.
    """

    state: State
    notes: str
    absent: frozenset[str]
    where: str

    def load_into(self, model: nn.Module) -> None:
        """Give the model these weights.

        Raises
        ------
        CheckpointError
            If a module's own loading code fails.
        """
        forget(model)
        try:
            model.load_state_dict(self.state, strict=False)
        except Exception as error:  # hooks of the model may raise anything
            raise CheckpointError(
                f"the model does not load the checkpoint: {one_line(error)}",
                where=self.where,
                next=_SAVE,
            ) from error


def fit_state_dict(state: Mapping[str, Tensor], model: nn.Module, *, where: str) -> Fitted:
    """`state` as the weights of `model`, which stays as it is.

    Raises
    ------
    CheckpointError
        Naming each key and shape that does not fit, or the parts of the file that fit equally.
    """
    state = state if isinstance(state, State) else State(state)
    own = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    names = Names(model, own)
    fits = [Fit(names.whole(state), model, own)]
    if not fits[0].fits:
        fits += [Fit(part, model, own) for part in names.parts(state)]
    chosen = max(fits, key=lambda one: (len(one.matched_ids), one.fits))
    if not chosen.fits:
        read_otherwise = as_transformers_reads(state, model)
        if read_otherwise is not None and read_otherwise.keys() != state.keys():
            return fit_state_dict(read_otherwise, model, where=where)
        raise _unfit(chosen, model, where)
    alternatives = [  # what has as much of the model is as good, whatever else it has
        other.part.prefix
        for other in fits
        if other is not chosen
        and (other.fits or len(other.matched_ids) == len(chosen.matched_ids))
        and not same_weights(other.part.state, chosen.part.state)
    ]
    if alternatives:
        prefixes = sorted([chosen.part.prefix, *alternatives])
        raise CheckpointError(
            "the checkpoint holds several parts that could be the model, with other weights: names "
            f"that begin with {' and '.join(repr(p) if p else 'no prefix' for p in prefixes)}",
            where=where,
            next=f"save only the intended one: {_saving(chosen.part.prefix)}, for instance",
        )
    absent = frozenset(name for name, tensor in own.items() if id(tensor) not in chosen.matched_ids)
    notes = "; ".join([*chosen.part.notes(), *_conversions(chosen.part.state, own)])
    return Fitted(chosen.part.state, notes, absent, where)


def _unfit(fit: Fit, model: nn.Module, where: str) -> CheckpointError:
    part, faults = fit.part, sorted(fit.faults)
    below = f" below {part.prefix!r}" if part.prefix else ""
    save_hint = f"save only the model: {_saving(part.prefix)}"
    hint = "give the problem the architecture that the checkpoint was saved from"
    if part.left_out:
        hint = f"{hint}; other parts are in it too ({part.left_out_summary()}): {save_hint}"
    elif faults and all(fault.surplus for fault in faults):
        hint = (
            f"{save_hint}, if the others are of the loss or of another part of a training; or "
            f"{hint}"
        )
    elif adapters(model):
        hint = f"{hint}; or {_SAVE}"
    return CheckpointError(
        f"the checkpoint does not fit the model{below}: "
        f"{first_few([f.text for f in faults], separator='; ') or 'it is empty'}",
        where=where,
        next=hint,
    )


def _saving(prefix: str) -> str:
    module = f"module.get_submodule({prefix[:-1]!r})" if prefix else "model"
    return f"torch.save({module}.state_dict(), path)"


def _conversions(state: State, own: Mapping[str, Tensor]) -> list[str]:
    """Notes on dtypes that are not the model's."""
    pairs = {(state[k].dtype, own[k].dtype) for k in state.keys() & own.keys()}
    named = sorted((str(a).split(".")[1], str(b).split(".")[1]) for a, b in pairs if a != b)
    return [f"what it holds in {a} is converted to the model's {b}" for a, b in named]


def check_same_absent(one: Fitted, absent: frozenset[str], *, where: str) -> None:
    """Raise `CheckpointError` if a checkpoint lacks other tensors than the others do.

    All are loaded into the same model: a missing tensor would keep another checkpoint's value.
    """
    differ = sorted(one.absent ^ absent)
    if differ:
        raise CheckpointError(
            f"{differ[0]} is in some checkpoints and not in others",
            where=where,
            next="save all checkpoints in the same way: with all tensors, or without the frozen "
            "ones",
        )
