"""Memory that featurizing a batch of ResNet-9 takes at its peak, against what it can't do without.

    python benchmarks/memory.py

Each way runs in a process of its own; what counts is how far its peak lies above that of a
process that only imports and makes the model. `needed` is the model, its activations (forward,
and backward by activations only) and the per-sample gradients of the largest layer for the batch.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from featurize import DIM, by_activations, featurizing, training_step
from models import CASES, Case

from trak_dist.ops.gradients import VmapGradients

WAYS = ("nothing", "by activations", "training step", "hooks", "vmap")


def main() -> dict[str, float]:
    case = CASES["ResNet-9"]()
    peaks = {way: measured(way) for way in WAYS}
    model = 4 * sum(p.numel() for p in case.model.parameters())
    largest = 4 * case.rows * max(p.numel() for p in case.model.parameters())
    above = {way: peak - peaks["nothing"] for way, peak in peaks.items() if way != "nothing"}
    needed = model + above["by activations"] + largest
    print(f"ResNet-9, {case.rows} rows, k = {DIM}: peak above the process that only imports")
    print(f"{'':<18}{'MiB':>8}{'÷ needed':>10}")
    for way, size in {"needed": needed, **above}.items():
        print(f"{way:<18}{size / 2**20:>8.0f}{size / needed:>10.2f}")
    return {"needed": needed, **above}


def measured(way: str) -> int:
    """Peak bytes of a process that runs `way`."""
    command = [sys.executable, __file__, way]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run(way: str) -> None:
    torch.set_num_threads(1)
    case: Case = CASES["ResNet-9"]()
    batch = case.batch(case.rows)
    ways = {
        "nothing": lambda: None,
        "by activations": lambda: by_activations(case, batch),
        "training step": lambda: training_step(case, batch),
        "hooks": featurizing(case, batch, DIM),
        "vmap": featurizing(case, batch, DIM, VmapGradients),
    }
    ways[way]()
    # Not getrusage: its peak may be that of the process this one was forked from.
    status = Path("/proc/self/status").read_text()
    print(1024 * int(status.split("VmHWM:")[1].split()[0]))


if __name__ == "__main__":
    run(sys.argv[1]) if len(sys.argv) > 1 else main()
