"""Model outputs by how the loss depends on f: minus f, or log(1 + exp(−f))."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from trak_dist.errors import ProblemError
from trak_dist.ops.batches import examples_in
from trak_dist.ops.model_outputs.protocol import BatchedModelOutput, Weights


class NegativeLoss(BatchedModelOutput):
    """F = −loss, so Q = −∂loss/∂f = 1; a positive score is helpful, it lowers the target's loss."""

    def get_out_to_loss_from_output(
        self,
        output: Float[Tensor, " batch"],
        batch: Sequence[Any],  # noqa: ARG002
    ) -> Float[Tensor, " batch"]:
        """Ones."""
        return torch.ones_like(output)

    def get_out_to_loss_grad(
        self,
        model: nn.Module,  # noqa: ARG002
        weights: Weights,  # noqa: ARG002
        buffers: Weights,  # noqa: ARG002
        batch: Sequence[Any],
    ) -> Float[Tensor, " batch"]:
        """Ones, which need no forward pass."""
        first = next(leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
        return torch.ones(examples_in(batch), device=first.device)


class LogisticLoss(BatchedModelOutput):
    """The loss is log(1 + exp(−f)), so Q = sigmoid(−f), and its curvature by f is Q(1 − Q)."""

    loss = "logistic"  # as a function of f: what its curvature is

    def get_out_to_loss_from_output(
        self,
        output: Float[Tensor, " batch"],
        batch: Sequence[Any],  # noqa: ARG002
    ) -> Float[Tensor, " batch"]:
        """Q of each example, which keeps small values that 1 − sigmoid(f) would cancel."""
        return torch.sigmoid(-output)

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """The same, from a forward pass."""
        return torch.sigmoid(-self.get_batch_output(model, weights, buffers, batch))


class LossOutput(NegativeLoss):
    """F = −loss for any loss that is a function of an example and the weights.

    Parameters
    ----------
    loss : callable
        `loss(model, batch)` gives the loss of each example, (batch,) floating point. `model` takes
        the model's arguments. For instance
        `LossOutput(lambda model, batch: mse_loss(model(batch[0]), batch[1], reduction="none"))`.

    Nothing is known of how the loss is curved, so the kernel is TRAK's (`reduce.curvature=none`),
    that of the losses' gradients. Rows that are fitted well have small ones; where the loss is that
    of one of the other model outputs, theirs is better.
    """

    def __init__(self, loss: Callable[[Callable[..., Any], Sequence[Any]], Tensor]) -> None:
        self.loss_function = loss

    def get_batch_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """F of each example.

        Raises
        ------
        ProblemError
            If the loss is not one number for each example.
        """
        state = ({**weights}, {**buffers})

        def call(*arguments: Any, **keywords: Any) -> Any:
            return functional_call(model, state, arguments, keywords)

        losses = self.loss_function(call, batch)
        size = examples_in(batch)
        if not isinstance(losses, Tensor) or losses.shape not in ((size,), (size, 1)):
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ProblemError(
                f"the loss of {size} examples came as {found}, not as ({size},)",
                where="LossOutput",
                next='give one number for each example, as reduction="none" does; the mean over '
                "an example's own tokens or pixels is one",
            )
        return -losses.reshape(size)
