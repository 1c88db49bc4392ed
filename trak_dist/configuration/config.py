"""The settings as frozen dataclasses, with the limits of each. Pure: no torch, no Hydra.

`Spec` is the part that a plan freezes; the rest says how to run. `validation` makes a `Config` of
the mapping that Hydra composes; `structuring` says what the limits mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STAGES = (
    *("all", "plan", "train", "featurize", "reduce", "evaluate", "report"),
    *("status", "verify", "cancel"),
)
DRAW_VERSION = 1  # of random streams; another one draws other numbers
PROJECTION_VERSION = 2  # of what projections make of them
SCALE_ROWS = 64  # of a kernel that is not formed, from which its mean absolute entry is taken
EXACT_SCALE_DIM = 4096  # up to which all its rows are
CACHE_BYTES = 2**30  # what a projector may keep of its draws in memory
DEVICES = ("auto", "cpu", "cuda")
# Options of sbatch that have a setting here, or that the job graph relies on.
RESERVED_SBATCH_OPTIONS = {
    *("account", "array", "constraint", "cpus-per-task", "dependency", "error", "exclude"),
    *("gpus-per-node", "job-name", "kill-on-invalid-dep", "mem", "nodes", "open-mode", "output"),
    *("parsable", "partition", "qos", "requeue", "signal", "time"),
}
MIN_SUBSETS = 3  # rankings of two agree or disagree by chance alone
GRADIENTS = ("auto", "hooks", "vmap", "loop")
COMPUTE = ("model", "bfloat16")
ONE_LINE = {"one_line": True}  # of a batch script, where another line would be a command
PROJECTIONS = ("sjlt", "rademacher", "gaussian", "identity")
CURVATURES = ("auto", "none", "output", "fisher")


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """How gradients are projected: the kind, and the seed of its draw."""

    kind: str = field(default="sjlt", metadata={"choices": PROJECTIONS})
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class FeaturizeConfig:
    """What sets the bits of grads: parameters, how computed, batches, cells, threads, storage type.

    `auto` means hooks where they cover the model; the plan records the method. `compute` is the
    type of weights, activations and gradients, that of the model or another one; `dtype` that of
    grads. `random` says what of an output that draws random numbers.
    """

    params: tuple[str, ...] = field(default=("*",), metadata={"not_empty": True})
    gradients: str = field(default="auto", metadata={"choices": GRADIENTS})
    compute: str = field(default="model", metadata={"choices": COMPUTE})
    random: str = field(default="refused", metadata={"choices": ("refused", "by_example")})
    batch_rows: int = field(default=64, metadata={"min": 1})
    cell_rows: int = field(default=0, metadata={"min": 0})  # 0: chosen when planning
    dtype: str = field(default="float16", metadata={"choices": ("float16", "float32", "int8")})
    threads: int = field(default=1, metadata={"min": 1})


@dataclass(frozen=True, kw_only=True)
class ReduceConfig:
    """The kernel: the curvature that it inverts, its regularisation, scale and form.

    `fisher_draws` labels are drawn for each of `fisher_rows` train rows (0: all). `gram_rows` rows
    are summed by one task (0: as many as take about half an hour).
    """

    curvature: str = field(default="auto", metadata={"choices": CURVATURES})
    fisher_draws: int = field(default=1, metadata={"min": 1})
    fisher_rows: int = field(default=0, metadata={"min": 0})
    lambda_reg: float = field(default=1.0, metadata={"min": 0})
    lambda_unit: str = field(
        default="mean_diagonal", metadata={"choices": ("mean_diagonal", "absolute")}
    )
    kernel_scale: str = field(default="mean_abs", metadata={"choices": ("mean_abs", "none")})
    kernel_form: str = field(default="auto", metadata={"choices": ("auto", "primal", "dual")})
    gram_rows: int = field(default=0, metadata={"min": 0})
    threads: int = field(default=1, metadata={"min": 1})


# A number that plans of earlier versions do not say, where there was no limit.
UNLIMITED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class ScoresConfig:
    """What is kept of the scores: all n_train × n_targets, or of each target the strongest.

    `count` are the highest, and as many the lowest, of each target; `block_targets` targets are
    preconditioned and scored at once (0: as many as take a moderate amount of memory).
    """

    keep: str = field(default="auto", metadata={"choices": ("auto", "all", "top")})
    count: int = field(default=1000, metadata={"min": 1})
    block_targets: int = field(default=0, metadata={"min": 0})


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How chunks are encoded; every chunk carries a CRC-32C whatever the choice."""

    compression: str = field(default="none", metadata={"choices": ("none", "zstd")})


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a run computes: the part of the configuration that its plan freezes.

    `problem` holds `_target_` and the arguments of that function.
    """

    problem: Mapping[str, Any]
    limit: int = field(default=0, metadata={"min": 0})  # 0: no limit
    proj_dim: int = field(default=2048, metadata={"min": 1})
    store_dim: int = field(default=2048, metadata={"min": 1})
    projection: ProjectionConfig = ProjectionConfig()
    featurize: FeaturizeConfig = FeaturizeConfig()
    reduce: ReduceConfig = ReduceConfig()
    scores: ScoresConfig = ScoresConfig()
    store: StoreConfig = StoreConfig()


@dataclass(frozen=True, kw_only=True)
class CheckpointsConfig:
    """How many checkpoints `stage=train` makes, where the problem provides none, and the ensemble.

    `dropout_seeds` is how many models, by dropout masks, are made of each (0: it is one itself);
    `use` names those of the ensemble (empty: all); `allow_missing` leaves out those that are not
    featurized.
    """

    train: int = field(default=5, metadata={"min": 1})
    dropout_seeds: int = field(default=0, metadata={"min": 0, "below": 1024})
    use: tuple[int, ...] = ()
    allow_missing: bool = False

    @property
    def ensemble(self) -> tuple[int, ...]:
        """`use` in one order, since sums over the ensemble follow it."""
        return tuple(sorted(self.use))

    @property
    def planned(self) -> dict[str, Any]:
        """What a plan keeps of them."""
        return {"use": self.ensemble, "dropout_seeds": self.dropout_seeds}


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """Models retrained on random subsets, which the scores are checked against; none if 0 or empty.

    Either `subsets` with `seeds` models each, on a share `alpha` of the train rows; or the files
    `masks` (subsets, n_train) and `margins` (subsets, n_targets) of models trained elsewhere.
    """

    subsets: int = field(default=0, metadata={"min": 0})
    seeds: int = field(default=1, metadata={"min": 1})
    alpha: float = field(default=0.5, metadata={"min": 0})
    masks: str = ""
    margins: str = ""


@dataclass(frozen=True, kw_only=True)
class Counterfactuals:
    """Models retrained without the most helpful rows of some targets; none if `targets` is 0.

    `remove` are the numbers of rows taken away, each with `seeds` models for each of `targets`
    targets of each target set, and as many with random rows taken away.
    """

    targets: int = field(default=0, metadata={"min": 0})
    remove: tuple[int, ...] = field(default=(20, 100), metadata={"not_empty": True})
    seeds: int = field(default=3, metadata={"min": 1})


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Cells run on this machine. `workers` and `memory_gb` of 0 mean all that it has."""

    kind: str = field(default="local", metadata={"choices": ("debug", "local", "slurm")})
    device: str = field(default="auto", metadata={"choices": DEVICES})
    workers: int = field(default=0, metadata={"min": 0})
    memory_gb: float = field(default=0.0, metadata={"min": 0, "below": 2**40})


