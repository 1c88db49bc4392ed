"""A newer template draws reports again; verify holds page and pictures against their receipt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import tiny
import torch
from command_result import Ended, Launch

from trak_dist import Rendered
from trak_dist.cells import ReportCell, report
from trak_dist.hashing import digest_of
from trak_dist.store.run import Run

pytestmark = pytest.mark.slow

NAMES = {"val.html": "page", "val.png": "examples"}
TEMPLATES = {2: "1386839533de1a19f105131cdbc01911"}


@pytest.fixture
def run(
    launch: Launch, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ended]:
    """A command on a run of the tiny problem, whose examples are pictures."""
    real = tiny.problem

    def render(example: tuple[torch.Tensor, torch.Tensor]) -> Rendered:
        features, label = example
        return Rendered(features.view(2, 3).numpy(), str(int(label)))

    def problem(directory: str, rows: int = 20) -> object:
        return dataclasses.replace(real(directory, rows), render=render)

    monkeypatch.setattr(tiny, "problem", problem)
    return lambda *overrides: launch(*tiny_run, "targets=val", *overrides)


@pytest.fixture
def made(run, tmp_path: Path) -> dict[str, bytes]:
    """Page and picture of a run that is done."""
    ended = run()
    assert ended.code == 0, ended.err
    return contents(tmp_path)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "run/report").iterdir()}


def test_the_receipt_has_the_digests_of_page_and_pictures(made, tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run")
    (receipt,) = run.receipts.done(ReportCell.of(run.plan)).values()
    digests = {NAMES[name]: digest_of(data) for name, data in made.items()}
    assert set(made) == {"val.html", "val.png"}
    assert receipt.digests == digests


@pytest.mark.parametrize("name", ["val.html", "val.png"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_damage_of_a_report_is_found_and_drawn_again_to_the_same_bytes(
    run, made, tmp_path: Path, attempts: list[str], name: str, how: str
) -> None:
    path = tmp_path / "run/report" / name
    if how == "changed":
        path.write_bytes(made[name][:-1] + b"?")
    else:
        path.unlink()
    ended = run("stage=verify")
    assert ended.code == 1
    assert f"damaged report/val: {NAMES[name]}: digest " in ended.out
    assert run("stage=verify", "repair=true").code == 0
    assert run().code == 0
    assert attempts == ["report/val"]
    assert contents(tmp_path) == made
    assert run("stage=verify").code == 0


def test_a_newer_template_draws_the_reports_of_old_runs_again_and_nothing_else(
    run, made, attempts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "VERSION", report.VERSION + 1)
    assert '"report": {"done": 0, "total": 1' in run("stage=status").out
    assert run().code == 0
    assert attempts == ["report/val"]


def test_the_version_is_that_of_the_template() -> None:
    text = resources.files("trak_dist.stages").joinpath("report.html.j2").read_bytes()
    version = {report.VERSION: digest_of(text)}
    assert version == TEMPLATES, "the template changed: raise cells.report.VERSION, and pin it here"
