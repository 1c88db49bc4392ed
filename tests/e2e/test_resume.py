"""Killed and damaged runs end with the scores of one that nothing happened to."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from killing import Killed, kill_at

from trak_dist import launch as launcher
from trak_dist import open_run, worker
from trak_dist.cells import ScoreCell, of_stage, parse_cell
from trak_dist.cells.featurize import of_checkpoint
from trak_dist.status.verify import damaged_cells
from trak_dist.store import arrays, contents
from trak_dist.store.receipts import Receipts
from trak_dist.store.run import Run

pytestmark = pytest.mark.slow

TESTS = Path(tiny.__file__).parent
STAGES = ("featurize", "reduce", "report")


def spec(directory: Path, run_dir: Path) -> list[str]:
    return [
        "problem._target_=tiny.problem",
        f"+problem.directory={directory}",
        "+problem.rows=20",
        f"run_dir={run_dir}",
        "proj_dim=16",
        "featurize.batch_rows=4",
        "featurize.cell_rows=8",
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of two checkpoints and the target set `val` as it is after each stage, undisturbed."""
    root = tmp_path_factory.mktemp("made")
    tiny.write_checkpoints(root / "checkpoints", 2)
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("plan", *STAGES):
            given = [*spec(root / "checkpoints", root / "run"), "targets=val", f"stage={stage}"]
            given.append("cluster=debug")
            patch.setattr("sys.argv", ["trak-dist", *given])
            launcher.main()
            runs[stage] = shutil.copytree(root / "run", root / stage)
    return runs