@dataclass(frozen=True, kw_only=True)
class CpuJobsConfig:
    """Where jobs without a GPU go; empty: where the others go."""

    partition: str = field(default="", metadata=ONE_LINE)
    account: str = field(default="", metadata=ONE_LINE)
    qos: str = field(default="", metadata=ONE_LINE)
    constraint: str = field(default="", metadata=ONE_LINE)
    exclude: str = field(default="", metadata=ONE_LINE)


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """Cells run in Slurm jobs. The fields are documented in `conf/cluster/slurm.yaml`."""

    kind: str = field(default="slurm", metadata={"choices": ("slurm",)})
    device: str = field(default="auto", metadata={"choices": DEVICES})
    partition: str = field(default="", metadata=ONE_LINE)
    account: str = field(default="", metadata=ONE_LINE)
    qos: str = field(default="", metadata=ONE_LINE)
    constraint: str = field(default="", metadata=ONE_LINE)
    exclude: str = field(default="", metadata=ONE_LINE)
    cpu_jobs: CpuJobsConfig = CpuJobsConfig()
    gpus_per_node: int = field(default=1, metadata={"min": 0})
    cpus_per_task: int = field(default=0, metadata={"min": 0})
    memory_gb: float = field(default=0.0, metadata={"min": 0, "below": 2**40})
    time: int = field(default=60, metadata={"min": 1})
    signal_delay: int = field(default=120, metadata={"min": 1})
    minutes_per_task: int = field(default=20, metadata={"min": 1})
    rows_per_task: int = field(default=0, metadata={"min": 0})
    array_parallelism: int = field(default=0, metadata={"min": 0})
    max_attempts: int = field(default=5, metadata={"min": 1})
    setup: tuple[str, ...] = ()
    python: str = field(default="", metadata=ONE_LINE)
    sbatch: Mapping[str, Any] = field(default_factory=dict, metadata=ONE_LINE)
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class Config:
    """One invocation: a spec, and what to do with it."""

    spec: Spec
    run_dir: str
    stage: str = field(default="all", metadata={"choices": STAGES})
    targets: tuple[str, ...] = field(default=("all",), metadata={"not_empty": True})
    repair: bool = False
    accept_source: bool = False
    trust: bool = False
    watch: bool = False
    force: bool = False
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    ground_truth: GroundTruth = GroundTruth()
    counterfactuals: Counterfactuals = Counterfactuals()
    self_influence: bool = False
    cluster: ClusterConfig | SlurmConfig = ClusterConfig()
