"""Compares the gradients of hooks or vmap with those of autograd, on a whole batch.

Some rows are computed each alone, and the weighted sum of all rows in one backward pass of torch's
own (`ops.audit`). Weights of half precision round so coarsely that an error of a rule could hide in
it. So there a copy of the model in float32 comes first, with the tolerance of float32: it shows
whether the rules are right. In its own type gradients may then differ from those of float32 by
`NOISE` times what autograd's own do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trak_dist.ops import audit
from trak_dist.ops.batches import Batch, examples_in
from trak_dist.ops.gradients import GradientComputer, VmapGradients, select_params
from trak_dist.ops.hooks import HookGradients
from trak_dist.ops.model_outputs import ModelOutput, out_to_loss
from trak_dist.ops.model_state import copy_model
from trak_dist.ops.projection import CACHED_PIECE
from trak_dist.spacing import evenly_spaced

ROWS = 4  # of each batch that are computed alone
ROUNDING = 1e-2  # of the tolerance, of all gradients: where a parameter's are zero but for rounding
NOISE = 3  # of autograd's own error: of a parameter of one number it is a sample of a few roundings


@dataclass(frozen=True)
class _Results:
    """Of a batch, in one type: gradients of some rows, the weighted sum of all, f and Q.

    `rows` and `sums` are by autograd, where `sums` is empty for vmap; the others by the method.
    """

    size: int
    tolerance: float
    found_rows: audit.Grads
    found_sums: audit.Grads
    f: Tensor | None
    q: Tensor
    alone: audit.SingleExampleResults
    sums: audit.Grads

    @classmethod
    def of(
        cls, model: nn.Module, output: ModelOutput, batch: Batch, params: Sequence[str], method: str
    ) -> _Results:
        """By the method first, which may refuse."""
        compute: GradientComputer = (
            HookGradients(model, output, params, piece_elements=CACHED_PIECE)
            if method == "hooks"
            else VmapGradients(model, output, params)
        )
        shapes, size = select_params(model, params), examples_in(batch)
        rows, weights = evenly_spaced(size, ROWS), audit.random_weights(size, seed=0)
        grads, found, f = audit.gradients_and_weighted_sum(compute, batch, rows, weights, shapes)
        q = out_to_loss(output, model, batch, f)[rows].double()
        alone = audit.SingleExampleResults.of(model, output, params, batch, rows)
        sums: dict[str, Tensor] = {}
        if method == "hooks":
            sums = {n: torch.zeros(1, *shape, dtype=torch.float64) for n, shape in shapes.items()}

            def sink(name: str, _: slice, values: Tensor) -> None:
                sums[name] += values.cpu()

            audit.weighted_sum_gradient(model, output, params, batch, weights, sink)
        found = {name: found[name][None] for name in sums}
        f = None if f is None else f[rows].double()
        return cls(size, audit.tolerance(model), grads, found, f, q, alone, sums)

    def difference(self, exact: _Results) -> str:
        """How the method differs from autograd in `exact`, by more than rounding; or empty."""
        tolerance, noise = self.tolerance, _distances(self.alone.grads, exact.alone.grads)
        than = f"one by one in a batch of {self.size}"
        if why := _mismatch(self.found_rows, exact.alone.grads, tolerance, noise, than):
            return why
        f, q = self.alone.f.double(), self.alone.q.double()
        if self.f is not None and not torch.allclose(self.f, f, tolerance, tolerance):
            return f"the output of an example in a batch of {self.size} is another one than alone"
        if not torch.allclose(self.q, q, tolerance, tolerance, equal_nan=True):
            return "get_out_to_loss_from_output differs from get_out_to_loss_grad"
        # A sum is rounded as its terms are, also where these cancel.
        more = (self.size / len(q)) ** 0.5
        of_sums = _distances(self.sums, exact.sums)
        of_sums = {name: max(error, noise[name] * more) for name, error in of_sums.items()}
        than = f"autograd gives of a batch of {self.size}"
        return _mismatch(self.found_sums, exact.sums, tolerance, of_sums, than)


def difference_from_autograd(
    model: nn.Module, output: ModelOutput, batch: Batch, params: Sequence[str], method: str
) -> str:
    """How the gradients of `method`, f or Q differ from autograd's; empty if they do not.

    Raises
    ------
    NotCovered
        If hooks can't compute them; or whatever a trace of torch.func, or the model, raises.
    """
    own = _Results.of(model, output, batch, params, method)
    if not any(p.dtype.itemsize < 4 for p in model.parameters() if p.is_floating_point()):
        return own.difference(own)
    widened: Batch = pytree.tree_map_only(
        Tensor, lambda t: t.float() if t.is_floating_point() else t, batch
    )
    try:
        exact = _Results.of(copy_model(model).float(), output, widened, params, method)
    except RuntimeError:  # a model that says itself in which types it computes
        return own.difference(own)
    if why := exact.difference(exact):
        return f"{why} in float32"
    return own.difference(exact)


def _distances(found: audit.Grads, expected: audit.Grads) -> dict[str, float]:
    return {name: float((found[name] - values).norm()) for name, values in expected.items()}


def _mismatch(
    found: audit.Grads,
    expected: audit.Grads,
    tolerance: float,
    noise: Mapping[str, float],
    than: str,
) -> str:
    """The parameter whose gradients differ."""
    whole = sum(float(w.square().sum()) for w in expected.values()) ** 0.5
    for name, error in _distances(found, expected).items():
        norm = float(expected[name].norm())
        allowed = max(tolerance * norm, NOISE * noise[name]) + tolerance * ROUNDING * whole
        if not error <= allowed:
            return (
                f"{name} has other gradients than {than} (difference {error:.1e}, norm {norm:.1e})"
            )
    return ""
