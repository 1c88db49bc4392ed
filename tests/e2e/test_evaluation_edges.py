# ruff: noqa: F811
"""Edges of the proofs: one target, numbers named twice, figures and pictures that are gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from test_lambda_selection import Made, _quick, best, fork, given, made  # noqa: F401

from trak_dist import open_run
from trak_dist.errors import ConfigError
from trak_dist.ops import draws

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("targets=1", "targets: 1 has no interval; at least 2, or 0"),
        ("remove=[2,2]", "remove: a number of rows is named twice"),
    ],
)
def test_counterfactuals_that_tell_nothing_are_refused(
    command, tmp_path: Path, asked: str, said: str
) -> None:
    ended = command(*given(tmp_path / "run"), "targets=val", f"counterfactuals.{asked}")
    assert ended.code == 2
    assert f"  counterfactuals.{said}\n" in ended.err


def test_published_masks_are_those_the_models_were_trained_on(fork: Made, command) -> None:
    shutil.rmtree(fork.run / "sweeps")
    assert command("ground_truth.subsets=0").code == 0
    assert command("ground_truth.subsets=4", "ground_truth.alpha=0.25").code == 0
    found = np.load(fork.run / "ground_truth/masks.npy")
    for index in range(4):
        assert np.flatnonzero(found[index]).tolist() == draws.subset(index, 24, 0.25).tolist()


@pytest.mark.parametrize("way", ["halves", "top"])
def test_what_train_has_not_is_a_config_error(command, tmp_path: Path, way: str) -> None:
    small = ("targets=val", "self_influence=true")
    assert command(*given(tmp_path / "run"), *small).code == 0
    results = open_run(tmp_path / "run")
    with pytest.raises(ConfigError):
        _ = results.halves("train") if way == "halves" else results.top("train", [3])


@pytest.mark.parametrize("way", ["gone", "cut"])
def test_auto_without_the_figures_is_reported_in_words(fork: Made, command, way: str) -> None:
    file = fork.run / "report/val.json"
    if way == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-30])
    ended = command("-m", "reduce.lambda_reg=auto")
    assert ended.code == 2
    assert "the figures are gone, or not those that were written" in ended.err


def test_a_page_without_its_figures_is_reported_in_words(fork: Made, command) -> None:
    (fork.run / "report/val.json").unlink()
    (fork.run / "receipts/report/report_val.json").unlink()
    ended = command()
    assert ended.code == 1
    assert "the figures are gone, or not those that were written" in ended.err


def test_a_member_of_the_same_lambda_says_that_it_was_chosen(fork: Made, command) -> None:
    value = float(f"{best(fork.run)[0]:.3g}")
    shutil.rmtree(fork.run / "sweeps")
    assert command("-m", f"reduce.lambda_reg={value}").code == 0
    assert "λ chosen on these targets" in command("-m", "reduce.lambda_reg=auto").out


def test_a_new_member_is_reported_of_no_alpha_that_was_not_given(command, tmp_path: Path) -> None:
    assert command(*given(tmp_path / "run"), "targets=val").code == 0
    truth = ("-m", "ground_truth.subsets=3", "ground_truth.seeds=1")
    assert command(*truth, "reduce.lambda_reg=2", "ground_truth.alpha=0.3").code == 0
    ended = command(*truth, "reduce.lambda_reg=3")
    assert ended.code == 2
    assert "next:  ground_truth.alpha=0.3 and no masks, or use another run_dir" in ended.err


def test_a_deleted_picture_is_found(fork: Made, command) -> None:
    (fork.run / "report/val.lds.png").unlink()
    assert command("stage=verify").code == 1
