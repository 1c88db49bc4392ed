"""Selects the gradient method of a plan: the fastest that is right.

Hooks refuse what they have no rule for, and torch.func what it can't trace. Other errors show in
numbers, on whole batches of real examples: each row alone, and all of a batch in one weighted sum
(`ops.audit`). They are compared at weights moved away from the problem's own, among which there may
be zeros that hide a difference. No method is right for an output that is random, or of which a
batch gives another value than the example alone, as its out-to-loss: those are refused.
"""

from __future__ import annotations

import textwrap
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from trak_dist.errors import ConfigError, NotCovered, ProblemError, TrakDistError
from trak_dist.ops import audit
from trak_dist.ops.batches import Batch, clone_batch, examples_in, rows_of
from trak_dist.ops.gradients import select_params
from trak_dist.ops.model_outputs import ModelOutput, out_to_loss, own_method, prepared
from trak_dist.ops.model_state import ModelStateGuard, copy_model
from trak_dist.planning.gradient_comparison import ROWS, difference_from_autograd
from trak_dist.spacing import evenly_spaced

MEETING = 10  # tolerances by which an output in a batch may differ from that alone
VMAP_BYTES = 2**30  # what a batch's gradients may take here; a worker has its own memory


def select_gradient_method(
    model: nn.Module,
    model_output: ModelOutput,
    batches: Mapping[str, Batch],
    *,
    params: Sequence[str],
    requested: str,
) -> tuple[str, str]:
    """`hooks`, `vmap` or `loop`; and, where `auto` does not come to the first, why.

    Parameters
    ----------
    model, model_output
        What is to be planned.
    batches : mapping
        Whole batches, by what they are of.
    params : sequence of str
        Globs that select parameters.
    requested : str
        `featurize.gradients`.

    Raises
    ------
    ConfigError
        If the requested method can't be used.
    ProblemError
        If no method can be right.
    """
    moved = _perturbed(model)
    for name, batch in batches.items():
        check_per_example(moved, model_output, params, batch, where=name)
    reasons: list[str] = []
    for method in ("hooks", "vmap") if requested == "auto" else (requested,):
        why = (
            ""
            if method == "loop"
            else _reason_against(moved, model_output, batches, params, method)
        )
        if not why:
            return method, ", ".join(reasons)
        if requested != "auto":
            raise ConfigError(
                f"{method} can't compute the gradients: {why}",
                where="featurize.gradients",
                next="featurize.gradients=auto, which finds one that can; or leave these "
                "parameters out (featurize.params)",
            )
        reasons.append(f"not by {method}: {why}")
    return "loop", ", ".join(reasons)


def check_per_example(
    model: nn.Module,
    model_output: ModelOutput,
    params: Sequence[str],
    batch: Batch,
    *,
    where: str,
) -> None:
    """Raise `ProblemError` if examples of a batch can't be computed one by one and be the same.

    Parameters
    ----------
    where : str
        What it is of, for the message.
    """
    rows = evenly_spaced(examples_in(batch), ROWS)
    kind = type(model_output).__qualname__
    try:
        audit.check_deterministic(model, model_output, params, batch, where=kind)
        _check_apart(model, model_output, batch, rows, where=where)
        own = audit.out_to_loss_alone(model, model_output, batch, rows)
        with ModelStateGuard(model).preserve():
            q = out_to_loss(model_output, model, batch, None)[rows]
    except TrakDistError:
        raise
    except Exception as error:  # user code may raise anything
        raise ProblemError(
            f"the model output can't be computed on examples of {where}, one by one and as a "
            f"batch: {_text(error)}",
            where=f"{kind}, {type(model).__qualname__}",
            next="see docs/your-problem.md on what a batch holds and what a model output gives",
        ) from error
    tolerance = audit.tolerance(model)
    if not torch.allclose(q.float(), own.float(), rtol=tolerance, atol=tolerance, equal_nan=True):
        at = int((q.float() - own.float()).abs().nan_to_num(torch.inf).argmax())
        raise ProblemError(
            f"the out-to-loss of an example of {where} depends on the other examples of its batch: "
            f"{float(q[at]):.6g} in a batch of {examples_in(batch)}, {float(own[at]):.6g} alone",
            where=f"{kind}, {type(model).__qualname__}",
            next="an example's loss must be its own: no statistics of the batch "
            "(BatchNorm with track_running_stats=False), no mean over it",
        )


def _check_apart(
    model: nn.Module, model_output: ModelOutput, batch: Batch, rows: Sequence[int], *, where: str
) -> None:
    """Raise `ProblemError` if `get_batch_output` gives another value of an example in a batch."""
    batched = own_method(prepared(model_output, model), "get_batch_output")
    if batched is None:
        return
    state, size = (dict(model.named_parameters()), dict(model.named_buffers())), examples_in(batch)
    with torch.no_grad(), ModelStateGuard(model).preserve():
        try:
            f = batched(model, *state, clone_batch(batch)).reshape(size)[list(rows)].double()
            singles = [clone_batch(rows_of(batch, slice(row, row + 1))) for row in rows]
            own = torch.cat([batched(model, *state, one).reshape(1) for one in singles]).double()
        except Exception:  # no error here: another method is taken, and the reason told
            return
    close = MEETING * audit.tolerance(model)
    if not torch.allclose(f, own, rtol=close, atol=close, equal_nan=True):
        at = int((f - own).abs().nan_to_num(torch.inf).argmax())
        raise ProblemError(
            "get_batch_output differs from get_output: examples meet. The output of an example of "
            f"{where} depends on the other examples of its batch: {float(f[at]):.6g} in a batch of "
            f"{size}, {float(own[at]):.6g} alone",
            where=f"{type(model_output).__qualname__}, {type(model).__qualname__}",
            next="an example's output must be its own: no statistics of the batch (BatchNorm with "
            "track_running_stats=False), no negatives from it; trak_dist.CLIP(contrast=…) has a "
            "fixed set of them",
        )


def _reason_against(
    model: nn.Module,
    output: ModelOutput,
    batches: Mapping[str, Batch],
    params: Sequence[str],
    method: str,
) -> str:
    """Why hooks or vmap can't be used; empty if they can."""
    p = sum(shape.numel() for shape in select_params(model, params).values())
    for name, whole in batches.items():
        batch = whole if method == "hooks" else rows_of(whole, slice(max(2, VMAP_BYTES // (4 * p))))
        try:
            why = difference_from_autograd(model, output, batch, params, method)
        except NotCovered as error:
            return error.what
        except Exception as error:  # whatever a rule, a trace, or the user's batched output does
            why = _text(error)
        if why:
            return f"{why} on examples of {name}"
    return ""


def _text(error: Exception) -> str:
    """What was raised, and by which line outside of torch, on one line of no great length."""
    ours = (Path(torch.__file__).parent, Path(__file__).parents[1])
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(Path(frame.filename).is_relative_to(folder) for folder in ours)
    ]
    text = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" …")
    if not frames:
        return text
    path = Path(frames[-1].filename)
    hint = ', attn_implementation="eager" may help' if path.name == "masking_utils.py" else ""
    return f"{text} (at {path.parent.name}/{path.name}:{frames[-1].lineno}{hint})"


def _perturbed(model: nn.Module) -> nn.Module:
    moved = copy_model(model).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            size = float(parameter.float().square().mean().sqrt()) if parameter.numel() else 0
            parameter.add_(noise, alpha=0.1 * size + 0.01)
    return moved