@pytest.fixture
def command(launch: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The command line, as if in a fresh process: nothing is left in memory."""

    def run(*overrides: str) -> object:
        where = [] if any(o.startswith("cluster=") for o in overrides) else ["cluster=debug"]
        return launch(*overrides, *where)

    return run


def fork(template: Path, run_dir: Path) -> Run:
    return Run.open(shutil.copytree(template, run_dir))


def cell_ids(run: Run) -> list[str]:
    return [c.id for stage in STAGES for c in of_stage(run.plan, stage)]


def missing(run: Run) -> list[str]:
    done = {c.id for stage in STAGES for c in run.receipts.done(of_stage(run.plan, stage))}
    return [i for i in cell_ids(run) if i not in done]


def scores(run_dir: Path, targets: str = "val") -> np.ndarray:
    """The scores as bits, so that equal means equal to the last one."""
    found = open_run(run_dir).scores(targets)
    assert np.isfinite(found).all()
    assert len(np.unique(found)) > found.size / 2
    return found.view(np.uint32)


def job(run: Run, cells: list[str]) -> None:
    worker.run_cells(str(run.layout.run_dir), run.plan.fingerprint, "cpu", cells)


STEPS = (
    *((os, "fsync"), (os, "link"), (Path, "replace"), (Path, "unlink")),
    *((arrays, "write_rows"), (Receipts, "publish")),
)
CHAIN = ["featurize/0/train/0-8", "gram/1", "kernel/1", "precondition/1/val", "score/val/0-20"]


@pytest.mark.parametrize("cell_id", CHAIN)
def test_a_cell_killed_at_any_step_is_not_done_or_whole_and_is_repaired_bit_for_bit(
    made, tmp_path: Path, attempts: list[str], cell_id: str
) -> None:
    before = fork(made["plan" if cell_id.startswith("featurize") else "featurize"], tmp_path / "0")
    job(before, list(itertools.takewhile(lambda i: i != cell_id, missing(before))))
    cell = parse_cell(cell_id)
    expected = Run.open(made["report"]).receipts.done([cell])[cell].digests
    for at in itertools.count(1):
        run = fork(tmp_path / "0", tmp_path / str(at))
        attempts.clear()
        with pytest.MonkeyPatch.context() as patch:
            steps = kill_at(patch, at, *STEPS)
            try:
                job(run, [cell_id])
            except Killed:
                pass
            else:
                break
        # A checkpoint is loaded, and its digest published, before featurize begins.
        assert attempts == [cell_id] or (cell_id.startswith("featurize") and not attempts)
        begun, done = len(attempts), bool(run.receipts.done([cell]))
        assert missing(run) == [i for i in missing(before) if i != cell_id or not done], steps
        job(run, [cell_id])
        assert attempts == [cell_id] * (begun if done else begun + 1), steps
        assert run.receipts.done([cell])[cell].digests == expected, steps
        assert list(contents.damages(run, cell, run.receipts.done([cell])[cell])) == [], steps
    assert at > 8
    assert "publish" in steps


@pytest.mark.parametrize(
    "death",
    [(contents, "write", 3), (Receipts, "publish", 6), (Receipts, "consolidate", 2)],
    ids=lambda death: f"{death[1]}-{death[2]}",
)
def test_a_killed_run_is_finished_by_the_same_command_and_scores_are_identical(
    made, tmp_path: Path, command, attempts: list[str], death: tuple
) -> None:
    owner, name, at = death
    run = fork(made["plan"], tmp_path / "run")
    calls, do = itertools.count(1), getattr(owner, name)

    def deadly(*args, **kwargs) -> object:
        if next(calls) == at:
            raise Killed
        return do(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, deadly)
        with pytest.raises(Killed):
            command(f"run_dir={tmp_path / 'run'}")
    left = missing(run)
    assert 0 < len(left) < len(cell_ids(run))
    attempts.clear()
    assert command(f"run_dir={tmp_path / 'run'}").code == 0
    assert sorted(attempts) == sorted(left)
    np.testing.assert_array_equal(scores(tmp_path / "run"), scores(made["report"]))


def test_a_cell_that_fails_leaves_the_others_to_run_and_is_all_that_runs_again(
    made, tmp_path: Path, command, attempts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fork(made["plan"], tmp_path / "run")
    bad = "featurize/0/train/8-16"

    def write(run, cell, values, do=contents.write) -> dict[str, str]:
        if cell.id == bad and attempts.count(bad) == 1:
            raise RuntimeError("this once")
        return do(run, cell, values)

    monkeypatch.setattr(contents, "write", write)
    ended = command("stage=featurize", f"run_dir={tmp_path / 'run'}")
    assert ended.code == 1
    assert bad in ended.err
    assert "RuntimeError: this once" in ended.err
    assert [i for i in missing(run) if i.startswith("featurize")] == [bad]
    command(f"run_dir={tmp_path / 'run'}")
    assert attempts.count(bad) == 2
    assert len(attempts) == len(cell_ids(run)) + 1
    assert run.receipts.done([parse_cell(bad)])[parse_cell(bad)].job["attempt"] == 2
    np.testing.assert_array_equal(scores(tmp_path / "run"), scores(made["report"]))


def test_debug_and_local_give_the_same_scores_to_the_last_bit(
    made, tmp_path: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fork(made["plan"], tmp_path / "run")
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    where = [f"run_dir={tmp_path / 'run'}", "cluster=local", "cluster.workers=2"]
    for stage in ("featurize", "reduce"):
        ended = command(f"stage={stage}", *where, "cluster.device=cpu")
        assert ended.code == 0, ended.err
    hosts = {r.job["pid"] for r in open_run(tmp_path / "run").receipts("featurize").values()}
    assert len(hosts) == 2
    assert os.getpid() not in hosts
    assert missing(run) == ["report/val"]
    np.testing.assert_array_equal(scores(tmp_path / "run"), scores(made["report"]))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("cell_id", "file", "damage"),
    [
        ("featurize/1/train/8-16", "grads/c/1/0", flip),
        ("featurize/1/train/8-16", "grads/c/1/0", Path.unlink),
        ("gram/0", "gram/c/0/0", flip),
        ("score/val/0-20", "scores/c/0/0", flip),
        ("score/val/0-20", "scores/c/0/0", Path.unlink),
    ],
)
def test_damage_is_found_named_and_repaired_to_the_same_bits(  # noqa: PLR0917
    made, tmp_path: Path, command, attempts, cell_id: str, file: str, damage: Callable
) -> None:
    run = fork(made["report"], tmp_path / "run")
    array, chunk = file.split("/", maxsplit=1)
    damage(contents.array_regions(run, parse_cell(cell_id))[array].path / chunk)
    where = f"run_dir={tmp_path / 'run'}"
    found = command("stage=verify", where)
    assert found.code == 1
    named = [line for line in found.out.splitlines() if line.startswith("damaged")]
    assert len(named) == 1
    assert named[0].startswith(f"damaged {cell_id}: {array}: ")
    assert missing(run) == []
    assert command("stage=verify", "repair=true", where).code == 0
    assert missing(run) == [cell_id]
    assert command(where).code == 0
    assert attempts == [cell_id]
    assert list(damaged_cells(run)) == []
    np.testing.assert_array_equal(scores(tmp_path / "run"), scores(made["report"]))


def grads_of(run: Run) -> Path:
    """The group of the train grads of checkpoint 1."""
    return run.layout.store / of_checkpoint(run.plan, 1) / "train"


@pytest.mark.parametrize("file", ["grads/c/1/0", "row_scale/c/1"])
def test_a_chunk_lost_since_its_receipt_fails_the_reduce_which_names_its_cell(
    made, tmp_path: Path, command, file: str
) -> None:
    run = fork(made["featurize"], tmp_path / "run")
    (grads_of(run) / file).unlink()
    ended = command("stage=reduce", f"run_dir={tmp_path / 'run'}")
    assert ended.code == 1
    assert "featurize/1/train/8-16" in ended.err


def test_a_lost_chunk_of_int8_grads_is_found_and_made_again(
    tmp_path: Path, command, tiny_run: list[str], attempts: list[str]
) -> None:
    asked = (*tiny_run, "targets=val", "featurize.dtype=int8")
    assert command(*asked).code == 0
    run, before = Run.open(tmp_path / "run"), scores(tmp_path / "run")
    (grads_of(run) / "grads/c/1/0").unlink()
    for cell in run.receipts.done(ScoreCell.of(run.plan)):
        run.receipts.revoke(cell, why="so that they are read")
    ended = command(*asked)
    assert ended.code == 1
    assert "grads of featurize/1/train/8-16 is damaged: a chunk is missing" in ended.err
    found = command("stage=verify", "repair=true", f"run_dir={tmp_path / 'run'}").out
    assert "damaged featurize/1/train/8-16: grads: a chunk is missing" in found
    attempts.clear()
    assert command(*asked).code == 0
    assert "featurize/1/train/8-16" in attempts
    np.testing.assert_array_equal(scores(tmp_path / "run"), before)


def test_a_lost_chunk_of_out_to_loss_is_not_scored_as_nan(made, tmp_path: Path, command) -> None:
    run = fork(made["featurize"], tmp_path / "run")
    (grads_of(run) / "out_to_loss" / "c" / "1").unlink()
    ended = command("stage=reduce", f"run_dir={tmp_path / 'run'}")
    assert run.receipts.done(ScoreCell.of(run.plan)) == {}
    assert ended.code == 1
