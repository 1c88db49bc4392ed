"""Models, tokenizers and adapters in directories of Hugging Face, built without the network.

Nothing that a directory brings is run: no remote code, weights by safetensors only. All are in
float32 and `eval()`; `featurize.compute` says in which type gradients are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trak_dist.errors import CheckpointError, ConfigError, ProblemError
from trak_dist.listing import first_few
from trak_dist.problems.adapters import find_adapter, with_adapter
from trak_dist.problems.extras import package
from trak_dist.problems.given import several
from trak_dist.problems.model_files import config_file, files_named, read_json

LOCAL = {"local_files_only": True, "trust_remote_code": False}
# What a training changes in config.json, and what has no effect on what the model computes.
_NOT_COMPUTED = {
    *("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype"),
    *("use_cache", "id2label", "label2id", "problem_type", "finetuning_task"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "_num_labels", "torchscript"),
}


def required(**settings: object) -> None:
    """Raise `ConfigError` naming each setting of the problem that is not given."""
    missing = [f"problem.{name}" for name, value in settings.items() if not value]
    if missing:
        raise ConfigError(
            f"not given: {', '.join(missing)}",
            where="problem",
            next=" ".join(f"{name}=…" for name in missing),
        )


def read_config(model: str) -> Any:
    """The configuration in a directory, or a `config.json`.

    Raises
    ------
    ProblemError
        If it is not there, or of no kind that the installed transformers knows.
    """
    transformers = package("transformers", needed_for="a Hugging Face model")
    file = config_file(model)
    if not file.is_file():
        raise ProblemError(
            "there is no config.json of a Hugging Face model",
            where=str(file),
            next="problem.model=… a directory that save_pretrained wrote, or a config.json; "
            "models are not downloaded",
        )
    try:
        return transformers.AutoConfig.from_pretrained(str(file), **LOCAL)
    except Exception as error:  # what is in the file may be anything
        raise ProblemError(
            f"the configuration can't be read: {_one_line(error)}",
            where=str(file),
            next="a model whose code is part of transformers; of another write a problem of your "
            "own (docs/your-problem.md)",
        ) from error


def build(model: str, config: Any, auto: str, checkpoints: Sequence[str]) -> nn.Module:
    """The model of a configuration, with the adapter that the checkpoints are of, if they are.

    Its weights are read only where checkpoints hold an adapter alone.

    Parameters
    ----------
    auto : str
        The class of transformers that knows the task, `AutoModelForCausalLM` say.

    Raises
    ------
    ProblemError, CheckpointError
        If it can't be built, or adapters differ, or are of a kind that is refused.
    """
    transformers = package("transformers", needed_for="a Hugging Face model")
    kind = getattr(transformers, auto)
    adapter = find_adapter(checkpoints)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # of generation; it would be computed for nothing
    try:
        if adapter is None:
            made = kind.from_config(config, trust_remote_code=False, dtype=torch.float32)
        else:
            transformers.utils.logging.disable_progress_bar()
            made, found = kind.from_pretrained(
                str(config_file(model).parent),
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **LOCAL,
            )
            made = with_adapter(made, adapter, sorted(found["missing_keys"]))
    except (ProblemError, CheckpointError):
        raise
    except Exception as error:  # of transformers and peft, many types
        raise ProblemError(
            f"the model can't be built as {auto}: {_one_line(error)}",
            where=str(model),
            next="a model of this task, with its weights in safetensors where adapters need them",
        ) from error
    assert isinstance(made, nn.Module)
    return made.eval()


def read_tokenizer(directory: str) -> Any:
    """The tokenizer in a directory.

    Raises
    ------
    ProblemError
        If there is none, it is not one of the fast ones, or not what tokenizer.json says.
    """
    transformers = package("transformers", needed_for="a Hugging Face tokenizer")
    path = Path(directory).expanduser()
    path = path if path.is_dir() else path.parent
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), **LOCAL)
        if tokenizer.is_fast and _is_as_saved(tokenizer, path / "tokenizer.json"):
            return tokenizer
        made = type(tokenizer).__name__
        why = f"{made} is not a fast one"
        if tokenizer.is_fast:
            why = f"transformers makes a {made} with another vocabulary of tokenizer.json"
    except Exception as error:  # of transformers and tokenizers, many types
        why = _one_line(error)
    raise ProblemError(
        f"there is no tokenizer that can be read: {why}",
        where=str(path),
        next="problem.tokenizer=… a directory that tokenizer.save_pretrained wrote, with "
        "tokenizer.json, and of an unusual tokenizer without a config.json",
    )


def _is_as_saved(tokenizer: Any, file: Path) -> bool:
    """Whether it has the vocabulary of tokenizer.json, where there is one.

    By the config.json beside it transformers may make a tokenizer of the model's usual kind.
    """
    if not file.is_file():
        return True
    saved = package("tokenizers", needed_for="a tokenizer").Tokenizer.from_file(str(file))
    now = tokenizer.backend_tokenizer
    same: bool = type(saved.model) is type(now.model) and saved.get_vocab(
        with_added_tokens=False
    ) == now.get_vocab(with_added_tokens=False)
    return same


def pad_token(config: Any, tokenizer: Any) -> int:
    """What texts are padded with: the model's own token, else the tokenizer's, else its end."""
    found = (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(t for t in found if isinstance(t, int) and 0 <= t < config.vocab_size)


def check_classes(config: Any, model: str) -> None:
    """Raise `ProblemError` if a model does not tell an example's one class of several."""
    kind = config.problem_type
    if config.num_labels < 2 or kind not in (None, "single_label_classification"):
        raise ProblemError(
            f"no classifier of one class of several: {config.num_labels} labels, problem_type "
            f"{kind}",
            where=str(config_file(model)),
            next="of a regression, or of several labels, write a problem of your own "
            "(docs/your-problem.md)",
        )


