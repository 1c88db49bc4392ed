"""The pictures of an evaluation."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Evaluation = Mapping[str, Any]


def lds_picture(found: Evaluation, *, title: str) -> bytes:
    """PNG: LDS against λ, checkpoints and `proj_dim`; predicted against true model outputs."""
    shown = found["shown"]
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.1, 1), squeeze=False)[:, 0]
    over_lambda, over_size, over_dim = upper.subplots(1, 3, sharey=True)
    curves = found["curves"]
    members = max(c["checkpoints"] for c in curves)
    dim = max(c["proj_dim"] for c in curves)
    by_size = [c for c in curves if c["proj_dim"] == dim]
    by_dim = sorted(
        (c for c in curves if c["checkpoints"] == members), key=lambda c: int(c["proj_dim"])
    )
    _over_lambda(over_lambda, found, by_size)
    _over(over_size, [c["checkpoints"] for c in by_size], by_size, "checkpoints")
    _over(over_dim, [c["proj_dim"] for c in by_dim], by_dim, "proj_dim")
    if found["reliability"]:
        for axes in (over_lambda, over_size, over_dim):
            axes.axhline(found["reliability"]["bound"], color="gray", linestyle=":")
        over_size.set_title("dotted: bound set by the ground truth's noise", fontsize=8)
    over_lambda.set_ylabel("LDS")
    scatters = lower.subplots(1, len(shown), squeeze=False)[0]
    for axes, one in zip(scatters, shown, strict=True):
        axes.scatter(one["predicted"], one["margins"], s=8)
        axes.set_title(f"target {one['target']}, LDS {one['lds']:.2f}", fontsize=9)
        axes.set_xlabel("predicted: sum of scores", fontsize=8)
        axes.tick_params(labelsize=7)
    scatters[0].set_ylabel("model output, retrained", fontsize=8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return _png(figure)


def counterfactual_picture(found: Evaluation, *, title: str) -> bytes:
    """PNG: how far the model outputs of some targets drop, against the number of rows removed."""
    drops = found["counterfactuals"]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    x = [one["removed"] for one in drops]
    each = np.array([one["without_random"] for one in drops]) - [
        one["without_helpful"] for one in drops
    ]
    axes.plot(x, each, color="gray", linewidth=0.7, alpha=0.6)
    means, lows, highs = _columns([one["drop"] for one in drops])
    axes.errorbar(x, means, yerr=(means - lows, highs - means), marker="o", capsize=3)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(x, [str(value) for value in x])
    axes.minorticks_off()
    axes.set_xlabel("most helpful train rows removed (gray: each target)")
    axes.set_ylabel("drop of the model output\nbelow that without random rows", fontsize=9)
    figure.suptitle(title, fontsize=8, parse_math=False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _over_lambda(axes: Axes, found: Evaluation, by_size: Sequence[Evaluation]) -> None:
    for curve in by_size:
        means, lows, highs = _columns(curve["by_lambda"])
        label = f"{curve['checkpoints']} checkpoint{'s' if curve['checkpoints'] > 1 else ''}"
        (line,) = axes.plot(found["lambdas"], means, label=label)
        axes.fill_between(found["lambdas"], lows, highs, color=line.get_color(), alpha=0.15)
    own = float(np.mean(found["own_lambda"]))
    if own > 0:
        axes.axvline(own, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("λ / mean diagonal (line: this run's)")
    axes.legend(fontsize=7)


def _over(axes: Axes, x: Sequence[int], curves: Sequence[Evaluation], label: str) -> None:
    means, lows, highs = _columns([c["chosen"] for c in curves])
    axes.errorbar(x, means, yerr=(means - lows, highs - means), marker="o", capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [str(value) for value in x], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel(f"{label} (λ chosen on other targets)")


def _columns(intervals: Sequence[Mapping[str, float]]) -> tuple[Any, Any, Any]:
    means, lows, highs = (
        np.array([one[name] for one in intervals]) for name in ("mean", "low", "high")
    )
    return means, lows, highs
