"""Folders of pictures, by Hugging Face's classifiers and by a user's own network."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import transformers
from command_result import Launch
from gathered_gradients import gathered
from PIL import Image
from torch import Tensor, nn

from trak_dist import ImageClassification, open_run
from trak_dist.errors import ConfigError, DatasetError, ProblemError, UnreadableRow
from trak_dist.ops.gradients import LoopGradients
from trak_dist.ops.hooks import HookGradients
from trak_dist.problem import Problem
from trak_dist.problems import image_folder

SIZE, MEAN, STD = 8, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
CLASSES = ("cat", "dog")
NAMES = {"id2label": {0: "dog", 1: "cat"}, "label2id": {"dog": 0, "cat": 1}}


def write_pictures(root: Path, each: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


def vit(**more: Any) -> transformers.ViTConfig:
    return transformers.ViTConfig(
        image_size=SIZE,
        patch_size=4,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        **more,
    )


def resnet(**more: Any) -> transformers.ResNetConfig:
    return transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", **more
    )


def write_model(directory: Path, config: Any, seed: int = 0) -> None:
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageClassification.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.mul_(5 if "vit" in config.model_type else 1)
    model.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": MEAN, "image_std": STD, "do_normalize": True})
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "train", 6, 1)
    write_pictures(tmp_path / "val", 2, 2)
    write_model(tmp_path / "model", vit(**NAMES))
    return tmp_path


def made(directory: Path, **settings: Any) -> Problem:
    given = {
        "model": str(directory / "model"),
        "train": str(directory / "train"),
        "targets": {"val": str(directory / "val")},
    }
    return image_folder.problem(**{**given, **settings})


def test_scores_of_pictures_by_a_vit_are_those_of_float64(launch: Launch, directory: Path) -> None:
    ended = launch(
        *("problem=image_folder", f"problem.model={directory / 'model'}"),
        *(f"problem.train={directory / 'train'}", f"problem.targets.val={directory / 'val'}"),
        *("projection=identity", "featurize.dtype=float32", "reduce.curvature=none"),
        *("reduce.lambda_reg=0.1", "reduce.kernel_scale=none", "cluster=debug"),
        f"run_dir={directory / 'run'}",
    )
    assert ended.code == 0, ended.err
    assert "gradients by hooks" in ended.out
    assert "pictures: resized to 8 × 8, RGB, minus 0.5, 0.4, 0.3, divided by" in ended.out
    assert (directory / "run/report/val.png").exists()

    def rows(root: Path) -> list[tuple[Tensor, int]]:
        files = [(f, 1 - i) for i, n in enumerate(CLASSES) for f in sorted((root / n).iterdir())]
        arrays = [(np.asarray(Image.open(f)) / 255 - MEAN) / STD for f, _ in files]
        return [
            (torch.tensor(a).permute(2, 0, 1), label)
            for a, (_, label) in zip(arrays, files, strict=True)
        ]

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.AutoModelForImageClassification.from_pretrained(
                directory / "model"
            )

        def forward(self, pixels: Tensor) -> Any:
            return self.model(pixels).logits

    model = Logits()
    state = model.state_dict()
    member = oracle.member(model, state, rows(directory / "train"), rows(directory / "val"))
    wanted, _ = oracle.scores(
        [member], lambda_reg=0.1, lambda_unit="mean_diagonal", kernel_scale="none"
    )
    assert oracle.column_errors(open_run(directory / "run").scores("val"), wanted).max() < 2e-4


@pytest.mark.parametrize("way", ["hooks", "loop"])
@pytest.mark.parametrize("config", [vit, resnet])
def test_what_a_model_returns_may_have_logits(config: Any, way: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = transformers.AutoModelForImageClassification.from_config(config()).eval()
    batch = (torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 1, 0]))
    exact = copy.deepcopy(model).double()
    output = ImageClassification()
    compute: Any = (
        HookGradients(model, output, ["*"], piece_elements=10**6)
        if way == "hooks"
        else LoopGradients(model, output, ["*"])
    )
    found = gathered(compute, model, batch)
    for row in range(4):
        logits = exact(batch[0][row : row + 1].double()).logits[0]
        f, _ = oracle.margin_and_out_to_loss(logits, int(batch[1][row]))
        grads = torch.autograd.grad(f, list(exact.parameters()))
        for (name, _), wanted in zip(exact.named_parameters(), grads, strict=True):
            error = (found[name][row] - wanted).norm()
            assert error <= 1e-4 * wanted.norm() + 1e-5, name


def test_a_model_that_returns_no_logits_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(ProblemError, match="the model returned tuple, which is no tensor"):
        ImageClassification().get_batch_output(Pair(), {}, {}, (torch.ones(2, 3), torch.ones(2)))


def test_pictures_are_resized_or_their_middle_is_cut_out(directory: Path) -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = 255  # the middle is white
    Image.fromarray(pixels).save(directory / "train/cat/0.png")
    plain = {"mean": [0.0], "std": [1.0]}
    cropped, _ = made(directory, resize="crop", **plain).train[0]
    assert torch.equal(cropped, torch.ones(3, 8, 8))
    stretched, label = made(directory, **plain).train[0]
    assert stretched[0, 0].mean() == pytest.approx(0.5, abs=0.05)
    assert int(label) == NAMES["label2id"]["cat"]
    small, _ = made(directory, size=4, **plain).train[0]
    assert small.shape == (3, 4, 4)


def test_a_picture_is_shown_as_it_is(directory: Path) -> None:
    problem = made(directory)
    assert problem.render
    shown = problem.render(problem.train[3])
    wanted = np.asarray(Image.open(directory / "train/cat/3.png")) / 255
    np.testing.assert_allclose(np.asarray(shown.content), wanted, atol=1e-6)
    assert shown.label == "cat"


def test_classes_without_names_are_numbered_by_the_folders_names(directory: Path) -> None:
    write_model(directory / "model", vit())
    problem = made(directory)
    assert [int(problem.train[row][1]) for row in (0, 6)] == [0, 1]
    assert problem.notes
    assert any(note.endswith("cat 0, dog 1") for note in problem.notes())


def test_folders_that_the_model_has_no_classes_for_are_refused(directory: Path) -> None:
    (directory / "train/dog").rename(directory / "train/wolf")
    with pytest.raises(
        ConfigError, match="the folders' names are cat, wolf, the model's 2 classes"
    ):
        made(directory)


def test_a_target_of_an_unknown_class_is_refused(directory: Path) -> None:
    (directory / "val/dog").rename(directory / "val/wolf")
    with pytest.raises(DatasetError, match="classes that the train set does not have: wolf"):
        made(directory)


@pytest.mark.parametrize(
    ("settings", "kind", "what"),
    [
        ({"resize": "squeeze"}, ConfigError, "'squeeze' is not one of stretch, crop"),
        ({"mean": [0.1, 0.2]}, ConfigError, r"mean \[0.1, 0.2\] and std"),
        ({"std": [0.0]}, ConfigError, "for 3 channels"),
        ({"size": -1}, ConfigError, "3 channels of -1 pixels a side"),
        ({"std": 0.0}, ConfigError, r"std \[0.0\] for 3 channels"),
        ({"targets": {"train": "pets"}}, ConfigError, "can't be called 'train'"),
        ({"train": "no/such"}, DatasetError, "there is no such folder"),
        ({"model": "no_such_module:net"}, ConfigError, "not given: problem.size, problem.mean"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], kind: type[Exception], what: str, directory: Path
) -> None:
    with pytest.raises(kind, match=what):
        made(directory, **settings)


def test_a_class_without_pictures_and_a_folder_without_classes_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model", vit())
    (tmp_path / "train").mkdir()
    with pytest.raises(DatasetError, match="there are no folders of classes"):
        made(tmp_path)
    (tmp_path / "train/cat").mkdir()
    (tmp_path / "train/cat/readme.txt").touch()
    with pytest.raises(DatasetError, match="no pictures in cat"):
        made(tmp_path)


def test_files_that_are_no_pictures_are_told_and_damaged_ones_named(directory: Path) -> None:
    (directory / "train/cat/notes.txt").touch()
    (directory / "train/.hidden").touch()
    problem = made(directory)
    assert problem.notes
    told = [n for n in problem.notes() if "left out" in n]
    assert told == [f"{directory / 'train'}: left out, no pictures by their names: cat/notes.txt"]
    (directory / "train/cat/2.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match="no picture that can be read: Unidentified") as raised:
        problem.train[2]
    assert raised.value.where == str(directory / "train/cat/2.png")
    assert not isinstance(raised.value, UnreadableRow)


def test_a_network_of_the_users_own_is_trusted_as_a_problem_is(
    launch: Launch, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = directory / "code"
    root.mkdir()
    (root / "own_network.py").write_text(
        "from torch import nn\n\n\ndef net(classes):\n"
        f"    return nn.Sequential(nn.Flatten(), nn.Linear({3 * SIZE * SIZE}, classes))\n"
    )
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root))
    import own_network

    torch.save(own_network.net(2).state_dict(), directory / "own.pt")
    command = (
        *("problem=image_folder", "problem.model=own_network:net", f"problem.size={SIZE}"),
        *("problem.mean=[0.5]", "problem.std=[0.5]", "problem.channels=3"),
        *(f"problem.train={directory / 'train'}", f"problem.targets.val={directory / 'val'}"),
        *(f"problem.checkpoints=[{directory / 'own.pt'}]", "proj_dim=16", "cluster=debug"),
    )
    ended = launch(*command, f"run_dir={directory / 'run'}")
    assert ended.code == 0, ended.err
    # Somebody else, who has planned nothing, is asked before the network's module is imported.
    monkeypatch.setenv("XDG_STATE_HOME", str(directory / "another"))
    monkeypatch.chdir(directory)
    ended = launch("stage=report", f"run_dir={directory / 'run'}", "cluster=debug")
    assert ended.code == 2
    assert "executes own_network.net as you, a problem that you have not planned" in ended.err
    assert str(root / "own_network.py") in ended.err
