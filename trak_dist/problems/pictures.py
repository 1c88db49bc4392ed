"""Pictures in files: read by Pillow, resized, normalised. Shared by problems of folders of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak_dist.errors import ConfigError, DatasetError
from trak_dist.listing import first_few
from trak_dist.problem import Rendered
from trak_dist.problems.extras import package

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Pictures:
    """How a picture becomes a tensor (channels, size, size) float32."""

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    channels: int = 3
    crop: bool = False
    resample: int = 2  # Pillow's number: bilinear

    def __post_init__(self) -> None:
        wanted = {1, self.channels}  # one number is for all channels
        if self.channels not in (1, 3) or self.size < 1:
            raise ConfigError(
                f"{self.channels} channels of {self.size} pixels a side",
                where="problem.channels, problem.size",
                next="problem.channels=3, or 1; problem.size=224",
            )
        if not {len(self.mean), len(self.std)} <= wanted or min(self.std) <= 0:
            raise ConfigError(
                f"mean {list(self.mean)} and std {list(self.std)} for {self.channels} channels",
                where="problem.mean, problem.std",
                next="a number for each channel, std above 0: 'problem.mean=[0.5,0.5,0.5]'",
            )

    def __str__(self) -> str:
        """What is done, in words."""
        how = "shorter side resized, middle cut out" if self.crop else "resized"
        colour = "RGB" if self.channels == 3 else "grey"
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return f"{how} to {self.size} × {self.size}, {colour}, minus {mean}, divided by {std}"

    def read(self, file: Path) -> Tensor:
        """A picture.

        Raises
        ------
        DatasetError
            If the file can't be read, or is no picture.
        """
        image = package("PIL.Image", needed_for="reading pictures")
        try:
            with image.open(file) as opened:
                picture = opened.convert("RGB" if self.channels == 3 else "L")
            box = None
            if self.crop:
                side = min(picture.size)
                left, top = ((length - side) / 2 for length in picture.size)
                box = (left, top, left + side, top + side)
            picture = picture.resize((self.size, self.size), self.resample, box=box)
        except Exception as error:  # of Pillow, many types
            raise DatasetError(
                f"no picture that can be read: {type(error).__name__}: {error}",
                where=str(file),
                next="replace the file, or take it away",
            ) from error
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32) / 255)
        pixels = pixels.view(self.size, self.size, self.channels).permute(2, 0, 1)
        mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in self._shifts)
        return ((pixels - mean) / std).contiguous()

    def shown(self, pixels: Tensor) -> Any:
        """A picture as an array (size, size, 3), or (size, size), in [0, 1]."""
        mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in self._shifts)
        found = (pixels * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
        return found[:, :, 0] if self.channels == 1 else found

    @property
    def _shifts(self) -> tuple[list[float], list[float]]:
        return list(self.mean), list(self.std)


@dataclass(frozen=True)
class ClassFolders:
    """The pictures in a folder, by the folder of their class, both in order of their names."""

    root: Path
    classes: Mapping[str, Sequence[Path]]
    others: Sequence[str] = field(default=())

    def notes(self) -> Iterator[str]:
        """Which files are left out."""
        if self.others:
            yield f"{self.root}: left out, no pictures by their names: {first_few(self.others, 5)}"


def class_folders(root: str, setting: str) -> ClassFolders:
    """The pictures in the folders of `root`; what begins with a dot is not looked at.

    Raises
    ------
    DatasetError
        If it is not there, or a class has none.
    """
    path = Path(root).expanduser()
    if not path.is_dir():
        raise DatasetError("there is no such folder", where=str(path), next=f"see {setting}")
    visible = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    folders = {p.name: p for p in visible if p.is_dir()}
    others = [p.name for p in visible if not p.is_dir()]
    classes = {}
    for name, folder in folders.items():
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != ".")
        classes[name] = [p for p in files if p.suffix.lower() in ENDINGS]
        others += [str(p.relative_to(path)) for p in files if p.suffix.lower() not in ENDINGS]
    empty = [name for name, files in classes.items() if not files]
    if empty or not classes:
        raise DatasetError(
            f"no pictures in {first_few(empty)}" if empty else "there are no folders of classes",
            where=str(path),
            next=f"a folder for each class, with pictures ({', '.join(ENDINGS)}) in it",
        )
    return ClassFolders(path, classes, others)


class PictureFolder:
    """(pixels (channels, size, size) float32, class () int64) a row, read when it is asked for."""

    def __init__(
        self, folders: ClassFolders, numbers: Mapping[str, int], pictures: Pictures
    ) -> None:
        unknown = [name for name in folders.classes if name not in numbers]
        if unknown:
            raise DatasetError(
                f"classes that the train set does not have: {first_few(unknown)}",
                where=str(folders.root),
                next=f"folders named {first_few(list(numbers), 20)}",
            )
        self._rows = [(f, numbers[name]) for name, fs in folders.classes.items() for f in fs]
        self._pictures = pictures

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self._rows)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """One picture and its class."""
        file, number = self._rows[row]
        return self._pictures.read(file), torch.tensor(number)


def picture_renderer(
    pictures: Pictures, names: Mapping[int, str]
) -> Callable[[tuple[Tensor, Tensor]], Rendered]:
    """A `render`: the picture as the model sees it, and the name of its class."""

    def render(example: tuple[Tensor, Tensor]) -> Rendered:
        pixels, number = example
        return Rendered(pictures.shown(pixels), names[int(number)])

    return render
