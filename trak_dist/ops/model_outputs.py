"""Model outputs: the scalar f(z; θ) that TRAK linearises, and its out-to-loss.

`ModelOutput`'s two methods are those of TRAK's `AbstractModelOutput`, so that a class written for
it fits. `BatchedModelOutput` has a third, which fast gradients (`ops.hooks`) need; where Q follows
from f, a fourth, `get_out_to_loss_from_output(output, batch)`, spares another forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

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
    """A model output that can be computed for a whole batch at once."""

    def get_batch_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """f(z; θ) of each example of a batch: what `get_output` gives of each."""
        ...


class ImageClassification:
    """The margin f = log(p / (1 − p)) of the true class, batches of (images, labels).

    Park et al. 2023, "TRAK: Attributing Model Behavior at Scale", section 3.3: with cross-entropy
    ℓ = log(1 + exp(−f)), −∂ℓ/∂f = 1 − p.
    """

    def get_output(
        self,
        model: nn.Module,
        weights: Weights,
        buffers: Weights,
        image: Float[Tensor, "..."],
        label: Int64[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """F of one example: its class's logit minus the log-sum-exp of the others."""
        logits = functional_call(model, (dict(weights), dict(buffers)), (image.unsqueeze(0),))
        return _margins(logits, label.unsqueeze(0)).squeeze(0)

    def get_batch_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """F of each example, from one forward pass."""
        images, labels = batch
        return _margins(functional_call(model, (dict(weights), dict(buffers)), (images,)), labels)

    def get_out_to_loss_from_output(
        self,
        output: Float[Tensor, " batch"],
        batch: Sequence[Any],  # noqa: ARG002
    ) -> Float[Tensor, " batch"]:
        """1 − p of each example, from its margin."""
        return torch.sigmoid(-output)

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """1 − p = sigmoid(−f), which keeps small values that 1 − p would cancel."""
        images, labels = batch
        logits = functional_call(model, (dict(weights), dict(buffers)), (images,))
        return torch.sigmoid(-_margins(logits, labels))


def out_to_loss(
    model_output: ModelOutput,
    model: nn.Module,
    batch: Sequence[Any],
    output: Float[Tensor, " batch"] | None,
) -> Float[Tensor, " batch"]:
    """Q of each example, by the model output's own way: from f where that is known to do."""
    from_output = getattr(model_output, "get_out_to_loss_from_output", None)
    with torch.no_grad():
        # What half precision left of f is too little for 1 − p.
        if from_output and output is not None and output.dtype.itemsize >= 4:
            q: Tensor = from_output(output, batch)
            return q
        weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        return model_output.get_out_to_loss_grad(model, weights, buffers, batch)


def _margins(
    logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    classes = torch.arange(logits.shape[1], device=logits.device)
    is_true = classes == labels[:, None]
    if logits.dtype.itemsize < 4:  # a half type can't hold the 1 − p of a good model
        logits = logits.float()
    # The margin does not depend on an offset; its rounding, forward and backward, would.
    logits = logits - logits.detach().amax(1, keepdim=True)
    # where(), not indexing in place: the same under vmap, and no NaN in its gradient
    others = torch.where(is_true, -torch.inf, logits).logsumexp(1)
    own = torch.where(is_true, logits, 0).sum(1)
    # A label that is no class must not pass for one: NaN is found, and its row named.
    return torch.where(is_true.any(1), own - others, torch.nan)
