"""A finished run, for reading: scores, top examples, receipts. Loads no torch."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak_dist import commands, in_process
from trak_dist.cells import STAGE_STEPS, EvaluateCell, ScoreCell, of_stage
from trak_dist.cells.score import halves_targets, keeps_top
from trak_dist.cells.top_part import kept
from trak_dist.coordinates import TRAIN
from trak_dist.errors import ConfigError, CorruptChunk, MissingInputs
from trak_dist.hashing import digest_of
from trak_dist.ops.strongest import Strongest
from trak_dist.plan import Plan
from trak_dist.store import atomic, contents, kept_tops
from trak_dist.store.kept_tops import Top
from trak_dist.store.record import Receipt
from trak_dist.store.run import Run


class Results:
    """The results of one run.

    Parameters
    ----------
    problem : trak_dist.Problem, optional
        That of a run which was planned with an object of this process; `query` executes it.
    """

    def __init__(self, run: Run, problem: Any = None) -> None:
        self._run, self._problem = run, problem

    @property
    def plan(self) -> Plan:
        """What the run computes."""
        return self._run.plan

    def scores(self, targets: str) -> NDArray[np.float32]:
        """The scores (n_train, n_targets) float32; positive ones are helpful.

        Raises
        ------
        MissingInputs
            If not all of them are computed yet.
        ConfigError
            If the run has no such target set.
        """
        self._check_not_train(targets)
        return np.concatenate([block for _, block in self._blocks(targets)])

    def to_pandas(self, targets: str) -> Any:
        """The scores as a `pandas.DataFrame`, float32: a row for each train row.

        The index is called `train`, the columns as the target set: both are row numbers.

        Raises
        ------
        MissingInputs, ConfigError
            As `scores` does; ConfigError also if pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise ConfigError(
                "pandas is not installed",
                where="to_pandas",
                next="pip install 'trak_dist[pandas]', or scores(targets), which is an array",
            ) from None
        scores = self.scores(targets)
        train, columns = (pd.RangeIndex(n) for n in scores.shape)
        return pd.DataFrame(scores, index=train.rename(TRAIN), columns=columns.rename(targets))

    def to_dataset(self, targets: str) -> Any:
        """The scores as a Hugging Face `datasets.Dataset`, beside the train set's own columns.

        A row for each train row; its one column, called as the target set, holds a list of float32.

        Raises
        ------
        MissingInputs, ConfigError
            As `scores` does; ConfigError also if datasets is not installed.
        """
        try:
            import pyarrow as pa
            from datasets import Dataset
        except ImportError as error:
            raise ConfigError(
                f"{error.name} is not installed",
                where="to_dataset",
                next="pip install 'trak_dist[hf]', or scores(targets), which is an array",
            ) from None
        self._check_not_train(targets)
        rows = [
            pa.FixedSizeListArray.from_arrays(block.ravel(), block.shape[1])
            for _, block in self._blocks(targets)
        ]
        return Dataset(pa.table({targets: pa.chunked_array(rows)}))

    def self_influence(self) -> NDArray[np.float32]:
        """The score of each train row against itself (n_train,) float32.

        Raises
        ------
        MissingInputs, ConfigError
            If it is not computed yet, or the run does not compute it.
        """
        return np.concatenate([block[:, 0] for _, block in self._blocks(TRAIN)])

    def halves(self, targets: str) -> NDArray[np.float32]:
        """The scores of either half of the ensemble (n_train, 2, some targets) float32.

        The halves are its checkpoints 0, 2, … and 1, 3, …, of an odd number without the last; the
        targets are `halves(plan, targets)`.

        Raises
        ------
        MissingInputs, ConfigError
            As `scores` does, or if there is one checkpoint.
        """
        self._check_has_halves(targets)
        return np.concatenate([block for _, block in self._blocks(targets, "halves")])

    def top(self, targets: str, columns: Sequence[int], count: int = 5) -> list[Top]:
        """The strongest train rows for some targets, in memory that does not grow with n_train.

        Raises
        ------
        MissingInputs, ConfigError
            As `scores` does.
        """
        self._check_not_train(targets)
        width = self.plan.split(targets).rows if targets in self._names() else 0
        if count < 1 or (width and not all(0 <= c < width for c in columns)):
            raise ConfigError(
                f"top of columns {list(columns)}, {count} each: {targets!r} has columns 0 to "
                f"{width - 1}",
                next="name columns that there are, and a count of at least 1",
            )
        if targets in self._names() and keeps_top(self.plan, targets):
            return kept_tops.read(self._run, targets, columns, count)
        best = Strongest(len(columns), count)
        worst = Strongest(len(columns), count)
        for start, block in self._blocks(targets):
            chosen = block[:, list(columns)].T
            rows = np.broadcast_to(np.arange(start, start + len(block)), chosen.shape)
            best.add(chosen, rows)
            worst.add(-chosen, rows)
        return [
            Top(target, best.rows[i], best.scores[i], worst.rows[i], -worst.scores[i])
            for i, target in enumerate(columns)
        ]

    def query(self, examples: Any, *, count: int = 10) -> list[Top]:
        """The strongest train rows for targets that no target set has; nothing is written.

        Their gradients are computed with each checkpoint of the ensemble, as those of a target set
        are, and all stored train rows are read once. It executes the run's problem, and loads
        torch.

        Parameters
        ----------
        examples : tuple or dataset
            A batch as collate gives it (a tuple, or one mapping or tensor), or anything else with a
            length and examples by number, which collate takes.
        count : int
            Rows of each kind, for each example.

        Raises
        ------
        MissingInputs
            If the train rows or the kernels are not all there.
        UntrustedProblem
            If somebody else planned the run, and its problem may not be executed.
        ConfigError, ProblemError, CheckpointError, DatasetError, NonFiniteGradient, WrongGradient
            As cells that featurize a target set.
        """
        query = importlib.import_module("trak_dist.interface.query")  # above this module, and torch
        with in_process.holding(self._problem):
            found: list[Top] = query.strongest_rows(self._run, examples, count=count)
        return found

    def top_of_halves(self, targets: str, count: int) -> NDArray[np.int64]:
        """The `count` strongest train rows by either half (2, some targets, count), as `halves`.

        In memory that does not grow with n_train.

        Raises
        ------
        MissingInputs, ConfigError
            As `halves` does.
        """
        self._check_has_halves(targets)
        if targets in self._names() and keeps_top(self.plan, targets):
            return kept_tops.read_halves(self._run, targets, count)
        columns = len(halves_targets(self.plan, targets))
        best = Strongest(2 * columns, count)
        for start, block in self._blocks(targets, "halves"):
            scores = block.reshape(len(block), -1).T
            rows = np.broadcast_to(np.arange(start, start + len(block)), scores.shape)
            best.add(scores, rows)
        return best.rows.reshape(2, columns, -1)

    def receipts(self, stage: str) -> dict[str, Receipt]:
        """The receipts of the done cells of `train`, `featurize`, `reduce` or `report`, by cell."""
        if stage not in STAGE_STEPS:
            raise ConfigError(f"no stage {stage!r}", next=f"one of {', '.join(STAGE_STEPS)}")
        done = self._run.receipts.done(of_stage(self._run.plan, stage))
        return {cell.id: receipt for cell, receipt in done.items()}

    def evaluation(self, targets: str) -> dict[str, Any]:
        """What `stage=evaluate` found of a target set, as in `report/<targets>.json`.

        Raises
        ------
        CorruptChunk
            If the file is gone or damaged.
        MissingInputs
            If it is not evaluated yet, or not at all.
        """
        cell = EvaluateCell(targets)
        path = self._run.layout.file(cell, "figures")
        receipt = self._run.receipts.done([cell]).get(cell)
        if receipt is None:
            planned = cell in EvaluateCell.of(self.plan)
            retraining = ("ground_truth.subsets=100", "ground_truth.seeds=3")
            requested = ("stage=evaluate",) if planned else retraining
            raise MissingInputs(
                f"{targets!r} is not evaluated",
                where=str(self._run.layout.run_dir),
                next=self._command(*requested),
            )
        text = atomic.read(path) if atomic.exists(path) else b""
        if digest_of(text) != receipt.digests.get("figures"):
            verify = commands.launch(self._run.layout.run_dir, "stage=verify", "repair=true")
            raise CorruptChunk(
                "the figures are gone, or not those that were written",
                where=str(path),
                next=f"{verify}, then the same command again",
            )
        found: dict[str, Any] = json.loads(text)
        return found

    def _check_not_train(self, targets: str) -> None:
        if targets == TRAIN:
            raise ConfigError("train is no target set", next="self_influence() is what there is")

    def _check_has_halves(self, targets: str) -> None:
        self._check_not_train(targets)
        if targets in self._names() and not halves_targets(self.plan, targets):
            raise ConfigError(
                f"an ensemble of {self.plan.ensemble_checkpoints} has no halves",
                next="more checkpoints: checkpoints.train=… or the problem's own",
            )

    def _command(self, *arguments: str) -> str:
        return in_process.command(self._run.layout.run_dir, self.plan, *arguments)

    def _names(self) -> list[str]:
        return [s.name for s in self.plan.targets]

    def _blocks(
        self, targets: str, name: str = "scores"
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        names = self._names()
        if targets == TRAIN and not self.plan.self_influence:
            raise ConfigError(
                "the run does not compute self-influence",
                next=self._command("stage=reduce", "self_influence=true"),
            )
        if targets not in (*names, TRAIN):
            raise ConfigError(
                f"the run has no target set {targets!r}", next=f"one of {', '.join(names)}"
            )
        if keeps_top(self.plan, targets):
            raise ConfigError(
                f"of the scores of {targets!r} only the {kept(self.plan)} highest and "
                "lowest of each target are kept",
                where=str(self._run.layout.run_dir),
                next=f"top({targets!r}, …); or {self._command('stage=reduce', 'scores.keep=all')}",
            )
        cells = list(ScoreCell.of_targets(self._run.plan, targets))
        done = self._run.receipts.done(cells)
        if len(done) < len(cells):
            raise MissingInputs(
                f"{len(cells) - len(done)} of {len(cells)} score cells of {targets!r} are missing",
                where=str(self._run.layout.run_dir),
                next=self._command(),
            )
        for cell in cells:
            yield cell.rows.start, contents.read(self._run, cell, name)


def open_run(run_dir: str | Path) -> Results:
    """Open a run directory for reading.

    Raises
    ------
    PlanMismatch
        If there is no run, or not one that this version reads.
    """
    return Results(Run.open(Path(run_dir)))
