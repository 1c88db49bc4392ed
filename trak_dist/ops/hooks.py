"""Per-sample gradients from one batched forward and one backward pass.

The forward pass is traced: whatever function of torch a selected parameter goes into gives its
output a hook. In the backward pass, which computes gradients by activations only, the hook forms
the parameter's per-sample gradients by the function's rule (`ops.layers`), passes them on in
pieces, and frees them. So neither the (batch, p) matrix nor the summed weight gradients exist.

Functions are traced and not modules, so `F.linear(x, self.fc.weight)`, tied weights and modules
used twice need no case of their own; a use without a rule is found, never passed over. The examples
are tracked too (`ops.tracking`): a layer's rows count as an example's only where that is known,
however the model has sorted, packed or routed them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trak_dist.errors import NotCovered, ProblemError
from trak_dist.ops import example_axis
from trak_dist.ops.batches import clone_batch, examples_in
from trak_dist.ops.bundles import Bundles
from trak_dist.ops.example_axis import Untracked
from trak_dist.ops.gradients import GradientSink, select_params
from trak_dist.ops.model_outputs import ModelOutput, own_method, prepared
from trak_dist.ops.model_state import ModelStateGuard
from trak_dist.ops.parameter_tracer import ParameterTracer
from trak_dist.ops.tracking import depend_on_examples


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
        if own_method(model_output, "get_batch_output") is None:
            kind = type(model_output).__qualname__
            inherits = hasattr(model_output, "get_batch_output")
            why = "overrides get_output, not" if inherits else "has no"
            raise NotCovered(
                f"{kind} {why} get_batch_output (with one, gradients take about half the time)"
            )
        self._model_output = model_output
        self._model, self._state_guard = model, ModelStateGuard(model)
        self._weights = {n: p.detach() for n, p in model.named_parameters()}
        self._buffers = {n: b.detach() for n, b in model.named_buffers()}
        self._selected = select_params(model, params)
        self._piece_elements = piece_elements
        self._bundles = bundles

    def __call__(self, batch: Sequence[Any], sink: GradientSink) -> Float[Tensor, " batch"]:
        """See `GradientComputer`."""
        size = examples_in(batch)
        output = own_method(prepared(self._model_output, self._model), "get_batch_output")
        assert output is not None
        watch = ParameterTracer(size, self._piece_elements)
        for name in self._selected:
            weight = self._weights[name].requires_grad_()
            watch.add_parameter(name, weight, sink, self._bundles(name, weight.device))
        batch = pytree.tree_map_only(
            Tensor, lambda t: example_axis.mark_batch_first(t, size), clone_batch(batch)
        )
        with self._state_guard.preserve():
            with torch.enable_grad(), watch:
                f = output(self._model, self._weights, self._buffers, batch)
            watch.check_covered()
            if watch.escaped_by:
                raise NotCovered(
                    f"the model output, since what {watch.escaped_by} does is not tracked"
                )
            _check_outputs(f, size)
            if watch.roots:
                torch.autograd.grad(f, watch.roots, torch.ones_like(f), allow_unused=True)
        found: Tensor = f.detach().reshape(size)
        return found


def _check_outputs(f: Any, size: int) -> None:
    """Raise `NotCovered` unless there is one output for each example, in their order."""
    if not isinstance(f, Tensor) or f.numel() != size:
        found = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
        raise ProblemError(
            f"get_batch_output gave {found} for {size} examples",
            where="the model output",
            next="it must give one value for each example: no mean over the batch",
        )
    depend_on_examples([f])
    where = example_axis.axis_of(f)
    if isinstance(where, Untracked):
        raise NotCovered(
            f"the model output, since examples are no longer separable after {where.by}"
        )
    if where is None:
        raise NotCovered("the model output, which is made of no example as far as torch shows")
    if not torch.equal(where.ids, torch.arange(size)):
        raise NotCovered("the model output, which is not in the order of the batch")
