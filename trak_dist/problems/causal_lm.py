"""causal_lm: texts, and a Hugging Face causal language model that was trained on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from trak_dist.coordinates import TRAIN
from trak_dist.errors import ConfigError
from trak_dist.ops.model_outputs import LanguageModeling
from trak_dist.problem import Problem
from trak_dist.problems import pretrained
from trak_dist.problems.given import files_of
from trak_dist.problems.records import read
from trak_dist.problems.texts import (
    CausalTexts,
    PackedTexts,
    TextColumns,
    check_length,
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
    prompt: str | None = None,
    completion: str | None = None,
    length: int = 512,
    packing: bool = False,
    end: bool = False,
) -> Problem:
    """The log-likelihood of texts, or of completions given their prompts.

    Parameters
    ----------
    model : str
        A directory of a Hugging Face model, or its config.json.
    train, targets : str, mapping of names to str
        Files of texts: .jsonl, .csv, .parquet, .txt, or a folder of `datasets`.
    checkpoints : sequence of str, optional
        Directories of models, or of PEFT adapters, or files; the model's own directory if none.
    tokenizer : str, optional
        A directory; the model's where left out.
    text, prompt, completion : str
        The columns: a text, or with both others a prompt and what follows it.
    length : int
        Tokens of a row at most; of a block if `packing`.
    packing : bool
        Whether texts are strung together and cut into blocks, which are the rows.
    end : bool
        Whether the tokenizer's end-of-text token is added to each text.

    Raises
    ------
    ConfigError, ProblemError, DatasetError
        If settings do not fit, or model or data can't be read.
    """
    pretrained.required(model=model, train=train)
    files = files_of(train, targets)
    columns = TextColumns(text, prompt, completion)
    if packing and prompt:
        raise ConfigError(
            "prompts and completions are not packed into blocks",
            where="problem.packing",
            next="problem.packing=false",
        )
    config = pretrained.read_config(model)
    check_length(length, config)
    words = pretrained.read_tokenizer(tokenizer or model)
    if end and words.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no end-of-text token", where="problem.end", next="problem.end=false"
        )
    given = pretrained.given_checkpoints(model, checkpoints)

    def dataset(file: str, setting: str) -> CausalTexts | PackedTexts:
        records = read(file, columns.names, setting=setting)
        texts = CausalTexts(records, columns, words, length, words.eos_token_id if end else None)
        return PackedTexts(texts, length, records) if packing else texts

    datasets = {name: dataset(*named) for name, named in files.items()}
    notes = partial(text_notes, model, config, words, given, {**datasets})
    return Problem(
        model=pretrained.build(model, config, "AutoModelForCausalLM", given),
        model_output=LanguageModeling(),
        train=datasets.pop(TRAIN),
        targets=datasets,
        checkpoints=given,
        collate=padded_batch(pretrained.pad_token(config, words)),
        render=text_renderer(words, {}),
        notes=notes,
    )