def picture_settings(model: str, config: Any) -> tuple[dict[str, Any], list[str]]:
    """What a directory says of pictures: size, channels, mean, std, resample; and what is not read.

    They are of config.json and preprocessor_config.json.
    """
    size, file = getattr(config, "image_size", None), config_file(model)
    file = file.with_name("preprocessor_config.json")
    stated = read_json(file) if file.is_file() else {}
    found = {
        "size": size if isinstance(size, int) else None,
        "channels": config.num_channels,
        "resample": stated.get("resample"),
        "mean": stated.get("image_mean"),
        "std": stated.get("image_std"),
    }
    if stated.get("do_normalize") is False:
        found |= {"mean": [0.0], "std": [1.0]}
    ignored = [name for name in ("do_center_crop", "crop_pct") if stated.get(name)]
    notes = (
        [f"pictures: {file} asks for {first_few(ignored)}: see problem.resize"] if ignored else []
    )
    return {name: value for name, value in found.items() if value is not None}, notes


def given_checkpoints(model: str, checkpoints: Sequence[str] | str | None) -> list[str]:
    """The checkpoints that are named; where none are, the model's own directory.

    Raises
    ------
    ConfigError
        If it has no weights.
    """
    if checkpoints:
        return [str(checkpoint) for checkpoint in several(checkpoints)]
    path = Path(model).expanduser()
    if path.is_dir() and any(path.glob("*.safetensors")):
        return [str(path)]
    raise ConfigError(
        "no checkpoints are given, and the model's directory has no weights in safetensors",
        where="problem.checkpoints",
        next="'problem.checkpoints=[DIR,…]' of the directories, or files, that training wrote",
    )


def differing_configs(model: str, checkpoints: Sequence[str]) -> Iterator[str]:
    """A note for each checkpoint whose config.json says something else than the model's."""
    wanted = read_json(config_file(model))
    for file in files_named("config.json", checkpoints):
        now = read_json(file)
        keys = sorted((wanted.keys() & now.keys()) - _NOT_COMPUTED)
        other = [f"{k} {now[k]!r}, not {wanted[k]!r}" for k in keys if now[k] != wanted[k]]
        if other:
            yield f"checkpoints: {file} says {first_few(other, 5)} as {config_file(model)}"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
