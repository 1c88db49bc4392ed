"""What a user asks for: by the command line and by keywords the same; merged with a plan once."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from test_plan import PLAN

from trak_dist import settings
from trak_dist.configuration.validation import config_from_mapping
from trak_dist.errors import ConfigError, ProblemError
from trak_dist.interface import keywords, options
from trak_dist.interface.invocation import Invocation

TARGET = PLAN.spec.problem["_target_"]


def typed(*overrides: str) -> Invocation:
    """By Hydra."""
    with initialize_config_dir(version_base="1.3", config_dir=str(options.CONF)):
        config = compose("config", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    ours = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return settings.invoked(ours, overrides)


def called(**named: Any) -> Invocation:
    return keywords.invocation(named)


def test_the_defaults_of_the_files_are_those_of_the_dataclasses() -> None:
    by_files = typed("problem=custom", "problem._target_=a.b", "run_dir=/x").merged(None)
    by_classes = called(problem="a.b", run_dir="/x").merged(None)
    assert by_files == by_classes
    assert by_classes == config_from_mapping(
        {"problem": {"_target_": "a.b"}, "run_dir": "/x", "cluster": {"kind": "local"}}
    )


@pytest.mark.parametrize(
    ("group", "name"),
    [(g, n) for g in options.IDENTITY for n in options.names(g) if n != "custom"],
)
def test_an_option_is_the_same_by_either_way(group: str, name: str) -> None:
    chosen = {"problem": "mnist", "run_dir": "/x", group: name}
    by_line, by_call = typed(*(f"{k}={v}" for k, v in chosen.items())), called(**chosen)
    assert by_line.merged(None) == by_call.merged(None)
    assert by_line.explicit == by_call.explicit


SAME = {
    ("proj_dim=8",): {"proj_dim": 8},
    ("reduce.lambda_reg=0.1",): {"reduce": {"lambda_reg": 0.1}},
    ("featurize.params=[a,b]", "limit=3"): {"featurize.params": ("a", "b"), "limit": 3},
    ("projection=sjlt", "projection.seed=4"): {"projection": "sjlt", "projection.seed": 4},
    ("cluster=slurm", "cluster.cpu_jobs.partition=p"): {
        "cluster": {"kind": "slurm", "cpu_jobs": {"partition": "p"}}
    },
    ("cluster=slurm", "+cluster.sbatch.nice=3"): {"cluster": "slurm", "cluster.sbatch.nice": 3},
    ("checkpoints.use=[0,2]", "targets=val"): {"checkpoints": {"use": [0, 2]}, "targets": "val"},
    ("problem.model=cnn",): {"problem.model": "cnn"},
}


@pytest.mark.parametrize("overrides", SAME)
@pytest.mark.parametrize("planned", [False, True])
def test_keywords_say_what_overrides_say(overrides: tuple[str, ...], planned: bool) -> None:
    by_line = typed(*overrides, "problem=mnist", "run_dir=/x")
    by_call = called(**SAME[overrides], problem="mnist", run_dir="/x")
    plan = PLAN if planned else None
    assert by_line.merged(plan) == by_call.merged(plan)


def test_what_is_not_named_comes_from_the_plan() -> None:
    invocation = called(run_dir="/x", reduce={"lambda_reg": 3})
    config = invocation.merged(PLAN)
    assert config.spec.problem == PLAN.spec.problem
    assert config.spec.proj_dim == PLAN.spec.proj_dim
    assert config.spec.reduce.lambda_reg == 3
    assert invocation.names("reduce.lambda_reg")
    assert invocation.names_in("reduce") == ["lambda_reg"]
    assert not invocation.names("proj_dim")
    assert f"proj_dim={PLAN.spec.proj_dim}" in invocation.from_plan(PLAN)
    assert not any(text.startswith("reduce.lambda_reg=") for text in invocation.from_plan(PLAN))


def test_an_invocation_stays_as_it_is() -> None:
    invocation = called(run_dir="/x")
    other = invocation.with_explicit("reduce.lambda_reg", 0.5)
    assert not invocation.names("reduce.lambda_reg")
    assert other.merged(PLAN).spec.reduce.lambda_reg == 0.5
    with pytest.raises(AttributeError):
        invocation.explicit = {}  # type: ignore[misc]


def test_what_has_to_be_named_is() -> None:
    with pytest.raises(ConfigError, match=r"not given: problem\._target_\n  where: the settings\n"):
        called(run_dir="/x").merged(None)


UNFIT = {
    "cluster: None is not a section": {"cluster": None},
    "cluster: 5 is not a section": {"cluster": 5},
    "cluster: '' is not the name of an option": {"cluster": ""},
    "cluster.kind: None is not the name of an option": {"cluster": {"kind": None}},
    "cluster.kind: 5 is not the name of an option": {"cluster": {"kind": 5}},
    "run_dir None is not usable: it must be a path\n": {"run_dir": None},
    "run_dir 3 is not usable: it must be a path\n": {"run_dir": 3},
    "run_dir 'a%b' is not usable: a path without '%'": {"run_dir": "a%b"},
    "reduce: 3 is not a section": {"reduce": 3},
    "cluster: 'slrum' is not the name of an option; did you mean 'slurm'": {"cluster": "slrum"},
    "projection: 'sjtl' is not the name": {"projection": "sjtl"},
    "problem.net: Linear can't be kept in a plan": {"problem": {"net": tiny.net()[0]}},
    "proj_dmi: unknown; did you mean 'proj_dim'": {"proj_dmi": 3},
    "reduce.lambda: unknown; did you mean 'lambda_": {"reduce": {"lambda": 3}},
    "reduse: unknown; did you mean 'reduce'": {"reduse.lambda_reg": 3},
    "proj_dim: 'many' is not of type int": {"proj_dim": "many"},
}


@pytest.mark.parametrize("what", UNFIT)
def test_keywords_that_are_unfit(what: str) -> None:
    with pytest.raises(ConfigError) as error:
        called(**{"problem": "a.b", "run_dir": "/x", **UNFIT[what]}).merged(None)
    assert what in str(error.value)


def test_several_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        called(problem="a.b", run_dir="/x", proj_dmi=3, reduce={"lambda_rge": 1}).merged(None)
    assert "proj_dmi: unknown" in str(error.value)
    assert "reduce.lambda_rge: unknown" in str(error.value)


def test_what_a_problem_may_be(tmp_path: Path) -> None:
    tiny.write_checkpoints(tmp_path, 1)
    assert keywords.problem_setting("a:b") == ("a:b", None)
    assert keywords.problem_setting(tiny.problem) == ({"_target_": "tiny.problem"}, None)
    partial = functools.partial(tiny.problem, directory="d")
    assert keywords.problem_setting(partial) == (
        {"_target_": "tiny.problem", "directory": "d"},
        None,
    )
    made = tiny.problem(str(tmp_path))
    for held in (made, lambda: made):
        assert keywords.problem_setting(held) == ({"_target_": "trak_dist.Problem"}, made)
    with pytest.raises(ProblemError, match="a problem can't be int"):
        keywords.problem_setting(3)  # type: ignore[arg-type]
