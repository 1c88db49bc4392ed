"""The model output of regressions: how near the prediction is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trak_dist.ops.model_outputs.calls import check_shapes, predicted
from trak_dist.ops.model_outputs.protocol import BatchedModelOutput, Weights


class Regression(BatchedModelOutput):
    """F = −‖y − ŷ‖, the distance to the target value; with the squared error, ½f², Q = −f.

    A positive score is helpful: training on the row brings the prediction nearer. (The prediction
    itself as f says what raises it, which does harm where it is too high.) L″ = 1, so TRAK's kernel
    is the loss's curvature as it is: with one value, ∇f = ±∇ŷ and XᵀX is the Gauss–Newton matrix;
    with several it has a row's part along its own error.

    A batch is (inputs, …, values) or a mapping of the model's arguments and `labels`; values are
    (batch,) or (batch, outputs), as what the model returns, or what this has as `logits`. A target
    that is predicted exactly has no gradient, and scores of 0.
    """

    def get_batch_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """F of each example, in the units of the values.

        Raises
        ------
        ProblemError
            If predictions and values are not of one shape.
        """
        found, values = predicted(model, weights, buffers, batch)
        if found.ndim == 2 and found.shape[1] == 1 and values.ndim == 1:
            found = found[:, 0]
        check_shapes(values, found.shape, found)
        distance: Tensor = torch.linalg.vector_norm((values - found).reshape(len(found), -1), dim=1)
        return -distance

    def get_out_to_loss_from_output(
        self,
        output: Float[Tensor, " batch"],
        batch: Sequence[Any],  # noqa: ARG002
    ) -> Float[Tensor, " batch"]:
        """Q = −∂(½f²)/∂f = −f of each example."""
        return -output

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """The same, from a forward pass."""
        return -self.get_batch_output(model, weights, buffers, batch)
