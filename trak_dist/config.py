"""The configuration as frozen dataclasses. Pure: no torch, no Hydra.

`Config.from_mapping` turns the nested mapping that Hydra composes into a `Config`, and reports
every bad field at once. `Spec` is the part of it that the plan freezes; the rest says how to run.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints
from unicodedata import category

from trak_dist import commands
from trak_dist.errors import ConfigError

STAGES = (
    *("all", "plan", "train", "featurize", "reduce", "evaluate", "report"),
    *("status", "verify", "cancel"),
)
DRAW_VERSION = 1  # of random streams; another one draws other numbers
PROJECTION_VERSION = 2  # of what projections make of them
CACHE_BYTES = 2**30  # what a projector may keep of its draws in memory
DEVICES = ("auto", "cpu", "cuda")
# Options of sbatch that have a setting of their own, or on which the job graph rests.
SET_BY_US = {
    *("account", "array", "constraint", "cpus-per-task", "dependency", "error", "exclude"),
    *("gpus-per-node", "job-name", "kill-on-invalid-dep", "mem", "nodes", "open-mode", "output"),
    *("parsable", "partition", "qos", "requeue", "signal", "time"),
}
MIN_SUBSETS = 3  # rankings of two agree or disagree by chance alone
GRADIENTS = ("auto", "hooks", "vmap", "loop")
COMPUTE = ("model", "bfloat16")
ONE_LINE = {"one_line": True}  # of a batch script, where another line would be a command
PROJECTIONS = ("sjlt", "rademacher", "gaussian", "identity")


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """How gradients are projected: the kind, and the seed of its draw."""

    kind: str = field(default="sjlt", metadata={"choices": PROJECTIONS})
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class FeaturizeConfig:
    """What sets the bits of grads: parameters, how computed, batches, cells, threads, storage type.

    `auto` gradients are by hooks where hooks can; the plan says which it is. `compute` is the type
    of weights, activations and gradients, that of the model or another one; `dtype` that of grads.
    `random` says what of an output that draws random numbers.
    """

    params: tuple[str, ...] = ("*",)
    gradients: str = field(default="auto", metadata={"choices": GRADIENTS})
    compute: str = field(default="model", metadata={"choices": COMPUTE})
    random: str = field(default="refused", metadata={"choices": ("refused", "by_example")})
    batch_rows: int = field(default=64, metadata={"min": 1})
    cell_rows: int = field(default=0, metadata={"min": 0})  # 0: chosen when planning
    dtype: str = field(default="float16", metadata={"choices": ("float16", "float32")})
    threads: int = field(default=1, metadata={"min": 1})


@dataclass(frozen=True, kw_only=True)
class ReduceConfig:
    """Regularisation and scale of the kernel, and the threads that set its bits."""

    lambda_reg: float = field(default=1.0, metadata={"min": 0})
    lambda_unit: str = field(
        default="mean_diagonal", metadata={"choices": ("mean_diagonal", "absolute")}
    )
    kernel_scale: str = field(default="mean_abs", metadata={"choices": ("mean_abs", "none")})
    threads: int = field(default=1, metadata={"min": 1})


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
    store: StoreConfig = StoreConfig()


@dataclass(frozen=True, kw_only=True)
class CheckpointsConfig:
    """How many checkpoints `stage=train` makes, where the problem brings none, and the ensemble.

    `use` names its checkpoints, none of them: all; `allow_missing` leaves out of it those that are
    not featurized.
    """

    train: int = field(default=5, metadata={"min": 1})
    use: tuple[int, ...] = field(default=(), metadata={"may_be_empty": True})
    allow_missing: bool = False

    @property
    def ensemble(self) -> tuple[int, ...]:
        """`use` in one order, since sums over the ensemble follow it."""
        return tuple(sorted(self.use))


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """Models retrained on random subsets, which the scores are held against; none if 0 or empty.

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
    remove: tuple[int, ...] = (20, 100)
    seeds: int = field(default=3, metadata={"min": 1})


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Cells run on this machine. `workers` and `memory_gb` of 0 mean: what it has."""

    kind: str = field(default="local", metadata={"choices": ("debug", "local", "slurm")})
    device: str = field(default="auto", metadata={"choices": DEVICES})
    workers: int = field(default=0, metadata={"min": 0})
    memory_gb: float = field(default=0.0, metadata={"min": 0, "below": 2**40})


@dataclass(frozen=True, kw_only=True)
class CpuJobsConfig:
    """Where jobs without a GPU go, if elsewhere; empty means: where the others go."""

    partition: str = field(default="", metadata=ONE_LINE)
    account: str = field(default="", metadata=ONE_LINE)
    qos: str = field(default="", metadata=ONE_LINE)
    constraint: str = field(default="", metadata=ONE_LINE)
    exclude: str = field(default="", metadata=ONE_LINE)


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """Cells run in Slurm jobs. What each field means stands in `conf/cluster/slurm.yaml`."""

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
    setup: tuple[str, ...] = field(default=(), metadata={"may_be_empty": True})
    python: str = field(default="", metadata=ONE_LINE)
    sbatch: Mapping[str, Any] = field(default_factory=dict, metadata=ONE_LINE)
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class Config:
    """One invocation: a spec, and what to do with it."""

    spec: Spec
    run_dir: str
    stage: str = field(default="all", metadata={"choices": STAGES})
    targets: tuple[str, ...] = ("all",)
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

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Config:
        """Build a `Config` from the nested mapping that Hydra composed.

        Raises
        ------
        ConfigError
            Naming every bad field, with its path, at once.
        """
        bad: list[str] = []
        spec_names = {f.name for f in fields(Spec)}
        own_names = {f.name for f in fields(cls)} - {"spec"}
        unknown = sorted(mapping.keys() - spec_names - own_names)
        bad.extend(f"  {n}: unknown; {nearest(n, spec_names | own_names)}" for n in unknown)
        spec = _build(Spec, {k: v for k, v in mapping.items() if k in spec_names}, "", bad)
        rest = {k: v for k, v in mapping.items() if k in own_names}
        config: Config = _build(cls, rest, "", bad, given={"spec": spec})
        if not bad:
            bad.extend(_cluster_checks(config.cluster))
            bad.extend(spec_checks(spec))
            bad.extend(_ground_truth_checks(config.ground_truth))
            bad.extend(
                f"  counterfactuals.remove: {count} is not a number of rows of at least 1"
                for count in config.counterfactuals.remove
                if count < 1
            )
            if len(set(config.counterfactuals.remove)) < len(config.counterfactuals.remove):
                bad.append("  counterfactuals.remove: a number of rows is named twice")
            if config.counterfactuals.targets == 1:
                bad.append("  counterfactuals.targets: 1 has no interval; at least 2, or 0")
            if config.checkpoints.allow_missing and config.stage != "reduce":
                bad.append("  checkpoints.allow_missing: only stage=reduce takes it")
        if bad:
            raise ConfigError(
                "\n".join(["the configuration is not valid:", *bad]),
                next=f"{commands.HELP} lists the keys",
            )
        return config


def cluster_from_mapping(mapping: Mapping[str, Any]) -> SlurmConfig:
    """Rebuild a `SlurmConfig` from a job's JSON."""
    return rebuilt(SlurmConfig, mapping, "the job's cluster settings are not valid:")


