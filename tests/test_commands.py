"""Commands that are printed to be pasted: the shell and Hydra read back the run directory."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trak_dist import commands, settings

NAMES = (
    *("a b", "a=b", "it's", 'a "b"', "$HOME", "${x}", "\\${x}", "`id`", "a,b", "{a: b}", "[1]"),
    *("a;b", "a&b", "a\\", "a\\'", "a#b", "é", "(x)", "a|b", "-m", "~root", "*", "a:b", "a@b"),
)


def read_back(command: str) -> Path:
    """The run directory that the launcher takes from a command, by way of a shell."""
    show = f"{shlex.quote(sys.executable)} -c 'import sys; print(sys.argv[-1], end=\"\")'"
    typed = command.replace("python -m trak_dist.launch", show)
    override = subprocess.run(["sh", "-c", typed], capture_output=True, text=True, check=True)
    return settings.composed_run_dir([override.stdout])


@pytest.mark.parametrize("name", NAMES)
def test_a_printed_command_names_the_run_directory_when_pasted(name: str, tmp_path: Path) -> None:
    run_dir = tmp_path / name
    assert read_back(commands.launch(run_dir, "stage=status")) == run_dir


@hypothesis_settings(deadline=None, max_examples=40)
@given(st.text(st.sampled_from("ab \\'\"${}[],:=()~#@!%?*").filter(lambda c: c != "%"), min_size=1))
def test_whatever_the_name(name: str) -> None:
    (override,) = shlex.split(commands.on(Path("/x") / name))
    assert settings.composed_run_dir([override]) == Path("/x") / name


@pytest.mark.parametrize("name", ["5", "null", "true", "???", "~root", "-m", ".5", "runs/first"])
def test_relative_names_that_hydra_would_read_otherwise(name: str) -> None:
    (override,) = shlex.split(commands.on(Path(name)))
    assert settings.composed_run_dir([override]) == Path.cwd() / name


def test_a_plain_path_stays_plain() -> None:
    assert commands.launch(Path("/runs/a-1"), "stage=plan") == (
        "python -m trak_dist.launch stage=plan run_dir=/runs/a-1"
    )
    assert commands.on(Path("first")) == f"run_dir={Path.cwd() / 'first'}"
    assert commands.on(Path("runs/first")) == "run_dir=runs/first"
