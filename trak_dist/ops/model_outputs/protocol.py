"""What a model output is: the scalar f(z; θ) that TRAK linearises, and its out-to-loss.

`ModelOutput`'s two methods are those of TRAK's `AbstractModelOutput`, so that a class written for
it fits. `BatchedModelOutput` has a third, which fast gradients (`ops.hooks`) need; where Q follows
from f, a fourth, `get_out_to_loss_from_output(output, batch)`, spares another forward pass. What an
output needs of the weights besides an example comes of `prepare` (`preparation`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trak_dist.errors import ProblemError
from trak_dist.ops.batches import batch_of_one, clone_batch, examples_in
from trak_dist.ops.model_outputs.preparation import prepared

Weights = Mapping[str, Tensor]


class ModelOutput(Protocol):
    """A model output function and the derivative of the loss with respect to it."""

    def get_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, *example: Any
    ) -> Float[Tensor, ""]:
        """f(z; θ) of one example, whose tensors come without a batch dimension (for `vmap`)."""
        ...

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """Q = −∂loss/∂f of each example of a batch."""
        ...


class BatchedModelOutput(ModelOutput, Protocol):
    """A model output that can be computed for a whole batch at once.

    What derives from it has `get_output` of that.
    """

    def get_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, *example: Any
    ) -> Float[Tensor, ""]:
        """f(z; θ) of one example, as a batch of one."""
        return self.get_batch_output(model, weights, buffers, batch_of_one(example)).squeeze(0)

    def get_batch_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """f(z; θ) of each example of a batch: what `get_output` gives of each."""
        ...


def own_method(model_output: ModelOutput, name: str) -> Callable[..., Any] | None:
    """The method `name` of a model output, if it is of the function that its class has now.

    A class that overrides `get_output`, and inherits the form for batches of another function, has
    none; nor one that overrides `get_out_to_loss_grad` and inherits Q from f.
    """
    method: Callable[..., Any] | None = getattr(model_output, name, None)
    for written in ("get_output", "get_out_to_loss_grad")[: 1 if name == "get_batch_output" else 2]:
        if _depth(model_output, written) < _depth(model_output, name):
            return None
    return method


def _depth(value: object, name: str) -> int:
    """How far up its classes an attribute is defined; on the object itself, before all of them."""
    if name in getattr(value, "__dict__", {}):
        return -1
    lines = type(value).__mro__
    return next((i for i, line in enumerate(lines) if name in vars(line)), len(lines))


def out_to_loss(
    model_output: ModelOutput,
    model: nn.Module,
    batch: Sequence[Any],
    output: Float[Tensor, " batch"] | None,
) -> Float[Tensor, " batch"]:
    """Q of each example, by the model output's own way: from f where that is known to do.

    Raises
    ------
    ProblemError
        If it is no numbers, or not one for each example.
    """
    size, model_output = examples_in(batch), prepared(model_output, model)
    from_output = own_method(model_output, "get_out_to_loss_from_output")
    with torch.no_grad():
        # What half precision left of f is too little for 1 − p.
        if from_output and output is not None and output.dtype.itemsize >= 4:
            raw = from_output(output, clone_batch(batch))
        else:
            weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
            raw = model_output.get_out_to_loss_grad(model, weights, buffers, clone_batch(batch))
    try:
        q = torch.as_tensor(raw)
    except (TypeError, ValueError, RuntimeError):
        found = f"{type(raw).__name__}, which is not numeric"
    else:
        if q.numel() == size:
            return q.reshape(size)  # TRAK's own classes give (size, 1)
        found = f"values of shape {tuple(q.shape)}"
    raise ProblemError(
        f"out-to-loss of {size} examples came as {found}",
        where=type(model_output).__qualname__,
        next="get_out_to_loss_grad must give one number for each example: no mean over the batch",
    )
