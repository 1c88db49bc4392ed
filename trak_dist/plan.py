"""The plan: a run's frozen spec, splits, checkpoints and target sets. Pure: no torch.

Who makes one is `planning.plans`; here is what follows from it: which cells there are, the key of
each, where two plans differ, and how much memory and disk the cells need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Concatenate, ParamSpec, TypeVar

from trak_dist.configuration.config import (
    CURVATURES,
    GRADIENTS,
    PROJECTION_VERSION,
    Counterfactuals,
    GroundTruth,
    Spec,
)
from trak_dist.configuration.dotted import non_default_settings
from trak_dist.coordinates import TRAIN
from trak_dist.hashing import canonical, digest_of
from trak_dist.plan_inputs import Checkpoint, ImportedTruth, Source, Split, planned_cell_rows

SCHEMA = 1
GRAM_PRODUCTS = 2**45  # of rows with themselves in one task: 15 to 40 minutes of a CPU core
REDUCE_KEYS = ("proj_dim", "reduce.", "scores.", "checkpoints.use")
GRADIENTS_KEY = "featurize.gradients"
# What is asked for; what became of it enters digests by itself.
REQUESTS = (
    GRADIENTS_KEY, "reduce.curvature", "reduce.kernel_form", "reduce.fisher_", "reduce.gram_rows"
)  # fmt: skip
SWEEP_KEYS = (
    *("proj_dim", "store_dim", "projection.", "checkpoints.use"),
    # not reduce.threads: they set the bits of the shared Gram
    *("reduce.curvature", "reduce.fisher_", "reduce.lambda_", "reduce.kernel_"),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run.

    `parameters` is p, the number of parameters whose gradients are used; `dropout_seeds` is how
    many models are made of each checkpoint by dropout masks (0: it is one itself); `use` names the
    models of the ensemble (empty: all); `self_influence` tells whether the train rows are
    scored against themselves; `lambda_from` is how λ was selected, if not by the user;
    `mislabelled` digests which train labels are known to be wrong; `gradients` is the resolved
    gradient method; `activations` are the bytes that an example's forward pass keeps; `curvatures`
    those that the output offers, best first; `problem_bytes` what planning grew by (0: unknown).
    """

    spec: Spec
    source: Source
    parameters: int = field(metadata={"min": 1})
    train: Split
    checkpoints: tuple[Checkpoint, ...]
    targets: tuple[Split, ...]
    ground_truth: GroundTruth = field(default_factory=GroundTruth)
    imported_truth: ImportedTruth | None = None
    counterfactuals: Counterfactuals = field(default_factory=Counterfactuals)
    self_influence: bool = False
    lambda_from: str | None = None
    mislabelled: str | None = None
    use: tuple[int, ...] = ()
    dropout_seeds: int = field(default=0, metadata={"min": 0, "below": 1024})
    gradients: str = field(default="vmap", metadata={"choices": GRADIENTS[1:]})
    activations: int = field(default=0, metadata={"min": 0})
    curvatures: tuple[str, ...] = ()
    problem_bytes: int = field(default=0, compare=False, metadata={"min": 0})

    @property
    def splits(self) -> tuple[Split, ...]:
        """The train split and the target sets."""
        return self.train, *self.targets

    @property
    def has_problem(self) -> bool:
        """Whether data and checkpoints come from a problem, rather than from `rows_from`."""
        return not self.train.streamed

    @property
    def rows_from(self) -> str:
        """What of this package gave the rows that no problem has: `TRAKer`, or a function."""
        called = str(self.spec.problem["_target_"]).removeprefix("trak_dist.")
        return called if called.startswith("import_") else "TRAKer"

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
        return "float64" if self.spec.featurize.dtype == "float32" else "float32"

    @property
    def curvature(self) -> str:
        """What the kernel inverts: `none` (XᵀX), `output` or `fisher`."""
        requested = self.spec.reduce.curvature
        return requested if requested != "auto" else (*self.curvatures, "none")[0]

    @property
    def fisher_rows(self) -> int:
        """Train rows for which labels are drawn."""
        return self.spec.reduce.fisher_rows or self.train.rows

    @property
    def curvature_rows(self) -> int:
        """Rows of U, of which the kernel's UᵀU is the sum."""
        fisher = self.curvature == "fisher"
        return self.fisher_rows * self.spec.reduce.fisher_draws if fisher else self.train.rows

    @property
    def dual(self) -> bool:
        """Whether UUᵀ is factorised in place of UᵀU."""
        form = self.spec.reduce.kernel_form
        return form == "dual" or (form == "auto" and self.curvature_rows < self.proj_dim)

    @property
    def gram_parts(self) -> int:
        """How many tasks sum the UᵀU of one checkpoint; 0 if its Gram cell does."""
        if self.dual or self.train.streamed:
            return 0
        rows = self.spec.reduce.gram_rows or GRAM_PRODUCTS // self.proj_dim**2
        rows = max(rows, self.train.cell_rows)  # a part is of whole cells
        return -(-self.curvature_rows // rows) if rows < self.curvature_rows else 0

    @property
    def model_ids(self) -> tuple[int, ...]:
        """The ensemble."""
        return self.use or self.all_model_ids

    @cached_property
    def all_model_ids(self) -> tuple[int, ...]:
        """All models that there are: of each checkpoint itself, or one for each dropout mask."""
        return tuple(m for checkpoint in self.checkpoints for m in self.models_of(checkpoint))

    @property
    def models_each(self) -> int:
        """How many models are made of a checkpoint."""
        return max(1, self.dropout_seeds)

    def models_of(self, checkpoint: Checkpoint) -> range:
        """The models that are made of a checkpoint."""
        return range(checkpoint.model_id, checkpoint.model_id + self.models_each)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the command line may set, nested as there."""
        checkpoints = {"use": list(self.use), "dropout_seeds": self.dropout_seeds}
        return {**asdict(self.spec), "checkpoints": checkpoints}

    def with_settings(self, spec: Spec, use: Sequence[int]) -> Plan:
        """The plan with other settings; for other grads the cells are cut as in a new run."""
        lambda_from = self.lambda_from if spec.reduce == self.spec.reduce else None
        changed = replace(self, spec=spec, use=tuple(use), lambda_from=lambda_from)
        if changed.projection_id == self.projection_id:
            return changed
        train, *targets = (
            replace(s, cell_rows=planned_cell_rows(s.rows, spec, changed.store_dim))
            for s in self.splits
        )
        return replace(changed, train=train, targets=tuple(targets))

    def split(self, name: str) -> Split:
        """The train split or the target set called `name`; `KeyError` if there is none."""
        return {s.name: s for s in self.splits}[name]

    def checkpoint(self, model_id: int) -> Checkpoint:
        """The checkpoint that a model is made of."""
        return self._by_id[model_id - model_id % self.models_each]

    def train_seed(self, model_id: int) -> int:
        """The seed from which the checkpoint of a model is trained, if the run trains it."""
        return model_id // self.models_each

    def dropout_seed(self, model_id: int) -> int | None:
        """The seed of a model's dropout masks, if it has some."""
        return model_id % self.dropout_seeds if self.dropout_seeds else None

    def named_model(self, model_id: int) -> str:
        """A model for people: its checkpoint and its mask, if it has one."""
        seed = self.dropout_seed(model_id)
        return str(model_id) if seed is None else f"{self.train_seed(model_id)} mask {seed}"

    @property
    def ensemble_checkpoints(self) -> int:
        """How many checkpoints the ensemble's models are made of."""
        return len({self.checkpoint(model_id) for model_id in self.model_ids})

    @property
    def described_ensemble(self) -> str:
        """The ensemble for people: how many checkpoints, how many masks."""
        whole = f"{self.ensemble_checkpoints} checkpoints"
        whole += f" x {self.dropout_seeds} dropout masks" if self.dropout_seeds else ""
        some = len(self.model_ids) < self.ensemble_checkpoints * self.models_each
        return f"{len(self.model_ids)} models of {whole}" if some else whole

    @cached_property
    def _by_id(self) -> dict[int, Checkpoint]:
        return {checkpoint.model_id: checkpoint for checkpoint in self.checkpoints}

    # Identity -------------------------------------------------------------------------------

    @cached_property
    def trained_from(self) -> str:
        """Digest of what determines how a model is trained, but for the threads."""
        problem = self.settings_of("problem", "limit")
        return digest([SCHEMA, problem, self.source.file, self.source.model, self.train.content])

    @cached_property
    def fingerprint(self) -> str:
        """Digest of what determines all grads; workers refuse jobs of another fingerprint."""
        return digest(
            [
                *(self.trained_from, self.projection_id, self.parameters),
                *(self.settings_of("featurize"), self.train.cell_rows),
                *([] if self.gradients == "vmap" else [self.gradients]),
                *([f"dropout {self.dropout_seeds}"] if self.dropout_seeds else []),
            ]
        )

    @cached_property
    def projection_id(self) -> str:
        """Names one projection of one choice of parameters, `sjlt-2048-1f0c9a3e` for instance."""
        what = [
            self.settings_of("projection", "featurize.params", "featurize.dtype"),
            PROJECTION_VERSION,
        ]
        return f"{self.spec.projection.kind}-{self.store_dim}-{digest([self.store_dim, what])[:8]}"

    @cached_property
    def gram_id(self) -> str:
        """Names one matrix that kernels are made of: `2048`, `8192-fisher4-dual`, `4096-2parts`."""
        own = [] if self.curvature == "none" else [self.curvature_id]
        form = ["dual"] * self.dual or [f"{self.gram_parts}parts"] * bool(self.gram_parts)
        return "-".join([str(self.proj_dim), *own, *form])

    @property
    def curvature_id(self) -> str:
        """Names what kernels invert: `none`, `output`, `fisher4`, `fisher4x1000`."""
        reduce = self.spec.reduce
        if self.curvature != "fisher":
            return self.curvature
        sample = f"x{reduce.fisher_rows}" if reduce.fisher_rows else ""
        return f"fisher{reduce.fisher_draws}{sample}"

    @cached_property
    def kernel_id(self) -> str:
        """Names one choice of `proj_dim` and `reduce`; checkpoints may join without changing it."""
        what = [self.proj_dim, self.settings_of("reduce"), *self.other_gram]
        return f"{self.proj_dim}-{digest(what)[:8]}"

    @property
    def other_gram(self) -> list[str]:
        """The Gram's name as it enters digests: none of XᵀX, all that earlier versions had."""
        return [] if self.gram_id == str(self.proj_dim) else [self.gram_id]

    @cached_property
    def reduce_id(self) -> str:
        """Names a member of a sweep: its projection, `proj_dim`, `reduce` and `use`."""
        content = [self.projection_id, self.kernel_id, self.use]
        return f"{self.spec.projection.kind}-{self.proj_dim}-{digest(content)[:8]}"

    def settings_of(self, *sections: str) -> dict[str, Any]:
        """The settings of some sections that are not at their defaults, as they enter digests."""
        return {
            k: v
            for k, v in non_default_settings(self.spec).items()
            if any(k == s or k.startswith(f"{s}.") for s in sections) and not k.startswith(REQUESTS)
        }

    def cut(self, split: str) -> list[object]:
        """What a split holds, and how it is cut into cells."""
        found = self.split(split)
        return [found.content, found.cell_rows]

    # What is asked of it -------------------------------------------------------------------

    def scored_names(self) -> Iterator[str]:
        """The target sets, and the train split if its self-influence is asked for."""
        yield from (split.name for split in self.targets)
        if self.self_influence:
            yield TRAIN

    def is_evaluated(self, name: str) -> bool:
        """Whether a target set's scores, or self-influence, are evaluated."""
        return name == TRAIN or self.has_ground_truth(name) or bool(self.counterfactuals.targets)

    def has_ground_truth(self, targets: str) -> bool:
        """Whether there are retrained models to compare the scores of a target set with."""
        imported = self.imported_truth is not None and self.imported_truth.targets == targets
        return targets != TRAIN and (bool(self.ground_truth.subsets) or imported)

    def inconsistencies(self) -> Iterator[str]:
        """What is inconsistent in it, a line for each."""
        ids, names = self.all_model_ids, [s.name for s in self.targets]
        if len(set(ids)) < len(ids):
            yield f"checkpoints: a model_id is there twice: {list(ids)}"
        if len(set(self.use)) < len(self.use) or not set(self.use) <= set(ids):
            yield f"use: {list(self.use)} are not some of the model_ids {list(ids)}"
        if not set(self.curvatures) <= set(CURVATURES):  # they name directories
            yield f"curvatures: {list(self.curvatures)} are not some of {', '.join(CURVATURES)}"
        if self.has_problem and any(c.path is None for c in self.checkpoints):
            yield "checkpoints: one has no path"
        if self.dropout_seeds and not self.has_problem:
            yield "dropout_seeds: rows are streamed, so no masks are made"
        if any(c.model_id % self.models_each for c in self.checkpoints):
            yield f"checkpoints: a model_id is no multiple of dropout_seeds {self.dropout_seeds}"
        if self.train.name != TRAIN or TRAIN in names or len(set(names)) < len(names):
            yield f"targets: {names} must be distinct, and not {TRAIN!r}"


P = ParamSpec("P")
T = TypeVar("T")


def cached_on_plan(compute: Callable[Concatenate[Plan, P], T]) -> Callable[Concatenate[Plan, P], T]:
    """A function of a plan and hashable arguments, cached on the plan."""

    @functools.wraps(compute)
    def remembered(plan: Plan, /, *args: P.args, **kwargs: P.kwargs) -> T:
        values = vars(plan).setdefault("_remembered", {})
        requested = compute, args, tuple(kwargs.items())
        if requested not in values:
            values[requested] = compute(plan, *args, **kwargs)
        found: T = values[requested]
        return found

    return remembered


def digest(value: Any) -> str:
    """Digest of a JSON-able value, independent of the order of its keys."""
    return digest_of(canonical(value))
