"""Every mistake that a user can make, with the words that tell of it."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from command_result import Ended

from trak_dist import machine
from trak_dist.ops.gradients import GradientSink
from trak_dist.ops.hooks import HookGradients
from trak_dist.store import atomic
from trak_dist.store.run import Run


def says(ended: Ended, code: int, *texts: str) -> None:
    assert ended.code == code, ended.err
    for text in texts:
        assert text in ended.err


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_no_checkpoint_given(launch, tiny_run, checkpoints: Path) -> None:
    shutil.rmtree(checkpoints)
    says(
        launch(*tiny_run),
        2,
        "error: no checkpoint found: the problem gives none, and no train_checkpoint to make them\n"
        "  where: problem\n"
        "  next:  see that the paths that the problem looks for exist\n",
    )


def test_checkpoint_gone(launch, tiny_run, tmp_path: Path) -> None:
    listed = tmp_path / "listed.py"
    listed.write_text(
        "import dataclasses, tiny\n"
        "def problem(directory):\n"
        "    return dataclasses.replace(tiny.problem(directory), checkpoints=['/gone/0.pt'])\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        ended = launch(*tiny_run, "problem._target_=listed.problem")
    hint = "  where: /gone/0.pt\n  next:  fix the problem's path"
    says(ended, 2, f"error: no checkpoint found\n{hint}")


def test_checkpoint_that_does_not_fit(launch, tiny_run, checkpoints: Path) -> None:
    state = tiny.state(0)
    state["0.weight"] = torch.zeros(5, 9)
    state["3.bias"] = state.pop("2.bias")
    torch.save(state, checkpoints / "1.pt")
    says(
        launch(*tiny_run),
        2,
        "error: the checkpoint does not fit the model: 0.weight has shape (5, 9), the model's "
        "(5, 6); missing 2.bias (3,); unexpected 3.bias (3,)\n"
        f"  where: {checkpoints / '1.pt'}\n",
    )


def test_pickle_where_a_state_dict_should_be(launch, tiny_run, checkpoints: Path) -> None:
    torch.save(tiny.net(), checkpoints / "1.pt")
    text = "error: a pickle instead of a state dict: it asks for torch.nn.modules"
    says(launch(*tiny_run), 2, text, str(checkpoints / "1.pt"), "save model.state_dict()")

    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (checkpoints / "touched",)

    (checkpoints / "1.pt").write_bytes(pickle.dumps(Attack()))
    says(launch(*tiny_run), 2, "it holds more than tensors, and is not loaded")
    assert not (checkpoints / "touched").exists()


def test_training_state_where_a_state_dict_should_be(launch, tiny_run, checkpoints: Path) -> None:
    torch.save({"model": tiny.state(0), "epoch": 3}, checkpoints / "1.pt")
    says(
        launch(*tiny_run),
        2,
        "error: not a state dict of named tensors: keys ['model', 'epoch']",
        "save model.state_dict() with torch.save",
    )


def test_garbage_where_a_state_dict_should_be(launch, tiny_run, checkpoints: Path) -> None:
    for content in (b"", b"hello world", b"\x80\x04garbage"):
        (checkpoints / "1.pt").write_bytes(content)
        says(launch(*tiny_run), 2, "error: ", str(checkpoints / "1.pt"), "safetensors")


def test_same_weights_under_two_ids(launch, tiny_run, checkpoints: Path) -> None:
    shutil.copy(checkpoints / "0.pt", checkpoints / "2.pt")
    says(
        launch(*tiny_run),
        2,
        "model_ids 0 and 2 have the same weights (digest ",
        "give each model_id its own checkpoint",
    )


@pytest.mark.slow
def test_other_weights_under_an_id_already_featurized(launch, tiny_run, checkpoints: Path) -> None:
    assert launch(*tiny_run, "targets=val").code == 0
    torch.save(tiny.state(7), checkpoints / "1.pt")
    says(
        launch(*tiny_run, "targets=test"),
        2,
        "model_id 1 has other weights than those it was first featurized with: digest ",
        "restore the checkpoint, or start a new run with another run_dir",
    )


def test_empty_dataset(launch, tiny_run) -> None:
    says(launch(*tiny_run, "+problem.targets=0"), 2, "error: the dataset 'val' is empty\n", "next:")


def test_dataset_that_changed_since_planning(launch, tiny_run, monkeypatch) -> None:
    assert launch(*tiny_run, "stage=plan").code == 0
    real = tiny.Rows
    monkeypatch.setattr(tiny, "Rows", lambda rows, seed: real(rows + 1, seed))
    says(
        launch(*tiny_run),
        2,
        "error: the dataset 'train' changed since planning: 50 rows with digest ",
        " then, 51 rows with digest ",
    )
    monkeypatch.setattr(tiny, "Rows", lambda rows, seed: real(rows, seed + 1))
    says(launch(*tiny_run), 2, "error: the dataset 'train' changed since planning")


def test_non_finite_gradient_names_cell_rows_and_checkpoint(launch, tiny_run, monkeypatch) -> None:
    real = tiny.Rows

    class WithNan(real):
        def __init__(self, rows: int, seed: int) -> None:
            super().__init__(rows, seed)
            if rows == 50:
                self.features[[9, 12]] = torch.nan

    monkeypatch.setattr(tiny, "Rows", WithNan)
    ended = launch(*tiny_run)
    says(
        ended,
        1,
        "featurize: 3 of 27 cells are not done",
        "non-finite gradient or out-to-loss in 2 of 8 rows of 'train': 9, 12; checkpoint 0 (",
        "where: featurize/0/train/8-16",
        "next: fix the cause, then run the same command again; finished cells are kept",
    )
    status = launch("stage=status", tiny_run[2])
    assert status.code == 1
    assert "failed featurize/0/train/8-16 on " in status.out
    assert '"featurize": {"done": 24, "total": 27, "failed": 3, ' in status.out


def test_lambda_zero_with_more_columns_than_rows_is_refused_when_planning(
    launch, tiny_run, tmp_path: Path
) -> None:
    says(
        launch(*tiny_run, "proj_dim=64", "reduce.lambda_reg=0"),
        2,
        "error: λ = 0 with proj_dim 64 > 50 train rows: XᵀX has rank 50 at most\n"
        "  next:  reduce.lambda_reg=1.0 reduce.lambda_unit=mean_diagonal, or another λ > 0\n",
    )
    assert not (tmp_path / "run").exists()


def test_singular_gram_at_lambda_zero_and_the_way_out(launch, tiny_run) -> None:
    ended = launch(*tiny_run, "proj_dim=48", "reduce.lambda_reg=0")  # some buckets stay empty
    says(
        ended,
        1,
        "XᵀX + λI is singular to working precision at λ = 0: scaled to a diagonal of ones it is ",
        "where: kernel/0",
        "next:  reduce.lambda_reg=1.0 reduce.lambda_unit=mean_diagonal, or another λ > 0",
    )
    ended = launch(*tiny_run, "proj_dim=48", "reduce.lambda_reg=1.0")
    assert ended.code == 0, ended.err
    assert "featurize: " not in ended.out, "no gradient is computed twice"


@pytest.mark.slow
def test_other_lambda_never_overwrites_scores(launch, tiny_run) -> None:
    assert launch(*tiny_run).code == 0
    says(
        launch(*tiny_run, "reduce.lambda_reg=0.5"),
        2,
        "error: the run has scores made with another proj_dim, reduce or ensemble",
    )


def test_memory_is_refused_before_anything_runs(
    launch, tiny_run, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: 2**30)
    ended = launch(*tiny_run, "proj_dim=16384", "reduce.kernel_form=primal")
    says(ended, 2, "error: a kernel cell needs 8.0 GiB, there are 1.0 GiB\n", "next:")
    assert not (tmp_path / "run").exists()


def test_a_batch_whose_activations_do_not_fit_is_refused_with_one_that_does(
    launch, tiny_run, tmp_path: Path
) -> None:
    rows = 2**24
    arguments = [*tiny_run, f"featurize.batch_rows={rows}", f"featurize.cell_rows={rows}"]
    ended = launch(*arguments, "cluster.memory_gb=0.5")
    says(ended, 2, "error: a featurize cell needs ", " GiB, there are 0.5 GiB\n")
    fits = int(re.search(r"next:  featurize.batch_rows=(\d+) would fit", ended.err)[1])
    assert 2**10 < fits < rows
    assert not (tmp_path / "run").exists()
    arguments[-2:] = [f"featurize.batch_rows={fits}", f"featurize.cell_rows={fits}"]
    assert launch(*arguments, "cluster.memory_gb=0.5", "stage=plan").code == 0


def test_unknown_keys_are_reported_all_at_once_with_the_nearest(launch, tiny_run) -> None:
    says(
        launch(*tiny_run, "proj_dmi=4", "reduce.lambda=1"),
        2,
        "error: unknown keys:\n"
        "  proj_dmi: unknown; did you mean 'proj_dim'?\n"
        "  reduce.lambda: unknown; did you mean 'reduce.lambda_reg'?\n",
    )


def test_bad_group(launch) -> None:
    says(launch("problem=mnits"), 2, "mnits", "Available options in 'problem':", "mnist")


def test_bad_values_are_reported_all_at_once(launch, tiny_run) -> None:
    says(
        launch(*tiny_run, "proj_dim=0", "featurize.dtype=float8", "reduce.lambda_reg=-1"),
        2,
        "error: the configuration is not valid:\n"
        "  proj_dim: 0 is not a finite number of at least 1\n",
        "  featurize.dtype: 'float8' is not one of float16, float32, int8\n",
        "  reduce.lambda_reg: -1 is not a finite number of at least 0",
    )


def test_run_directory_of_another_spec(launch, tiny_run) -> None:
    assert launch(*tiny_run, "stage=plan").code == 0
    says(
        launch(*tiny_run, "projection=gaussian", "featurize.dtype=float32"),
        2,
        "error: the run directory belongs to another spec:\n"
        "  featurize.dtype: 'float16' in the plan, 'float32' now\n"
        "  projection.kind: 'sjlt' in the plan, 'gaussian' now\n"
        "  where: ",
        "next:  leave these settings out to resume this run, or use another run_dir",
    )


def test_source_of_the_problem_changed(launch, tiny_run, tmp_path: Path) -> None:
    source = tmp_path / "changing.py"
    source.write_text("from tiny import problem\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert launch(*tiny_run, "problem._target_=changing.problem", "stage=plan").code == 0
        sys.modules.pop("changing")
        source.write_text("from tiny import problem  # or is it?\n")
        ended = launch(*tiny_run, "problem._target_=changing.problem")
    says(ended, 2, "error: the source of changing.problem changed since planning: digest ", " now")


def test_no_disk_space(launch, tiny_run, monkeypatch) -> None:
    monkeypatch.setattr(atomic, "free_bytes", lambda _: 1000)
    says(launch(*tiny_run), 2, "error: no disk space: the run needs ", "0 MiB are free")


def test_unwritable_directory(launch, tiny_run, tmp_path: Path) -> None:
    locked = Path("/sys/kernel") if os.geteuid() == 0 else tmp_path / "locked"
    if os.geteuid() != 0:
        locked.mkdir(mode=0o555)
    says(
        launch(*tiny_run, f"run_dir={locked / 'run'}"),
        2,
        "error: not writable: ",
        "next:  run_dir=",
    )


def test_percent_sign_in_run_dir(launch, tiny_run) -> None:
    says(
        launch(*tiny_run, "run_dir=runs/%j"),
        2,
        "error: run_dir 'runs/%j' is not usable: a path without '%'",
    )


def test_status_where_no_run_is(launch, tmp_path: Path) -> None:
    says(
        launch("stage=status", f"run_dir={tmp_path}"),
        2,
        "error: there is no run here: plan.json is missing\n",
        f"next:  python -m trak_dist.launch problem=mnist run_dir={tmp_path} begins one",
    )


def test_problem_that_can_not_be_imported(launch, tiny_run) -> None:
    says(
        launch(*tiny_run, "problem._target_=tiny.problme"),
        2,
        "error: 'tiny.problme' can't be imported: ",
        "where: problem._target_",
    )


def test_arguments_that_the_problem_does_not_take(launch, tiny_run) -> None:
    says(launch(*tiny_run, "+problem.rwos=3"), 2, "tiny.problem(directory: ", "rwos")


def test_device_that_is_not_there(launch, tiny_run, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    says(
        launch(*tiny_run, "cluster.device=cuda"),
        2,
        "error: device cuda was asked for, torch sees no CUDA device",
    )


def test_an_unexpected_error_comes_with_its_traceback(launch, tiny_run, monkeypatch) -> None:
    def broken(self: HookGradients, batch: tuple[torch.Tensor, ...], take: GradientSink) -> object:
        raise RuntimeError("out of luck")

    assert launch(*tiny_run, "stage=plan").code == 0
    monkeypatch.setattr(HookGradients, "__call__", broken)
    says(launch(*tiny_run), 1, "featurize/0/train/0-8", "Traceback", "RuntimeError: out of luck")


def test_run_files_stay_readable_after_an_error(launch, tiny_run, tmp_path: Path) -> None:
    assert launch(*tiny_run, "stage=plan").code == 0
    assert Run.open(tmp_path / "run").plan.train.rows == 50
