"""Signatures of the model that a problem builds: each worker builds it again.

They cover the tensors that no checkpoint holds (frozen weights that are not saved, buffers that are
not persistent, tensors and arrays that are attributes of modules), and the outputs and gradients of
some train rows, as built. Floating-point numbers are stored as their norm and weighted sums, which
another processor reproduces up to rounding; integers by digest.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trak_dist.building import fixed_seeds
from trak_dist.errors import ProblemError
from trak_dist.listing import first_few
from trak_dist.ops.batches import content
from trak_dist.ops.gradients import LoopGradients
from trak_dist.ops.model_outputs import ModelOutput, out_to_loss
from trak_dist.plan_inputs import Source

log = logging.getLogger(__name__)

ROWS = 2  # whose output and gradient are pinned
SUMS = 4
PIECE = 2**18
SAMPLE = 2**14  # entries of a weight that checkpoints hold
TENSORS = 1e-4  # of a tensor's norm: what rounding, half types' too, may change of its sums
COMPUTED = 1e-3  # of an output's, or a gradient's; more in half types
_OWN = frozenset(vars(nn.Module()))

Numbers = list[float]


def unsaved_tensors(model: nn.Module, saved_names: Collection[str]) -> dict[str, str | Numbers]:
    """Signatures of the tensors of a model, as it is built, that checkpoints do not hold, by name.

    Parameters
    ----------
    saved_names : collection of str
        The names in `model.state_dict()` that checkpoints hold.
    """
    state = _state(model)
    saved = {_memory(state[name]) for name in saved_names if name in state} - {0}
    found: dict[str, str | Numbers] = {}
    for name, value in _tensors(model):
        computed = isinstance(value, Tensor) and value.grad_fn  # of weights, by a hook
        if not computed and _memory(value) not in saved:
            found[name] = _signature(value)
    return dict(sorted(found.items()))


def built_values(
    model: nn.Module,
    model_output: ModelOutput,
    batch: Sequence[Any],
    *,
    params: Sequence[str],
    unsaved: Collection[str],
) -> dict[str, Numbers]:
    """Outputs, out-to-loss and gradients of a batch, by the model as built.

    The weights that checkpoints hold, all but the `unsaved`, are included: where they differ, which
    does not matter to a run, the others can't be compared.
    """
    gradients: dict[str, list[Tensor]] = {}

    def sink(name: str, _: slice, values: Tensor) -> None:
        gradients.setdefault(name, []).append(values)

    with fixed_seeds():
        f = LoopGradients(model, model_output, params)(batch, sink)
        q = out_to_loss(model_output, model, batch, None)
    held = (tensor.flatten()[:SAMPLE] for n, tensor in _state(model).items() if n not in unsaved)
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    return {
        "tolerance": [max(COMPUTED, eps**0.5)],
        "weights": _numbers(held),
        "output": _values(f),
        "out-to-loss": _values(q),
        "gradient": _numbers(g for name in sorted(gradients) for g in gradients[name]),
    }


def check_unsaved(planned: Source, model: nn.Module, *, what: str) -> None:
    """Raise `ProblemError` if a tensor that no checkpoint holds is not the planned one."""
    if not planned.built:
        return  # a plan of an earlier version
    now = unsaved_tensors(model, _state(model).keys() - planned.unsaved.keys())
    then = planned.unsaved
    differ = sorted(
        name
        for name in {*then, *now}
        if name not in then or name not in now or not _same_tensor(then[name], now[name])
    )
    if differ:
        raise ProblemError(
            f"{what} built a model that differs from the planned one: {first_few(differ, 5)}, "
            "which the checkpoints do not hold",
            where="problem._target_",
            next="restore what it was built from; or, in a new run_dir, save it in the checkpoints "
            "(register_buffer puts a tensor into the state dict), or draw it from a seed",
        )


def check_built(planned: Source, now: Mapping[str, Numbers], *, what: str) -> None:
    """Raise `ProblemError` if the model, as built, does not compute what it did when planned."""
    then = planned.built
    if not then:
        return  # a plan of an earlier version
    (tolerance,) = then["tolerance"]
    if not _close(then["weights"], now["weights"], tolerance):
        log.info(
            "weights that checkpoints hold are initialised differently: outputs are not compared"
        )
        return
    for name, minimum in (("output", 1.0), ("out-to-loss", 1.0), ("gradient", 0.0)):
        if not _close(then[name], now[name], tolerance, minimum):
            raise ProblemError(
                f"the model of {what} gives another {name} of {ROWS} train rows than when it was "
                f"planned: {_format_values(then[name])} then, {_format_values(now[name])} now",
                where="problem._target_",
                next="restore the code of the plan, or start a new run with another run_dir; "
                "random values that are drawn while it is built must be seeded, or saved",
            )


def _format_values(values: Numbers) -> str:
    """The numbers, without their norm."""
    return ", ".join(f"{value:.4g}" for value in values[1:])


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    return {name: t.detach() for name, t in state.items() if isinstance(t, Tensor)}


def _memory(value: Tensor | np.ndarray[Any, Any]) -> int:
    """The address of a tensor's storage, which tied weights and views share."""
    dense = isinstance(value, Tensor) and value.layout is torch.strided
    return value.untyped_storage().data_ptr() if dense else 0  # type: ignore[union-attr]


