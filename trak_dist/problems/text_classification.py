"""text_classification: texts with classes, and a Hugging Face classifier of sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from trak_dist.coordinates import TRAIN
from trak_dist.ops.model_outputs import TextClassification
from trak_dist.problem import Problem
from trak_dist.problems import pretrained
from trak_dist.problems.given import files_of
from trak_dist.problems.records import read
from trak_dist.problems.texts import (
    ClassifiedTexts,
    check_length,
    class_numbers,
    padded_batch,
    text_notes,
    text_renderer,
)


def problem(  # noqa: PLR0913 -- these are settings
    model: str,
    train: str,
    targets: Mapping[str, str | None],
    checkpoints: Sequence[str] | str | None = None,
    tokenizer: str | None = None,
    *,
    text: str = "text",
    label: str = "label",
    length: int = 512,
) -> Problem:
    """The margin of a text's class.

    Parameters
    ----------
    model, train, targets, checkpoints, tokenizer
        As of `causal_lm`, of a model for sequence classification: an encoder, or a decoder with a
        classification head.
    text, label : str
        The columns of the text and of its class, by name (`label2id` of config.json) or by number.
    length : int
        Tokens of a row at most.

    Raises
    ------
    ConfigError, ProblemError, DatasetError
        If settings do not fit, or model or data can't be read.
    """
    pretrained.required(model=model, train=train)
    files = files_of(train, targets)
    config = pretrained.read_config(model)
    pretrained.check_classes(config, model)
    check_length(length, config)
    words = pretrained.read_tokenizer(tokenizer or model)
    given = pretrained.given_checkpoints(model, checkpoints)
    pad = pretrained.pad_token(config, words)
    # By it decoders find the last token of a text, whose logits they take.
    config.pad_token_id = pad

    def dataset(file: str, setting: str) -> ClassifiedTexts:
        records = read(file, [text, label], setting=setting)
        classes = class_numbers(records, label, config.label2id, config.num_labels)
        return ClassifiedTexts(records, text, classes, words, length)

    datasets = {name: dataset(*named) for name, named in files.items()}
    notes = partial(text_notes, model, config, words, given, {**datasets})
    return Problem(
        model=pretrained.build(model, config, "AutoModelForSequenceClassification", given),
        model_output=TextClassification(),
        train=datasets.pop(TRAIN),
        targets=datasets,
        checkpoints=given,
        collate=padded_batch(pad, words.pad_token_type_id),
        render=text_renderer(words, config.id2label),
        notes=notes,
    )
