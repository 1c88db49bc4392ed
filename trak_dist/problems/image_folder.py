"""image_folder: folders of pictures by class, and a classifier of Hugging Face or of your own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from trak_dist.building import is_import_path
from trak_dist.coordinates import TRAIN
from trak_dist.errors import ConfigError
from trak_dist.ops.model_outputs import ImageClassification
from trak_dist.problem import Problem
from trak_dist.problems import pretrained
from trak_dist.problems.given import files_of, several
from trak_dist.problems.own_models import own_model
from trak_dist.problems.pictures import PictureFolder, Pictures, class_folders, picture_renderer

RESIZES = ("stretch", "crop")


def problem(  # noqa: PLR0913 -- these are settings
    model: str,
    train: str,
    targets: Mapping[str, str | None],
    checkpoints: Sequence[str] | str | None = None,
    *,
    size: int | None = None,
    resize: str = "stretch",
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    channels: int | None = None,
) -> Problem:
    """The margin of a picture's class.

    Parameters
    ----------
    model : str
        A directory of a Hugging Face image classifier, or its config.json; or `module:function`,
        which gets the number of classes and returns a torch module of images
        (batch, channels, size, size) to logits.
    train, targets : str, mapping of names to str
        Folders with a folder of pictures for each class.
    checkpoints : sequence of str, optional
        Directories or files; the model's own directory if none.
    size, resize : int, str
        Pixels of a side, and how they are come to: `stretch`, whatever the picture's shape is; or
        `crop`, the shorter side to this size, and of the longer the middle.
    mean, std : sequence of float
        What is subtracted from each channel, in [0, 1], and what it is divided by.
    channels : int
        3, or 1 for grey pictures.
        These five are those of the model's config.json and preprocessor_config.json, where left
        out.

    Raises
    ------
    ConfigError, ProblemError, DatasetError
        If settings do not fit, or model or pictures can't be read.
    """
    pretrained.required(model=model, train=train)
    if resize not in RESIZES:
        raise ConfigError(
            f"{resize!r} is not one of {', '.join(RESIZES)}", where="problem.resize", next="stretch"
        )
    own, config = is_import_path(model), None
    stated: dict[str, Any] = {}
    unread: list[str] = []
    if not own:
        config = pretrained.read_config(model)
        pretrained.check_classes(config, model)
        stated, unread = pretrained.picture_settings(model, config)
    given = {
        "size": size,
        "mean": several(mean) or None,
        "std": several(std) or None,
        "channels": channels,
    }
    chosen = {**stated, **{name: value for name, value in given.items() if value is not None}}
    chosen.setdefault("channels", 3)
    pretrained.required(**{name: chosen.get(name) for name in given})
    pictures = Pictures(**chosen, crop=resize == "crop")

    found = {name: class_folders(*named) for name, named in files_of(train, targets).items()}
    numbers, why = _class_numbers(list(found[TRAIN].classes), config)
    datasets = {name: PictureFolder(one, numbers, pictures) for name, one in found.items()}
    weights = several(checkpoints) if own else pretrained.given_checkpoints(model, checkpoints)

    def notes() -> Iterator[str]:
        yield f"pictures: {pictures}"
        yield from (*unread, *why)
        if not own:
            yield from pretrained.differing_configs(model, weights)
        for one in found.values():
            yield from one.notes()

    return Problem(
        model=_built(model, len(numbers), config, weights),
        model_output=ImageClassification(),
        train=datasets.pop(TRAIN),
        targets=datasets,
        checkpoints=weights,
        render=picture_renderer(pictures, {number: name for name, number in numbers.items()}),
        notes=notes,
    )


def _built(model: str, classes: int, config: Any, checkpoints: Sequence[str]) -> nn.Module:
    if config is None:
        return own_model(model, classes)
    return pretrained.build(model, config, "AutoModelForImageClassification", checkpoints)


def _class_numbers(folders: list[str], config: Any) -> tuple[dict[str, int], list[str]]:
    """The number of each class: that of its name in the model's config, else the names' order."""
    if config is None:
        return {name: number for number, name in enumerate(folders)}, []
    names: dict[str, int] = {str(name): int(number) for name, number in config.label2id.items()}
    if all(name in names for name in folders):
        return names, []
    unnamed = all(name == f"LABEL_{number}" for name, number in names.items())
    if unnamed and len(folders) == len(names):
        order = ", ".join(f"{name} {number}" for number, name in enumerate(folders))
        return (
            {name: number for number, name in enumerate(folders)},
            [f"classes: the model does not name its own; by the names of the folders: {order}"],
        )
    raise ConfigError(
        f"the folders' names are {', '.join(folders[:10])}, the model's {len(names)} classes "
        f"{', '.join(list(names)[:10])}",
        where=str(Path(config.name_or_path or "problem.model")),
        next="name the folders as label2id in the model's config.json names the classes",
    )
