"""report: a page and a picture of the strongest train examples for some targets.

Whoever changes what is drawn, here, in the template or in `evaluation.plots`, raises
`cells.report.VERSION`, so that the reports of old runs are drawn again.
"""

from __future__ import annotations

import base64
import io
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trak_dist.cells import EvaluateCell, FeaturizeCell, ReportCell
from trak_dist.cells.score import halves_of, halves_targets
from trak_dist.coordinates import TRAIN
from trak_dist.evaluation.plots import counterfactual_picture, lds_picture
from trak_dist.hashing import digest_of
from trak_dist.ops import lds, ranking
from trak_dist.problem import Rendered
from trak_dist.runtime.cell_result import CellResult
from trak_dist.runtime.inputs import require
from trak_dist.runtime.session import Session
from trak_dist.spacing import evenly_spaced
from trak_dist.store import atomic
from trak_dist.store.kept_tops import Top
from trak_dist.store.results import Results

SHOWN_TARGETS = 12
SHOWN_EXAMPLES = 5
SHOWN_SUSPECTS = 60
SUSPECTS_PER_LINE = 10
TOP_COUNTS = (10, 100)


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


def report(session: Session, cell: ReportCell) -> CellResult:
    """Write `report/<targets>.html` and its pictures.

    Raises
    ------
    MissingInputs
        If scores, or the evaluation of them, are missing.
    """
    run = session.run
    evaluation: dict[str, Any] = {}
    if run.plan.is_evaluated(cell.targets):
        require(run, [EvaluateCell(cell.targets)], needed_by=cell)
        evaluation = Results(run).evaluation(cell.targets)
    title = _title(session, cell)
    lines = [] if cell.targets == TRAIN else _lines(session, cell)
    suspects = [
        _Example(one["row"], _render(session, TRAIN, one["row"]), one["self_influence"])
        for one in evaluation.get("largest", [])[:SHOWN_SUSPECTS]
    ]
    examples = _grid(lines, title=title) if lines else _suspects(suspects, title=title)
    pictures = {"examples": examples}
    if "lds" in evaluation:
        pictures["lds"] = lds_picture(evaluation, title=title)
    if "counterfactuals" in evaluation:
        pictures["counterfactuals"] = counterfactual_picture(evaluation, title=title)
    stability = _stability(session, cell.targets)
    page = _page(
        title=title,
        lines=lines,
        suspects=suspects,
        pictures={name: base64.b64encode(data).decode() for name, data in pictures.items()},
        evaluation=evaluation,
        stability=stability,
        lambda_from=run.plan.lambda_from,
        audited=run.progress([FeaturizeCell]).audit_summary(),
    )
    written = {name: picture for name, picture in pictures.items() if picture}
    written["page"] = page.encode()
    for name, content in written.items():
        atomic.write(run.layout.file(cell, name), content)
    return CellResult({n: digest_of(c) for n, c in written.items()}, {"stability": stability})


def _stability(session: Session, targets: str) -> dict[str, Any]:
    """The share of a target's top rows on which either half of the ensemble agrees, by count.

    Also what it would be by chance, and how many checkpoints are in a half.
    """
    run = session.run
    if not halves_targets(run.plan, targets):
        return {}
    counts = [count for count in TOP_COUNTS if 2 * count <= run.plan.train.rows]
    tops = Results(run).top_of_halves(targets, max(counts, default=1))
    shared = {n: ranking.overlaps(*tops[:, :, :n]) for n in counts}
    half = len({run.plan.checkpoint(model_id) for model_id in halves_of(run.plan)[0]})
    return {
        str(n): {
            **asdict(lds.interval(values, minimum=0.0)),
            "chance": n / run.plan.train.rows,
            "checkpoints": half,
        }
        for n, values in shared.items()
    }


def _lines(session: Session, cell: ReportCell) -> list[_Line]:
    columns = evenly_spaced(session.run.plan.split(cell.targets).rows, SHOWN_TARGETS)
    count = min(SHOWN_EXAMPLES, session.run.plan.spec.scores.count)
    tops = Results(session.run).top(cell.targets, columns, count)
    return [_line(session, cell, top) for top in tops]


def _title(session: Session, cell: ReportCell) -> str:
    plan = session.run.plan
    return (
        f"{plan.spec.problem['_target_']}: {cell.targets}, {plan.train.rows} train examples, "
        f"{plan.described_ensemble}, {plan.spec.projection.kind} to {plan.proj_dim}"
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
    return session.rendered(split, row) or Rendered(f"{split} example {row}", "")


def _grid(lines: list[_Line], *, title: str) -> bytes:
    """PNG: a line for each target; nothing if examples are no pictures."""
    if not all(isinstance(line.target.rendered.content, np.ndarray) for line in lines):
        return b""
    columns = 1 + 2 * SHOWN_EXAMPLES
    title += (
        "\nblack: target, green: most helpful, red: most harmful train examples (label, row, score)"
    )
    figure, axes = _axes(len(lines), columns, title=title)
    for line, row in zip(lines, axes, strict=True):
        _draw(row[0], line.target, "black")
        for shown, example in zip(row[1:], line.helpful, strict=False):
            _draw(shown, example, "tab:green")
        for shown, example in zip(row[1 + SHOWN_EXAMPLES :], line.harmful, strict=False):
            _draw(shown, example, "tab:red")
    return _png(figure)


def _suspects(suspects: list[_Example], *, title: str) -> bytes:
    """PNG: the train examples with the largest self-influence, the largest first."""
    if not all(isinstance(example.rendered.content, np.ndarray) for example in suspects):
        return b""
    title += "\ntrain examples with the largest self-influence (label, row, self-influence)"
    figure, axes = _axes(-(-len(suspects) // SUSPECTS_PER_LINE), SUSPECTS_PER_LINE, title=title)
    for shown, example in zip(axes.flat, suspects, strict=False):
        _draw(shown, example, "black")
    return _png(figure)


def _axes(lines: int, columns: int, *, title: str) -> tuple[Figure, Any]:
    height = 1.35 * lines + 1.0
    figure = Figure(figsize=(1.05 * columns, height))
    room = {"left": 0.01, "right": 0.99, "bottom": 0.01, "top": 1 - 0.95 / height, "hspace": 0.55}
    axes = figure.subplots(lines, columns, squeeze=False, gridspec_kw=room)
    for shown in axes.flat:
        shown.set_axis_off()
    figure.suptitle(title, fontsize=9, y=1 - 0.1 / height, va="top", parse_math=False)
    return figure, axes


def _png(figure: Figure) -> bytes:
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


def _page(**content: Any) -> str:
    source = resources.files("trak_dist.stages").joinpath("report.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source).render(**content)
