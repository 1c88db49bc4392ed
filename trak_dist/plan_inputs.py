"""What a plan is made of: splits and where their rows come from, checkpoints, the source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from trak_dist.configuration.config import Spec
from trak_dist.coordinates import Rows, check_name

CHUNK_BYTES = 64 * 2**20
MIN_CELLS = 8  # a small split is still cut into about so many cells, to lose little at a kill


@dataclass(frozen=True)
class ProbedDataset:
    """Rows of a dataset of the problem, with digests of a few: of each alone, and in one batch.

    Plans of earlier versions have no digest of the batch.
    """

    alone: str
    together: str | None = None

    def __post_init__(self) -> None:
        assert self.alone

    @property
    def digest(self) -> str:
        """What identifies its rows in the keys of cells."""
        return self.alone


@dataclass(frozen=True)
class Streamed:
    """Rows that calls of `TRAKer` provide, in any order: there is no dataset to read them from."""

    @property
    def digest(self) -> str:
        """Nothing is known of them when they are planned."""
        return ""


@dataclass(frozen=True)
class Split:
    """The train set or a target set as planned: where its rows come from, and the rows of a cell.

    `ProbedDataset` and `Streamed` are the two sources.
    """

    name: str
    rows: int = field(metadata={"min": 1})
    cell_rows: int = field(metadata={"min": 1})
    row_source: ProbedDataset | Streamed

    def __post_init__(self) -> None:
        check_name(self.name, what="the split")  # it names directories

    @property
    def streamed(self) -> bool:
        """Whether its rows are streamed, rather than read from a dataset."""
        return isinstance(self.row_source, Streamed)

    @property
    def content(self) -> tuple[str, int, str]:
        """What identifies the split's data, however it is cut into cells."""
        return self.name, self.rows, self.row_source.digest

    @property
    def cells(self) -> int:
        """How many cells it is cut into."""
        return -(-self.rows // self.cell_rows)

    def blocks(self, *, overlapping: Rows | None = None) -> Iterator[Rows]:
        """The rows of each cell, in order; or of those that have some of `overlapping`."""
        some = overlapping or Rows(0, self.rows)
        first = some.start - some.start % self.cell_rows
        for start in range(first, some.stop, self.cell_rows):
            yield Rows(start, min(start + self.cell_rows, self.rows))


@dataclass(frozen=True)
class Checkpoint:
    """A state dict; the path of one that `stage=train` makes is relative to the run directory.

    `model_id` is its model's; where dropout masks make several models of it, the first one's, and
    theirs follow. One that `TRAKer` was given in memory has no path. `digest` is that of its
    content, if it was read when it was planned.
    """

    model_id: int
    path: str | None
    trained: bool
    digest: str | None = None

    def __post_init__(self) -> None:
        assert isinstance(self.model_id, int)  # it names directories

    @property
    def file(self) -> str:
        """Its path, of a checkpoint that a problem has: all of these are files."""
        assert self.path is not None
        return self.path


@dataclass(frozen=True)
class Source:
    """What the problem is made of, so that a job runs what was planned.

    `file` digests the Python file of its function, as planned; `modules` the user's own files that
    it, and the classes of what it gives, are written in or import; `accepted` are those of later
    versions that the user said compute the same; `model` digests how model and output print.
    `unsaved` has signatures of the tensors that no checkpoint holds, `built` of outputs and
    gradients of the model as built; both are of `checks.pinned_model`, and empty in plans of
    earlier versions.
    """

    file: str
    model: str
    import_root: str
    accepted: tuple[str, ...] = ()
    modules: Mapping[str, str] = field(default_factory=dict)
    unsaved: Mapping[str, str | list[float]] = field(default_factory=dict)
    built: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class ImportedTruth:
    """The ground truth in a user's files: the digest of both, and the target set they are of."""

    digest: str
    targets: str


def cell_rows(rows: int, *, row_bytes: int, batch_rows: int) -> int:
    """Rows of a cell: a multiple of `batch_rows` that fills no more than `CHUNK_BYTES`."""
    cap = max(1, CHUNK_BYTES // row_bytes // batch_rows)
    target_rows = -(-rows // (MIN_CELLS * batch_rows))
    return max(1, min(cap, target_rows)) * batch_rows


def planned_cell_rows(rows: int, spec: Spec, dim: int) -> int:
    """Rows of a cell of grads with `dim` columns: as set, or what fits.

    Of int8 as many as of float16: a cell that reads them holds them as float32.
    """
    row_bytes = dim * (4 if spec.featurize.dtype == "float32" else 2)
    return spec.featurize.cell_rows or cell_rows(
        rows, row_bytes=row_bytes, batch_rows=spec.featurize.batch_rows
    )
