"""Stored runs: `python tests/golden/stored.py` makes those in `stored/` with the code of today.

They are of an earlier version, and stay: that this one goes on with them is what the test is there
to find. Who makes them again for a reason does so with the code before the change.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tarfile
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import golden_problem
import matplotlib.figure
import numpy as np
import torch

from trak_dist import TRAKer

SAVEFIG = matplotlib.figure.Figure.savefig
STORED = Path(__file__).parent / "stored"
# A run with every kind of cell; then one target set more; then a member with another λ.
COMMON = (
    *("cluster=debug", "problem=custom", "problem._target_=golden_problem.problem", "proj_dim=8"),
    *("featurize.batch_rows=4", "featurize.cell_rows=8", "checkpoints.train=2"),
    *("ground_truth.subsets=4", "self_influence=true", "counterfactuals.targets=2"),
    *("counterfactuals.remove=[2]", "counterfactuals.seeds=1"),
)
COMMANDS = (
    (*COMMON, "targets=val"),
    (*COMMON, "targets=all"),
    ("-m", "cluster=debug", "reduce.lambda_reg=0.25"),
)


def launch(run_dir: Path, *overrides: str) -> None:
    """A command, in this process."""
    from trak_dist.launch import main

    with mock.patch("sys.argv", ["trak-dist", f"run_dir={run_dir}", *overrides]):
        main()


def traker(save_dir: Path) -> dict[str, np.ndarray]:
    """TRAK's calls; the scores by target set."""
    problem = golden_problem.problem()
    traker = TRAKer(
        problem.model,
        "image_classification",
        golden_problem.ROWS,
        save_dir,
        device="cpu",
        proj_dim=8,
        lambda_reg=0.5,
        use_half_precision=False,
    )
    states = [problem.train_checkpoint(problem.train, seed, "cpu") for seed in range(2)]
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id=model_id)
        for rows in torch.arange(golden_problem.ROWS).split(5):
            traker.featurize(problem.train[rows], inds=rows)
    traker.finalize_features()
    found = {}
    for name, targets in problem.targets.items():
        for model_id, state in enumerate(states):
            traker.start_scoring_checkpoint(name, state, model_id, len(targets))
            traker.score(targets[torch.arange(len(targets))], num_samples=len(targets))
        found[name] = traker.finalize_scores(name)
    return found


def tiny_picture(figure: matplotlib.figure.Figure, buffer: Any, **said: Any) -> None:
    """In place of `savefig`, for pictures are most of a small run."""
    SAVEFIG(figure, buffer, **{**said, "dpi": 20})


def processor() -> dict[str, str]:
    """What the last bits of sums and products depend on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = ("vendor_id", "cpu family", "model\t", "flags")
    lines = sorted({line for line in info.splitlines() if line.startswith(names)})
    return {
        "cpu": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def main() -> None:
    torch.set_num_threads(1)
    STORED.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        os.environ["XDG_STATE_HOME"] = str(root / "state")
        os.chdir(Path(__file__).parent)
        # "." as the place that the problem is imported from, since it is frozen in the plan.
        with (
            mock.patch.object(Path, "cwd", return_value=Path()),
            mock.patch.object(socket, "gethostname", return_value="host"),
            mock.patch.object(matplotlib.figure.Figure, "savefig", tiny_picture),
        ):
            for overrides in COMMANDS:
                launch(root / "launched", *overrides)
            traker(root / "traker")
        for name in ("launched", "traker"):
            (root / name / "processor.json").write_text(json.dumps(processor()))
            with tarfile.open(STORED / f"{name}.tar.gz", "w:gz") as archive:
                archive.add(root / name, name, filter=_without_logs)


def _without_logs(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    info.uid, info.gid, info.uname, info.gname = 0, 0, "", ""
    return None if "/logs" in info.name else info


if __name__ == "__main__":
    main()
