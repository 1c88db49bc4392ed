"""The Python interface: plan, look, execute, read; in this process and in others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import trak_dist
from trak_dist import PlannedRun, Progress
from trak_dist.cells import ScoreCell
from trak_dist.errors import (
    CellsFailed,
    ConfigError,
    MissingInputs,
    PlanMismatch,
    ProblemError,
)
from trak_dist.stages import reduce
from trak_dist.store.run import Run

SMALL: dict[str, Any] = {"proj_dim": 16, "featurize": {"batch_rows": 4, "cell_rows": 8}}


@pytest.fixture
def problem(tmp_path: Path) -> dict[str, str]:
    tiny.write_checkpoints(tmp_path / "checkpoints")
    return {"_target_": "tiny.problem", "directory": str(tmp_path / "checkpoints")}


@pytest.fixture
def made(problem: dict[str, str]) -> trak_dist.Problem:
    """As a notebook has it: an object that no other process can import."""
    return tiny.problem(problem["directory"])


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., PlannedRun]:
    def planned(problem: Any = None, **settings: Any) -> PlannedRun:
        settings = {"run_dir": tmp_path / "run", "cluster": "debug", **settings}
        return trak_dist.plan_run(problem=problem, **settings)

    return planned


def test_a_run_from_python_is_the_one_of_the_command_line(
    launch, tiny_run, plan, problem, tmp_path: Path, capfd
) -> None:
    seen: list[Progress] = []
    planned = plan(problem, run_dir=tmp_path / "python", **SMALL)
    outcome = planned.execute(on_progress=seen.append)
    assert capfd.readouterr() == ("", "")
    assert outcome.complete
    assert not outcome.failed
    assert outcome.stage == "report"
    outcome.raise_for_failures()
    assert launch(*tiny_run).code == 0
    by_line = Run.open(tmp_path / "run")
    assert by_line.plan == Run.open(tmp_path / "python").plan
    np.testing.assert_array_equal(
        planned.results().scores("val"), trak_dist.open_run(tmp_path / "run").scores("val")
    )
    steps = {progress.step: progress for progress in seen}
    assert list(steps) == ["featurize", "reduce 1/2", "reduce 2/2", "report"]
    assert all(last.finished and last.done == last.total for last in steps.values())
    assert steps["featurize"].total == 27
    assert (steps["featurize"].rows_per_second or 0) > 0
    assert seen[0].done == 0
    assert max(progress.running for progress in seen) == 1


def test_the_summary_says_what_is_left(plan, problem) -> None:
    planned = plan(problem, **SMALL)
    before = planned.summary
    assert (before.done, before.missing) == (0, 43)
    assert before.stages["featurize"].tasks == 27
    assert before.stages["featurize"].worker_minutes is None
    assert before.minutes is None, "nothing was measured"
    assert before.workers == 1
    assert before.store_bytes > 0
    assert before.memory_bytes["featurize"] > 0
    plan(stage="featurize").execute().raise_for_failures()
    after = plan().summary
    assert after.stages["featurize"].worker_minutes == 0
    assert (after.done, after.missing) == (27, 16)
    assert "featurize       27        0" in str(after)
    assert plan(stage="reduce").summary.missing == 14
    plan(stage="reduce").execute().raise_for_failures()
    receipts = Run.open(planned.run_dir).receipts
    (cell, *_) = ScoreCell.of_targets(Run.open(planned.run_dir).plan, "val")
    receipts.revoke(cell, why="for the test")
    minutes = plan(stage="reduce").summary.minutes
    assert minutes is not None
    assert 0 < minutes < 1


def test_an_object_is_planned_executed_and_resumed(plan, made, tmp_path: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    made.model.train()
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    plan(made, stage="featurize", **SMALL).execute().raise_for_failures()
    again = plan(made)
    assert (again.summary.done, again.summary.missing) == (27, 16)
    again.execute().raise_for_failures()
    assert again.status().complete
    assert made.model.training, "the user's own model is left as it was"
    for name, tensor in made.model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    by_path = plan(
        {"_target_": "tiny.problem", "directory": str(tmp_path / "checkpoints")},
        run_dir=tmp_path / "by path",
        **SMALL,
    )
    by_path.execute().raise_for_failures()
    np.testing.assert_array_equal(again.results().scores("val"), by_path.results().scores("val"))


def test_a_run_of_an_object_needs_it_and_no_other(plan, launch, made, problem, tmp_path) -> None:
    plan(made, stage="plan", **SMALL)
    with pytest.raises(ProblemError, match="an object of the Python process that planned it"):
        plan()
    with pytest.raises(PlanMismatch, match=r"problem._target_: 'trak_dist.Problem' in the plan"):
        plan(problem)
    other = tiny.problem(problem["directory"], rows=49)
    with pytest.raises(trak_dist.errors.DatasetError):
        plan(other)
    run_dir = f"run_dir={tmp_path / 'run'}"
    ended = launch(run_dir, "cluster=debug")
    assert ended.code == 2
    assert "an object of the Python process that planned it" in ended.err
    assert launch(run_dir, "stage=status").code == 0


def test_the_next_call_for_a_run_of_an_object_has_it(plan, made, tmp_path: Path) -> None:
    planned = plan(made, stage="reduce", **SMALL)
    call = f"trak_dist.plan_run(problem=…, run_dir='{tmp_path / 'run'}'"
    with pytest.raises(MissingInputs) as error:
        planned.execute()
    assert error.value.next == f"{call}, stage='featurize').execute()"
    with pytest.raises(MissingInputs) as error:
        planned.results().scores("val")
    assert error.value.next == f"{call}).execute()"
    with pytest.raises(MissingInputs) as error:
        planned.results().evaluation("val")
    settings = "**{'ground_truth.subsets': 100}, **{'ground_truth.seeds': 3}"
    assert error.value.next == f"{call}, {settings}).execute()"


def test_an_object_is_for_this_process_only(plan, made) -> None:
    for cluster in ("local", "slurm"):
        with pytest.raises(ConfigError, match="can't import the problem: it is an object"):
            plan(made, cluster=cluster, **SMALL)


@pytest.mark.slow
def test_local_workers_import_what_a_path_names(plan, problem, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(tiny.__file__).parent))
    seen: list[Progress] = []
    arguments = {"problem.directory": problem["directory"]}
    planned = plan("tiny:problem", cluster="local", stage="featurize", **SMALL, **arguments)
    assert planned.execute(on_progress=seen.append).complete
    assert (seen[-1].done, seen[-1].finished) == (27, True)
    workers = planned.summary.workers
    assert workers
    assert 1 <= max(progress.running for progress in seen) <= workers


def test_a_failed_cell_is_in_the_outcome(plan, problem, monkeypatch, capfd) -> None:
    works = reduce.gram

    def fails(session: Any, cell: Any) -> Any:
        if cell.model_id == 1:
            raise ValueError("bad luck")
        return works(session, cell)

    monkeypatch.setattr(reduce, "gram", fails)
    seen: list[Progress] = []
    outcome = plan(problem, **SMALL).execute(on_progress=seen.append)
    assert not outcome.complete
    assert (outcome.stage, outcome.cells) == ("reduce", 12)
    (cell,) = outcome.failed
    assert cell.id == "gram/1"
    assert outcome.failed[cell].error == "ValueError: bad luck"
    assert {cell.id for cell in outcome.not_run} == {
        *("kernel/1", "precondition/1/val", "precondition/1/test")
    }
    assert (seen[-1].done, seen[-1].failed, seen[-1].finished) == (8, 1, True)
    with pytest.raises(CellsFailed, match=r"gram/1 \(4 of 12 cells .*\): ValueError: bad luck"):
        outcome.raise_for_failures()
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(reduce, "gram", works)
    assert plan().execute().complete


def test_a_stage_whose_inputs_are_missing(plan, problem) -> None:
    with pytest.raises(MissingInputs, match="stage=reduce needs featurize"):
        plan(problem, stage="reduce", **SMALL).execute()


@pytest.mark.parametrize("cluster", ["debug", "slurm"])
def test_nothing_is_executed_of_a_plan(plan, problem, cluster: str) -> None:
    planned = plan(problem, stage="plan", cluster=cluster, **SMALL)
    outcome = planned.execute(wait=True)
    assert (outcome.stage, outcome.cells, outcome.submission) == ("plan", 0, None)
    assert outcome.complete
    assert not planned.status().complete


def test_settings_that_are_not_those_of_the_run(plan, problem) -> None:
    plan(problem, stage="plan", **SMALL)
    with pytest.raises(PlanMismatch, match=r"featurize.dtype: 'float16' in the plan"):
        plan(**{"featurize.dtype": "float32"})
    with pytest.raises(ConfigError, match="stage='status' plans nothing"):
        plan(stage="status")


def test_notes_are_returned_and_called_back(plan, problem) -> None:
    notes: list[str] = []
    first = plan(problem, stage="plan", on_note=notes.append, **SMALL)
    again = plan(stage="plan", on_note=notes.append)
    assert notes == [*first.notes, *again.notes]
    assert any(note.startswith("from the plan: ") for note in again.notes)


@pytest.mark.slow
def test_a_member_of_a_sweep(plan, problem, tmp_path: Path) -> None:
    plan(problem, **SMALL).execute().raise_for_failures()
    with pytest.raises(PlanMismatch, match="the run has scores made with another"):
        plan(reduce={"lambda_reg": 0.5})
    member = plan(sweep=True, reduce={"lambda_reg": 0.5})
    assert member.run_dir.parent == tmp_path / "run/sweeps"
    assert member.summary.stages["featurize"].missing == 0
    member.execute().raise_for_failures()
    assert member.results().plan.spec.reduce.lambda_reg == 0.5


def test_neither_hydra_nor_torch_is_loaded_by_what_does_not_need_it(tmp_path: Path) -> None:
    code = (
        "import sys, trak_dist\n"
        "try: trak_dist.plan_run(problem='a:b', run_dir='run', proj_dmi=3)\n"
        "except trak_dist.errors.ConfigError as error: print(error)\n"
        "print({'hydra', 'torch', 'submitit', 'rich'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "did you mean 'proj_dim'?" in ended.stdout
    assert ended.stdout.endswith("set()\n")
