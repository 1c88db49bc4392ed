"""All that the README says of speed: `make bench`.

    python benchmarks/bench.py [results.json]

Runs the other benchmarks one after the other, then tells their figures beside the goals, and how
long TRAK's own quickstart would take at these rates: an extrapolation, said as such.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import audit
import featurize
import memory
import peers
import reduce
import store
import torch
from rounds import medians, ratios

CHECKPOINTS, TRAIN, TARGETS = 20, 10_000, 2_000


def main() -> None:
    found = {
        "machine": machine(),
        "featurize": featurize.main(),
        "audit": audit.main(),
        "peers": peers.main(),
        "memory": memory.main(),
        "reduce": reduce.main(),
        "store": store.main(),
    }
    print(f"\n{found['machine']}\n")
    print(f"{'':<62}{'found':>8}{'goal':>9}")
    for what, value, goal in goals(found):
        print(f"{what:<62}{value:>8.2f}{goal:>9}")
    print(quickstart(found))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1))


def goals(found: dict) -> list[tuple[str, float, str]]:
    ours = f"hooks, sjlt to {featurize.DIM}"
    rows = []
    for name, goal in (("ResNet-9", "≤ 1.0"), ("ViT-tiny", "≤ 1.2"), ("language model", "≤ 1.2")):
        seconds = found["featurize"][name]["seconds"]
        ratio = ratios(seconds, featurize.faster_step(seconds))[ours]
        rows.append((f"featurize ÷ training step, {name}, k = {featurize.DIM}", ratio, goal))
    seconds = found["featurize"]["ResNet-9"]["seconds"]
    wide, narrow = (f"hooks, sjlt to {dim}" for dim in (max(featurize.DIMS), min(featurize.DIMS)))
    rows.append(("k = 16384 ÷ k = 512, ResNet-9", ratios(seconds, narrow)[wide], "≤ 1.1"))
    for name, one in found["audit"].items():
        cells = max(audit.CELLS)
        rows.append(
            (f"audit ÷ featurize, {name}, cells of {cells}", audit.share(one, cells), "≤ 0.03")
        )
    for dim, seconds in found["peers"]["seconds"].items():
        for peer in ("traker", "dattri"):
            goal = "≥ 150" if (peer, dim) == ("traker", "4096") else ""
            speedup = ratios(seconds, "trak_dist")[peer]
            rows.append((f"{peer} ÷ trak_dist, ResNet-9, k = {dim}", speedup, goal))
    sizes, seconds = found["memory"], found["reduce"]
    rows.append(("peak memory ÷ needed, ResNet-9", sizes["hooks"] / sizes["needed"], "≤ 1.5"))
    for way, floor in (("Gram", reduce.GRAM), ("scores", reduce.SCORES)):
        share = 1 / ratios(seconds, floor)[way]
        rows.append((f"{way}, share of the float32 product's rate", share, "≥ 0.8"))
    written = {way: write for way, (write, _) in found["store"]["seconds"].items()}
    share = written[store.FLOOR] / written["store, none"]
    return [*rows, ("store write, share of a plain file's and fsync", share, "≥ 0.8")]


def quickstart(found: dict) -> str:
    """20 checkpoints of ResNet-9 on 10,000 train and 2,000 target images, on one core."""
    case = found["featurize"]["ResNet-9"]
    rate = case["rows"] / medians(case["seconds"])[f"hooks, sjlt to {featurize.DIM}"]
    reduced = medians(found["reduce"])
    gram = TRAIN / reduce.ROWS * reduced["Gram"]
    scores = TRAIN / reduce.ROWS * TARGETS / reduce.TARGETS * reduced["scores"]
    hours = CHECKPOINTS * ((TRAIN + TARGETS) / rate + gram + scores) / 3600
    return (
        f"extrapolated from these rates, not run: {CHECKPOINTS} checkpoints of ResNet-9 on "
        f"{TRAIN:,} train rows and {TARGETS:,} targets, k = {featurize.DIM}: {hours:.1f} hours of "
        "one core, without start-up, factorisation, reading and writing"
    )


def machine() -> str:
    names = [line for line in cpu_lines() if line.startswith("model name")]
    name = names[0].split(":")[1].strip() if names else platform.processor()
    best = torch.backends.cpu.get_cpu_capability()
    return f"{len(names)} × {name}, {best}, torch {torch.__version__}, one thread"


def cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
