"""Folders that a training wrote, named as checkpoints: what is in them, in order of its steps."""

from __future__ import annotations

from pathlib import Path

import lightning
import pytest
import safetensors.torch
import tiny
import torch
import transformers
from command_result import Launch

from trak_dist import open_run
from trak_dist.checkpoints import folders, state_dicts
from trak_dist.errors import CheckpointError


def saved(path: Path, seed: int = 0) -> None:
    path.mkdir(parents=True)
    safetensors.torch.save_file(tiny.state(seed), path / "model.safetensors")


def expanded(*paths: Path) -> tuple[list[Path], list[str]]:
    notes: list[str] = []
    return folders.expanded(paths, notes.append), notes


def test_a_trainers_folder_is_its_checkpoints_by_number(tmp_path: Path) -> None:
    for step in (1000, 500, 90, 10000):
        saved(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "runs").mkdir()
    steps = [tmp_path / f"checkpoint-{step}" for step in (90, 500, 1000, 10000)]
    assert expanded(tmp_path) == (steps, [])
    assert expanded(steps[2], tmp_path / "other.pt") == ([steps[2], tmp_path / "other.pt"], [])


def test_what_has_weights_itself_is_one_checkpoint_and_says_so(tmp_path: Path) -> None:
    saved(tmp_path / "out")
    saved(tmp_path / "out/checkpoint-5", 1)
    found, notes = expanded(tmp_path / "out")
    assert found == [tmp_path / "out"]
    assert len(notes) == 1
    assert "is taken as one checkpoint; checkpoint-5 in it are not" in notes[0]


def test_lightnings_files_are_in_order_of_their_steps(tmp_path: Path) -> None:
    names = ["epoch=9-step=100.ckpt", "epoch=10-step=1000.ckpt", "run-epoch=2-step=20-v1.ckpt"]
    for name in (*names, "last.ckpt"):
        (tmp_path / name).touch()
    found, notes = expanded(tmp_path)
    assert [p.name for p in found] == [names[2], names[0], names[1]]
    assert notes == [f"checkpoints: last.ckpt in {tmp_path} is left out, a copy of the latest"]


def test_lightnings_files_without_a_step_are_refused(tmp_path: Path) -> None:
    for name in ("loss=0.3.ckpt", "epoch=1-step=20.ckpt"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"which step loss=0.3.ckpt is of can't be told"):
        expanded(tmp_path)
    (tmp_path / "epoch=1-step=20.ckpt").unlink()
    assert expanded(tmp_path)[0] == [tmp_path / "loss=0.3.ckpt"]


@pytest.mark.filterwarnings("ignore:::lightning", "ignore:::torch")
def test_what_lightnings_callback_writes_is_read(tmp_path: Path) -> None:
    class Trained(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = tiny.net()

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    keep = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path / "kept", save_weights_only=True, save_top_k=-1, every_n_train_steps=2
    )
    trainer = lightning.Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=False,
        callbacks=[keep],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Trained()
    trainer.fit(module, torch.utils.data.DataLoader(tiny.Rows(8, seed=1), batch_size=4))
    found, _ = expanded(tmp_path / "kept")
    assert [p.stem.partition("step=")[2] for p in found] == ["2", "4", "6"]
    fitted = state_dicts.fit_state_dict(state_dicts.read(found[-1]), tiny.net(), where="last")
    for name, tensor in module.network.state_dict().items():
        assert torch.equal(fitted.state[name], tensor)


def test_what_the_trainer_of_hugging_face_writes_is_read(tmp_path: Path) -> None:
    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = tiny.net()

        def forward(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.network(features)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    rows = tiny.Rows(8, seed=1)
    model = Classifier()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        save_strategy="steps",
        save_steps=5,
        max_steps=10,
        save_only_model=True,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = [dict(zip(("features", "labels"), rows[i], strict=True)) for i in range(8)]
    transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    found, _ = expanded(tmp_path / "out")
    assert [p.name for p in found] == ["checkpoint-5", "checkpoint-10"]
    fitted = state_dicts.fit_state_dict(state_dicts.read(found[-1]), tiny.net(), where="last")
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(fitted.state[name], tensor)


def in_folder(directory: str) -> object:
    import dataclasses

    return dataclasses.replace(tiny.problem(directory), checkpoints=[f"{directory}/out"])


def test_more_training_steps_extend_a_run_and_earlier_ones_are_refused(
    launch: Launch, tmp_path: Path, attempts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "folder_problem", sys.modules[__name__])
    command = (
        *("problem._target_=folder_problem.in_folder", f"+problem.directory={tmp_path}"),
        *(f"run_dir={tmp_path / 'run'}", "cluster=debug", "proj_dim=16", "targets=val"),
    )
    for step in (90, 500):
        saved(tmp_path / f"out/checkpoint-{step}", step)
    assert launch(*command).code == 0
    attempts.clear()
    saved(tmp_path / "out/checkpoint-1000", 1000)
    ended = launch(*command)
    assert ended.code == 0, ended.err
    featurized = {cell.split("/")[1] for cell in attempts if cell.startswith("featurize")}
    assert featurized == {"2"}
    assert [Path(c.path or "").name for c in open_run(tmp_path / "run")._run.plan.checkpoints] == [
        "checkpoint-90",
        "checkpoint-500",
        "checkpoint-1000",
    ]
    saved(tmp_path / "out/checkpoint-100", 100)
    ended = launch(*command)
    assert ended.code == 2
    assert "append checkpoints after those that are planned" in ended.err


def test_a_distributed_checkpoint_is_refused_with_the_command(tmp_path: Path) -> None:
    directory = tmp_path / "a dir"
    directory.mkdir()
    (directory / ".metadata").write_bytes(b"cos\nsystem\n(S'touch touched'\ntR.")
    with pytest.raises(CheckpointError) as raised:
        state_dicts.read(directory)
    assert str(raised.value) == (
        "a checkpoint of torch.distributed.checkpoint, whose .metadata is a pickle that is not "
        f"loaded\n  where: {directory}\n  next:  python -m "
        f"torch.distributed.checkpoint.format_utils dcp_to_torch '{directory}' '{directory}.pt', "
        f"if you trust it, and name {directory}.pt"
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_command_for_a_distributed_checkpoint_makes_one_that_is_read(tmp_path: Path) -> None:
    import subprocess
    import sys

    state = tiny.state(3)
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path / "out/dcp", no_dist=True)
    with pytest.raises(CheckpointError, match=r"\.metadata is a pickle") as raised:
        state_dicts.read(tmp_path / "out")  # a folder with it, as FSDP's trainers write
    command = raised.value.next.partition(", if you trust")[0].split()
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    model = tiny.net()
    fitted = state_dicts.fit_state_dict(state_dicts.read(Path(command[-1])), model, where="dcp")
    assert all(torch.equal(fitted.state[name], tensor) for name, tensor in state.items())
