"""The plan holds what its checkpoints held: a file that is another one later is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from command_result import Ended

from trak_dist import worker
from trak_dist.cells import FeaturizeCell
from trak_dist.checkpoints.digests import content_digest
from trak_dist.plan import Plan, digest
from trak_dist.store.run import Run

DIGESTS = [content_digest(tiny.state(seed)) for seed in range(3)]


@pytest.fixture
def directory(tiny_run: list[str], tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def opened(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "run")


def swap(directory: Path) -> None:
    shutil.copy(directory / "0.pt", directory / "kept")
    shutil.copy(directory / "1.pt", directory / "0.pt")
    shutil.copy(directory / "kept", directory / "1.pt")


def told(now: str, then: str, path: Path) -> str:
    return (
        f"model_id 0 has other weights than those it was planned with: digest {now} now, {then} "
        f"then\n  where: {path}\n  next:  restore the checkpoint, or start a new run with another "
        "run_dir"
    )


def forget_digests(run: Run) -> Plan:
    """The plan as a version wrote it that did not keep digests; its file is replaced."""
    content = json.loads(run.layout.plan(run.generation).read_text())
    assert content.pop("digest")
    for checkpoint in content["checkpoints"]:
        del checkpoint["digest"]
    text = json.dumps({**content, "digest": digest(content)}, indent=1)
    run.layout.plan(run.generation).write_text(text)
    return Run.open(run.layout.run_dir).plan


def test_checkpoints_swapped_after_planning_are_refused_by_launcher_and_worker(
    launch, tiny_run, tmp_path: Path, directory: Path
) -> None:
    assert launch(*tiny_run, "stage=plan").code == 0
    run = opened(tmp_path)
    assert [c.digest for c in run.plan.checkpoints] == DIGESTS
    swap(directory)
    ended: Ended = launch(*tiny_run)
    assert (ended.code, told(DIGESTS[1], DIGESTS[0], directory / "0.pt") in ended.err) == (2, True)

    cell = next(FeaturizeCell.of(run.plan))
    assert not worker.run_cells(str(tmp_path / "run"), run.plan.fingerprint, "cpu", [cell.id])
    failure = run.receipts.failure(cell)
    assert failure is not None
    assert failure.error == told(DIGESTS[1], DIGESTS[0], directory / "0.pt")
    assert not run.layout.checkpoint_digest(0).exists(), "the wrong digest is not published"

    swap(directory)
    assert launch(*tiny_run, "stage=featurize").code == 0
    assert Run.open(tmp_path / "run").plan == run.plan


def test_a_checkpoint_replaced_before_a_resumed_launch_is_refused(
    launch, tiny_run, tmp_path: Path, directory: Path
) -> None:
    assert launch(*tiny_run, "stage=plan").code == 0
    run = opened(tmp_path)
    cells = list(FeaturizeCell.of_split(run.plan, 2, "train"))
    assert worker.run_cells(
        str(tmp_path / "run"), run.plan.fingerprint, "cpu", [c.id for c in cells]
    )
    torch.save(tiny.state(9), directory / "0.pt")
    now = content_digest(tiny.state(9))
    ended = launch(*tiny_run)
    assert (ended.code, told(now, DIGESTS[0], directory / "0.pt") in ended.err) == (2, True)


def test_a_plan_without_digests_resumes_and_gets_those_of_which_nothing_is_known(
    launch, tiny_run, tmp_path: Path
) -> None:
    assert launch(*tiny_run, "stage=plan", "checkpoints.use=[0,2]").code == 0
    run = opened(tmp_path)
    assert [c.digest for c in run.plan.checkpoints] == [DIGESTS[0], None, DIGESTS[2]]
    assert launch(*tiny_run, "stage=plan", "checkpoints.use=[0,1,2]").code == 0
    run = opened(tmp_path)
    assert [c.digest for c in run.plan.checkpoints] == DIGESTS, "read now"

    without = forget_digests(run)
    assert [c.digest for c in without.checkpoints] == [None, None, None]
    cells = list(FeaturizeCell.of(run.plan))
    assert [c.key(without) for c in cells] == [c.key(run.plan) for c in cells]
    assert without.fingerprint == run.plan.fingerprint
    of_one = [c.id for c in cells if c.model_id == 1]
    worker.run_cells(str(tmp_path / "run"), without.fingerprint, "cpu", of_one)
    assert launch(*tiny_run, "stage=plan").code == 0
    now = opened(tmp_path).plan
    assert [c.digest for c in now.checkpoints] == [DIGESTS[0], None, DIGESTS[2]]
    assert replace(now, checkpoints=without.checkpoints) == without
    assert launch(*tiny_run).code == 0
    assert opened(tmp_path).plan == now

    finished = forget_digests(opened(tmp_path))
    assert launch(*tiny_run).code == 0
    assert opened(tmp_path).plan == finished, "known by the first worker: the plan stays"
