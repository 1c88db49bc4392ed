"""Fixtures: the command line in this process, and a small run to work on."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import tiny
import torch
from command_result import Ended, Launch
from devices import DEVICE

from trak_dist import worker
from trak_dist.cells import KINDS
from trak_dist.launch import main


def pytest_report_header() -> str:
    return f"instructions: {torch.backends.cpu.get_cpu_capability()}"


@pytest.fixture(autouse=True, scope="session")
def _what_is_planned_is_remembered_aside(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def _leave_threads_as_they_were() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _compute_as_a_cell_does(request: pytest.FixtureRequest) -> object:
    """On a GPU, where tests are marked `device`: in full float32, in an order that is fixed."""
    if DEVICE.type == "cpu" or not request.node.get_closest_marker("device"):
        yield
        return
    with worker.cell_numerics(DEVICE):
        yield


@pytest.fixture
def odd_path(tmp_path: Path) -> Path:
    """A directory whose name has a space, quotes and a newline."""
    path = tmp_path / "a dir with 'quotes' \"and\" a\nnewline"
    path.mkdir()
    return path


@pytest.fixture
def launch(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Launch:
    """`python -m trak_dist.launch` with some arguments, in this process."""

    def run(*overrides: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["trak-dist", *overrides])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capfd.readouterr()
        return Ended(code, out, err)

    return run


@pytest.fixture
def command(launch: Launch, tmp_path: Path) -> Launch:
    """A command on `tmp_path / "run"`, as if in a fresh process."""

    def run(*overrides: str) -> Ended:
        return launch(f"run_dir={tmp_path / 'run'}", "cluster=debug", *overrides)

    return run


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the cells that stages were called for."""
    called: list[str] = []
    for kind in KINDS:
        module_name, name = kind.run.split(":")
        module = importlib.import_module(module_name)
        stage = getattr(module, name)

        def noted(session, cell, stage=stage) -> object:
            called.append(cell.id)
            return stage(session, cell)

        monkeypatch.setattr(module, name, noted)
    return called


@pytest.fixture
def tiny_run(tmp_path: Path) -> list[str]:
    """Overrides that run the tiny problem with 3 checkpoints in `tmp_path / "run"`."""
    tiny.write_checkpoints(tmp_path / "checkpoints")
    return tiny_overrides(tmp_path)


def tiny_overrides(path: Path) -> list[str]:
    return [
        "problem._target_=tiny.problem",
        f"+problem.directory={path / 'checkpoints'}",
        f"run_dir={path / 'run'}",
        "cluster=debug",
        "proj_dim=16",
        "featurize.batch_rows=4",
        "featurize.cell_rows=8",
    ]
