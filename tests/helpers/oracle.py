"""TRAK scores in float64 by the shortest road: a loop over examples, autograd, and numpy.

An oracle for tests. It imports nothing from trak_dist, shares no formula's code with it, and holds
whole matrices; it is slow and simple on purpose.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Member:
    """One checkpoint: train grads (n, k), target grads (t, k) and out-to-loss (n,).

    The kernel is made of the rows U (r, k), UᵀU; without curvature they are the train grads.
    """

    train: Matrix
    targets: Matrix
    out_to_loss: Matrix
    curvature: Matrix | None = None

    @property
    def rows(self) -> Matrix:
        return self.train if self.curvature is None else self.curvature


@dataclass(frozen=True)
class Kernel:
    """(XᵀX + λI)⁻¹, divided by the mean of its absolute entries or not."""

    inverse: Matrix
    condition: float


def parameter_names(model: nn.Module, globs: Sequence[str] = ("*",)) -> list[str]:
    """The parameters in the order of the columns of all grads here: that of the model."""
    return [n for n, _ in model.named_parameters() if any(fnmatch(n, g) for g in globs)]


def member(
    model: nn.Module,
    state: Mapping[str, Tensor],
    train: Any,
    targets: Any,
    *,
    globs: Sequence[str] = ("*",),
    projection: Matrix | None = None,
    weighted: bool = False,
    uniform: Sequence[Mapping[int, float]] = (),
) -> Member:
    """X/√p, G/√p and Q of one checkpoint; a `projection` (p, k) multiplies the grads first.

    `weighted` rows are √(Q(1 − Q)) x; `uniform` are numbers in [0, 1) by row, for each draw of
    labels, whose log-likelihoods' gradients are the curvature's rows.
    """
    exact = copy.deepcopy(model).double().eval()
    exact.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in state.items()})
    names = parameter_names(exact, globs)
    x, q = _grads(exact, names, train)
    g, _ = _grads(exact, names, targets)
    p = x.shape[1]
    matrix = np.eye(p) if projection is None else projection
    rows = None
    if weighted:
        rows = np.sqrt(q * (1 - q))[:, None] * x
    if uniform:
        rows = np.concatenate([_fisher_rows(exact, names, train, u) for u in uniform])
        rows *= np.sqrt(len(x) / len(rows))
    u = None if rows is None else rows @ matrix / np.sqrt(p)
    return Member(x @ matrix / np.sqrt(p), g @ matrix / np.sqrt(p), q, u)


def margin_and_out_to_loss(logits: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """log(p / (1 − p)) and 1 − p of one example, the latter summed over the other classes."""
    log_p = torch.log_softmax(logits, dim=0)
    others = torch.cat([log_p[:label], log_p[label + 1 :]])
    return log_p[label] - torch.logsumexp(others, dim=0), others.exp().sum()


def kernel(x: Matrix, *, lambda_reg: float, lambda_unit: str, kernel_scale: str) -> Kernel:
    gram = x.T @ x
    unit = {"absolute": 1.0, "mean_diagonal": np.mean(np.diag(gram))}[lambda_unit]
    regular = gram + lambda_reg * unit * np.eye(len(gram))
    inverse = np.linalg.inv(regular)
    divisor = {"none": 1.0, "mean_abs": np.mean(np.abs(inverse))}[kernel_scale]
    return Kernel(inverse / divisor, float(np.linalg.cond(regular)))


def scores(members: Sequence[Member], **reduce: Any) -> tuple[Matrix, float]:
    """Scores (n, t) of the ensemble, and the largest condition number on the way.

    mean over m of [X_m K_m G_mᵀ], times the mean over m of Q_m.
    """
    kernels = [kernel(m.rows, **reduce) for m in members]
    products = [m.train @ k.inverse @ m.targets.T for m, k in zip(members, kernels, strict=True)]
    out_to_loss = np.mean([m.out_to_loss for m in members], axis=0)
    return np.mean(products, axis=0) * out_to_loss[:, None], max(k.condition for k in kernels)


def column_errors(found: NDArray[Any], wanted: Matrix) -> Matrix:
    """‖found − wanted‖₂ / ‖wanted‖₂ of each column."""
    return np.linalg.norm(found - wanted, axis=0) / np.linalg.norm(wanted, axis=0)


def _grads(model: nn.Module, names: Sequence[str], examples: Any) -> tuple[Matrix, Matrix]:
    parameters = dict(model.named_parameters())
    rows, out_to_loss = [], []
    for i in range(len(examples)):
        features, label = examples[i]
        inputs = features.double() if features.is_floating_point() else features
        logits = model(inputs[None].clone())[0]
        margin, q = margin_and_out_to_loss(logits, int(label))
        grads = torch.autograd.grad(margin, [parameters[n] for n in names])
        rows.append(np.concatenate([g.numpy().ravel() for g in grads]))
        out_to_loss.append(float(q.detach()))
    return np.array(rows), np.array(out_to_loss)


def _fisher_rows(
    model: nn.Module, names: Sequence[str], examples: Any, uniform: Mapping[int, float]
) -> Matrix:
    """The gradients of log p(y), y the first class whose cumulative probability is above u."""
    parameters, rows = dict(model.named_parameters()), []
    for i, u in uniform.items():
        log_p = torch.log_softmax(model(examples[i][0].double()[None])[0], dim=0)
        label = int(np.searchsorted(np.cumsum(log_p.detach().exp().numpy()), u, side="right"))
        grads = torch.autograd.grad(log_p[label], [parameters[n] for n in names])
        rows.append(np.concatenate([g.numpy().ravel() for g in grads]))
    return np.array(rows)
