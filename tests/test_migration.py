"""The page for users of TRAK: its table has every parameter, and each row a test."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import small_cnn
import test_traker
import trak
from streaming_process import traker

import trak_dist
from trak_dist import open_run
from trak_dist.errors import DeviceError

OWN = "curvature"  # an argument that TRAK does not have
METHODS = (
    *("__init__", "load_checkpoint", "featurize", "finalize_features"),
    *("start_scoring_checkpoint", "score", "finalize_scores"),
)
PAGE = (Path(__file__).parents[1] / "docs/migration.md").read_text()
ROWS = dict(re.findall(r"(?m)^\| `(\w+)` \| (.+) \|$", PAGE.partition("## Every parameter")[2]))
# What tests a row: here, or in test_traker.
TESTS = {
    "model": "test_another_train_set_or_model_for_a_run_is_refused",
    "task": "test_an_output_written_for_trak_runs_as_it_is",
    "train_set_size": "test_another_train_set_or_model_for_a_run_is_refused",
    "save_dir": "test_what_traker_made_is_an_array_and_a_run",
    "load_from_save_dir": "test_ignored_arguments_change_nothing",
    "device": "test_the_device_is_what_is_there_or_what_was_asked_for",
    "gradient_computer": "test_gradients_one_by_one_are_those_of_hooks",
    "projector": "test_projectors_are_taken_with_their_dimension_and_seed",
    "saver": "test_arguments_that_can_not_be_are_refused",
    "score_computer": "test_arguments_that_can_not_be_are_refused",
    "proj_dim": "test_any_dimension_works",
    "logging_level": "test_the_log_level_is_the_one_asked_for",
    "use_half_precision": "test_half_precision_is_close_and_stored_as_such",
    "proj_max_batch_size": "test_ignored_arguments_change_nothing",
    "projector_seed": "test_another_seed_gives_other_scores",
    "grad_wrt": "test_grad_wrt_names_the_parameters",
    "lambda_reg": "test_lambda_is_in_units_of_trak",
    OWN: "test_rows_are_weighted_by_their_curvature",
    "checkpoint": "test_a_checkpoint_may_be_a_path",
    "model_id": "test_other_weights_under_a_known_id_are_refused",
    "batch": "test_a_batch_may_be_a_mapping",
    "inds": "test_rows_in_any_order_and_batch_give_the_same_scores",
    "num_samples": "test_num_samples_counts_on_and_each_checkpoint_starts_over",
    "model_ids": "test_scores_of_some_checkpoints_are_those_of_a_run_of_them",
    "del_grads": "test_del_grads_destroys_nothing",
    "exp_name": "test_mistakes_in_calls_are_reported",
    "num_targets": "test_missing_targets_are_named_or_their_checkpoint_skipped",
    "allow_skip": "test_missing_targets_are_named_or_their_checkpoint_skipped",
}
DEFAULTS_OF_OURS = {"device", "gradient_computer"}
LEFT_OUT = {"proj_dim", "projector_seed", "use_half_precision", "lambda_reg"}  # the run's, if any


def parameters(kind: type) -> Iterator[tuple[str, inspect.Parameter]]:
    for method in METHODS:
        for name, parameter in inspect.signature(getattr(kind, method)).parameters.items():
            if name != "self" and not name.startswith("_"):
                yield f"{method}.{name}", parameter


def test_calls_take_what_traks_take_in_the_same_order() -> None:
    ours, theirs = (list(parameters(kind)) for kind in (trak_dist.TRAKer, trak.TRAKer))
    of_both = [(name, our) for name, our in ours if name != f"__init__.{OWN}"]
    assert [name for name, _ in of_both] == [name for name, _ in theirs]
    assert [name for name, _ in ours if name.startswith("__init__.")][-1] == f"__init__.{OWN}"
    for (name, our), (_, their) in zip(of_both, theirs, strict=True):
        parameter = name.rpartition(".")[2]
        if parameter in LEFT_OUT:
            assert our.default is None, name
        elif parameter not in DEFAULTS_OF_OURS:
            assert our.default == their.default, name


def test_the_table_has_every_parameter_and_each_row_a_test() -> None:
    names = {name.rpartition(".")[2] for name, _ in parameters(trak.TRAKer)}
    assert set(ROWS) == set(TESTS) == names | {OWN}
    for test in TESTS.values():
        assert hasattr(test_traker, test) or test in globals(), test


@pytest.mark.filterwarnings("ignore:::trak")
def test_the_imports_of_the_page_are_there() -> None:
    imports = re.findall(r"`from (trak[\w.]*) import ([\w, ]+)` \|", PAGE)
    assert len(imports) == 8
    for module, names in imports:
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name)
            assert hasattr(trak_dist, name)


@pytest.fixture
def checkpoints(tmp_path: Path) -> str:
    small_cnn.write_checkpoints(tmp_path / "checkpoints", 2)
    return str(tmp_path / "checkpoints")


def test_ignored_arguments_change_nothing(checkpoints: str, tmp_path: Path) -> None:
    wanted = test_traker.whole(checkpoints, tmp_path / "run")
    ignored = {"load_from_save_dir": False, "proj_max_batch_size": 8}
    assert np.array_equal(test_traker.whole(checkpoints, tmp_path / "other", **ignored), wanted)
    assert np.array_equal(test_traker.whole(checkpoints, tmp_path / "run", **ignored), wanted)


def test_the_device_is_what_is_there_or_what_was_asked_for(tmp_path: Path) -> None:
    arguments = {"model": small_cnn.net(), "task": "image_classification", "train_set_size": 3}
    there = trak_dist.TRAKer(**arguments, save_dir=tmp_path).device.type
    assert there in ("cpu", "cuda")
    if there == "cpu":
        for absent in ("cuda", "cuda:1", "mps"):
            with pytest.raises(DeviceError, match=f"device {absent} "):
                trak_dist.TRAKer(**arguments, save_dir=tmp_path, device=absent)


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_projectors_are_taken_with_their_dimension_and_seed(
    kind: str, checkpoints: str, tmp_path: Path
) -> None:
    projector = trak_dist.BasicProjector(
        grad_dim=7, proj_dim=48, seed=3, proj_type=trak_dist.ProjectionType(kind), device="cpu"
    )
    test_traker.featurized(
        traker(checkpoints, str(tmp_path / "run"), projector=projector), checkpoints
    )
    spec = open_run(tmp_path / "run").plan.spec
    assert (spec.proj_dim, spec.projection.seed) == (48, 3)
    assert spec.projection.kind == {"normal": "gaussian"}.get(kind, kind)


def test_half_precision_is_close_and_stored_as_such(checkpoints: str, tmp_path: Path) -> None:
    wanted = test_traker.whole(checkpoints, tmp_path / "run")
    found = test_traker.whole(checkpoints, tmp_path / "half", use_half_precision=True)
    assert 0 < np.linalg.norm(found - wanted) < 1e-2 * np.linalg.norm(wanted)
    dtypes = [open_run(tmp_path / name).plan.spec.featurize.dtype for name in ("run", "half")]
    assert dtypes == ["float32", "float16"]


def test_another_seed_gives_other_scores(checkpoints: str, tmp_path: Path) -> None:
    wanted = test_traker.whole(checkpoints, tmp_path / "run")
    found = test_traker.whole(checkpoints, tmp_path / "other", projector_seed=1)
    assert not np.allclose(found, wanted)


def test_a_checkpoint_may_be_a_path(checkpoints: str, tmp_path: Path) -> None:
    fed, problem = traker(checkpoints, str(tmp_path / "run")), small_cnn.problem(checkpoints)
    fed.load_checkpoint(problem.checkpoints[1], model_id=0)
    fed.load_checkpoint(test_traker.states(checkpoints)[1], model_id=0)


def test_a_batch_may_be_a_mapping(tmp_path: Path) -> None:
    class OfMappings(trak_dist.ImageClassification):
        def _logits_and_labels(self, model, weights, buffers, batch):
            inputs = batch[0]["image"], batch[0]["label"]
            return super()._logits_and_labels(model, weights, buffers, inputs)

    images = small_cnn.Images(6, seed=1)
    found = {}
    for name, task, batch in (
        ("tuple", trak_dist.ImageClassification(), (images.images, images.labels)),
        ("mapping", OfMappings(), {"image": images.images, "label": images.labels}),
    ):
        fed = trak_dist.TRAKer(small_cnn.net(), task, 6, tmp_path / name, device="cpu", proj_dim=4)
        fed.load_checkpoint(small_cnn.state(0), 0)
        fed.featurize(batch, num_samples=6)
        fed.finalize_features()
        found[name] = open_run(tmp_path / name).receipts("reduce")
    grams = [
        [r.digests for cell, r in receipts.items() if cell == "gram/0"]
        for receipts in found.values()
    ]
    assert grams[0] == grams[1] != []
