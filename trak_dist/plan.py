"""The plan: a run's frozen spec, splits, checkpoints and target sets, as ranges. Pure: no torch.

Who makes one is `planning.plans`; here is what follows from it: which cells there are, the key of
each, where two plans differ, and how much memory and disk the cells need.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from trak_dist.cells import (
    FULL,
    RANDOM,
    STAGE_CELLS,
    TRAIN,
    Cell,
    CounterfactualCell,
    EvaluateCell,
    FeaturizeCell,
    GramCell,
    KernelCell,
    MarginsCell,
    PreconditionCell,
    ReportCell,
    Rows,
    ScoreCell,
    TrainCell,
    check_name,
)
from trak_dist.config import (
    GRADIENTS,
    PROJECTION_VERSION,
    Counterfactuals,
    GroundTruth,
    Spec,
    distinct,
    flatten,
)

SCHEMA = 1
CHUNK_BYTES = 64 * 2**20
HALVES_TARGETS = 64  # of each target set, for which scores of halves of the ensemble are kept
MAX_CELLS = 10**7  # what a command that lists them gets through
MIN_CELLS = 8  # a small split is still cut into about so many cells, to lose little at a kill
REDUCE_KEYS = ("proj_dim", "reduce.", "checkpoints.use")
GRADIENTS_KEY = "featurize.gradients"
SWEEP_KEYS = (
    *("proj_dim", "store_dim", "projection.", "checkpoints.use"),
    *("reduce.lambda_", "reduce.kernel_"),  # not its threads: they set the bits of the shared Gram
)


@dataclass(frozen=True)
class Split:
    """A dataset as planned: its rows, the rows of a cell, and a digest of some probe rows.

    Without a digest it is no dataset: its rows are `fed`. `batch` digests the probe rows in one
    batch, and is empty in plans of earlier versions.
    """

    name: str
    rows: int = field(metadata={"min": 1})
    cell_rows: int = field(metadata={"min": 1})
    probe: str
    batch: str = ""

    def __post_init__(self) -> None:
        check_name(self.name, what="the split")  # it names directories

    def spread(self, count: int) -> list[int]:
        """`count` of its rows, evenly spread from the first to the last; all if it has no more."""
        count = min(count, self.rows)
        return sorted({round(i * (self.rows - 1) / max(1, count - 1)) for i in range(count)})

    @property
    def fed(self) -> bool:
        """Whether its rows come by calls of `TRAKer`: there is no dataset to probe."""
        return not self.probe

    @property
    def content(self) -> tuple[str, int, str]:
        """What the split holds, however it is cut into cells."""
        return self.name, self.rows, self.probe

    def blocks(self) -> Iterator[Rows]:
        """The rows of each cell, in order."""
        for start in range(0, self.rows, self.cell_rows):
            yield Rows(start, min(start + self.cell_rows, self.rows))


@dataclass(frozen=True)
class Checkpoint:
    """A state dict; the path of one that `stage=train` makes is relative to the run directory.

    `digest` is that of its content, if it was read when it was planned.
    """

    model_id: int
    path: str
    trained: bool
    digest: str = ""

    def __post_init__(self) -> None:
        assert isinstance(self.model_id, int)  # it names directories


@dataclass(frozen=True)
class Source:
    """What the problem is made of, so that a job runs what was planned.

    `file` digests the Python file of its function, as planned; `modules` the user's own files that
    it, and the classes of what it gives, are written in or import; `accepted` are those of later
    versions that the user said compute the same; `model` digests how model and output print.
    `unsaved` tells the tensors of the model that no checkpoint holds, `built` what it gives of some
    train rows as it is built; both are of `checks.pinned_model`, and empty in plans of earlier
    versions.
    """

    file: str
    model: str
    import_root: str
    accepted: tuple[str, ...] = field(default=(), metadata={"may_be_empty": True})
    modules: Mapping[str, str] = field(default_factory=dict)
    unsaved: Mapping[str, str | list[float]] = field(default_factory=dict)
    built: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run.

    `parameters` is p, the number of parameters whose gradients are used; `use` names the
    checkpoints of the ensemble, none of them: all; `truth_files` digests the ground truth's files,
    if the user brought them, `truth_of` is the target set that they are of; `self_influence` tells
    whether the train rows are scored against themselves; `lambda_from` says how λ was chosen, if
    not by the user; `mislabelled` digests which train labels are known to be wrong; `gradients` is
    how per-sample gradients are computed, `hooks` or `vmap`, whatever the spec leaves open;
    `activations` are the bytes that the forward pass of an example keeps for the backward pass.
    """

    spec: Spec
    source: Source
    parameters: int = field(metadata={"min": 1})
    train: Split
    checkpoints: tuple[Checkpoint, ...]
    targets: tuple[Split, ...]
    ground_truth: GroundTruth = field(default_factory=GroundTruth)
    truth_files: str = ""
    truth_of: str = ""
    counterfactuals: Counterfactuals = field(default_factory=Counterfactuals)
    self_influence: bool = False
    lambda_from: str = ""
    mislabelled: str = ""
    use: tuple[int, ...] = field(default=(), metadata={"may_be_empty": True})
    gradients: str = field(default="vmap", metadata={"choices": GRADIENTS[1:]})
    activations: int = field(default=0, metadata={"min": 0})

    @property
    def store_dim(self) -> int:
        """Columns of the stored grads."""
        identity = self.spec.projection.kind == "identity"
        return self.parameters if identity else self.spec.store_dim

    @property
    def proj_dim(self) -> int:
        """Columns of the grads that kernel and scores use, folded from `store_dim`."""
        identity = self.spec.projection.kind == "identity"
        return self.parameters if identity else self.spec.proj_dim

    @property
    def precondition_dtype(self) -> str:
        """Type of the preconditioned targets, and so of the products of scores.

        One step above that of the stored grads: products with large entries of B cancel.
        """
        return "float32" if self.spec.featurize.dtype == "float16" else "float64"

    @property
    def model_ids(self) -> tuple[int, ...]:
        """The ensemble."""
        return self.use or tuple(c.model_id for c in self.checkpoints)

    @property
    def settings(self) -> dict[str, Any]:
        """What the command line may say of the run, nested as there."""
        return {**asdict(self.spec), "checkpoints": {"use": list(self.use)}}

    def with_settings(self, spec: Spec, use: Sequence[int]) -> Plan:
        """The plan with other settings; the cells of other grads are cut as those of a new run."""
        same = spec.reduce == self.spec.reduce
        said = self.lambda_from if same else ""
        changed = replace(self, spec=spec, use=tuple(use), lambda_from=said)
        if changed.projection_id == self.projection_id:
            return changed
        train, *targets = (
            replace(s, cell_rows=planned_cell_rows(s.rows, spec, changed.store_dim))
            for s in (self.train, *self.targets)
        )
        return replace(changed, train=train, targets=tuple(targets))

    def split(self, name: str) -> Split:
        """The train split or the target set called `name`."""
        return next(s for s in (self.train, *self.targets) if s.name == name)

    def checkpoint(self, model_id: int) -> Checkpoint:
        """The checkpoint whose key is `model_id`."""
        return next(c for c in self.checkpoints if c.model_id == model_id)

    # Identity -------------------------------------------------------------------------------

    @cached_property
    def _trained_from(self) -> str:
        problem = self._settings("problem", "limit")
        return digest([SCHEMA, problem, self.source.file, self.source.model, self.train.content])

    @cached_property
    def fingerprint(self) -> str:
        """Digest of what determines all grads; jobs of another fingerprint refuse to work."""
        return digest(
            [
                *(self._trained_from, self.projection_id, self.parameters),
                *(self._settings("featurize"), self.train.cell_rows),
                *([] if self.gradients == "vmap" else [self.gradients]),
            ]
        )

    @cached_property
    def projection_id(self) -> str:
        """Names one projection of one choice of parameters, `sjlt-2048-1f0c9a3e` for instance."""
        what = [
            self._settings("projection", "featurize.params", "featurize.dtype"),
            PROJECTION_VERSION,
        ]
        return f"{self.spec.projection.kind}-{self.store_dim}-{digest([self.store_dim, what])[:8]}"

    @cached_property
    def kernel_id(self) -> str:
        """Names one choice of `proj_dim` and `reduce`; checkpoints may join without changing it."""
        return f"{self.proj_dim}-{digest([self.proj_dim, self._settings('reduce')])[:8]}"

    @cached_property
    def reduce_id(self) -> str:
        """Names a member of a sweep: its projection, `proj_dim`, `reduce` and `use`."""
        content = [self.projection_id, self.kernel_id, self.use]
        return f"{self.spec.projection.kind}-{self.proj_dim}-{digest(content)[:8]}"

    @cached_property
    def _bases(self) -> dict[str, str]:
        threads = self._settings("featurize.threads")
        gram = digest([self.fingerprint, self.proj_dim, self._settings("reduce.threads")])
        kernel = digest([gram, self.kernel_id])
        score = digest([kernel, self.model_ids, HALVES_TARGETS])
        train = digest([self._trained_from, threads])
        subset = digest([train, self.ground_truth.alpha])
        truth = [subset, self.truth_files, self.ground_truth.subsets, self.ground_truth.seeds]
        without = asdict(self.counterfactuals)
        bases = {"train": train, "subset": subset, "gram": gram, "kernel": kernel}
        for split in (self.train, *self.targets):
            name, content = split.name, [split.content, split.cell_rows]
            bases[f"featurize/{name}"] = digest([self.fingerprint, content])
            bases[f"precondition/{name}"] = digest([kernel, content])
            bases[f"score/{name}"] = digest([score, content])
            bases[f"margins/{name}"] = digest([subset, split.content])
            retrained = ["counterfactual", train, content]
            bases[f"counterfactual/{RANDOM}/{name}"] = digest(retrained)
            bases[f"counterfactual/{name}"] = digest([*retrained, score])
            evaluated: list[object] = ["evaluate", score, content]
            evaluated += [truth] if self.has_truth(name) else []
            evaluated += [without] if self.counterfactuals.targets and name != TRAIN else []
            evaluated += [self.mislabelled] if name == TRAIN else []
            bases[f"evaluate/{name}"] = digest(evaluated)
            bases[f"report/{name}"] = digest(["report", *evaluated])
        return bases

    def _settings(self, *sections: str) -> dict[str, Any]:
        return {
            k: v
            for k, v in distinct(self.spec).items()
            if any(k == s or k.startswith(f"{s}.") for s in sections)
            and k != "featurize.gradients"  # what was asked for; the plan's own field is what is
        }

    def key(self, cell: Cell) -> str:
        """Hash of all that determines the cell's bytes; a receipt with this key makes it done."""
        match cell:
            case FeaturizeCell(split=split):
                base = self._bases[f"featurize/{split}"]
            case TrainCell(subset=subset):
                base = self._bases["train" if subset == FULL else "subset"]
            case CounterfactualCell(targets=name, whose="random"):
                base = self._bases[f"counterfactual/{RANDOM}/{name}"]
            case (
                MarginsCell(targets=name)
                | PreconditionCell(targets=name)
                | ScoreCell(targets=name)
                | CounterfactualCell(targets=name)
                | EvaluateCell(targets=name)
                | ReportCell(targets=name)
            ):
                base = self._bases[f"{cell.stage}/{name}"]
            case _:
                base = self._bases[cell.stage]
        return hashlib.sha256(f"{base}|{cell.id}".encode()).hexdigest()[:32]

    # Cells ----------------------------------------------------------------------------------

    def cells(self, stage: str) -> Iterator[Cell]:
        """The cells that `stage` runs, each after those it needs."""
        for kind in STAGE_CELLS[stage]:
            yield from self.cells_of(kind)

    def cells_of(self, kind: type[Cell]) -> Iterator[Cell]:
        """The cells of one kind, in order."""
        if kind is TrainCell:
            used = (self.checkpoint(model_id) for model_id in self.model_ids)
            yield from (TrainCell(FULL, c.model_id) for c in used if c.trained)
            yield from (TrainCell(subset, seed) for subset, seed in self.retrained())
        elif kind is MarginsCell:
            yield from (MarginsCell(*m, s.name) for m in self.retrained() for s in self.targets)
        elif kind is FeaturizeCell:
            names = [s.name for s in (self.train, *self.targets)]
            yield from (
                c for m in self.model_ids for n in names for c in self.featurize_cells(m, n)
            )
        elif kind is GramCell or kind is KernelCell:
            yield from (kind(model_id) for model_id in self.model_ids)
        elif kind is PreconditionCell:
            yield from (PreconditionCell(m, s.name) for m in self.model_ids for s in self.targets)
        elif kind is ScoreCell:
            for name in self.scored():
                yield from self.score_cells(name)
        elif kind is CounterfactualCell:
            for targets in self.targets:
                yield from self.counterfactual_cells(targets.name)
        elif kind is EvaluateCell:
            yield from (EvaluateCell(name) for name in self.scored() if self.evaluated(name))
        else:
            assert kind is ReportCell
            yield from (ReportCell(name) for name in self.scored())

    def scored(self) -> Iterator[str]:
        """The target sets, and the train split if its self-influence is asked for."""
        yield from (split.name for split in self.targets)
        if self.self_influence:
            yield TRAIN

    def evaluated(self, name: str) -> bool:
        """Whether a target set's scores, or self-influence, are held against anything."""
        return name == TRAIN or self.has_truth(name) or bool(self.counterfactuals.targets)

    def has_truth(self, targets: str) -> bool:
        """Whether there are retrained models to hold the scores of a target set against."""
        return targets != TRAIN and (bool(self.ground_truth.subsets) or self.truth_of == targets)

    def retrained(self) -> Iterator[tuple[str, int]]:
        """Subset and seed of each model of the ground truth, subset by subset."""
        for subset in range(self.ground_truth.subsets):
            yield from ((str(subset), seed) for seed in range(self.ground_truth.seeds))

    def featurize_cells(self, model_id: int, split: str) -> Iterator[FeaturizeCell]:
        """The featurize cells of one checkpoint and split, in order of rows."""
        return (FeaturizeCell(model_id, split, rows) for rows in self.split(split).blocks())

    def score_cells(self, targets: str) -> Iterator[ScoreCell]:
        """The score cells of one target set, in order of rows."""
        return (ScoreCell(targets, rows) for rows in self.score_split(targets).blocks())

    def counterfactual_cells(self, targets: str) -> Iterator[CounterfactualCell]:
        """The models retrained without some rows, random ones last."""
        asked = self.counterfactuals
        chosen = [str(row) for row in self.split(targets).spread(asked.targets)]
        for whose in (*chosen, RANDOM) if chosen else ():
            for removed in asked.remove:
                for seed in range(asked.seeds):
                    yield CounterfactualCell(targets, whose, removed, seed)

    def score_split(self, targets: str) -> Split:
        """The train split, cut so that a cell's scores, and its grads, stay below `CHUNK_BYTES`."""
        rows = max(1, CHUNK_BYTES // (4 * max(self.score_columns(targets), self.store_dim)))
        return replace(self.train, cell_rows=min(rows, self.train.rows))

    def score_columns(self, targets: str) -> int:
        """Scores of a train row: one for each target, or its self-influence."""
        return 1 if targets == TRAIN else self.split(targets).rows

    def halves(self, targets: str) -> list[int]:
        """The targets for which scores of either half of the ensemble are kept."""
        several = targets != TRAIN and len(self.model_ids) > 1
        return self.split(targets).spread(HALVES_TARGETS) if several else []

    def oddities(self) -> Iterator[str]:
        """What of its parts does not go together, a line for each."""
        ids, names = [c.model_id for c in self.checkpoints], [s.name for s in self.targets]
        if len(set(ids)) < len(ids):
            yield f"  checkpoints: a model_id is there twice: {ids}"
        if len(set(self.use)) < len(self.use) or not set(self.use) <= set(ids):
            yield f"  use: {list(self.use)} are not some of the model_ids {ids}"
        if self.train.name != TRAIN or TRAIN in names or len(set(names)) < len(names):
            yield f"  targets: {names} are not names of their own beside {TRAIN!r}"
        elif (cells := self._cells_at_most()) > MAX_CELLS:
            yield f"  {cells:.2g} cells are more than the {MAX_CELLS:.0e} that one run may have"

    def _cells_at_most(self) -> int:
        truth, without = self.ground_truth, self.counterfactuals
        splits = (self.train, *self.targets)
        ids, names = len(self.checkpoints), [s.name for s in splits]
        scored = sum(-(-self.train.rows // self.score_split(n).cell_rows) for n in names)
        retrained = (1 + len(names)) * truth.subsets * truth.seeds
        chosen = sum(1 + min(without.targets, s.rows) for s in self.targets)
        removed = chosen * len(without.remove) * without.seeds
        rows = sum(-(-s.rows // s.cell_rows) for s in splits)
        return ids * (rows + len(names) + 3) + scored + retrained + removed


def digest(value: Any) -> str:
    """Digest of a JSON-able value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cell_rows(rows: int, *, row_bytes: int, batch_rows: int) -> int:
    """Rows of a cell: a multiple of `batch_rows` that fills no more than `CHUNK_BYTES`."""
    cap = max(1, CHUNK_BYTES // row_bytes // batch_rows)
    wanted = -(-rows // (MIN_CELLS * batch_rows))
    return max(1, min(cap, wanted)) * batch_rows


def planned_cell_rows(rows: int, spec: Spec, dim: int) -> int:
    """Rows of a cell of grads with `dim` columns: what the settings say, or what fits."""
    row_bytes = dim * (2 if spec.featurize.dtype == "float16" else 4)
    return spec.featurize.cell_rows or cell_rows(
        rows, row_bytes=row_bytes, batch_rows=spec.featurize.batch_rows
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, each with its old and its new value."""
    a, b = (json.loads(json.dumps(flatten(m))) for m in (old, new))
    return {k: (a.get(k), b.get(k)) for k in sorted({*a, *b}) if a.get(k) != b.get(k)}