def _tensors(model: nn.Module, prefix: str = "", known: frozenset[int] = frozenset()) -> Any:
    """The named tensors and arrays of a model, and of modules that it keeps in lists."""
    known |= {id(module) for module in model.modules()}
    yield from ((prefix + n, t) for n, t in model.named_parameters(remove_duplicate=False))
    yield from ((prefix + n, t) for n, t in model.named_buffers(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in _OWN:
                continue
            leaves = pytree.tree_leaves(value)
            for at, leaf in enumerate(leaves):
                index = f"[{at}]" if len(leaves) > 1 else ""
                full = f"{prefix}{path}{'.' if path else ''}{name}{index}"
                if isinstance(leaf, Tensor | np.ndarray):
                    yield full, leaf
                elif isinstance(leaf, nn.Module) and id(leaf) not in known:
                    yield from _tensors(leaf, f"{full}.", known)


def _signature(value: Tensor | np.ndarray[Any, Any]) -> str | Numbers:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc":
            return f"array of {value.dtype}"
        value = torch.from_numpy(np.ascontiguousarray(value))
    if value.is_meta:
        return "meta"
    if value.is_quantized:
        value = value.dequantize()
    value = value.detach().to_dense().cpu()
    if value.is_floating_point() or value.is_complex():
        return _numbers([value])
    sha = hashlib.sha256(str((value.dtype, tuple(value.shape))).encode())
    sha.update(content(value))
    return sha.hexdigest()[:16]


def _values(tensor: Tensor) -> Numbers:
    values = torch.nan_to_num(tensor.detach().reshape(-1).double()).cpu()
    return _rounded([float(values.norm()), *values.tolist()])


def _numbers(tensors: Iterable[Tensor]) -> Numbers:
    """The norm of some tensors' entries, and weighted sums of every fourth."""
    square, sums = 0.0, torch.zeros(SUMS, dtype=torch.float64)
    for at, tensor in enumerate(tensors, 1):
        real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        for piece in torch.split(real.reshape(-1), PIECE):
            values = torch.nan_to_num(piece.double(), nan=0.0, posinf=1.0, neginf=-1.0)
            values = nn.functional.pad(values, (0, -len(values) % SUMS)).view(-1, SUMS)
            square += float(values.square().sum())
            weighted = values * _weights(values.device)[: len(values)]
            sums += weighted.sum(0).cpu() * (1 + at % 7)
    return _rounded([square**0.5, *sums.tolist()])


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Weights in [−½, ½) of a piece's entries, (PIECE / SUMS, SUMS): steps of the golden ratio."""
    steps = torch.arange(PIECE, dtype=torch.float64) * 0.6180339887498949
    return (steps % 1 - 0.5).view(-1, SUMS).to(device)


def _rounded(values: Iterable[float]) -> Numbers:
    return [float(f"{value:.7g}") for value in values]


def _same_tensor(then: str | Numbers, now: str | Numbers) -> bool:
    if isinstance(then, str) or isinstance(now, str):
        return then == now
    return _close(then, now, TENSORS)


def _close(then: Numbers, now: Numbers, tolerance: float, minimum: float = 0.0) -> bool:
    """Whether numbers (norm first) agree relative to the norm, at least `minimum`."""
    scale = tolerance * max(then[0], now[0], minimum, 1e-9)
    return len(then) == len(now) and all(
        abs(a - b) <= scale for a, b in zip(then, now, strict=True)
    )
