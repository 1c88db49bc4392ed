"""A valid `Config` from the mapping that Hydra composed, or every bad setting of it at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from trak_dist import commands
from trak_dist.configuration.config import (
    MIN_SUBSETS,
    RESERVED_SBATCH_OPTIONS,
    ClusterConfig,
    Config,
    Counterfactuals,
    GroundTruth,
    SlurmConfig,
    Spec,
)
from trak_dist.configuration.structuring import attempt, converter, did_you_mean, structure
from trak_dist.errors import ConfigError

_INVALID = "the configuration is not valid:"
_HELP = f"{commands.HELP} lists the keys"
_SPEC = {field.name: field for field in fields(Spec)}
_INVOCATION = {field.name: field for field in fields(Config) if field.name != "spec"}


def config_from_mapping(mapping: Mapping[str, Any]) -> Config:
    """Build a `Config` from the nested mapping that Hydra composed.

    Raises
    ------
    ConfigError
        Naming every bad field, with its path, at once.
    """
    valid = {*_SPEC, *_INVOCATION}
    unknown = [f"{n}: unknown; {did_you_mean(n, valid)}" for n in sorted(mapping.keys() - valid)]
    spec = {name: value for name, value in mapping.items() if name in _SPEC}
    rest = {name: value for name, value in mapping.items() if name in _INVOCATION}
    config, bad = attempt(Config, {"spec": spec, **rest})
    bad = [*unknown, *(line.removeprefix("spec.") for line in bad)]
    if config is not None and not bad:
        bad = [*_conflicts(config)]
    if config is None or bad:
        raise ConfigError("\n  ".join([_INVALID, *bad]), next=_HELP)
    return config


def cluster_from_mapping(mapping: Mapping[str, Any]) -> SlurmConfig:
    """Rebuild a `SlurmConfig` from a job's JSON."""
    return structure(SlurmConfig, mapping, "the job's cluster settings are not valid:")


def check_sections(mapping: Mapping[str, Any]) -> None:
    """Raise `ConfigError` naming each setting that was removed, and each that is not a section."""
    settings = _INVOCATION | _SPEC
    bad = [f"{name}: it can't be removed" for name in settings if name not in mapping]
    bad += [
        f"{name}: {mapping[name]!r} is not a section of settings"
        for name, field in settings.items()
        if (name == "problem" or is_dataclass(field.default))
        and not isinstance(mapping.get(name, {}), Mapping)
    ]
    if bad:
        raise ConfigError(
            "\n  ".join([_INVALID, *bad]),
            where="the command line",
            next=f"{_HELP}; SECTION.KEY=VALUE sets one",
        )


def spec_conflicts(spec: Spec) -> Iterator[str]:
    """What is inconsistent in a spec, a line for each."""
    if not isinstance(spec.problem.get("_target_"), str):
        yield "problem._target_: missing; give the import path of a function returning a Problem"
    if spec.projection.kind != "identity" and spec.store_dim % spec.proj_dim:
        yield f"proj_dim: {spec.proj_dim} does not divide store_dim {spec.store_dim}"
    elif spec.projection.kind in ("rademacher", "gaussian") and spec.store_dim != spec.proj_dim:
        yield (
            f"store_dim: {spec.projection.kind} does not fold, so store_dim {spec.store_dim} "
            f"must equal proj_dim {spec.proj_dim}"
        )
    if spec.featurize.cell_rows % spec.featurize.batch_rows:
        yield (
            f"featurize.cell_rows: {spec.featurize.cell_rows} is not a multiple of "
            f"featurize.batch_rows {spec.featurize.batch_rows}"
        )


def _conflicts(config: Config) -> Iterator[str]:
    yield from _of_cluster(config.cluster)
    yield from spec_conflicts(config.spec)
    yield from _of_ground_truth(config.ground_truth)
    yield from _of_counterfactuals(config.counterfactuals)
    if config.checkpoints.allow_missing and config.stage != "reduce":
        yield "checkpoints.allow_missing: only stage=reduce takes it"


def _of_cluster(cluster: ClusterConfig | SlurmConfig) -> Iterator[str]:
    if not isinstance(cluster, SlurmConfig):
        return
    options = {str(key).replace("_", "-"): key for key in cluster.sbatch}
    for name in sorted(RESERVED_SBATCH_OPTIONS & options.keys()):
        yield f"cluster.sbatch.{options[name]}: the launcher sets --{name} itself"
    if cluster.signal_delay >= 60 * cluster.time:
        yield (
            f"cluster.signal_delay: {cluster.signal_delay} seconds are not less than "
            f"cluster.time {cluster.time} minutes"
        )


def _of_ground_truth(truth: GroundTruth) -> Iterator[str]:
    if 0 < truth.subsets < MIN_SUBSETS:
        yield f"ground_truth.subsets: {truth.subsets} are too few for a correlation"
    if truth.subsets and not 0 < truth.alpha < 1:
        yield f"ground_truth.alpha: {truth.alpha} is not between 0 and 1"
    if bool(truth.masks) != bool(truth.margins):
        yield "ground_truth: masks and margins belong together, one of them is missing"
    if truth.masks and truth.subsets:
        yield "ground_truth: either subsets to train, or masks and margins of trained models"


def _of_counterfactuals(without: Counterfactuals) -> Iterator[str]:
    for count in without.remove:
        if count < 1:
            yield f"counterfactuals.remove: {count} is not a number of rows of at least 1"
    if len(set(without.remove)) < len(without.remove):
        yield "counterfactuals.remove: a number of rows is named twice"
    if without.targets == 1:
        yield "counterfactuals.targets: 1 has no interval; at least 2, or 0"


def _cluster(raw: Any, _: Any) -> ClusterConfig | SlurmConfig:
    if isinstance(raw, Mapping) and raw.get("kind") == "slurm":
        return converter.structure(raw, SlurmConfig)
    return converter.structure(raw, ClusterConfig)


converter.register_structure_hook(ClusterConfig | SlurmConfig, _cluster)
