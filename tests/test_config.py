"""The configuration: all that is wrong is told at once, by path, with what would be right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from omegaconf import OmegaConf

from trak_dist.configuration.config import (
    STAGES,
    ClusterConfig,
    Config,
    ProjectionConfig,
    SlurmConfig,
    Spec,
)
from trak_dist.configuration.dotted import flatten
from trak_dist.configuration.structuring import did_you_mean, structure, unstructure
from trak_dist.configuration.validation import config_from_mapping
from trak_dist.errors import ConfigError
from trak_dist.settings import CONF

SETTINGS = (
    "accept_source, checkpoints, cluster, counterfactuals, featurize, force, ground_truth, limit, "
    "problem, proj_dim, projection, reduce, repair, run_dir, scores, self_influence, stage, store, "
    "store_dim, targets, trust, watch"
)
GOOD: dict[str, Any] = {"problem": {"_target_": "a.b", "rows": 3}, "run_dir": "runs/a"}


def faults(mapping: Mapping[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        config_from_mapping(mapping)
    first, *lines = raised.value.what.splitlines()
    assert first == "the configuration is not valid:"
    assert all(line.startswith("  ") for line in lines)
    return [line.strip() for line in lines]


def test_the_least_that_a_user_gives_is_enough() -> None:
    config = config_from_mapping(GOOD)
    assert (config.stage, config.targets, config.repair) == ("all", ("all",), False)
    assert config.spec.problem == {"_target_": "a.b", "rows": 3}
    assert config.spec.proj_dim == config.spec.store_dim == 2048
    assert config.spec.reduce.lambda_reg == 1.0


def test_every_bad_field_is_named_at_once_with_its_path() -> None:
    found = faults(
        {
            "run_dir": 7,
            "problem": "mnist",
            "proj_dim": 0,
            "limit": True,
            "stage": "everything",
            "targets": [],
            "repair": "yes",
            "zzz": 1,
            "projection": {"kind": "sparse", "sed": 1},
            "featurize": {"batch_rows": 2.5, "dtype": "float64", "params": [1]},
            "reduce": {"lambda_reg": -1, "lambda_unit": "none"},
            "store": "zstd",
            "cluster": {"worker": 2, "memory_gb": float("inf")},
        }
    )
    assert sorted(found) == sorted(
        [
            "run_dir: 7 is not of type str",
            "problem: 'mnist' is not a mapping",
            "proj_dim: 0 is not a finite number of at least 1",
            "limit: True is not of type int",
            f"stage: 'everything' is not one of {', '.join(STAGES)}",
            "targets: [] is not a name or a list of names",
            "repair: 'yes' is not of type bool",
            f"zzz: unknown; valid: {SETTINGS}",
            "projection.kind: 'sparse' is not one of sjlt, rademacher, gaussian, identity",
            "projection.sed: unknown; did you mean 'seed'?",
            "featurize.batch_rows: 2.5 is not of type int",
            "featurize.dtype: 'float64' is not one of float16, float32, int8",
            "featurize.params: [1] is not a name or a list of names",
            "reduce.lambda_reg: -1 is not a finite number of at least 0",
            "reduce.lambda_unit: 'none' is not one of mean_diagonal, absolute",
            "store: 'zstd' is not a section of settings",
            "cluster.worker: unknown; did you mean 'workers'?",
            "cluster.memory_gb: inf is not a finite number of at least 0",
        ]
    )


@pytest.mark.parametrize(
    ("name", "meant"), [("proj_dims", "proj_dim"), ("stor_dim", "store_dim"), ("targts", "targets")]
)
def test_an_unknown_setting_is_reported_with_the_nearest_valid_one(name: str, meant: str) -> None:
    assert faults({**GOOD, name: 1}) == [f"{name}: unknown; did you mean {meant!r}?"]


def test_the_name_of_an_inner_field_is_no_setting() -> None:
    (fault,) = faults({**GOOD, "spec": {"problem": {"_target_": "c.d"}}})
    assert fault.startswith("spec: unknown")


def test_settings_that_must_be_given_are_named() -> None:
    assert faults({}) == ["problem: missing", "run_dir: missing"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
def test_lambda_is_a_finite_number_that_is_not_negative(value: float) -> None:
    assert faults({**GOOD, "reduce": {"lambda_reg": value}}) == [
        f"reduce.lambda_reg: {value!r} is not a finite number of at least 0"
    ]


def test_whole_numbers_stand_for_floats_but_not_the_other_way() -> None:
    config = config_from_mapping({**GOOD, "reduce": {"lambda_reg": 2}})
    assert isinstance(config.spec.reduce.lambda_reg, float)
    assert faults({**GOOD, "proj_dim": 16.0}) == ["proj_dim: 16.0 is not of type int"]


def test_one_target_set_may_be_given_without_a_list() -> None:
    assert config_from_mapping({**GOOD, "targets": "val"}).targets == ("val",)
    assert config_from_mapping({**GOOD, "targets": ["val", "test"]}).targets == ("val", "test")


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (
            {"problem": {}},
            "problem._target_: missing; give the import path of a function returning a Problem",
        ),
        ({"proj_dim": 3, "store_dim": 16}, "proj_dim: 3 does not divide store_dim 16"),
        ({"proj_dim": 32, "store_dim": 16}, "proj_dim: 32 does not divide store_dim 16"),
        (
            {"proj_dim": 8, "store_dim": 16, "projection": {"kind": "gaussian"}},
            "store_dim: gaussian does not fold, so store_dim 16 must equal proj_dim 8",
        ),
        (
            {"featurize": {"cell_rows": 10, "batch_rows": 4}},
            "featurize.cell_rows: 10 is not a multiple of featurize.batch_rows 4",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given: dict[str, Any], fault: str) -> None:
    assert faults({**GOOD, **given}) == [fault]


def test_settings_that_do_not_go_together_are_all_reported_at_once() -> None:
    bad = {"problem": {}, "proj_dim": 3, "store_dim": 16, "featurize": {"cell_rows": 65}}
    assert [f.split(":")[0] for f in faults({**GOOD, **bad})] == [
        "problem._target_",
        "proj_dim",
        "featurize.cell_rows",
    ]


@pytest.mark.parametrize("kind", ["sjlt", "identity"])
def test_cells_hold_whole_batches_whatever_the_projection(kind: str) -> None:
    bad = {"projection": {"kind": kind}, "featurize": {"cell_rows": 10, "batch_rows": 4}}
    assert len(faults({**GOOD, **bad})) == 1


def test_dimensions_that_fold_are_accepted() -> None:
    spec = config_from_mapping({**GOOD, "proj_dim": 8, "store_dim": 16}).spec
    assert (spec.proj_dim, spec.store_dim) == (8, 16)


def test_a_spec_comes_back_from_its_own_mapping() -> None:
    spec = config_from_mapping({**GOOD, "proj_dim": 8, "store_dim": 16, "limit": 5}).spec
    assert structure(Spec, unstructure(spec), "no spec:") == spec
    with pytest.raises(ConfigError, match=r"the plan's spec is not valid:\n  limit: 'x' is not"):
        structure(Spec, {**unstructure(spec), "limit": "x"}, "the plan's spec is not valid:")


def test_the_nearest_name_is_only_offered_if_it_is_near() -> None:
    assert did_you_mean("seeed", ["seed", "kind"]) == "did you mean 'seed'?"
    assert did_you_mean("xyz", ["seed", "kind"]) == "valid: kind, seed"


def test_nested_settings_flatten_to_dotted_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}


def test_options_of_sbatch_that_the_launcher_sets_itself_are_refused() -> None:
    cluster = {"kind": "slurm", "sbatch": {"gpus_per_node": 2, "reservation": "x", "time": 3}}
    with pytest.raises(ConfigError) as raised:
        config_from_mapping({**GOOD, "cluster": cluster})
    assert str(raised.value).splitlines()[1:3] == [
        "  cluster.sbatch.gpus_per_node: the launcher sets --gpus-per-node itself",
        "  cluster.sbatch.time: the launcher sets --time itself",
    ]


def in_yaml(name: str) -> dict[str, Any]:
    found = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=False)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("cluster/local", ClusterConfig()),
        ("cluster/slurm", SlurmConfig()),
        ("projection/sjlt", ProjectionConfig()),
        ("projection/gaussian", ProjectionConfig(kind="gaussian")),
        ("projection/rademacher", ProjectionConfig(kind="rademacher")),
        ("projection/identity", ProjectionConfig(kind="identity")),
    ],
)
def test_a_group_in_yaml_has_the_defaults_of_its_dataclass(name: str, defaults: object) -> None:
    assert flatten(in_yaml(name)) == flatten(json.loads(json.dumps(unstructure(defaults))))


def test_settings_in_yaml_have_the_defaults_of_the_dataclasses() -> None:
    yaml = in_yaml("config")
    for outside in ("defaults", "hydra", "run_dir"):
        yaml.pop(outside)
    assert yaml.pop("store_dim") == "${proj_dim}"
    defaults = unstructure(Config(spec=Spec(problem={}), run_dir=""))
    defaults |= defaults.pop("spec")
    for group in ("problem", "projection", "cluster", "run_dir", "store_dim"):
        defaults.pop(group)
    assert flatten(yaml).keys() == flatten(defaults).keys()
    config = config_from_mapping({**GOOD, **yaml})
    assert config == config_from_mapping(GOOD)
    assert config == Config(spec=Spec(problem=GOOD["problem"]), run_dir=GOOD["run_dir"])
