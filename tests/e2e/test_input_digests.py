"""Rows, batches, models and files that change in the middle of a run are noticed and fixed."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from command_result import Ended
from torch import nn
from torch.utils.data import default_collate

from trak_dist import open_run, worker
from trak_dist.cells import of_stage
from trak_dist.plan import digest
from trak_dist.store.run import Run

pytestmark = pytest.mark.slow

ROWS, UNPROBED = 40, 20  # of 40 rows, those probed are 0, 3, 5, 8, …, 18, 21, …
FIRST = ["featurize/0/train/0-8", "featurize/0/train/8-16", "featurize/0/train/16-24"]


class Rows(tiny.Rows):
    """Rows of which one, that is not probed, can be changed."""

    def __init__(self, changed: bool = False) -> None:
        super().__init__(ROWS, seed=1)
        if changed:
            self.features[UNPROBED] += 1
        self._thread = threading.get_ident()

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert threading.get_ident() == self._thread
        return super().__getitem__(index)


@pytest.fixture
def run_problem(launch: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Run the tiny problem with some fields replaced, as if in a fresh process."""
    real = tiny.problem

    def run(*overrides: str, name: str = "run", **changes: object) -> Ended:
        changes = {"train": Rows(), **changes}
        monkeypatch.setattr(
            tiny, "problem", lambda directory: dataclasses.replace(real(directory), **changes)
        )
        return launch(
            "problem._target_=tiny.problem",
            f"+problem.directory={tmp_path / 'checkpoints'}",
            f"run_dir={tmp_path / name}",
            "targets=val",
            "cluster=debug",
            "proj_dim=16",
            "featurize.batch_rows=4",
            "featurize.cell_rows=8",
            *overrides,
        )

    return run


@pytest.fixture(params=[1, 3])
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> int:
    tiny.write_checkpoints(tmp_path / "checkpoints", request.param)
    return request.param


@pytest.fixture
def one(tmp_path: Path) -> None:
    tiny.write_checkpoints(tmp_path / "checkpoints", 1)


def featurize(run: Run, cells: list[str]) -> None:
    worker.run_cells(str(run.layout.run_dir), run.plan.fingerprint, "cpu", cells)


def begun(run_problem: Callable, tmp_path: Path, **changes: object) -> Run:
    """A run whose first cells are done."""
    assert run_problem("stage=plan", **changes).code == 0
    run = Run.open(tmp_path / "run")
    featurize(run, FIRST)
    assert [c.id for c in run.receipts.done(of_stage(run.plan, "featurize"))] == FIRST
    return run


def scores(path: Path) -> np.ndarray:
    return open_run(path).scores("val").view(np.uint32)


def test_changed_rows_of_done_cells_are_named_and_restored_data_resume(
    run_problem, checkpoints: int, tmp_path: Path
) -> None:
    begun(run_problem, tmp_path)
    ended = run_problem(train=Rows(changed=True))
    assert ended.code == 1
    assert (
        "1 of 3 done cells of 'train' were computed from other rows than the dataset has now: "
        "featurize/0/train/16-24 (rows 20-24)"
    ) in ended.err
    assert f"stage=verify repair=true run_dir={tmp_path / 'run'}" in ended.err
    assert run_problem().code == 0
    assert run_problem("stage=verify").code == 0
    assert run_problem(name="undisturbed").code == 0
    np.testing.assert_array_equal(scores(tmp_path / "run"), scores(tmp_path / "undisturbed"))


def test_cells_of_data_that_changed_are_revoked_by_one_command(
    run_problem, checkpoints: int, tmp_path: Path, attempts: list[str]
) -> None:
    begun(run_problem, tmp_path)
    changed = Rows(changed=True)
    assert run_problem(train=changed).code == 1
    ended = run_problem("stage=verify", "repair=true", train=changed)
    assert ended.code == 0
    assert (
        "damaged featurize/0/train/16-24: computed from other rows than 'train' has at 20-24"
        in ended.out
    )
    attempts.clear()
    assert run_problem(train=changed).code == 0
    assert FIRST[2] in attempts
    assert not {*FIRST[:2]} & {*attempts}
    assert run_problem(name="undisturbed", train=changed).code == 0
    np.testing.assert_array_equal(scores(tmp_path / "run"), scores(tmp_path / "undisturbed"))


def test_mixed_cells_that_nobody_noticed_are_revoked_with_what_was_made_of_them(
    run_problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempts: list[str]
) -> None:
    from trak_dist.stages import featurize as stage

    tiny.write_checkpoints(tmp_path / "checkpoints", 3)
    with monkeypatch.context() as blind:
        blind.setattr(stage, "check_done_rows", lambda *_: None)
        blind.setattr(stage, "check_same_inputs", lambda *_: None)
        assert run_problem("stage=plan").code == 0
        run = Run.open(tmp_path / "run")
        cells = [c.id for c in of_stage(run.plan, "featurize")]
        odd = [c for c in cells if c.startswith("featurize/1/train/16")]
        featurize(run, [c for c in cells if c not in odd])
        assert run_problem("stage=featurize", train=Rows(changed=True)).code == 0
    ended = run_problem()
    assert ended.code == 1
    assert "cells that belong together disagree on inputs_digest" in ended.err
    assert odd[0] in ended.err
    assert (
        f"stage=verify repair=true run_dir={tmp_path / 'run'} revokes all cells that" in ended.err
    )
    ended = run_problem("stage=verify", "repair=true")
    assert ended.code == 0
    for model_id in range(3):
        assert (
            f"damaged featurize/{model_id}/train/16-24: computed from other rows than" in ended.out
        )
        assert (
            f"damaged gram/{model_id}: derived from featurize/{model_id}/train/16-24" in ended.out
        )
        assert f"damaged kernel/{model_id}: derived from " in ended.out
    attempts.clear()
    assert run_problem().code == 0
    assert len([a for a in attempts if a.startswith("featurize")]) == 3
    assert run_problem("stage=verify").code == 0
    assert run_problem(name="undisturbed").code == 0
    np.testing.assert_array_equal(scores(tmp_path / "run"), scores(tmp_path / "undisturbed"))


