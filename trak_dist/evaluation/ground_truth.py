"""The ground truth of an evaluation, read: masks and margins of retrained models."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak_dist.cells import MarginsCell, of_stage
from trak_dist.configuration.config import MIN_SUBSETS, GroundTruth
from trak_dist.errors import (
    ConfigError,
    EvaluationError,
    GroundTruthNotFound,
    UnreadableGroundTruth,
)
from trak_dist.ops import draws
from trak_dist.plan import Plan
from trak_dist.store import arrays, atomic, contents
from trak_dist.store.run import Run


@dataclass(frozen=True)
class GroundTruthData:
    """`masks` (subsets, n_train) bool, and `margins` (subsets, seeds, targets) float64."""

    masks: NDArray[np.bool_]
    margins: NDArray[np.float64]


def check_has_ground_truth(plan: Plan) -> None:
    """Raise `ConfigError` if there is nothing to compare scores with."""
    if not any(of_stage(plan, "evaluate")):
        raise ConfigError(
            "there is no ground truth to compare the scores with",
            where="ground_truth",
            next="ground_truth.subsets=100 ground_truth.seeds=3 in place of stage=evaluate trains "
            "models for it",
        )


def subset_masks(plan: Plan) -> NDArray[np.bool_]:
    """The masks of the models that the run retrains."""
    masks = np.zeros((plan.ground_truth.subsets, plan.train.rows), dtype=bool)
    for index, mask in enumerate(masks):
        mask[draws.subset(index, plan.train.rows, plan.ground_truth.alpha).numpy()] = True
    return masks


def publish_masks(run: Run) -> None:
    """Write the masks where others find them, as TRAK's `masks.npy`; never fewer than before."""
    if not run.plan.ground_truth.subsets:
        return
    masks = subset_masks(run.plan)
    try:
        existing = _load(run.layout.masks)[: len(masks)]
    except EvaluationError:
        existing = None
    if existing is None or not np.array_equal(existing, masks):
        buffer = io.BytesIO()
        np.save(buffer, masks)
        atomic.write(run.layout.masks, buffer.getvalue())


def read_ground_truth(run: Run, targets: str) -> GroundTruthData:
    """The ground truth for one target set.

    Raises
    ------
    EvaluationError
        If its files are not those that were planned.
    """
    plan = run.plan
    if plan.ground_truth.subsets:
        margins = np.stack(
            [
                [
                    contents.read(run, MarginsCell(str(subset), seed, targets), "margins")[0]
                    for seed in range(plan.ground_truth.seeds)
                ]
                for subset in range(plan.ground_truth.subsets)
            ]
        )
        return GroundTruthData(subset_masks(plan), margins.astype(np.float64))
    imported = plan.imported_truth
    assert imported is not None
    rows = {targets: plan.split(targets).rows}
    found = import_ground_truth(plan.ground_truth, plan.train.rows, rows, notify=lambda _: None)
    if found.digest != imported.digest:
        raise EvaluationError(
            f"the ground truth changed since planning: digest {imported.digest} then, "
            f"{found.digest} now",
            where=plan.ground_truth.margins,
            next="restore the files, or use another run_dir",
        )
    return found.truth


@dataclass(frozen=True)
class ImportedGroundTruth:
    """Imported ground truth: its arrays, their target set, and the digest of the files."""

    truth: GroundTruthData
    targets: str
    digest: str


def import_ground_truth(
    files: GroundTruth,
    train_rows: int,
    targets: Mapping[str, int],
    *,
    notify: Callable[[str], None],
) -> ImportedGroundTruth:
    """Read `masks.npy` and `margins.npy`, a row per subset or a column per subset.

    Parameters
    ----------
    targets : mapping of names to numbers of rows
        The target sets; the margins are those of the one that has as many rows.
    notify : callable
        Gets a line on how the files were read.

    Raises
    ------
    EvaluationError
        If a file is no array, or the shapes do not fit the run or each other.
    """
    masks, margins = (_load(Path(p)) for p in (files.masks, files.margins))
    shapes = f"masks {masks.shape}, margins {margins.shape}"
    where = f"{files.masks}, {files.margins}"
    if masks.ndim != 2 or margins.ndim != 2 or train_rows not in masks.shape:
        raise EvaluationError(
            f"the ground truth does not fit: {shapes}; wanted (subsets, {train_rows}) and "
            "(subsets, targets)",
            where=where,
            next="masks over the rows of the train set that the run uses",
        )
    transposed = masks.shape[1] != train_rows
    masks = masks.T if transposed else masks
    subsets = len(masks)
    fitting = [
        (name, margins.shape != (subsets, rows))
        for name, rows in targets.items()
        if margins.shape in ((subsets, rows), (rows, subsets))
    ]
    if len(fitting) != 1:
        found = "fits several target sets" if fitting else "fits no target set"
        raise EvaluationError(
            f"the ground truth {found}: {shapes}, {subsets} subsets, target sets "
            f"{', '.join(f'{name} {rows}' for name, rows in targets.items())}",
            where=where,
            next="a run with targets=… of the one set that the margins are of",
        )
    ((name, margins_transposed),) = fitting
    margins = margins.T if margins_transposed else margins
    if not set(np.unique(masks)) <= {0, 1} or not np.isfinite(margins).all():
        raise EvaluationError(
            "masks must hold 0 and 1, or False and True, margins finite numbers", where=where
        )
    if subsets < MIN_SUBSETS:
        raise EvaluationError(f"{subsets} subsets are too few for a correlation", where=where)
    for what, is_transposed in (("masks", transposed), ("margins", margins_transposed)):
        if is_transposed:
            notify(f"ground truth: {what} have a column per subset, read transposed")
    notify(f"ground truth: {subsets} subsets, margins of {name!r}")
    masks, margins = masks.astype(bool), margins.astype(np.float64)
    content = arrays.content_digest(masks) + arrays.content_digest(margins)
    return ImportedGroundTruth(GroundTruthData(masks, margins[:, None]), name, content)


def _load(path: Path) -> NDArray[Any]:
    try:
        with path.open("rb") as file:  # else a cut zip leaves it open
            loaded = np.load(file, allow_pickle=False)
    except OSError as error:
        gone = isinstance(error, FileNotFoundError)
        kind = GroundTruthNotFound if gone else UnreadableGroundTruth
        raise kind(
            f"not a readable array: {error.strerror or error}",
            where=str(path),
            next="see that it is there and that you may read it",
            errno=error.errno,
        ) from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(
            f"not a readable array: {error}", where=str(path), next="numpy.save a plain array"
        ) from None
    if not isinstance(loaded, np.ndarray) or loaded.dtype.kind not in "biuf":
        raise EvaluationError(
            f"not one array of numbers: {getattr(loaded, 'dtype', type(loaded).__name__)}",
            where=str(path),
            next="numpy.save a plain array",
        )
    return loaded
