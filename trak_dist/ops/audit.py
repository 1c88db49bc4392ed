"""Checks of per-sample gradients, f and Q against plain autograd.

A gradient computer is tried on a whole batch. Some rows of it are computed again, each alone: their
gradients, f and Q must be the same, whatever other examples they came with. And a sum of all rows'
gradients, with random weights, must be the gradient of the weighted sum of outputs, one backward
pass of torch's own, in which a row that was given to another example would show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trak_dist.errors import ProblemError
from trak_dist.ops.batches import Batch, clone_batch, examples_in, rows_of
from trak_dist.ops.gradients import GradientComputer, GradientSink, LoopGradients, select_params
from trak_dist.ops.model_outputs import ModelOutput, out_to_loss, own_method, prepared
from trak_dist.ops.model_state import ModelStateGuard

Grads = Mapping[str, Float[Tensor, "rows ..."]]


def tolerance(model: nn.Module) -> float:
    """Relative difference that rounding may make, in the coarsest type of a model's weights."""
    eps = max(
        (torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()),
        default=torch.finfo(torch.float32).eps,
    )
    return max(1e-4, 16 * eps)


@dataclass(frozen=True)
class SingleExampleResults:
    """Some examples, each computed alone: gradients, f (rows,), Q (rows,)."""

    grads: Grads
    f: Float[Tensor, " rows"]
    q: Float[Tensor, " rows"]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        model_output: ModelOutput,
        params: Sequence[str],
        batch: Batch,
        rows: Sequence[int],
    ) -> SingleExampleResults:
        """By a loop, one after the other."""
        loop = LoopGradients(model, model_output, params)
        chosen = rows_of(batch, list(rows))
        grads, f = gradients_of_rows(loop, chosen, range(len(rows)), select_params(model, params))
        assert f is not None
        return cls(grads, f, out_to_loss_alone(model, model_output, batch, rows))


def out_to_loss_alone(
    model: nn.Module, model_output: ModelOutput, batch: Batch, rows: Sequence[int]
) -> Float[Tensor, " rows"]:
    """Q of some examples, each in a batch of its own."""
    with ModelStateGuard(model).preserve():
        q = [
            out_to_loss(model_output, model, rows_of(batch, slice(row, row + 1)), None)
            for row in rows
        ]
    return torch.cat(q)


def check_deterministic(
    model: nn.Module, model_output: ModelOutput, params: Sequence[str], batch: Batch, *, where: str
) -> None:
    """Raise `ProblemError` if the output of an example differs when it is computed again."""
    loop, example = LoopGradients(model, model_output, params), rows_of(batch, [0])
    first, second = (loop(example, lambda *_: None) for _ in range(2))
    if not torch.allclose(first, second, rtol=tolerance(model), atol=1e-6, equal_nan=True):
        raise ProblemError(
            f"the model output of an example is {first.item():.6g}, and {second.item():.6g} when "
            "it is computed again",
            where=where,
            next="switch randomness off: F.dropout(x, p, self.training); or where it is meant, "
            "featurize.random=by_example",
        )


def gradients_of_rows(
    compute: GradientComputer, batch: Batch, rows: Sequence[int], shapes: Mapping[str, torch.Size]
) -> tuple[Grads, Float[Tensor, " batch"] | None]:
    """The float64 gradients of some rows of a batch, in their order; and f, if it is known."""
    grads, _, f = gradients_and_weighted_sum(compute, batch, rows, None, shapes)
    return grads, f


def gradients_and_weighted_sum(
    compute: GradientComputer,
    batch: Batch,
    rows: Sequence[int],
    weights: Float[Tensor, " batch"] | None,
    shapes: Mapping[str, torch.Size],
) -> tuple[Grads, Grads, Float[Tensor, " batch"] | None]:
    """The same, and the weighted sum of all rows' gradients, without a (batch, p) matrix."""
    selected = {n: torch.zeros(len(rows), *s, dtype=torch.float64) for n, s in shapes.items()}
    sums = {
        n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items() if weights is not None
    }

    def sink(name: str, piece: slice, grads: Tensor) -> None:
        values = grads.detach().cpu().double()
        for position, row in enumerate(rows):
            if piece.start <= row < piece.stop:
                selected[name][position] += values[row - piece.start]
        if weights is not None:
            sums[name] += torch.tensordot(weights[piece], values, 1)

    f = compute(batch, sink)
    return selected, sums, None if f is None else f.detach()


def weighted_sum_gradient(
    model: nn.Module,
    model_output: ModelOutput,
    params: Sequence[str],
    batch: Batch,
    weights: Float[Tensor, " batch"],
    sink: GradientSink,
) -> None:
    """Pass the gradient of Σ wᵢ fᵢ, from one backward pass, to the sink as that of one example."""
    ready = prepared(model_output, model)
    output: Callable[..., Tensor] | None = own_method(ready, "get_batch_output")
    assert output is not None
    selected = select_params(model, params)
    leaves = {n: p.detach().requires_grad_(n in selected) for n, p in model.named_parameters()}
    buffers = {n: b.detach() for n, b in model.named_buffers()}
    with ModelStateGuard(model).preserve(), torch.enable_grad():
        f = output(model, leaves, buffers, clone_batch(batch)).reshape(examples_in(batch))
        found = torch.autograd.grad(
            (f.float() * weights.to(f.device)).sum(),
            [leaves[n] for n in selected],
            allow_unused=True,
        )
    for name, grads in zip(selected, found, strict=True):
        if grads is not None:
            sink(name, slice(0, 1), grads[None])


def random_weights(size: int, seed: int) -> Float[Tensor, " batch"]:
    """Weights between 0.5 and 1.5, no two of them alike."""
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + torch.rand(size, generator=generator, dtype=torch.float64)
