"""Rows of a problem's datasets: read, collated, digested, and checked against what was planned.

All of it happens in the thread that made the dataset: one that holds an open database may refuse
to be read from another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Subset, default_collate

from trak_dist.configuration.config import Spec
from trak_dist.errors import DatasetError, ProblemError, UnreadableRow
from trak_dist.hashing import truncated
from trak_dist.ops.batches import content
from trak_dist.plan_inputs import ProbedDataset, Split, Streamed
from trak_dist.problem import MapDataset, Problem, Rendered, user_code_errors
from trak_dist.spacing import evenly_spaced

PROBE_ROWS = 16


def length(dataset: MapDataset, name: str) -> int:
    """The number of its rows.

    Raises
    ------
    DatasetError
        If its length is not defined.
    """
    with user_code_errors(f"len() of the dataset {name!r}", DatasetError):
        return len(dataset)


def apply_limit(dataset: MapDataset, limit: int) -> MapDataset:
    """The first `limit` examples; all of them if it is 0."""
    if limit == 0 or limit >= len(dataset):
        return dataset
    subset: Subset[Any] = Subset(dataset, range(limit))  # type: ignore[arg-type]
    return subset


def examples(dataset: MapDataset, rows: Sequence[int], *, name: str) -> list[Any]:
    """Some rows of a dataset, at once where it has `__getitems__`, as torch's loader reads them.

    Raises
    ------
    UnreadableRow
        Naming the first row that raises.
    """

    def one_by_one() -> Iterator[Any]:
        for row in rows:
            with user_code_errors(f"reading row {row} of {name!r}", UnreadableRow):
                yield dataset[row]

    at_once = getattr(dataset, "__getitems__", None)
    if at_once is None or len(rows) == 1:
        return list(one_by_one())
    with user_code_errors(f"reading rows {rows[0]} to {rows[-1]} of {name!r}", UnreadableRow):
        try:
            return list(at_once(list(rows)))
        except Exception:
            list(one_by_one())  # which row it is
            raise


def collate_rows(problem: Problem, dataset: MapDataset, rows: Sequence[int], *, name: str) -> Any:
    """What collate gives of some rows of a dataset.

    Raises
    ------
    UnreadableRow
        If a row can't be read, or they can't be put into one batch.
    """
    found = examples(dataset, rows, name=name)
    which = f"row {rows[0]}" if len(rows) == 1 else f"rows {rows[0]} to {rows[-1]}"
    with user_code_errors(f"collate of {which} of {name!r}", UnreadableRow):
        return (problem.collate or default_collate)(found)


def batch(
    problem: Problem, dataset: MapDataset, rows: Sequence[int], *, name: str
) -> tuple[Any, ...]:
    """Some rows of a dataset, as the arguments of a model output; fails as `collated` does."""
    return as_batch(collate_rows(problem, dataset, rows, name=name))


def as_batch(collated: Any) -> tuple[Any, ...]:
    """What collate gave, as the arguments of a model output."""
    if isinstance(collated, Mapping):
        return (dict(collated),)
    return tuple(collated) if isinstance(collated, list | tuple) else (collated,)


def render_row(problem: Problem, name: str, row: int) -> Rendered | None:
    """How a row is shown, if the problem says.

    Raises
    ------
    UnreadableRow, ProblemError
        If it can't be read or shown, or render gives something else.
    """
    if problem.render is None:
        return None
    (example,) = examples(problem.dataset(name), [row], name=name)
    with user_code_errors(f"render of row {row} of {name!r}", UnreadableRow):
        shown = problem.render(example)
    if not isinstance(shown, Rendered):
        raise ProblemError(
            f"render gave {type(shown).__name__}, not trak_dist.Rendered",
            where="problem.render",
            next="return trak_dist.Rendered(picture or text, label)",
        )
    return shown


def content_bytes(batch: Any, *, where: str) -> Iterator[bytes | memoryview]:
    """The bytes that identify a batch.

    Raises
    ------
    DatasetError
        If it holds anything but tensors, numbers and strings.
    """
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            yield str((leaf.dtype, tuple(leaf.shape))).encode()
            yield content(leaf)
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            yield repr(leaf).encode()
        else:  # its repr may be shortened, or hold an address
            raise DatasetError(
                f"a batch holds {type(leaf).__module__}.{type(leaf).__qualname__}, not tensors",
                where=where,
                next="let collate give tensors, in tuples, lists or dicts",
            )


def probe(problem: Problem, name: str, spec: Spec) -> tuple[int, ProbedDataset]:
    """How many rows a split has, and digests of some of them.

    They are evenly spaced over the dataset: a cheap check that it, and collate, are unchanged.

    Raises
    ------
    DatasetError, UnreadableRow
        If it is empty, or they can't be read.
    """
    if length(problem.dataset(name), name) == 0:
        raise DatasetError(
            f"the dataset {name!r} is empty", where="problem", next="see that its files are found"
        )
    dataset = apply_limit(problem.dataset(name), spec.limit)
    rows = evenly_spaced(len(dataset), PROBE_ROWS)
    row_digests, batch_digest = hashlib.sha256(), hashlib.sha256()
    batch = rows[: spec.featurize.batch_rows]
    for sha, groups in ((row_digests, [[row] for row in rows]), (batch_digest, [batch])):
        for group in groups:
            where = f"problem.collate, row {group[0]} of {name!r}"
            for piece in content_bytes(
                collate_rows(problem, dataset, group, name=name), where=where
            ):
                sha.update(piece)
    return len(dataset), ProbedDataset(truncated(row_digests), truncated(batch_digest))


def check_split(problem: Problem, split: Split, spec: Spec) -> None:
    """Raise `DatasetError` if the problem's dataset, or its batches, are not those planned."""
    planned = split.row_source
    if isinstance(planned, Streamed):
        return
    rows, now = probe(problem, split.name, spec)
    if (rows, now.alone) != (split.rows, planned.alone):
        raise DatasetError(
            f"the dataset {split.name!r} changed since planning: {split.rows} rows with digest "
            f"{planned.alone} then, {rows} rows with digest {now.alone} now",
            where="problem",
            next="restore the data (without random augmentation), or start a new run_dir",
        )
    if planned.together and now.together != planned.together:
        raise DatasetError(
            f"batches of {split.name!r} changed since planning, though single rows did not: "
            f"digest {planned.together} then, {now.together} now",
            where="problem.collate",
            next="restore collate, or start a new run_dir",
        )
