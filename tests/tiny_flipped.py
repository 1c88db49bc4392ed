"""The tiny problem, which says of its first train rows that they are mislabelled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import tiny

import trak_dist


def problem(directory: str, rows: int = 30, marked: int = 6, flags: int = 30) -> trak_dist.Problem:
    """`flags` flags, of which the first `marked` are set."""
    plain = tiny.problem(directory, rows=rows)
    return replace(plain, mislabelled=np.arange(flags) < marked)
