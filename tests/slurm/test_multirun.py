"""A sweep on a real Slurm: one featurize pass, and the scores of other executors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from on_slurm import SLURM, finish, overrides, scores

from trak_dist.store.run import Run

SWEPT = ("-m", "reduce.lambda_reg=1.0,2.0")


def runs(run_dir: Path) -> Iterator[Path]:
    """The run and its members, in order of their names, which the settings determine."""
    yield run_dir
    layout = Run.open(run_dir).layout
    yield from (layout.sweeps / name for name in layout.members())


def test_a_sweep_is_featurized_once_and_has_the_scores_of_other_executors(
    launch, path: Path, expected: np.ndarray
) -> None:
    ended = launch(*overrides(path, "run", seconds=0.5), *SLURM, *SWEPT)
    assert ended.code == 0, ended.err
    assert sum(line.startswith("featurize ") for line in ended.out.splitlines()) == 1
    assert "afterany:" in ended.out, "members wait for the Gram of the first"
    found = {run_dir.name: finish(run_dir, 240) for run_dir in runs(path / "run")}
    assert len(found) == 2
    assert all(status.complete for status in found.values()), found
    assert np.array_equal(scores(path / "run"), expected)
    assert launch(*overrides(path, "debug", seconds=0.5), "cluster=debug", *SWEPT).code == 0
    for ours, theirs in zip(runs(path / "run"), runs(path / "debug"), strict=True):
        assert ours == path / "run" or ours.name == theirs.name
        assert np.array_equal(scores(ours), scores(theirs))