Section = TypeVar("Section")


def rebuilt(cls: type[Section], mapping: Mapping[str, Any], what: str) -> Section:
    """Rebuild a dataclass, and those in it, from the JSON of its `asdict`.

    Raises
    ------
    ConfigError
        `what`, and each bad field.
    """
    bad: list[str] = []
    section: Section = _build(cls, mapping, "", bad)
    if bad:
        raise ConfigError("\n".join([what, *bad]))
    return section


def refuse_other_shape(mapping: Mapping[str, Any]) -> None:
    """Raise `ConfigError` naming each setting that was taken out, and each that is no section."""
    hints = get_type_hints(Config) | get_type_hints(Spec)
    names = [name for name in hints if name != "spec"]
    bad = [f"  {name}: it can't be taken out" for name in names if name not in mapping]
    bad += [
        f"  {name}: {mapping[name]!r} is not a section of settings"
        for name in names
        if (name == "problem" or _section(hints[name], {}))
        and not isinstance(mapping.get(name, {}), Mapping)
    ]
    if bad:
        raise ConfigError(
            "\n".join(["the configuration is not valid:", *bad]),
            where="the command line",
            next=f"{commands.HELP} lists the keys; SECTION.KEY=VALUE sets one",
        )


def control_character(text: str) -> str:
    """The first character of `text` that could end a line, or is none at all; nothing if all are.

    The latter are bytes of a command line that are no UTF-8.
    """
    return next((c for c in text if category(c) in ("Cc", "Cs", "Zl", "Zp")), "")