def test_members_of_a_sweep_are_revoked_too(
    run_problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trak_dist.stages import featurize as stage

    tiny.write_checkpoints(tmp_path / "checkpoints", 2)
    swept = ("-m", "checkpoints.use=[0,1],[0],[1]")
    monkeypatch.setattr(stage, "check_done_rows", lambda *_: None)
    monkeypatch.setattr(stage, "check_same_inputs", lambda *_: None)
    assert run_problem("stage=plan").code == 0
    run = Run.open(tmp_path / "run")
    cells = [c.id for c in of_stage(run.plan, "featurize")]
    featurize(run, cells[:4])
    assert run_problem(*swept, train=Rows(changed=True)).code == 1  # the whole is mixed
    homes = {n: run.layout.sweeps / n for n in run.layout.members()}
    alone = [n for n, home in homes.items() if len(Run.open(home).plan.use) == 1]
    mixed = {n: scores(homes[n]) for n in alone}
    assert len(mixed) == 2
    assert run_problem("stage=verify", "repair=true").code == 0
    assert run_problem(*swept).code == 0
    found = {n: scores(home) for n, home in homes.items()}
    assert any((found[n] != mixed[n]).any() for n in mixed)
    assert run_problem("stage=plan", name="undisturbed").code == 0
    assert run_problem(*swept, name="undisturbed").code == 0
    for name, values in found.items():
        clean = Run.open(tmp_path / "undisturbed").layout.sweeps / name
        np.testing.assert_array_equal(values, scores(clean))


def test_another_collate_of_whole_batches_is_refused(run_problem, one, tmp_path: Path) -> None:
    def last_doubled(rows: list[Any]) -> Any:
        features, labels = default_collate(rows)
        return (
            torch.cat([features[:-1], 2 * features[-1:]]) if len(rows) > 1 else features
        ), labels

    begun(run_problem, tmp_path)
    ended = run_problem(collate=last_doubled)
    assert ended.code == 2
    assert "batches of 'train' changed since planning, though single rows did not" in ended.err


def test_a_frozen_layer_that_is_another_one_in_each_process_is_refused_by_name(
    run_problem, one, tmp_path: Path
) -> None:
    def model(scale: float) -> nn.Module:
        made = tiny.net()
        made.scale = torch.full((3,), scale)
        return made

    begun(run_problem, tmp_path, model=model(1.0))
    ended = run_problem(model=model(2.0))
    assert ended.code == 2
    assert "tiny.problem built a model that differs from the planned one: scale" in ended.err
    run = Run.open(tmp_path / "run")
    featurize(run, ["featurize/0/train/24-32"])
    (failure,) = run.receipts.failures(of_stage(run.plan, "featurize")).values()
    assert (
        "built a model that differs from the planned one: scale, which the checkpoints do not"
        in (failure.error)
    )
    assert run_problem(model=model(1.0)).code == 0


MODULE = """
import tiny
from torch import nn
class Net(nn.Sequential):
    def forward(self, x):
        return {}
"""
PROBLEM = """
import dataclasses, tiny
def problem(directory):
    from of_net import Net
    return dataclasses.replace(tiny.problem(directory), model=Net(*tiny.net()))
"""


def test_an_edited_module_is_noticed_and_accepted_only_if_it_computes_the_same(
    launch, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_problem.py").write_text(PROBLEM)

    def run(forward: str, *overrides: str) -> Ended:
        (tmp_path / "of_net.py").write_text(MODULE.format(forward))
        for name in ("of_net", "of_problem"):
            sys.modules.pop(name, None)
        target = "problem._target_=of_problem.problem"
        return launch(*tiny_run, target, "targets=val", *overrides)

    assert run("super().forward(x)", "stage=featurize").code == 0
    ended = run("super().forward(x).tanh()")
    assert ended.code == 2
    assert "the file of its module of_net has digest " in ended.err
    ended = run("super().forward(x).tanh()", "accept_source=true")
    assert ended.code == 2
    assert "the model of of_problem.problem gives another output of 2 train rows" in ended.err
    ended = run("1 * super().forward(x)", "accept_source=true")
    assert ended.code == 0, ended.err
    assert "featurize: " not in ended.out
    assert run("super().forward(x)").code == 0


def test_runs_of_earlier_versions_resume(run_problem, one, tmp_path: Path) -> None:
    run = begun(run_problem, tmp_path)
    path = run.layout.plan(0)
    plan = json.loads(path.read_text())
    for name in ("modules", "unsaved", "built"):
        del plan["source"][name]
    for split in (plan["train"], *plan["targets"]):
        del split["batch"]
    del plan["digest"]
    path.write_text(json.dumps({**plan, "digest": digest(plan)}))
    for cell in FIRST:
        (receipt,) = run.layout.run_dir.rglob(f"{cell.replace('/', '_')}.json")
        written = json.loads(receipt.read_text())
        del written["facts"]["batch_digests"]
        receipt.write_text(json.dumps(written))
    assert run_problem().code == 0
    assert Run.open(tmp_path / "run").plan.source.built == {}
    assert run_problem(name="undisturbed").code == 0
    np.testing.assert_array_equal(scores(tmp_path / "run"), scores(tmp_path / "undisturbed"))
