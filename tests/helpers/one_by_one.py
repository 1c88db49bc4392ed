"""Per-sample gradients by plain autograd, each example alone: the oracle of gradient computers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gathered_gradients import gathered
from torch import Tensor, nn
from torch.func import functional_call

from trak_dist.ops.hooks import HookGradients


class Weighed:
    """F: the sum of a smooth function of what a model gives, with weights unlike each other."""

    def get_batch_output(self, model, weights, buffers, batch) -> Tensor:
        return weighed(functional_call(model, (dict(weights), dict(buffers)), tuple(batch)))


def weighed(out: Tensor) -> Tensor:
    """Of each example."""
    out = out.flatten(1)
    return (torch.sin(out) * torch.arange(1, out.shape[1] + 1)).sum(1)


def gradients_alone(model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
    """(batch, …) gradients by name, zero where a parameter is not used."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for row in range(len(batch[0])):
        f = weighed(model(*(t[row : row + 1].clone() for t in batch))).sum()
        found = torch.autograd.grad(f, [*parameters.values()], allow_unused=True)
        for (name, parameter), grad in zip(parameters.items(), found, strict=True):
            rows[name].append(torch.zeros_like(parameter) if grad is None else grad)
    return {name: torch.stack(grads) for name, grads in rows.items()}


def assert_hooks_are_exact(
    model: nn.Module,
    batch: Sequence[Tensor],
    *,
    wanted: dict[str, Tensor] | None = None,
    to: float = 1e-10,
) -> None:
    """Gradients by hooks are those of each example alone, whatever the size of pieces."""
    wanted = wanted or gradients_alone(model, batch)
    whole = torch.cat([grads.flatten() for grads in wanted.values()]).norm()
    assert whole > 0
    for piece_elements in (1, 2**20):
        hooks = HookGradients(model, Weighed(), ["*"], piece_elements=piece_elements)
        found = gathered(hooks, model, [t.clone() for t in batch])
        for name, grads in wanted.items():
            error = (found[name] - grads).norm()
            assert error <= to * (grads.norm() + 1e-2 * whole), name
