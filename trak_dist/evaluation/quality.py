"""What was found of the scores' worth: overlaps, counterfactuals, AUC, LDS; a line each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from trak_dist.cells import EvaluateCell, ReportCell
from trak_dist.errors import CorruptChunk
from trak_dist.store.run import Run


def lines(run: Run) -> Iterator[str]:
    """All that was found, the LDS last."""
    done = run.receipts.done([*ReportCell.of(run.plan), *EvaluateCell.of(run.plan)])
    facts = [(cell.id.partition("/")[2], receipt.facts) for cell, receipt in done.items()]
    for part in (_half_agreement_lines, _counterfactual_lines, _label_lines):
        for name, found in facts:
            with _facts_errors(name):
                yield from part(name, found)
    yield from lds(run)


def lds(run: Run) -> Iterator[str]:
    """The LDS of each target set that has retrained models."""
    chosen_here = ", λ chosen on these targets" if run.plan.lambda_from else ""
    for cell, receipt in run.receipts.done(EvaluateCell.of(run.plan)).items():
        name = cell.id.partition("/")[2]
        with _facts_errors(name):
            yield from _lds_line(name, receipt.facts, chosen_here)


def _lds_line(name: str, found: Mapping[str, Any], chosen_here: str) -> Iterator[str]:
    if "lds" in found:
        own, cross_fitted = _interval(found["lds"]), _interval(found["chosen"]["lds"])
        left_out_note = (
            f"; {found['left_out']} constant targets left out" if found["left_out"] else ""
        )
        yield (
            f"LDS:    {name} {own} (95 %{chosen_here}), with λ chosen on other targets "
            f"{cross_fitted}{left_out_note}"
        )


def _half_agreement_lines(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    for count, share in sorted(found.get("stability", {}).items(), key=lambda one: int(one[0])):
        yield (
            f"halves: {name} share {_interval(share)} of the {count} most helpful rows, by "
            f"chance {share['chance']:.2g}"
        )


def _counterfactual_lines(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    for one in found.get("counterfactuals", []):
        yield (
            f"remove: {name} {one['removed']} most helpful rows: output drops by "
            f"{_interval(one['drop'])}, against random rows"
        )


def _label_lines(_: str, found: Mapping[str, Any]) -> Iterator[str]:
    if wrong := found.get("mislabelled"):
        yield (
            f"labels: AUC {_interval(wrong['auc'])} of self-influence, "
            f"{_interval(wrong['auc_of_out_to_loss'])} of out-to-loss alone, "
            f"for {wrong['rows']} wrong ones"
        )


@contextlib.contextmanager
def _facts_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptChunk(
            f"the facts of a receipt can't be read: {type(error).__name__}: {error}",
            where=name,
            next="remove its evaluate and report receipts, then the same command again",
        ) from error


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
