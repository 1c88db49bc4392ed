"""`open_run(…).query(examples)`: the tops of a target set, of examples that no run has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from command_result import Launch

from trak_dist import Problem, TRAKer, open_run, plan_run
from trak_dist.cells import FeaturizeCell, KernelCell
from trak_dist.coordinates import TRAIN
from trak_dist.errors import ConfigError, CorruptChunk, MissingInputs, UntrustedProblem
from trak_dist.interface import query
from trak_dist.store import contents
from trak_dist.store.results import Results, Top

COUNT = 6
RUNS = {
    "default": (),
    "folded": ("store_dim=32", "featurize.dtype=int8"),
    "exact": ("featurize.dtype=float32", "store.compression=zstd", "checkpoints.use=[0,2]"),
    "dual": ("reduce.kernel_form=dual", "proj_dim=64", "reduce.curvature=fisher"),
}


@pytest.fixture
def finished(launch: Launch, tiny_run: list[str], tmp_path: Path) -> Results:
    assert launch(*tiny_run).code == 0
    return open_run(tmp_path / "run")


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    files = (p for p in directory.rglob("*") if p.is_file())
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def assert_same(found: list[Top], run: Results, targets: str = "val") -> None:
    scores = run.scores(targets)
    close = 1e-6 * np.abs(scores).max()
    wanted = run.top(targets, range(scores.shape[1]), count=COUNT)
    for target, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.target == b.target == target
        for name in ("helpful", "harmful"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
            of_rows = scores[getattr(a, name), target]
            np.testing.assert_allclose(getattr(a, f"{name}_scores"), of_rows, rtol=0, atol=close)


@pytest.mark.parametrize("kind", RUNS)
def test_the_rows_of_a_target_set_have_its_tops_and_nothing_is_written(
    launch: Launch, tiny_run: list[str], tmp_path: Path, kind: str
) -> None:
    assert launch(*tiny_run, *RUNS[kind], "targets=val").code == 0
    before, run, random = (
        snapshot(tmp_path / "run"),
        open_run(tmp_path / "run"),
        torch.get_rng_state(),
    )
    rows = tiny.Rows(7, seed=2)
    assert_same(run.query(rows, count=COUNT), run)
    assert_same(run.query((rows.features, rows.labels), count=COUNT), run)
    assert snapshot(tmp_path / "run") == before
    assert torch.equal(torch.get_rng_state(), random)


def test_a_batch_is_cut_as_cells_cut_it_and_one_example_is_enough(finished: Results) -> None:
    rows = tiny.Rows(7, seed=2)
    whole = finished.query([rows[i] for i in range(7)], count=3)
    for i in (0, 6):
        (alone,) = finished.query((rows.features[i : i + 1], rows.labels[i : i + 1]), count=3)
        np.testing.assert_array_equal(alone.helpful, whole[i].helpful)


def test_a_problem_of_this_process(tmp_path: Path) -> None:
    tiny.write_checkpoints(tmp_path / "checkpoints")
    problem: Problem = tiny.problem(str(tmp_path / "checkpoints"))
    planned = plan_run(problem=problem, run_dir=tmp_path / "run", cluster="debug", proj_dim=16)
    planned.execute().raise_for_failures()
    assert_same(planned.results().query(tiny.Rows(7, seed=2), count=COUNT), planned.results())


def test_what_can_not_be_asked_is_refused(finished: Results, tmp_path: Path) -> None:
    rows = tiny.Rows(7, seed=2)
    with pytest.raises(ConfigError, match="count 0 is not at least 1"):
        finished.query(rows, count=0)
    with pytest.raises(ConfigError, match="there are no examples"):
        finished.query([])
    run = finished._run
    lost = contents.array_regions(run, next(FeaturizeCell.of_split(run.plan, 1, TRAIN)))["grads"]
    (lost.path / "c/2/0").unlink()
    with pytest.raises(CorruptChunk, match="grads of featurize/1/train/16-24 is damaged: a chunk"):
        finished.query(rows)
    run.receipts.revoke(KernelCell(2), why="for this test")
    with pytest.raises(MissingInputs, match="are not done: kernel/2"):
        finished.query(rows)


def test_a_problem_that_somebody_else_planned_is_not_executed(
    finished: Results, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    monkeypatch.setattr(query, "Session", lambda *_: pytest.fail("executed"))
    with pytest.raises(UntrustedProblem, match=r"executes tiny\.problem as you"):
        finished.query(tiny.Rows(1, seed=2))


def test_streamed_rows_have_no_problem(tmp_path: Path) -> None:
    fed = TRAKer(tiny.net(), "image_classification", 4, save_dir=tmp_path / "run", proj_dim=8)
    rows = tiny.Rows(4, seed=1)
    fed.load_checkpoint(tiny.state(0), model_id=0)
    fed.featurize((rows.features, rows.labels), num_samples=4)
    with pytest.raises(ConfigError, match="were streamed by TRAKer: it has no problem"):
        open_run(tmp_path / "run").query(rows)
