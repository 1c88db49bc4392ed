"""report: a page and a picture of the strongest train examples for some targets."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trak_dist.cells import TRAIN, EvaluateCell, ReportCell
from trak_dist.problem import Rendered
from trak_dist.stages.outcome import Outcome
from trak_dist.stages.plots import lds_picture
from trak_dist.stages.reduce import require
from trak_dist.stages.session import Session
from trak_dist.store import atomic
from trak_dist.store.results import Results, Top

SHOWN_TARGETS = 12
SHOWN_EXAMPLES = 5


@dataclass(frozen=True)
class _Example:
    row: int
    rendered: Rendered
    score: float | None


@dataclass(frozen=True)
class _Line:
    target: _Example
    helpful: list[_Example]
    harmful: list[_Example]


def report(session: Session, cell: ReportCell) -> Outcome:
    """Write `report/<targets>.html` and, if the examples are pictures, `.png`.

    Raises
    ------
    MissingInputs
        If scores are missing.
    """
    run = session.run
    rows = run.plan.split(cell.targets).rows
    columns = np.unique(np.linspace(0, rows - 1, min(SHOWN_TARGETS, rows)).round().astype(int))
    tops = Results(run).top(cell.targets, columns.tolist(), SHOWN_EXAMPLES)
    lines = [_line(session, cell, top) for top in tops]
    path = run.layout.report(cell.targets)
    picture = b""
    if all(isinstance(line.target.rendered.content, np.ndarray) for line in lines):
        picture = _picture(lines, title=_title(session, cell))
        atomic.write(path.with_suffix(".png"), picture)
    evaluation, curves = {}, b""
    if run.plan.has_truth(cell.targets):
        require(run, [EvaluateCell(cell.targets)], needed_by=cell)
        evaluation = json.loads(run.layout.evaluation(cell.targets).read_bytes())
        curves = lds_picture(evaluation, title=_title(session, cell))
        atomic.write(path.with_suffix(".lds.png"), curves)
    page = _page(lines, picture, curves, evaluation, title=_title(session, cell))
    atomic.write(path, page.encode())
    return Outcome({}, {"picture": bool(picture)})


def _title(session: Session, cell: ReportCell) -> str:
    plan = session.run.plan
    return (
        f"{plan.spec.problem['_target_']}: {cell.targets}, {plan.train.rows} train examples, "
        f"{len(plan.model_ids)} checkpoints, {plan.spec.projection.kind} to {plan.proj_dim}"
    )


def _line(session: Session, cell: ReportCell, top: Top) -> _Line:
    def examples(rows: Any, scores: Any) -> list[_Example]:
        pairs = zip(rows.tolist(), scores.tolist(), strict=True)
        return [_Example(row, _render(session, TRAIN, row), score) for row, score in pairs]

    return _Line(
        _Example(top.target, _render(session, cell.targets, top.target), None),
        examples(top.helpful, top.helpful_scores),
        examples(top.harmful, top.harmful_scores),
    )


def _render(session: Session, split: str, row: int) -> Rendered:
    render = session.problem.render
    if render is None:
        return Rendered(f"{split} example {row}", "")
    return render(session.dataset(split)[row])


def _picture(lines: list[_Line], *, title: str) -> bytes:
    columns = 1 + 2 * SHOWN_EXAMPLES
    height = 1.35 * len(lines) + 1.0
    figure = Figure(figsize=(1.05 * columns, height))
    axes = figure.subplots(
        len(lines),
        columns,
        squeeze=False,
        gridspec_kw={
            "left": 0.01,
            "right": 0.99,
            "bottom": 0.01,
            "top": 1 - 0.95 / height,
            "hspace": 0.55,
        },
    )
    for shown in axes.flat:
        shown.set_axis_off()
    for line, row in zip(lines, axes, strict=True):
        _draw(row[0], line.target, "black")
        for shown, example in zip(row[1:], line.helpful, strict=False):
            _draw(shown, example, "tab:green")
        for shown, example in zip(row[1 + SHOWN_EXAMPLES :], line.harmful, strict=False):
            _draw(shown, example, "tab:red")
    figure.suptitle(
        f"{title}\nblack: target, green: most helpful, red: most harmful train examples "
        "(label, row, score)",
        fontsize=9,
        y=1 - 0.1 / height,
        va="top",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: Axes, example: _Example, colour: str) -> None:
    content = example.rendered.content
    assert isinstance(content, np.ndarray)
    axes.imshow(content, cmap="gray", interpolation="nearest")
    score = "" if example.score is None else f"\n{example.score:+.3g}"
    # Labels are the user's text: no mathtext in them.
    axes.set_title(
        f"{example.rendered.label} (#{example.row}){score}",
        fontsize=7,
        color=colour,
        parse_math=False,
    )


def _page(
    lines: list[_Line],
    picture: bytes,
    curves: bytes,
    evaluation: Mapping[str, Any],
    *,
    title: str,
) -> str:
    source = resources.files("trak_dist.stages").joinpath("report.html.j2").read_text()
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        source
    )
    return template.render(
        title=title,
        lines=lines,
        picture=base64.b64encode(picture).decode(),
        curves=base64.b64encode(curves).decode(),
        evaluation=evaluation,
    )
