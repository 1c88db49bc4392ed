"""The tiny problem, whose batches take time and, read by a job, do what a file tells them to."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from torch.utils.data import default_collate

import trak_dist


class ActingRows(tiny.Rows):
    """Each batch takes `seconds`; row 9 does once, or always, what `directory/act` says."""

    def __init__(self, rows: int, seed: int, directory: Path, seconds: float) -> None:
        super().__init__(rows, seed)
        self.directory, self.seconds = directory, seconds

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 9 and "SLURM_JOB_ID" in os.environ:
            self._act()
        return super().__getitem__(index)

    def collate(self, examples: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        if len(examples) > 1 and "SLURM_JOB_ID" in os.environ:  # a batch, and not a probe
            time.sleep(self.seconds)
        return default_collate(examples)

    def _act(self) -> None:
        path = self.directory / "act"
        if not path.exists():
            return
        act = path.read_text()
        if act == "fail":
            raise RuntimeError("row 9 can't be read")
        if act == "always":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            path.unlink()
        except FileNotFoundError:  # another task was quicker
            return
        if act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            time.sleep(float(act))


def train(dataset: object, seed: int, device: torch.device) -> dict[str, torch.Tensor]:
    return tiny.state(seed)


def problem(
    directory: str, rows: int = 32, seconds: float = 0.0, trains: bool = False
) -> trak_dist.Problem:
    made = tiny.problem(directory, rows=rows)
    if trains:
        made = replace(made, checkpoints=(), train_checkpoint=train)
    acting = ActingRows(rows, 1, Path(directory).parent, seconds)
    targets = {"val": made.targets["val"]}
    return replace(made, train=acting, targets=targets, collate=acting.collate)
