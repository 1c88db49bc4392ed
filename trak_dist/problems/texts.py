"""Tokenised texts: datasets for language models and classifiers, and how they are batched.

A row is tokenised when it is read. Sequences are padded on the right to the longest of a batch,
with `attention_mask`, so padding changes nothing but rounding.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trak_dist.errors import ConfigError, DatasetError
from trak_dist.listing import first_few
from trak_dist.ops.model_outputs import IGNORED
from trak_dist.problem import Rendered
from trak_dist.problems import pretrained
from trak_dist.problems.records import Records

SHOWN_CHARACTERS = 600
_AT_ONCE = 1000  # texts that are tokenised in one call

Example = Mapping[str, Tensor]


@dataclass(frozen=True)
class TextColumns:
    """Which columns of a file make an example: a text, or a prompt and its completion."""

    text: str
    prompt: str | None = None
    completion: str | None = None

    def __post_init__(self) -> None:
        if bool(self.prompt) != bool(self.completion):
            raise ConfigError(
                f"prompt is {self.prompt}, completion is {self.completion}: both or neither",
                where="problem.prompt, problem.completion",
                next="problem.prompt=COLUMN problem.completion=COLUMN",
            )

    @property
    def names(self) -> list[str]:
        """The columns that are read."""
        return [self.prompt, self.completion] if self.prompt and self.completion else [self.text]


class CausalTexts:
    """A text a row: {input_ids, attention_mask, labels}, each (tokens,) int64.

    Of a prompt and its completion, tokenised as one text, labels are −100 up to the first token
    that reaches into the completion.

    Parameters
    ----------
    length : int
        Tokens that a row has at most; what is beyond is cut off.
    end : int, optional
        The id of a token that ends each text that is not cut.
    """

    def __init__(
        self, records: Records, columns: TextColumns, tokenizer: Any, length: int, end: int | None
    ) -> None:
        self._records, self._tokenizer, self._length, self._end = records, tokenizer, length, end
        self._texts, *completions = (records.texts(name) for name in columns.names)
        self._completions = completions[0] if completions else None

    def __len__(self) -> int:
        """The number of texts."""
        return len(self._texts)

    def __getitem__(self, row: int) -> Example:
        """One text."""
        ((ids, first),) = self._encoded([row])
        self._check_predicts([row] if self._predicts_nothing(ids, first) else [])
        found = torch.tensor(ids[: self._length])
        labels = found.clone()
        labels[:first] = IGNORED
        return {"input_ids": found, "attention_mask": torch.ones_like(found), "labels": labels}

    def tokens(self) -> Iterator[list[int]]:
        """The tokens of each text, none cut off."""
        return (ids for _, ids, _ in self._all())

    def notes(self, name: str) -> Iterator[str]:
        """What is cut; all texts are tokenised to see it.

        Raises
        ------
        DatasetError
            Naming all rows that have no token to predict.
        """
        cut, nothing = 0, []
        for row, ids, first in self._all():
            cut += len(ids) > self._length
            if self._predicts_nothing(ids, first):
                nothing.append(row)
        self._check_predicts(nothing)
        yield from cut_note(name, cut, len(self), self._length)

    def _all(self) -> Iterator[tuple[int, list[int], int]]:
        for start in range(0, len(self), _AT_ONCE):
            rows = range(start, min(start + _AT_ONCE, len(self)))
            for row, (ids, first) in zip(rows, self._encoded(rows), strict=True):
                yield row, ids, first

    def _encoded(self, rows: Sequence[int]) -> list[tuple[list[int], int]]:
        """The tokens of texts, and the first that is to be predicted; none are cut off."""
        texts = [self._texts[row] for row in rows]
        first = [0] * len(rows)
        if self._completions is None:
            found = self._tokenizer(texts, verbose=False, return_attention_mask=False)
        else:
            prompts, texts = (
                texts,
                [t + self._completions[row] for t, row in zip(texts, rows, strict=True)],
            )
            found = self._tokenizer(texts, verbose=False, return_offsets_mapping=True)
            places = zip(found["offset_mapping"], prompts, strict=True)
            first = [
                next((i for i, (_, end) in enumerate(ends) if end > len(prompt)), len(ends))
                for ends, prompt in places
            ]
        end = [] if self._end is None else [self._end]
        return [([*ids, *end], f) for ids, f in zip(found["input_ids"], first, strict=True)]

    def _predicts_nothing(self, ids: list[int], first: int) -> bool:
        return max(1, first) >= min(len(ids), self._length)

    def _check_predicts(self, rows: Sequence[int]) -> None:
        if rows:
            raise self._records.error(
                f"no token to predict within {self._length} tokens in "
                f"row{'s' if len(rows) > 1 else ''} {first_few(rows)}: each is predicted from "
                "those before it",
                "a larger problem.length, or leave these rows out",
            )


class PackedTexts:
    """Texts one after the other, cut into blocks of `length` tokens: the rows are the blocks."""

    def __init__(self, texts: CausalTexts, length: int, records: Records) -> None:
        packed = array("i")
        for tokens in texts.tokens():
            packed.extend(tokens)
        ids = torch.frombuffer(packed, dtype=torch.int32)
        rest = len(ids) % length
        if rest == len(ids):
            raise records.error(
                f"{rest} tokens are no block of {length}", "a smaller problem.length"
            )
        self._blocks, self._rest = ids[: len(ids) - rest].view(-1, length), rest

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self._blocks)

    def __getitem__(self, row: int) -> Example:
        """One block."""
        ids = self._blocks[row].long()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    def notes(self, name: str) -> Iterator[str]:
        """How many tokens are in no block."""
        if self._rest:
            block = self._blocks.shape[1]
            yield f"{name}: the last {self._rest} tokens are left out, less than a block of {block}"


class ClassifiedTexts:
    """A text and its class a row: what the tokenizer gives, each (tokens,), and `labels` ()."""

    def __init__(
        self, records: Records, text: str, labels: Tensor, tokenizer: Any, length: int
    ) -> None:
        self._texts, self._labels = records.texts(text), labels
        self._records, self._tokenizer, self._length = records, tokenizer, length

    def __len__(self) -> int:
        """The number of texts."""
        return len(self._texts)

    def __getitem__(self, row: int) -> Example:
        """One text and its class."""
        found = self._tokenizer(self._texts[row], truncation=True, max_length=self._length)
        inputs = {name: torch.tensor(found[name], dtype=torch.int64) for name in found}
        return {**inputs, "labels": self._labels[row]}

    def notes(self, name: str) -> Iterator[str]:
        """What is cut; all texts are tokenised to see it."""
        cut, nothing = 0, []
        for start in range(0, len(self), _AT_ONCE):
            texts = list(self._texts[start : start + _AT_ONCE])
            for row, ids in enumerate(self._tokenizer(texts, verbose=False)["input_ids"], start):
                cut += len(ids) > self._length
                if not ids:
                    nothing.append(row)
        if nothing:
            raise self._records.error(f"texts without a token: rows {first_few(nothing)}")
        yield from cut_note(name, cut, len(self), self._length)


def text_notes(
    model: str,
    config: Any,
    tokenizer: Any,
    checkpoints: Sequence[str],
    datasets: Mapping[str, CausalTexts | PackedTexts | ClassifiedTexts],
) -> Iterator[str]:
    """What is worth saying of texts and their model: tokens and settings that differ, cuts."""
    if len(tokenizer) > config.vocab_size:
        yield (
            f"tokenizer: {len(tokenizer)} tokens, the model has {config.vocab_size}: a text with "
            "one of the others can't be computed"
        )
    yield from pretrained.differing_configs(model, checkpoints)
    for name, found in datasets.items():
        yield from found.notes(name)


def cut_note(name: str, cut: int, rows: int, length: int) -> Iterator[str]:
    """That some texts are cut, if they are."""
    if cut:
        yield f"{name}: {cut} of {rows} texts are longer than {length} tokens, and are cut there"


def padded_batch(pad: int, pad_type: int = 0) -> Callable[[Sequence[Example]], dict[str, Tensor]]:
    """A collate: sequences padded on the right to (examples, longest), numbers stacked."""
    fill = {"input_ids": pad, "labels": IGNORED, "token_type_ids": pad_type}

    def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
        return {
            name: torch.nn.utils.rnn.pad_sequence(
                [e[name] for e in examples], batch_first=True, padding_value=fill.get(name, 0)
            )
            if first.ndim
            else torch.stack([e[name] for e in examples])
            for name, first in examples[0].items()
        }

    return collate


def text_renderer(tokenizer: Any, classes: Mapping[int, str]) -> Callable[[Example], Rendered]:
    """A `render`: the text that the tokens are of, and the name of its class if it has one."""

    def render(example: Example) -> Rendered:
        text = tokenizer.decode(example["input_ids"].tolist(), skip_special_tokens=True)
        if len(text) > SHOWN_CHARACTERS:
            text = f"{text[:SHOWN_CHARACTERS]}…"
        labels = example["labels"]
        return Rendered(text, "" if labels.ndim else classes.get(int(labels), str(int(labels))))

    return render


def class_numbers(records: Records, column: str, names: Mapping[str, int], count: int) -> Tensor:
    """The classes in a column, by name or by number, (rows,) int64.

    Raises
    ------
    DatasetError
        Naming the rows whose class the model does not have.
    """
    numbers, bad = [], []
    for row, value in enumerate(records.columns[column]):
        number = names.get(value) if isinstance(value, str) else value
        if number is None and str(value).isdecimal():
            number = int(value)
        whole = isinstance(number, int) and not isinstance(number, bool)
        numbers.append(number if whole else -1)
        if not whole or not 0 <= number < count:  # type: ignore[operator]
            bad.append(row)
    if bad:
        value = records.columns[column][bad[0]]
        raise DatasetError(
            f"{value!r} in row {bad[0]} of column {column!r} is no class of the model"
            f"{f', nor are {len(bad) - 1} others' if len(bad) > 1 else ''}; its classes are "
            f"{first_few([f'{name} ({n})' for name, n in names.items()], 20)}",
            where=str(records.file),
            next="a class by its name in the model's config.json (label2id), or by its number",
        )
    return torch.tensor(numbers)


def check_length(length: int, config: Any) -> None:
    """Raise `ConfigError` if rows may be longer than a model's positions, or are of one token."""
    positions = getattr(config, "max_position_embeddings", None)
    if length < 2:
        raise ConfigError(f"rows of {length} tokens", where="problem.length", next="2 or more")
    if isinstance(positions, int) and length > positions > 0:
        raise ConfigError(
            f"rows of up to {length} tokens, the model has {positions} positions",
            where="problem.length",
            next=f"problem.length={positions}, or less",
        )
