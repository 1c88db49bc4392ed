"""Splits whose rows are streamed by calls of `TRAKer`, not read from a problem's dataset.

What a call computes is a part of its process's own; a featurize cell gathers the parts of its rows
into its chunk, the earliest part where a row came twice. Once all cells of a checkpoint and split
are done their parts are discarded.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from trak_dist.cells import FeaturizeCell
from trak_dist.cells.featurize import INPUT_DIGEST_BYTES
from trak_dist.coordinates import TRAIN
from trak_dist.errors import DatasetError, MissingInputs, MixedRun, ModelIDException
from trak_dist.hashing import digest_of
from trak_dist.listing import first_few
from trak_dist.ops import rows as row_format
from trak_dist.ops.batches import content
from trak_dist.ops.model_outputs import IGNORED, attention_mask
from trak_dist.runtime.cell_result import CellResult, grads_facts
from trak_dist.store import contents, parts
from trak_dist.store.parts import Part
from trak_dist.store.run import Run

log = logging.getLogger("trak_dist")


class RowStream:
    """The rows that one process streams into one checkpoint's split."""

    def __init__(self, run: Run, model_id: int, split: str, checkpoint_digest: str) -> None:
        self._run, self._model_id, self.split = run, model_id, split
        self._directory = run.layout.parts(run.plan, model_id, split)
        self._checkpoint_digest = checkpoint_digest
        self.has_written = False  # by this process
        self._seen: set[str] = set()
        rows = run.plan.split(split).rows
        self._done = np.zeros(rows, bool)
        self._inputs = np.zeros((rows, INPUT_DIGEST_BYTES), np.uint8)
        self._known = np.zeros(rows, bool)  # whether their inputs are in `_inputs`

    def done(self) -> NDArray[np.bool_]:
        """Which rows (n,) are there, in cells or in parts of any process."""
        if self._done.all():
            return self._done
        # first: rows that are gathered during this are in cells
        listed = parts.listed(self._directory)
        cells = list(FeaturizeCell.of_split(self._run.plan, self._model_id, self.split))
        for cell in self._run.receipts.done(cells):
            assert isinstance(cell, FeaturizeCell)
            self._done[cell.rows.start : cell.rows.stop] = True
        for path in listed:
            if path.name not in self._seen:
                try:
                    self._record(*parts.rows_of(path))
                except FileNotFoundError:
                    return self.done()  # discarded: its rows are in cells by now
                self._seen.add(path.name)
        return self._done

    def _record(self, rows: NDArray[np.int64], inputs: NDArray[np.uint8]) -> None:
        self._done[rows] = True
        new = ~self._known[rows]
        self._inputs[rows[new]] = inputs[new]
        self._known[rows] = True

    def check_same_examples(self, rows: NDArray[np.int64], inputs: NDArray[np.uint8]) -> None:
        """Raise `DatasetError` if rows that are done were computed from other examples.

        Parameters
        ----------
        rows : (m,) int64
            Rows that are done.
        inputs : (m, 16) uint8
            What `row_digests` gives of the examples that come for them now.
        """
        plan = self._run.plan
        if not plan.split(self.split).streamed:
            return  # read from a dataset, whose digests are of cells, not of rows
        unknown = rows[~self._known[rows]]
        for cell in (
            FeaturizeCell.of_split(plan, self._model_id, self.split) if len(unknown) else ()
        ):
            if ((unknown >= cell.rows.start) & (unknown < cell.rows.stop)).any():
                inputs_of_cell = contents.read(self._run, cell, "inputs")
                self._record(np.arange(cell.rows.start, cell.rows.stop), inputs_of_cell)
        others = rows[(self._inputs[rows] != inputs).any(1)]
        if len(others):
            name = "save_dir" if self.split == TRAIN else "exp_name"
            raise DatasetError(
                f"{len(others)} of {len(rows)} rows of {self.split!r} were computed before from "
                f"other examples than these: {format_ranges(np.sort(others))}",
                where=f"model_id {self._model_id}",
                next=f"the same examples as before, or another {name}; inds, if they come in "
                "another order; no random augmentation",
            )

    def write(
        self,
        rows: NDArray[np.int64],
        grads: Float[Tensor, "rows k"],
        out_to_loss: Float[Tensor, " rows"],
        inputs: NDArray[np.uint8],
    ) -> None:
        """Keep X / √p and Q of some rows, and the digests of what they were computed from."""
        plan = self._run.plan
        stored, scale = row_format.encode(grads, plan.spec.featurize.dtype)
        tensors = {"grads": stored, "row_scale": scale, "out_to_loss": out_to_loss}
        arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        facts = grads_facts(plan, self._checkpoint_digest)
        part = Part({"rows": rows, "inputs": inputs, **arrays}, facts)
        self._seen.add(parts.write(self._directory, part).name)
        self._record(rows, inputs)
        self.has_written = True


