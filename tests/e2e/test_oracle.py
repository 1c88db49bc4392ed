"""Scores of whole runs against the float64 oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import small_cnn
import tiny
import torch

from trak_dist import open_run
from trak_dist.ops.gradients import select_params
from trak_dist.ops.projection import make_projector

PROBLEMS: dict[str, Any] = {"tiny": tiny, "small_cnn": small_cnn}
DIM, SEED = 16, 3
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "int8": 0.03}
WELL_CONDITIONED = 1e5


@dataclass(frozen=True)
class Setting:
    projection: str
    dtype: str = "float32"
    lambda_reg: float = 0.05
    lambda_unit: str = "mean_diagonal"
    kernel_scale: str = "mean_abs"

    @property
    def reduce(self) -> dict[str, Any]:
        names = ("lambda_reg", "lambda_unit", "kernel_scale")
        return {n: getattr(self, n) for n in names}

    def overrides(self) -> list[str]:
        return [
            *(f"projection={self.projection}", f"projection.seed={SEED}"),
            *(f"proj_dim={DIM}", f"featurize.dtype={self.dtype}", "reduce.curvature=none"),
            *(f"reduce.{name}={value}" for name, value in self.reduce.items()),
        ]


# Each projection with each dtype; among them each pair of dtype, unit of λ and scale of the kernel.
RELATIVE = ("float32", 0.05, "mean_diagonal"), ("float16", 0.05, "mean_diagonal")
ABSOLUTE = ("float32", 0.02, "absolute"), ("float16", 0.02, "absolute")
SETTINGS = [
    Setting("identity", *RELATIVE[0], "mean_abs"),
    Setting("identity", *ABSOLUTE[1], "none"),
    Setting("sjlt", *ABSOLUTE[0], "mean_abs"),
    Setting("sjlt", *RELATIVE[1], "none"),
    Setting("rademacher", *RELATIVE[0], "none"),
    Setting("rademacher", *ABSOLUTE[1], "mean_abs"),
    Setting("gaussian", *ABSOLUTE[0], "none"),
    Setting("gaussian", *RELATIVE[1], "mean_abs"),
    Setting("sjlt", "int8"),
]


def run(launch, path: Path, problem: str, *overrides: str) -> np.ndarray:
    """The scores of `val`, from train rows in three cells and batches that don't divide them."""
    if not (path / "checkpoints").exists():
        PROBLEMS[problem].write_checkpoints(path / "checkpoints")
    ended = launch(
        *(f"problem._target_={problem}.problem", f"+problem.directory={path / 'checkpoints'}"),
        *(f"run_dir={path / 'run'}", "cluster=debug", "targets=val"),
        *("featurize.batch_rows=10", "featurize.cell_rows=20", *overrides),
    )
    assert ended.code == 0, ended.err
    return open_run(path / "run").scores("val")


def projection_matrix(kind: str, module: Any, model_id: int, seed: int = SEED) -> np.ndarray | None:
    """The (p, k) matrix of a projector, a block of rows per parameter in the oracle's order."""
    if kind == "identity":
        return None
    shapes = select_params(module.net(), ["*"])
    projector = make_projector(kind, dim=DIM, seed=seed, model_id=model_id, shapes=shapes)
    blocks = []
    for name in oracle.parameter_names(module.net()):
        size = shapes[name].numel()
        into = torch.zeros(size, DIM)
        projector.add(into, name, torch.eye(size).view(size, *shapes[name]))
        blocks.append(into.double().numpy())
    return np.concatenate(blocks)


def members(
    path: Path, problem: str, kind: str, globs: Sequence[str] = ("*",)
) -> list[oracle.Member]:
    module = PROBLEMS[problem]
    built = module.problem(str(path / "checkpoints"))
    return [
        oracle.member(
            *(module.net(), torch.load(checkpoint), built.train, built.targets["val"]),
            globs=globs,
            projection=projection_matrix(kind, module, model_id),
        )
        for model_id, checkpoint in enumerate(built.checkpoints)
    ]


