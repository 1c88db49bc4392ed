"""Per-sample gradients of the model output.

A gradient computer takes a batch and passes on, piece by piece, the gradient of each example's
model output by each selected parameter. `VmapGradients` here is general; it holds all of a batch's
gradients at once. `HookGradients`, in `ops.hooks`, is fast and never does. `LoopGradients` asks
nothing of the model but autograd.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trak_dist.errors import ConfigError, ProblemError
from trak_dist.ops.batches import clone_batch, examples_in, rows_of
from trak_dist.ops.model_outputs import ModelOutput, prepared
from trak_dist.ops.model_state import ModelStateGuard

GradientSink = Callable[[str, slice, Float[Tensor, "rows ..."]], None]


class GradientComputer(Protocol):
    """Per-sample gradients of one model with its weights loaded."""

    def __call__(self, batch: Sequence[Any], sink: GradientSink) -> Float[Tensor, " batch"] | None:
        """Hand over the gradients of each example's model output, and give the output if known.

        Parameters
        ----------
        batch : sequence
            The arguments of the model output; every tensor in it has the examples first.
        sink : callable
            Gets a parameter's name, a slice of the batch's examples, and their gradients. What it
            gets of one parameter and example adds up: it may come in parts, or, where it is zero,
            not at all. The parts and their order depend on nothing but model and batch.
        """
        ...


class VmapGradients:
    """`torch.func.vmap` of `torch.func.grad`: any model that torch.func can trace."""

    def __init__(self, model: nn.Module, model_output: ModelOutput, params: Sequence[str]) -> None:
        selected = select_params(model, params)
        self._weights = {n: p.detach() for n, p in model.named_parameters() if n in selected}
        self._buffers = {n: b.detach() for n, b in model.named_buffers()}
        self._frozen = {n: p.detach() for n, p in model.named_parameters() if n not in selected}
        self._model, self._state_guard = model, ModelStateGuard(model)
        self._model_output = model_output

    def __call__(self, batch: Sequence[Any], sink: GradientSink) -> None:
        """See `GradientComputer`; the output is not known."""
        axes = (None, None, None, *([0] * len(batch)))
        output = prepared(self._model_output, self._model).get_output
        per_sample = torch.func.vmap(torch.func.grad(output, argnums=1), in_dims=axes)
        with self._state_guard.preserve():
            grads: dict[str, Tensor] = per_sample(
                self._model, self._weights, {**self._buffers, **self._frozen}, *clone_batch(batch)
            )
        for name in sorted(grads):
            values = grads.pop(name)
            sink(name, slice(0, len(values)), values)


class LoopGradients:
    """`torch.autograd`, one example after the other: slow, for what torch.func can't trace."""

    def __init__(self, model: nn.Module, model_output: ModelOutput, params: Sequence[str]) -> None:
        # The model's own parameters, for an output that calls the model as it is.
        self._weights = dict(model.named_parameters())
        self._selected = {n: self._weights[n] for n in select_params(model, params)}
        self._buffers = {n: b.detach() for n, b in model.named_buffers()}
        self._model, self._state_guard = model, ModelStateGuard(model)
        self._model_output = model_output

    def __call__(self, batch: Sequence[Any], sink: GradientSink) -> Float[Tensor, " batch"]:
        """See `GradientComputer`."""
        outputs, output = [], prepared(self._model_output, self._model).get_output
        for row in range(examples_in(batch)):
            example = clone_batch(rows_of(batch, row))
            with self._state_guard.preserve(), torch.enable_grad():
                f = _scalar(output(self._model, self._weights, self._buffers, *example))
                found = torch.autograd.grad(f, list(self._selected.values()), allow_unused=True)
            outputs.append(f.detach())
            for name, grads in zip(self._selected, found, strict=True):
                if grads is not None:
                    sink(name, slice(row, row + 1), grads[None])
        return torch.stack(outputs)


def _scalar(output: Tensor) -> Float[Tensor, ""]:
    if output.numel() != 1:
        raise ProblemError(
            f"the output of one example has the shape {tuple(output.shape)}, not that of a number",
            where="get_output",
            next="give a scalar for each example; a classifier's labels are one whole number each",
        )
    return output.reshape(())


def outputs(
    model: nn.Module, model_output: ModelOutput, batch: Sequence[Any]
) -> Float[Tensor, " batch"]:
    """f(z; θ) of each example of a batch."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    axes = (None, None, None, *([0] * len(batch)))
    model_output, guard = prepared(model_output, model), ModelStateGuard(model)
    try:
        with guard.preserve():
            values: Tensor = torch.func.vmap(model_output.get_output, in_dims=axes)(
                model, weights, buffers, *clone_batch(batch)
            )
    except RuntimeError:  # torch.func can't trace it
        examples = [clone_batch(rows_of(batch, row)) for row in range(examples_in(batch))]
        with torch.no_grad(), guard.preserve():
            of_each = [model_output.get_output(model, weights, buffers, *e) for e in examples]
        values = torch.stack([_scalar(f) for f in of_each])
    return values


def activation_bytes(model: nn.Module, model_output: ModelOutput, batch: Sequence[Any]) -> int:
    """Bytes that the forward pass of a batch's first example keeps for the backward pass."""
    weights = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    buffers = {n: b.detach() for n, b in model.named_buffers()}
    held: dict[int, int] = {}
    model_output = prepared(model_output, model)

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    guarded = ModelStateGuard(model).preserve()
    with guarded, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = model_output.get_output(model, weights, buffers, *clone_batch(rows_of(batch, 0)))
    del output
    held_by_output = pytree.tree_leaves(list(getattr(model_output, "__dict__", {}).values()))
    constant = [t for t in held_by_output if isinstance(t, Tensor)]  # the same for all examples
    for tensor in (*weights.values(), *buffers.values(), *constant):
        held.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(held.values())


def select_params(model: nn.Module, patterns: Sequence[str]) -> dict[str, torch.Size]:
    """The names and shapes of the parameters that the glob `patterns` select, in order of name.

    Frozen ones, which don't require gradients, are none of them.

    Raises
    ------
    ConfigError
        If a pattern selects none.
    """
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    for pattern in patterns:
        if not fnmatch.filter(shapes, pattern):
            raise ConfigError(
                f"{pattern!r} selects no parameter that requires gradients; "
                f"there are {', '.join(shapes) or 'none'}",
                where="featurize.params",
                next="featurize.params='[*.weight]' for example, or leave it out for all",
            )
    chosen = {n for pattern in patterns for n in fnmatch.filter(shapes, pattern)}
    return {name: shapes[name] for name in sorted(chosen)}
