"""Command lines that Hydra, OmegaConf or their parser stumble over end in our words."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from trak_dist import commands
from trak_dist.configuration.config import SlurmConfig
from trak_dist.configuration.validation import cluster_from_mapping
from trak_dist.errors import ConfigError
from trak_dist.interface import preparation

STUMBLES = {
    "problem=0": "problem: 0 is not the name of an option\n  where: the command line\n"
    "  next:  problem=… one of causal_lm, cifar2, custom, fashion_mnist, image_folder, mnist, "
    "table, text_classification",
    "problem=[0,0]": "problem: [0,0] is not the name of an option",
    "problem=": "problem:  is not the name of an option",
    "cluster=null": "cluster: null is not the name of an option",
    "reduce=3": "reduce: 3 is not a section of settings",
    "++checkpoints=[1]": "Error merging override ++checkpoints=[1]",
    "~featurize": "featurize: it can't be removed",
    "~cluster": "cluster: it can't be removed",
    "~run_dir": "run_dir: it can't be removed",
    "projection.seed=${x}": "projection.seed: Interpolation key 'x' not found",
    "limit=${limit}": "limit: Recursive interpolation detected",
    "limit=${oc.env:NO_SUCH}": "Environment variable 'NO_SUCH' not found",
    "=3": "'=3' is not of the form key=value: it has no key",
    "hydra.verbose=3": "the configuration can't be composed: ",
    "hydra/sweeper=null": "Config group override must be a string or a list",
    f"+problem.x={'[' * 200 + ']' * 200}": "the configuration can't be composed: ",
    f"problem.x={'{a:' * 300 + '1' + '}' * 300}": "is not of the form key=value: ",
    f"limit={'9' * 400}": "limit: a number of 400 digits is too large",
    f"reduce.lambda_reg={'9' * 400}": "reduce.lambda_reg: a number of 400 digits is too large",
    "cluster.memory_gb=1e300": "cluster.memory_gb: 1e+300 is too large",
    "run_dir='~nobody-of-that-name/x'": "run_dir '~nobody-of-that-name/x' is not usable",
    "run_dir='a\nb'": "run_dir 'a\\nb' is not usable: a path without the control character '\\n'",
}
SWEPT = ("problem=0", "reduce=3", "~run_dir", "projection.seed=${x}", "hydra.verbose=3")


@pytest.mark.parametrize(
    ("stumble", "multirun"), [*((s, False) for s in STUMBLES), *((s, True) for s in SWEPT)]
)
def test_what_hydra_stumbles_over(launch, tmp_path: Path, stumble: str, multirun: bool) -> None:
    command = ["problem._target_=tiny.problem", f"run_dir={tmp_path / 'run'}", "stage=status"]
    ended = launch(*command, stumble, *["-m"] * multirun)
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    assert STUMBLES[stumble] in ended.err


def test_a_mistake_in_the_problem_is_reported_whole(launch, tiny_run, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise LookupError("of the code")

    monkeypatch.setattr(preparation, "prepare_run", broken)
    ended = launch(*tiny_run)
    assert ended.code == 1
    assert "LookupError: of the code" in ended.err


ONE_LINE = ("partition", "account", "qos", "constraint", "exclude", "python")


@pytest.mark.parametrize("control", ["\n", "\r", "\0", "\x1b", "\x85", "\u2028"])
def test_no_setting_begins_another_line_of_the_batch_script(control: str) -> None:
    text = f"x{control}#SBATCH --uid=0"
    settings: list[dict[str, object]] = [{name: text} for name in ONE_LINE]
    settings += [{"cpu_jobs": {name: text}} for name in ONE_LINE[:-1]]
    settings += [{"sbatch": {"comment": text}}, {"sbatch": {text: 1}}]
    for given in settings:
        (name,) = given
        with pytest.raises(ConfigError, match=rf"{name}.*: the control character '\\"):
            cluster_from_mapping(given)
    assert cluster_from_mapping({"setup": ["a", "b\nc"]}) == SlurmConfig(setup=("a", "b\nc"))


def test_a_control_character_on_the_command_line(launch, tiny_run) -> None:
    ended = launch(*tiny_run, "cluster=slurm", "cluster.partition='a\nrm -r x'")
    assert ended.code == 2
    assert (
        "  cluster.partition: the control character '\\n' would begin another line\n" in ended.err
    )


def printed(text: str) -> list[str]:
    """The arguments of the command that is printed as the next one."""
    (line,) = [line for line in text.splitlines() if line.startswith("next:")]
    words = shlex.split(line.removeprefix("next:"))
    assert words[:3] == ["python", "-m", "trak_dist.launch"]
    return words[3:]


def test_commands_of_a_run_with_an_odd_name_can_be_pasted(launch, tiny_run, tmp_path: Path) -> None:
    run_dir = tmp_path / 'it\'s a=${b} "run"\\'
    (on,) = shlex.split(commands.on(run_dir))
    made = launch(*[o for o in tiny_run if not o.startswith("run_dir=")], on)
    assert made.code == 0, made.err
    looked = launch(*printed(made.out))
    assert json.loads(looked.out.splitlines()[-1])["complete"]
    chunk = run_dir / "store.zarr/scores/val/c/0/0"
    chunk.write_bytes(b"")
    found = launch("stage=verify", on)
    assert found.code == 1
    repaired = launch(*printed(found.out))
    assert repaired.code == 0
    again = launch(*printed(repaired.out), "cluster=debug")
    assert again.code == 0, again.err
    assert chunk.stat().st_size > 0
