"""The strongest scores of each target, read from what top cells wrote. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak_dist import in_process
from trak_dist.cells import TopCell
from trak_dist.cells.top_part import HALVES_COUNT, halves_within, kept
from trak_dist.errors import ConfigError, MissingInputs
from trak_dist.store import contents
from trak_dist.store.run import Run


@dataclass(frozen=True)
class Top:
    """The train rows with the highest (`helpful`) and lowest (`harmful`) scores for one target.

    Each is ordered from the strongest on; rows (count,) int64, scores (count,) float32.
    """

    target: int
    helpful: NDArray[np.int64]
    helpful_scores: NDArray[np.float32]
    harmful: NDArray[np.int64]
    harmful_scores: NDArray[np.float32]


def read(run: Run, targets: str, columns: Sequence[int], count: int) -> list[Top]:
    """The `count` strongest train rows for some targets.

    Raises
    ------
    MissingInputs
        If they are not all found yet.
    ConfigError
        If fewer are kept.
    """
    _check_kept(run, count, kept(run.plan))
    found: dict[int, Top] = {}
    for cell in _done(run, targets):
        if wanted := [c for c in columns if c in cell.block.numbers]:
            stored = contents.read(run, cell, "top")
            for column in wanted:
                found[column] = _top(column, stored[column - cell.block.start, ..., :count])
    return [found[column] for column in columns]


def read_halves(run: Run, targets: str, count: int) -> NDArray[np.int64]:
    """The `count` strongest train rows by either half (2, some targets, count).

    Raises
    ------
    MissingInputs, ConfigError
        As `read` does.
    """
    _check_kept(run, count, kept(run.plan, HALVES_COUNT))
    of_blocks = [
        contents.read(run, cell, "halves")[:, :, 0, :count]
        for cell in _done(run, targets)
        if halves_within(run.plan, targets, cell.block)
    ]
    return np.concatenate(of_blocks).swapaxes(0, 1).astype(np.int64)


def _top(target: int, stored: NDArray[Any]) -> Top:
    (helpful, helpful_scores), (harmful, strength) = stored
    return Top(
        target,
        helpful.astype(np.int64),
        helpful_scores.astype(np.float32),
        harmful.astype(np.int64),
        -strength.astype(np.float32),
    )


def _check_kept(run: Run, count: int, there: int) -> None:
    if min(count, run.plan.train.rows) > there:
        settings = ("stage=reduce", f"scores.count={count}")
        raise ConfigError(
            f"{count} of each target were asked for, {there} are kept",
            where=str(run.layout.run_dir),
            next=in_process.command(run.layout.run_dir, run.plan, *settings),
        )


def _done(run: Run, targets: str) -> list[TopCell]:
    cells = list(TopCell.of_targets(run.plan, targets))
    done = run.receipts.done(cells)
    if len(done) < len(cells):
        raise MissingInputs(
            f"{len(cells) - len(done)} of {len(cells)} top cells of {targets!r} are missing",
            where=str(run.layout.run_dir),
            next=in_process.command(run.layout.run_dir, run.plan),
        )
    return cells
