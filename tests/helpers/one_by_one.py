"""Per-sample gradients by plain autograd, each example alone: the oracle of gradient computers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from gathered_gradients import gathered
from torch import Tensor, nn
from torch.func import functional_call

from trak_dist.ops.hooks import HookGradients


class Weighed:
    """F: the sum of a smooth function of what a model gives, with weights unlike each other."""

    def get_batch_output(self, model, weights, buffers, batch) -> Tensor:
        out = functional_call(model, (dict(weights), dict(buffers)), tuple(batch))
        return weighed(out)


def weighed(out: Tensor) -> Tensor:
    out = out.flatten(1)
    return (torch.sin(out) * torch.arange(1, out.shape[1] + 1)).sum(1)


def assert_hooks_are_exact(
    model: nn.Module,
    batch: Sequence[Tensor],
    output: object = None,
    f: Callable[..., Tensor] | None = None,
    pieces: Sequence[int] = (1, 2**20),
) -> None:
    """In float64: gradients by hooks are those of each example alone, to rounding."""
    f = f or (lambda *one: weighed(model(*one)).sum())
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    parameters = dict(model.named_parameters())
    wanted: dict[str, list[Tensor]] = {n: [] for n in names}
    for row in range(len(batch[0])):
        one = [t[row : row + 1].clone() for t in batch]
        found = torch.autograd.grad(f(*one), [parameters[n] for n in names], allow_unused=True)
        for name, grad in zip(names, found, strict=True):
            wanted[name].append(torch.zeros_like(parameters[name]) if grad is None else grad)
    for piece_elements in pieces:
        hooks = HookGradients(model, output or Weighed(), ["*"], piece_elements=piece_elements)
        grads = gathered(hooks, model, [t.clone() for t in batch])
        whole = torch.cat([torch.stack(w).flatten() for w in wanted.values()]).norm()
        for name in names:
            expected = torch.stack(wanted[name])
            error = (grads[name] - expected).norm()
            assert error <= 1e-10 * (expected.norm() + 1e-2 * whole), name
        assert all(torch.stack(w).any() for w in wanted.values())
