"""Recurrent layers of torch, with each weight used once for all steps (for `ops.rewriting`).

A fused kernel shows nothing of its steps. But where it gets the input's part of the gates as its
input, what is added to that has the gradient of the gates of each step. Added is a zero, the
product of the states' weights with all states less itself; the kernel's own weights are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from trak_dist.ops.example_axis import axis_of

Gates = Float[Tensor, "batch steps gates"]
Recurrent = Callable[..., Callable[[], Any] | None]


def recurrent(kernel: Any) -> Recurrent:
    """For `torch.lstm`, `gru`, `rnn_tanh` and `rnn_relu`; not packed ones, nor projections."""

    def layers(  # noqa: PLR0913, PLR0917
        input: Tensor,
        hx: Any,
        weights: Any,
        has_biases: Any,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: Any = None,
    ) -> Callable[[], Any] | None:
        each, directions = 4 if has_biases is True else 2, 2 if bidirectional else 1
        packed = not isinstance(batch_first, bool) or not isinstance(has_biases, bool)
        if packed or (train and dropout) or len(weights) != each * directions * num_layers:
            return None
        states = tuple(hx) if isinstance(hx, list | tuple) else (hx,)

        def run() -> tuple[Tensor, ...]:
            x, ends = input if batch_first else input.transpose(0, 1), []
            for layer in range(num_layers):
                found = []
                for direction in range(directions):
                    k = layer * directions + direction
                    own = tuple(_of_examples(state[k : k + 1], x) for state in states)
                    turned = x.flip(1) if direction else x
                    out, *end = _layer(kernel, turned, own, weights[each * k : each * (k + 1)])
                    found.append(out.flip(1) if direction else out)
                    ends.append(end)
                x = torch.cat(found, -1) if bidirectional else found[0]
            last = (torch.cat(of_one) for of_one in zip(*ends, strict=True))
            return (x if batch_first else x.transpose(0, 1), *last)

        return run

    return layers


def _of_examples(state: Float[Tensor, "1 batch h"], x: Tensor) -> Float[Tensor, "1 batch h"]:
    """A state that may be learned: by a zero of each example it is lifted to be the example's."""
    return state + 0 * x[:, :1, :1].transpose(0, 1) if axis_of(state) is None else state


def _layer(
    kernel: Any,
    x: Float[Tensor, "batch steps i"],
    states: tuple[Float[Tensor, "1 batch h"], ...],
    weights: Sequence[Tensor],
) -> Sequence[Tensor]:
    of_input, of_state, *biases = weights
    bias, state_bias = biases or (None, None)
    given = F.linear(x, of_input, bias)
    fixed = [torch.eye(given.shape[-1], dtype=given.dtype, device=given.device), of_state.detach()]
    if state_bias is not None:
        fixed += [torch.zeros_like(state_bias.detach()), state_bias.detach()]

    def steps(gates: Gates, states: tuple[Tensor, ...]) -> Sequence[Tensor]:
        start = states if kernel is torch.lstm else states[0]
        found: Sequence[Tensor] = kernel(
            gates, start, fixed, bool(biases), 1, 0.0, False, False, True
        )
        return found

    with torch.no_grad():
        after = steps(given.detach(), tuple(s.detach() for s in states))[0]
        before = torch.cat([states[0].detach().transpose(0, 1), after[:, :-1]], 1)
    products = F.linear(before, of_state, state_bias)
    zero = products - products.detach()
    if kernel is torch.gru:  # whose last gate takes the product times the first gate
        first, others = given.shape[-1] // 3, given.shape[-1] // 3 * 2
        reset = (given + products).detach()[..., :first].sigmoid()
        zero = torch.cat([zero[..., :others], reset * zero[..., others:]], -1)
    return steps(given + zero, states)


RECURRENT: dict[Any, Recurrent] = {
    kernel: recurrent(kernel) for kernel in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
}
