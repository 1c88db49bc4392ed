"""The tiny problem, whose row 9 makes a worker wait until a file says go."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import tiny
import torch

import trak_dist

AT = "TEST_WAITS_AT"  # a directory: `reached` is made there, `go` is waited for


class WaitingRows(tiny.Rows):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 9 and AT in os.environ:
            here = Path(os.environ[AT])
            (here / "reached").touch()
            while not (here / "go").exists():
                time.sleep(0.01)
        return super().__getitem__(index)


def problem(directory: str) -> trak_dist.Problem:
    return replace(tiny.problem(directory), train=WaitingRows(50, seed=1))
