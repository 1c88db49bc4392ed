"""Which way of computing gradients a plan takes: the fastest that is right.

Hooks refuse what they have no rule for, and torch.func what it can't trace. What they could still
get wrong, a model output whose batched form is another function or a model whose examples meet,
shows in numbers: on the first examples they must agree with a loop over them. They are compared at
weights moved away from the problem's own, among which there may be zeros that hide a difference.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trak_dist.errors import ConfigError, NotCovered
from trak_dist.ops.gradients import (
    GradientComputer,
    LoopGradients,
    VmapGradients,
    examples_in,
    select_params,
)
from trak_dist.ops.hooks import HookGradients
from trak_dist.ops.model_outputs import ModelOutput, out_to_loss
from trak_dist.ops.projection import CACHED_PIECE

TOLERANCE = 1e-4  # of a parameter's gradients, in relative 2-norm
ROUNDING = 1e-6  # of all gradients: what may be left where a parameter's are zero but for rounding


def choose(
    model: nn.Module,
    model_output: ModelOutput,
    batches: Mapping[str, Sequence[Any]],
    *,
    params: Sequence[str],
    asked: str,
) -> tuple[str, str]:
    """`hooks`, `vmap` or `loop`; and, where `auto` does not come to the first, why.

    Parameters
    ----------
    model, model_output
        What is to be planned.
    batches : mapping
        The first examples of each split.
    params : sequence of str
        Globs that select parameters.
    asked : str
        `featurize.gradients`.

    Raises
    ------
    ConfigError
        If it asks for a way that can't be.
    """
    moved = _moved(model)
    reasons: list[str] = []
    for way in ("hooks", "vmap") if asked == "auto" else (asked,):
        why = "" if way == "loop" else _objection(moved, model_output, batches, params, way)
        if not why:
            return way, ", ".join(reasons)
        if asked != "auto":
            raise ConfigError(
                f"{way} can't compute the gradients: {why}",
                where="featurize.gradients",
                next="featurize.gradients=auto, which finds one that can; or leave these "
                "parameters out (featurize.params)",
            )
        reasons.append(f"not by {way}: {why}")
    return "loop", ", ".join(reasons)


def _objection(
    model: nn.Module,
    output: ModelOutput,
    batches: Mapping[str, Sequence[Any]],
    params: Sequence[str],
    way: str,
) -> str:
    """What speaks against hooks or vmap; empty if nothing."""
    shapes = select_params(model, params)
    for split, batch in batches.items():
        try:
            if way == "hooks":
                compute: GradientComputer = HookGradients(
                    model, output, params, piece_elements=CACHED_PIECE
                )
            else:
                compute = VmapGradients(model, output, params)
            found, f = _gathered(compute, batch, shapes)
            q = out_to_loss(output, model, batch, f)
        except NotCovered as error:
            return error.what
        except Exception as error:  # whatever a rule, a trace, or the user's batched output does
            text = " ".join(str(error).split())
            return f"{type(error).__name__} on the first examples of {split!r}: {text[:300]}"
        wanted, _ = _gathered(LoopGradients(model, output, params), batch, shapes)
        whole = sum(float(w.square().sum()) for w in wanted.values()) ** 0.5
        for name in shapes:
            error_norm = float((found[name] - wanted[name]).norm())
            norm = float(wanted[name].norm())
            if not error_norm <= TOLERANCE * norm + ROUNDING * whole:
                return (
                    f"{name} has other gradients than one by one on the first examples of "
                    f"{split!r} (difference {error_norm:.1e}, norm {norm:.1e})"
                )
        own = out_to_loss(output, model, batch, None)
        if not torch.allclose(q.flatten(), own.flatten(), rtol=TOLERANCE, atol=ROUNDING):
            return f"get_out_to_loss_from_output differs from get_out_to_loss_grad on {split!r}"
    return ""


def _moved(model: nn.Module) -> nn.Module:
    moved = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            size = float(parameter.float().square().mean().sqrt()) if parameter.numel() else 0
            parameter.add_(noise, alpha=0.1 * size + 0.01)
    return moved


def _gathered(
    compute: GradientComputer, batch: Sequence[Any], shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, Tensor], Tensor | None]:
    size = examples_in(batch)
    grads = {n: torch.zeros(size, *shape, dtype=torch.float64) for n, shape in shapes.items()}

    def take(name: str, rows: slice, values: Tensor) -> None:
        grads[name][rows] += values.cpu()

    f = compute(batch, take)
    return grads, f
