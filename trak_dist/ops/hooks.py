"""Per-sample gradients from one batched forward and one backward pass.

The forward pass is watched: whatever function of torch a selected parameter goes into gives its
output a hook. In the backward pass, which computes gradients by activations only, the hook forms
the parameter's per-sample gradients by the function's rule (`ops.layers`), hands them over in
pieces, and lets go of them. So neither the (batch, p) matrix nor the summed weight gradients exist.

What is watched are functions and not modules, so `F.linear(x, self.fc.weight)`, tied weights and
modules used twice need no case of their own; a use without a rule is found, never passed over. The
examples are followed too (`ops.following`): a layer's rows are read as examples only where it is
known whose they are, however the model has sorted, packed or routed them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trak_dist.errors import NotCovered, ProblemError
from trak_dist.ops import examples
from trak_dist.ops.batches import examples_in, fresh
from trak_dist.ops.bundles import Bundles
from trak_dist.ops.examples import Lost
from trak_dist.ops.following import holds_examples
from trak_dist.ops.gradients import Take, select_params
from trak_dist.ops.intact import Intact
from trak_dist.ops.model_outputs import ModelOutput, own_form
from trak_dist.ops.watch import Watch


class HookGradients:
    """Gradients by hooks, where every use of a selected parameter has a rule.

    Parameters
    ----------
    model : torch.nn.Module
        With its weights loaded, in `eval()`.
    model_output : ModelOutput
        With `get_batch_output`.
    params : sequence of str
        Globs that select parameters.
    piece_elements : int
        About how many numbers are handed over at a time; more where one example has more.
    bundles : callable
        Gives the bundles of a parameter, by its name and device, if its gradients are to be handed
        over bundled where they can be; by default none are.

    Raises
    ------
    NotCovered
        If the model output has no `get_batch_output`; when called, if a use has no rule.
    """

    def __init__(
        self,
        model: nn.Module,
        model_output: ModelOutput,
        params: Sequence[str],
        *,
        piece_elements: int,
        bundles: Callable[[str, torch.device], Bundles | None] = lambda *_: None,
    ) -> None:
        # TRAK's model outputs have no such method: it is optional.
        output = own_form(model_output, "get_batch_output")
        if output is None:
            kind = type(model_output).__qualname__
            inherits = hasattr(model_output, "get_batch_output")
            raise NotCovered(
                f"{kind} overrides get_output, not get_batch_output"
                if inherits
                else f"{kind} has no get_batch_output"
            )
        self._output: Callable[..., Tensor] = output
        self._model, self._intact = model, Intact(model)
        self._weights = {n: p.detach() for n, p in model.named_parameters()}
        self._buffers = {n: b.detach() for n, b in model.named_buffers()}
        self._selected = select_params(model, params)
        self._piece_elements = piece_elements
        self._bundles = bundles

    def __call__(self, batch: Sequence[Any], take: Take) -> Float[Tensor, " batch"]:
        """See `GradientComputer`."""
        size = examples_in(batch)
        watch = Watch(size, self._piece_elements)
        for name in self._selected:
            weight = self._weights[name].requires_grad_()
            watch.add_parameter(name, weight, take, self._bundles(name, weight.device))
        batch = pytree.tree_map_only(Tensor, lambda t: examples.come_first(t, size), fresh(batch))
        with self._intact.kept():
            with torch.enable_grad(), watch:
                f = self._output(self._model, self._weights, self._buffers, batch)
            watch.refuse_uncovered()
            if watch.unseen:
                raise NotCovered(
                    f"the model output, since what {watch.unseen} does is not followed"
                )
            _refuse_mixed(f, size)
            if watch.roots:
                torch.autograd.grad(f, watch.roots, torch.ones_like(f), allow_unused=True)
        return f.detach().reshape(size)


def _refuse_mixed(f: Any, size: int) -> None:
    """Raise `NotCovered` unless there is one output for each example, in their order."""
    if not isinstance(f, Tensor) or f.numel() != size:
        found = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
        raise ProblemError(
            f"get_batch_output gave {found} for {size} examples",
            where="the model output",
            next="it must give one value for each example: no mean over the batch",
        )
    holds_examples([f])
    where = examples.of(f)
    if isinstance(where, Lost):
        raise NotCovered(f"the model output, since examples can't be told apart after {where.by}")
    if where is None:
        raise NotCovered("the model output, which is made of no example as far as torch shows")
    if not torch.equal(where.ids, torch.arange(size)):
        raise NotCovered("the model output, which comes in another order than the batch")
