"""What a kernel inverts: the curvature H = UᵀU of the training loss, and what model outputs offer.

The generalised Gauss–Newton matrix of a loss L(f) is Σ L″(fᵢ) ∇fᵢ ∇fᵢᵀ: U = √W X, with
L″ = Q(1 − Q) of the logistic loss, which TRAK's derivation drops (Park et al. 2023, section 3).
Where the loss is no function of one output, the Fisher matrix takes its place: the mean of u uᵀ
with u = ∇ log p(y | x) and y drawn from the model's own prediction (Martens 2020, "New insights and
perspectives on the natural gradient method", sections 5 and 8). Both are positive semi-definite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from trak_dist.errors import ProblemError
from trak_dist.ops import draws
from trak_dist.ops.batches import Batch, clone_batch, examples_in, rows_of
from trak_dist.ops.model_outputs import (
    BatchedModelOutput,
    ModelOutput,
    Weights,
    out_to_loss,
    own_method,
    prepared,
)

LOGISTIC = "logistic"
CLOSE = 1e-3  # of Q, to that of the loss that is declared


class FisherModelOutput(ModelOutput, Protocol):
    """A model output whose labels can be drawn from the model, for Fisher rows."""

    def draw_labels(
        self,
        model: nn.Module,
        weights: Weights,
        buffers: Weights,
        batch: Sequence[Any],
        uniform: draws.Uniform,
    ) -> Sequence[Any]:
        """The batch with labels drawn from the model's own prediction, by `draws.categorical`."""
        ...

    def get_batch_log_likelihood(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """Log p(labels | inputs) of each example: minus its loss."""
        ...


class LogLikelihood(BatchedModelOutput):
    """log p(labels | inputs) as the model output: its gradients at drawn labels are Fisher rows."""

    def __init__(self, output: FisherModelOutput) -> None:
        self._output = output

    def prepare(
        self,
        model: nn.Module,
        weights: Weights,  # noqa: ARG002
        buffers: Weights,  # noqa: ARG002
    ) -> LogLikelihood:
        """That of the prepared model output."""
        return LogLikelihood(prepared(self._output, model))

    def get_batch_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """It of each example of a batch."""
        return self._output.get_batch_log_likelihood(model, weights, buffers, batch)

    def get_out_to_loss_grad(
        self,
        model: nn.Module,  # noqa: ARG002
        weights: Weights,  # noqa: ARG002
        buffers: Weights,  # noqa: ARG002
        batch: Sequence[Any],
    ) -> Float[Tensor, " batch"]:
        """Ones: the loss is its negative."""
        return torch.ones(examples_in(batch))


def offered(model_output: ModelOutput) -> tuple[str, ...]:
    """The curvatures that a model output offers, the best first; `none` is always the last.

    `output` if it declares `loss = "logistic"`: the loss is log(1 + exp(−f)). `fisher` if it has
    `draw_labels` and `get_batch_log_likelihood`. What is inherited beside an overridden
    `get_output` or `get_out_to_loss_grad` does not count.
    """
    loss: object = own_method(model_output, "loss")
    likelihood = ("draw_labels", "get_batch_log_likelihood")
    return (
        *(["output"] if loss == LOGISTIC else []),
        *(["fisher"] if all(own_method(model_output, name) for name in likelihood) else []),
        "none",
    )


def check_logistic(model: nn.Module, model_output: ModelOutput, batch: Batch) -> None:
    """Raise `ProblemError` if Q is not that of the logistic loss, sigmoid(−f), in a batch."""
    state = dict(model.named_parameters()), dict(model.named_buffers())
    ready = prepared(model_output, model)
    with torch.no_grad():
        examples = (clone_batch(rows_of(batch, row)) for row in range(examples_in(batch)))
        outputs = [ready.get_output(model, *state, *example) for example in examples]
    f = torch.stack([output.reshape(()) for output in outputs]).float()
    q = out_to_loss(model_output, model, batch, None).float()
    expected = torch.sigmoid(-f)
    if not torch.allclose(q, expected, rtol=CLOSE, atol=CLOSE, equal_nan=True):
        at = int((q - expected).abs().nan_to_num(torch.inf).argmax())
        raise ProblemError(
            f"it declares the logistic loss, but out-to-loss of a train row is {float(q[at]):.6g}, "
            f"and sigmoid(−f) is {float(expected[at]):.6g}",
            where=type(model_output).__qualname__,
            next="leave `loss` out of a model output whose loss is not log(1 + exp(−f))",
        )


def row_weights(out_to_loss: Float[Tensor, " rows"]) -> Float64[Tensor, " rows"]:
    """L″ of the logistic loss by each row's output: Q(1 − Q)."""
    q = out_to_loss.double()
    return q * (1 - q)


def uniform_of_rows(rows: Sequence[int], draw: int, device: torch.device) -> draws.Uniform:
    """The random numbers that labels of train rows are drawn with: of row and draw alone."""
    keys = torch.tensor([draws.stream_key("label", draw, row) for row in rows], device=device)

    def uniform(count: int) -> Float64[Tensor, "batch count"]:
        return draws.uniform(keys[:, None], torch.arange(count, device=device))

    return uniform