def nearest(name: str, valid: Iterable[str]) -> str:
    """A half-sentence that names the valid key nearest to `name`, or lists all of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"


def distinct(spec: Spec) -> dict[str, Any]:
    """The dotted settings that are not at their defaults.

    Keys are made of these, so that a later version's new setting, at its default, leaves what was
    computed before it valid.
    """
    defaults = flatten(asdict(Spec(problem={})))
    return {k: v for k, v in flatten(asdict(spec)).items() if k not in defaults or v != defaults[k]}


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping to dotted keys: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _build(
    cls: type[Any],
    mapping: Mapping[str, Any],
    path: str,
    bad: list[str],
    *,
    given: Mapping[str, Any] | None = None,
) -> Any:
    hints = _hints(cls)  # type: ignore[arg-type]  # a class can be hashed
    values: dict[str, Any] = dict(given or {})
    known = {f.name: f for f in fields(cls)}
    for name, raw in mapping.items():
        if name not in known:
            bad.append(f"  {path}{name}: unknown; {nearest(name, known)}")
        elif section := _section(hints[name], raw):
            values[name] = _built(section, raw, f"{path}{name}", bad)
        elif section := _section(next(iter(get_args(hints[name])), None), raw):
            several = raw if isinstance(raw, list | tuple) else [None]
            values[name] = tuple(
                _built(section, one, f"{path}{name}.{i}", bad) for i, one in enumerate(several)
            )
        else:
            values[name] = _value(raw, hints[name], known[name].metadata, f"{path}{name}", bad)
    missing = [n for n, f in known.items() if n not in values and f.default is f.default_factory]
    bad.extend(f"  {path}{name}: missing" for name in missing)
    return None if bad else cls(**values)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _built(section: type[Any], raw: Any, path: str, bad: list[str]) -> Any:
    if isinstance(raw, Mapping):
        return _build(section, raw, f"{path}.", bad)
    bad.append(f"  {path}: {raw!r} is not a section of settings")
    return None


def _section(hint: Any, raw: Any) -> type[Any] | None:
    """The class of a section of settings; None if the field is a plain value."""
    if hint == ClusterConfig | SlurmConfig:
        slurm = isinstance(raw, Mapping) and raw.get("kind") == "slurm"
        return SlurmConfig if slurm else ClusterConfig
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


def _several(raw: Any, kind: Any, limits: Mapping[str, Any], path: str, bad: list[str]) -> Any:
    if kind == tuple[str, ...]:
        tasks = raw if isinstance(raw, list | tuple) else [raw]
        if all(isinstance(v, list | tuple) and all(type(w) is str for w in v) for v in tasks):
            return tuple(map(tuple, tasks))
        bad.append(f"  {path}: {raw!r} are not lists of names")
        return None
    what = "name" if kind is str else "number"
    several = raw if isinstance(raw, list | tuple) else (raw,)
    if all(type(v) is kind for v in several) and (several or limits.get("may_be_empty")):
        return tuple(several)
    bad.append(f"  {path}: {raw!r} is not a {what} or a list of {what}s")
    return None


def _value(raw: Any, hint: Any, limits: Mapping[str, Any], path: str, bad: list[str]) -> Any:
    if get_args(hint)[1:] == (...,):
        return _several(raw, get_args(hint)[0], limits, path, bad)
    if get_args(hint):  # Mapping[str, Any]
        if isinstance(raw, Mapping):
            for name, value in raw.items() if limits.get("one_line") else ():
                _one_line(f"{name}{value}", path, bad)
            return dict(raw)
        bad.append(f"  {path}: {raw!r} is not a mapping")
        return None
    whole = isinstance(raw, int) and not isinstance(raw, bool)
    fits = {
        int: whole,
        float: whole or isinstance(raw, float),
        bool: isinstance(raw, bool),
        str: isinstance(raw, str),
    }[hint]
    if not fits:
        bad.append(f"  {path}: {raw!r} is not of type {hint.__name__}")
    elif "choices" in limits and raw not in limits["choices"]:
        bad.append(f"  {path}: {raw!r} is not one of {', '.join(limits['choices'])}")
    elif "min" in limits and not limits["min"] <= raw < float("inf"):
        bad.append(f"  {path}: {raw!r} is not a finite number of at least {limits['min']}")
    elif whole and not -(2**64) < raw < 2**64:
        bad.append(f"  {path}: a number of {len(str(raw))} digits is too large")
    elif "below" in limits and not raw < limits["below"]:
        bad.append(f"  {path}: {raw!r} is too large")
    elif limits.get("one_line"):
        _one_line(raw, path, bad)
    return None if bad else hint(raw)


def _one_line(text: str, path: str, bad: list[str]) -> None:
    if control := control_character(text):
        bad.append(f"  {path}: the control character {control!r} would begin another line")


def _ground_truth_checks(truth: GroundTruth) -> Iterable[str]:
    if 0 < truth.subsets < MIN_SUBSETS:
        yield f"  ground_truth.subsets: {truth.subsets} are too few for a correlation"
    if truth.subsets and not 0 < truth.alpha < 1:
        yield f"  ground_truth.alpha: {truth.alpha} is not between 0 and 1"
    if bool(truth.masks) != bool(truth.margins):
        yield "  ground_truth: masks and margins belong together, one of them is missing"
    if truth.masks and truth.subsets:
        yield "  ground_truth: either subsets to train, or masks and margins of trained models"


def _cluster_checks(cluster: ClusterConfig | SlurmConfig) -> Iterable[str]:
    given = {key.replace("_", "-"): key for key in getattr(cluster, "sbatch", {})}
    for name in sorted(SET_BY_US & given.keys()):
        yield f"  cluster.sbatch.{given[name]}: the launcher sets --{name} itself"
    if isinstance(cluster, SlurmConfig) and cluster.signal_delay >= 60 * cluster.time:
        yield (
            f"  cluster.signal_delay: {cluster.signal_delay} seconds are not less than "
            f"cluster.time {cluster.time} minutes"
        )


def spec_checks(spec: Spec) -> Iterable[str]:
    """What of a spec does not go together, a line for each."""
    if not isinstance(spec.problem.get("_target_"), str):
        yield "  problem._target_: missing; give the import path of a function returning a Problem"
    if spec.projection.kind != "identity" and spec.store_dim % spec.proj_dim:
        yield f"  proj_dim: {spec.proj_dim} does not divide store_dim {spec.store_dim}"
    elif spec.projection.kind in ("rademacher", "gaussian") and spec.store_dim != spec.proj_dim:
        yield (
            f"  store_dim: {spec.projection.kind} does not fold, so store_dim {spec.store_dim} "
            f"must equal proj_dim {spec.proj_dim}"
        )
    if spec.featurize.cell_rows % spec.featurize.batch_rows:
        yield (
            f"  featurize.cell_rows: {spec.featurize.cell_rows} is not a multiple of "
            f"featurize.batch_rows {spec.featurize.batch_rows}"
        )