def row_digests(batch: Sequence[Any], size: int) -> NDArray[np.uint8]:
    """(size, 16) digests of examples, to tell whether each checkpoint was shown the same ones.

    Padding is left out, since the same text is padded in one batch and not in another: what an
    attention mask masks, and 0 and −100 at the ends of other whole numbers.
    """
    leaves = [t.detach().cpu() for t in pytree.tree_leaves(tuple(batch)) if isinstance(t, Tensor)]
    mask = attention_mask(batch)
    mask = None if mask is None else mask.detach().cpu().bool()
    found = np.empty((size, INPUT_DIGEST_BYTES), np.uint8)
    for row in range(size):
        sha = hashlib.sha256()
        for leaf in leaves:
            value = leaf[row].contiguous()
            if mask is not None and leaf.shape == mask.shape:
                value = value[mask[row]]
            elif value.ndim and not value.is_floating_point():
                counts = (value != 0) & (value != IGNORED)
                filled = counts.reshape(-1, value.shape[-1]).any(0).nonzero()
                value = value[..., : int(filled[-1]) + 1 if len(filled) else 0].contiguous()
            sha.update(str((value.dtype, tuple(value.shape))).encode())
            sha.update(content(value))
        found[row] = np.frombuffer(sha.digest()[:INPUT_DIGEST_BYTES], np.uint8)
    return found


def check_rows_present(run: Run, model_id: int, split: str) -> None:
    """Raise `ModelIDException` naming the rows of a checkpoint's split that are not there."""
    missing = np.flatnonzero(~RowStream(run, model_id, split, "").done())
    if len(missing):
        rows = "train rows" if split == TRAIN else f"targets of {split!r}"
        raise ModelIDException(
            f"{len(missing)} of {run.plan.split(split).rows} {rows} are missing for model_id "
            f"{model_id}: {format_ranges(missing)}",
            where=str(run.layout.run_dir),
            next="featurize them" if split == TRAIN else "score them, or allow_skip=True",
        )


def complete(
    run: Run, model_ids: Sequence[int], splits: Sequence[str], *, allow_skip: bool
) -> list[int]:
    """Those of the checkpoints that have all rows of some splits.

    Raises
    ------
    ModelIDException
        If there are none; if one has not, unless `allow_skip` says to leave it out.
    """
    chosen = []
    for model_id in model_ids:
        try:
            for split in splits:
                check_rows_present(run, model_id, split)
            chosen.append(model_id)
        except ModelIDException as error:
            if not allow_skip:
                raise
            log.warning("skipped: %s", error.what)
    if not chosen:
        raise ModelIDException(
            f"no checkpoint has all rows and targets of {splits[-1]!r}", where="finalize_scores"
        )
    return chosen


def format_ranges(rows: NDArray[np.int64]) -> str:
    """Rows in ascending order, as their ranges: `3, 5-7`."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    ranges = [
        str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in np.split(rows, breaks) if len(r)
    ]
    return first_few(ranges)


def gather_parts(run: Run, cell: FeaturizeCell) -> CellResult:
    """Write a cell's chunk from parts, one of which is in memory at a time.

    Raises
    ------
    ModelIDException
        If some of its rows are in no part.
    MissingInputs
        If another process gathers it at the same time, and was first.
    MixedRun
        If its parts were not made from the same things.
    """
    paths = parts.listed(run.layout.parts(run.plan, cell.model_id, cell.split))
    size = len(cell.rows)
    arrays: dict[str, NDArray[Any]] = {}
    facts: dict[str, Any] = {}
    try:
        source = _sources(paths, cell)
        used = np.unique(source)
        for index in used:
            part = parts.read(paths[index])
            if (facts := facts or dict(part.facts)) != part.facts:
                raise _mixed(facts, part.facts, paths[used[0]], paths[index], cell)
            position = np.empty(size, np.int64)
            rows = part.arrays["rows"] - cell.rows.start
            inside = np.flatnonzero((rows >= 0) & (rows < size))
            position[rows[inside]] = inside
            filled = np.flatnonzero(source == index)
            for name, values in part.arrays.items():
                if name not in arrays:
                    arrays[name] = np.empty((size, *values.shape[1:]), values.dtype)
                arrays[name][filled] = values[position[filled]]
    except (FileNotFoundError, ModelIDException) as error:
        if isinstance(error, FileNotFoundError) or run.receipts.done([cell]):
            what = "another process has just gathered its parts"
            raise MissingInputs(what, where=cell.id) from None
        raise
    del arrays["rows"]
    inputs = digest_of(arrays["inputs"].data)
    digests = contents.write(run, cell, arrays)
    counts = {"rows": size, "parts": len(used), "non_finite_rows": 0}
    return CellResult(digests, {**facts, "inputs_digest": inputs, **counts})


def _sources(paths: Sequence[Path], cell: FeaturizeCell) -> NDArray[np.int64]:
    """Which part each row of a cell is taken from: the earliest that has it."""
    size = len(cell.rows)
    source = np.full(size, -1)
    for index in reversed(range(len(paths))):
        rows = parts.rows_of(paths[index])[0] - cell.rows.start
        source[rows[(rows >= 0) & (rows < size)]] = index
    missing = np.flatnonzero(source < 0) + cell.rows.start
    if len(missing):
        raise ModelIDException(
            f"{len(missing)} of {size} rows of {cell.split!r} are not featurized for model_id "
            f"{cell.model_id}: {format_ranges(missing)}",
            where=cell.id,
            next="featurize them: TRAKer.featurize, or score for targets; of imported rows "
            "import them again",
        )
    return source


def _mixed(
    facts: Mapping[str, Any],
    others: Mapping[str, Any],
    first: Path,
    path: Path,
    cell: FeaturizeCell,
) -> MixedRun:
    names = sorted(n for n in {*facts, *others} if facts.get(n) != others.get(n))
    differences = "; ".join(f"{n}: {facts.get(n)!r} and {others.get(n)!r}" for n in names)
    return MixedRun(
        f"parts that belong together disagree: {differences} in {first.name} and {path.name}",
        where=cell.id,
        next="remove the parts that are wrong, and featurize their rows again",
    )