def assert_scores(found: np.ndarray, wanted: list[oracle.Member], setting: Setting) -> None:
    expected, condition = oracle.scores(wanted, **setting.reduce)
    assert condition <= WELL_CONDITIONED
    assert found.shape == expected.shape
    errors = oracle.column_errors(found, expected)
    print(f"{setting}: error {errors.max():.1e}, condition {condition:.1e}")
    assert errors.max() <= TOLERANCE[setting.dtype]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.projection}-{s.dtype}")
def test_scores_of_a_perceptron_agree_with_a_float64_oracle(
    launch, tmp_path: Path, setting: Setting
) -> None:
    found = run(launch, tmp_path, "tiny", *setting.overrides())
    assert_scores(found, members(tmp_path, "tiny", setting.projection), setting)


@pytest.mark.parametrize(
    "setting",
    [Setting("identity"), Setting("sjlt"), Setting("sjlt", "float16", kernel_scale="none")],
    ids=lambda s: f"{s.projection}-{s.dtype}",
)
def test_scores_of_a_convolutional_net_agree_with_a_float64_oracle(
    launch, tmp_path: Path, setting: Setting
) -> None:
    found = run(launch, tmp_path, "small_cnn", *setting.overrides())
    assert_scores(found, members(tmp_path, "small_cnn", setting.projection), setting)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_scores_hold_near_the_largest_condition_number_promised(
    launch, tmp_path: Path, dtype: str
) -> None:
    """One checkpoint, whose error no average over an ensemble makes smaller."""
    (tmp_path / "checkpoints").mkdir()
    torch.save(small_cnn.state(2), tmp_path / "checkpoints/2.pt")
    setting = Setting("identity", dtype, lambda_reg=0.0007)
    found = run(launch, tmp_path, "small_cnn", *setting.overrides())
    wanted = members(tmp_path, "small_cnn", "identity")
    _, condition = oracle.scores(wanted, **setting.reduce)
    assert condition >= WELL_CONDITIONED / 2
    assert_scores(found, wanted, setting)


def test_examples_that_the_model_is_sure_of_keep_their_small_scores(launch, tmp_path: Path) -> None:
    """Row by row: 1 − p in float32 would be 0 for these, and so would their scores."""
    small_cnn.write_checkpoints(tmp_path / "checkpoints", count=1, sharpness=50)
    setting = Setting("identity", kernel_scale="none")
    found = run(launch, tmp_path, "small_cnn", *setting.overrides())
    (only,) = members(tmp_path, "small_cnn", "identity")
    sure = (only.out_to_loss > 1e-30) & (only.out_to_loss < 2**-25)
    assert sure.sum() >= 3
    expected, _ = oracle.scores([only], **setting.reduce)
    assert oracle.column_errors(found[sure].T, expected[sure].T).max() <= 1e-4


def test_chosen_parameters_alone_make_the_scores(launch, tmp_path: Path) -> None:
    setting = Setting("identity")
    found = run(launch, tmp_path, "tiny", *setting.overrides(), "featurize.params=['0.*']")
    assert open_run(tmp_path / "run").plan.parameters == 35
    assert_scores(found, members(tmp_path, "tiny", "identity", ["0.*"]), setting)
    everything, _ = oracle.scores(members(tmp_path, "tiny", "identity"), **setting.reduce)
    assert oracle.column_errors(found, everything).min() > 0.01


@pytest.mark.slow
def test_folded_grads_give_the_scores_of_the_smaller_dimension(launch, tmp_path: Path) -> None:
    setting = Setting("sjlt")
    for name in ("folded", "direct"):
        tiny.write_checkpoints(tmp_path / name / "checkpoints")
    folded = run(launch, tmp_path / "folded", "tiny", *setting.overrides(), f"store_dim={2 * DIM}")
    direct = run(launch, tmp_path / "direct", "tiny", *setting.overrides())
    plan = open_run(tmp_path / "folded/run").plan
    assert (plan.store_dim, plan.proj_dim) == (2 * DIM, DIM)
    assert oracle.column_errors(folded, direct.astype(np.float64)).max() <= 1e-4
