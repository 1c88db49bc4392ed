"""Texts whose tokens are targets of their own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch

from trak_dist.errors import DatasetError
from trak_dist.ops.model_outputs.language import IGNORED, text_labels


class EachToken:
    """A map-style dataset of a row for each label of a text that counts, in the texts' order.

    As a target set, its columns are tokens: which train rows make the model predict this one? Row i
    is the text with all labels but one −100, so f of `LanguageModeling` is log p of one token. Each
    row is a forward and a backward pass over its text. `place(i)` is (text, position).

    Parameters
    ----------
    dataset
        Map-style, of mappings with `input_ids` (tokens,), perhaps `attention_mask` and `labels`
        (tokens,), as `LanguageModeling` takes them. All texts are read once, to count their tokens.

    Raises
    ------
    DatasetError
        If an example is no such mapping; if no token counts.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._positions = [self._counted(row) for row in range(len(dataset))]
        self._ends = list(accumulate(len(found) for found in self._positions))
        if not self._ends or not self._ends[-1]:
            raise DatasetError(
                f"none of the {len(dataset)} texts has a token that counts",
                where="EachToken",
                next="labels other than −100 after the first token",
            )

    def __len__(self) -> int:
        """The number of tokens that count."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A text with one label."""
        row, position = self.place(index)
        text = self._dataset[row]
        labels = torch.full_like(text_labels(text), IGNORED)
        labels[position] = text_labels(text)[position]
        return {**text, "labels": labels}

    def place(self, index: int) -> tuple[int, int]:
        """The text of a row, and the position of its token."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} tokens")
        row = bisect_right(self._ends, index)
        return row, self._positions[row][index - (self._ends[row - 1] if row else 0)]

    def _counted(self, row: int) -> list[int]:
        text = self._dataset[row]
        if not isinstance(text, Mapping) or "input_ids" not in text:
            raise DatasetError(
                f"example {row} is {type(text).__name__} without input_ids",
                where="EachToken",
                next="a dataset of mappings with input_ids, and attention_mask and labels if there "
                "are any",
            )
        counted = (text_labels(text) != IGNORED).nonzero()[:, 0].tolist()
        return [position for position in counted if position]  # nothing predicts the first one
