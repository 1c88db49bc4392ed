"""Scores for Hugging Face models from files alone, against a loop over examples in float64."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import peft
import pytest
import tiny_transformers as tiny
import torch
import transformers
from command_result import Ended, Launch
from gathered_gradients import gathered
from torch import Tensor, nn

from trak_dist import open_run
from trak_dist.errors import CheckpointError, ConfigError, DatasetError, ProblemError
from trak_dist.ops.gradients import LoopGradients
from trak_dist.ops.hooks import HookGradients
from trak_dist.problem import Problem
from trak_dist.problems import causal_lm, text_classification

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
ROWS, TARGETS = 20, 4
CLASSES = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
EXACT = (
    *("projection=identity", "featurize.dtype=float32", "reduce.curvature=none"),
    *("reduce.lambda_reg=0.1", "reduce.kernel_scale=none", "reduce.lambda_unit=mean_diagonal"),
)
LAMBDA = {"lambda_reg": 0.1, "lambda_unit": "mean_diagonal", "kernel_scale": "none"}
Log = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _quiet() -> object:
    return transformers.utils.logging.disable_progress_bar()


def write_rows(path: Path, count: int, seed: int, **columns: Sequence[Any]) -> Path:
    rows = [{"text": text} for text in tiny.texts(count, seed)]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return tiny.write_lines(path, rows)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two GPT-2 models and texts."""
    for seed in range(2):
        tiny.write_model(tmp_path / f"model-{seed}", "gpt2", seed=seed)
    write_rows(tmp_path / "train.jsonl", ROWS, 1)
    write_rows(tmp_path / "val.jsonl", TARGETS, 2)
    return tmp_path


def command(directory: Path, problem: str = "causal_lm", *more: str) -> list[str]:
    return [
        f"problem={problem}",
        f"problem.model={directory / 'model-0'}",
        f"problem.train={directory / 'train.jsonl'}",
        f"problem.targets.val={directory / 'val.jsonl'}",
        "problem.length=24",
        f"run_dir={directory / 'run'}",
        *("cluster=debug", "featurize.batch_rows=8"),
        *more,
    ]


def both(directory: Path) -> str:
    return f"problem.checkpoints=[{directory / 'model-0'},{directory / 'model-1'}]"


def grads(
    model: nn.Module, rows: Sequence[Mapping[str, Any]], log: Log
) -> tuple[np.ndarray, np.ndarray]:
    """∂f/∂θ (rows, p) and Q (rows,), one text after the other, none of them padded."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, out_to_loss = [], []
    for row in rows:
        f, q = log(model, row)
        found.append(
            np.concatenate([g.numpy().ravel() for g in torch.autograd.grad(f, parameters)])
        )
        out_to_loss.append(float(q.detach()))
    return np.array(found), np.array(out_to_loss)


def members(
    models: Sequence[nn.Module], train: Sequence[Any], targets: Sequence[Any], log: Log
) -> list[oracle.Member]:
    made = []
    for model in models:
        exact = copy.deepcopy(model).double().eval()
        x, q = grads(exact, train, log)
        g, _ = grads(exact, targets, log)
        made.append(oracle.Member(x / np.sqrt(x.shape[1]), g / np.sqrt(x.shape[1]), q))
    return made


def log_likelihood(model: nn.Module, row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Σ log p(token | those before it) of the softmax itself, from `first` on."""
    ids = torch.tensor([row["ids"]])
    p = torch.softmax(model(input_ids=ids).logits[0], -1)
    places = range(max(1, row.get("first", 0)), ids.shape[1])
    return torch.stack([p[t - 1, ids[0, t]].log() for t in places]).sum(), torch.ones(())


def words(text: str) -> list[int]:
    return [tiny.WORDS.index(word) for word in text.split()]


def loaded(directory: Path, auto: str = "AutoModelForCausalLM") -> list[nn.Module]:
    return [
        getattr(transformers, auto).from_pretrained(directory / f"model-{seed}")
        for seed in range(2)
    ]


def assert_near(ended: Ended, directory: Path, made: Sequence[oracle.Member]) -> None:
    assert ended.code == 0, ended.err
    wanted, _ = oracle.scores(made, **LAMBDA)
    found = open_run(directory / "run").scores("val")
    assert oracle.column_errors(found, wanted).max() < 2e-4


def test_scores_of_texts_are_those_of_float64(launch: Launch, directory: Path) -> None:
    ended = launch(*command(directory, "causal_lm", both(directory), *EXACT))
    assert "gradients by hooks" in ended.out
    train, val = ([{"ids": words(t)} for t in tiny.texts(*of)] for of in ((ROWS, 1), (TARGETS, 2)))
    assert_near(ended, directory, members(loaded(directory), train, val, log_likelihood))
    page = (directory / "run/report/val.html").read_text()
    assert any(text in page for text in tiny.texts(TARGETS, 2)), "rows are shown as text"


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(k, marks=pytest.mark.slow) for k in ("gpt2", "qwen2", "bert"))]
)
def test_scores_of_classified_texts_are_those_of_float64(
    kind: str, launch: Launch, tmp_path: Path
) -> None:
    auto = "AutoModelForSequenceClassification"
    for seed in range(2):
        tiny.write_model(tmp_path / f"model-{seed}", kind, auto, seed=seed, num_labels=3, **CLASSES)
    labels = [i % 3 for i in range(ROWS)]
    named = ["abc"[n] if i % 2 else n for i, n in enumerate(labels)]
    write_rows(tmp_path / "train.jsonl", ROWS, 1, label=named)
    write_rows(tmp_path / "val.jsonl", TARGETS, 2, label=[0, 1, 2, 0])
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    own = f"problem.tokenizer={tmp_path / 'tokenizer'}"
    ended = launch(*command(tmp_path, "text_classification", both(tmp_path), own, *EXACT))
    assert "gradients by hooks" in ended.out

    def margin(model: nn.Module, row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=torch.tensor([row["ids"]])).logits[0]
        return oracle.margin_and_out_to_loss(logits, row["label"])

    train, val = (
        [{"ids": words(t), "label": n} for t, n in zip(tiny.texts(*of), classes, strict=True)]
        for of, classes in (((ROWS, 1), labels), ((TARGETS, 2), [0, 1, 2, 0]))
    )
    assert_near(ended, tmp_path, members(loaded(tmp_path, auto), train, val, margin))


def lm(directory: Path, **settings: Any) -> Problem:
    given = {
        "model": str(directory / "model-0"),
        "train": str(directory / "train.jsonl"),
        "targets": {"val": str(directory / "val.jsonl")},
        "length": 24,
    }
    return causal_lm.problem(**{**given, **settings})


def test_of_a_completion_alone_the_loss_counts(launch: Launch, directory: Path) -> None:
    def split(count: int, seed: int) -> list[dict[str, str]]:
        halves = (text.split() for text in tiny.texts(count, seed))
        return [{"p": " ".join(t[:2]), "c": " " + " ".join(t[2:])} for t in halves]

    train, val = split(ROWS, 1), split(TARGETS, 2)
    tiny.write_lines(directory / "train.jsonl", train)
    tiny.write_lines(directory / "val.jsonl", val)
    ended = launch(
        *command(directory, "causal_lm", both(directory), *EXACT),
        *("problem.prompt=p", "problem.completion=c", "problem.end=true"),
    )
    rows, targets = (
        [{"ids": [*words(r["p"] + r["c"]), 2], "first": 2} for r in of] for of in (train, val)
    )
    assert_near(ended, directory, members(loaded(directory), rows, targets, log_likelihood))


def test_a_token_that_reaches_into_the_completion_is_of_it(directory: Path) -> None:
    tiny.write_lines(directory / "train.jsonl", [{"p": "w1 w2 w", "c": "3 w4"}] * 2)
    problem = lm(directory, prompt="p", completion="c", targets={})
    assert problem.train[0]["input_ids"].tolist() == words("w1 w2 w3 w4")
    assert problem.train[0]["labels"].tolist() == [-100, -100, *words("w3 w4")]


def test_packed_rows_are_blocks_of_all_texts_one_after_the_other(directory: Path) -> None:
    problem = lm(directory, packing=True, end=True, length=10)
    tokens = [token for text in tiny.texts(ROWS, 1) for token in (*words(text), 2)]
    assert len(problem.train) == len(tokens) // 10
    blocks = [problem.train[row] for row in range(len(problem.train))]
    joined = torch.cat([block["input_ids"] for block in blocks])
    assert joined.tolist() == tokens[: len(joined)]
    assert all(torch.equal(block["labels"], block["input_ids"]) for block in blocks)
    assert problem.notes
    rest = len(tokens) % 10
    assert f"train: the last {rest} tokens are left out, less than a block of 10" in problem.notes()


@pytest.mark.parametrize("way", ["hooks", "loop"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_padding_changes_no_gradient(kind: str, way: str, tmp_path: Path) -> None:
    auto = "AutoModelForSequenceClassification"
    tiny.write_model(tmp_path / "model-0", kind, auto, num_labels=3, **CLASSES)
    write_rows(tmp_path / "train.jsonl", 6, 1, label=[0, 1, 2, 0, 1, 2])
    problem = text_classification.problem(
        str(tmp_path / "model-0"), str(tmp_path / "train.jsonl"), {}, length=24
    )
    problem.model.load_state_dict(
        transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "model-0"
        ).state_dict()
    )
    assert problem.collate
    rows = [problem.train[row] for row in range(6)]
    lengths = {len(row["input_ids"]) for row in rows}
    assert len(lengths) > 2
    long = {n: v if v.ndim == 0 else torch.cat([v, v])[:24] for n, v in rows[0].items()}

    def found(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if way == "loop":
            compute: Any = LoopGradients(problem.model, problem.model_output, ["*"])
        else:
            compute = HookGradients(
                problem.model, problem.model_output, ["*"], piece_elements=10**6
            )
        return gathered(compute, problem.model, (batch,))

    together = found(problem.collate([*rows, long]))
    for at, row in enumerate(rows):
        alone = found(problem.collate([row]))
        for name, grad in alone.items():
            torch.testing.assert_close(together[name][at], grad[0], rtol=1e-4, atol=1e-5)


# Adapters ---------------------------------------------------------------------------------------


def write_adapter(directory: Path, base: Path, seed: int, **settings: Any) -> None:
    made = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True, **settings
    )
    model = peft.get_peft_model(made, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)


def test_adapters_of_a_base_model_are_scored_by_their_own_parameters(
    launch: Launch, directory: Path
) -> None:
    base = directory / "model-0"
    for seed, step in ((1, 50), (2, 100)):
        write_adapter(directory / f"out/checkpoint-{step}", base, seed)
    given = f"problem.checkpoints=[{directory / 'out'}]"
    ended = launch(*command(directory, "causal_lm", given, *EXACT))
    assert "2 checkpoints" in ended.out
    models = []
    for step in (50, 100):
        made = transformers.AutoModelForCausalLM.from_pretrained(base)
        models.append(
            peft.PeftModel.from_pretrained(
                made, directory / f"out/checkpoint-{step}", is_trainable=True
            )
        )
    train, val = ([{"ids": words(t)} for t in tiny.texts(*of)] for of in ((ROWS, 1), (TARGETS, 2)))
    made = members(models, train, val, log_likelihood)
    assert made[0].train.shape[1] == 2 * tiny.WIDTH + 2 * 3 * tiny.WIDTH
    assert_near(ended, directory, made)


def test_adapters_of_two_configurations_are_refused(directory: Path) -> None:
    for seed in (1, 2):
        write_adapter(directory / f"a{seed}", directory / "model-0", seed, lora_alpha=8 * seed)
    with pytest.raises(CheckpointError) as raised:
        lm(directory, checkpoints=[str(directory / "a1"), str(directory / "a2")])
    first = directory / "a1/adapter_config.json"
    assert raised.value.what == (
        f"adapters of other configurations: lora_alpha is 8 in {first}, 16 here"
    )


@pytest.mark.parametrize("what", ["prompts", "others", "megatron"])
def test_an_adapter_that_would_load_or_import_something_is_refused(
    what: str, directory: Path
) -> None:
    if what == "prompts":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    elif what == "others":
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=8, adapters={"a": "some/hub"})
    else:
        config = peft.LoraConfig(task_type="CAUSAL_LM", megatron_config={"a": 1})
        config.megatron_core = "this_would_be_imported"
    config.save_pretrained(directory / "adapter")
    with pytest.raises(ProblemError, match="are not built: what their configuration names could"):
        lm(directory, checkpoints=[str(directory / "adapter")])


# What is told, and what is refused --------------------------------------------------------------


def test_what_is_cut_is_told_when_a_run_is_planned_and_not_again(
    launch: Launch, directory: Path
) -> None:
    wanted = [*command(directory), "problem.length=8", "stage=plan", "proj_dim=16"]
    cut = {
        n: sum(len(t.split()) > 8 for t in tiny.texts(n, s)) for n, s in ((ROWS, 1), (TARGETS, 2))
    }
    first = launch(*wanted)
    assert (
        f"train: {cut[ROWS]} of 20 texts are longer than 8 tokens, and are cut there" in first.out
    )
    assert "longer than" not in launch(*wanted).out
    assert max(len(lm(directory, length=8).train[row]["input_ids"]) for row in range(ROWS)) == 8


def test_a_target_set_that_is_added_later_is_checked_whole(launch: Launch, directory: Path) -> None:
    more = directory / "more.jsonl"
    wanted = [*command(directory), f"+problem.targets.more={more}", "stage=plan", "proj_dim=16"]
    write_rows(more, TARGETS, 2)
    assert launch(*wanted, "targets=val").code == 0
    texts = tiny.texts(60, 3)
    for row in (5, 41):  # which are none of those that planning tries
        texts[row] = "w1"
    tiny.write_lines(more, [{"text": text} for text in texts])
    ended = launch(*wanted, "targets=more")
    assert ended.code == 2
    assert "no token to predict within 24 tokens in rows 5, 41: each" in ended.err
    assert [split.name for split in open_run(directory / "run").plan.targets] == ["val"]


def test_a_checkpoint_with_another_configuration_is_told(launch: Launch, directory: Path) -> None:
    tiny.write_model(directory / "model-1", "gpt2", seed=1, activation_function="relu")
    ended = launch(*command(directory, "causal_lm", both(directory), "stage=plan", "proj_dim=16"))
    assert "model-1/config.json says activation_function 'relu', not 'gelu_new'" in ended.out


def test_tokens_that_the_model_has_not_are_told_and_pad_nothing(directory: Path) -> None:
    words_and_pad = tiny.tokenizer()
    words_and_pad.add_special_tokens({"pad_token": "[NEW]"})
    words_and_pad.save_pretrained(directory / "larger")
    tiny.write_model(directory / "bare", "gpt2", pad_token_id=None)
    problem = lm(directory, model=str(directory / "bare"), tokenizer=str(directory / "larger"))
    assert problem.notes
    assert problem.collate
    assert list(problem.notes()) == [
        "tokenizer: 31 tokens, the model has 30: a text with one of the others can't be computed"
    ]
    batch = problem.collate([problem.train[row] for row in range(ROWS)])
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {2}, "end of text"


def test_rows_are_not_tokenised_before_they_are_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []
    real = transformers.PreTrainedTokenizerFast.__call__

    def noted(self: Any, texts: Any, **settings: Any) -> Any:
        called.append(len(texts))
        return real(self, texts, **settings)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "__call__", noted)
    problem = lm(directory)
    assert called == []
    _ = problem.train[3]
    assert called == [1]


def test_rows_with_nothing_to_predict_are_refused_with_their_numbers(
    launch: Launch, directory: Path
) -> None:
    rows = [{"text": t} for t in ("w1 w2", "w1", "w3 w4", "w5")]
    tiny.write_lines(directory / "train.jsonl", rows)
    ended = launch(*command(directory, "causal_lm", "proj_dim=16"))
    assert ended.code == 2
    assert "no token to predict within 24 tokens in rows 1, 3" in ended.err
    assert f"where: {directory / 'train.jsonl'}" in ended.err
    assert not (directory / "run").exists()


def test_the_models_own_weights_are_its_checkpoint_where_none_is_named(directory: Path) -> None:
    assert lm(directory).checkpoints == [str(directory / "model-0")]
    (directory / "model-0/model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no checkpoints are given, and the model's directory"):
        lm(directory)
    config = lm(
        directory,
        model=str(directory / "model-0/config.json"),
        tokenizer=str(directory / "model-1"),
        checkpoints=str(directory / "model-1"),
    )
    assert config.checkpoints == [str(directory / "model-1")]


@pytest.mark.parametrize(
    ("settings", "kind", "what"),
    [
        ({"model": None, "train": ""}, ConfigError, "not given: problem.model, problem.train"),
        ({"model": "no/such"}, ProblemError, "there is no config.json of a Hugging Face model"),
        ({"tokenizer": "/"}, ProblemError, "there is no tokenizer that can be read: "),
        ({"length": 25}, ConfigError, "rows of up to 25 tokens, the model has 24 positions"),
        ({"length": 1}, ConfigError, "rows of 1 tokens"),
        ({"prompt": "p"}, ConfigError, "prompt is p, completion is None: both or neither"),
        (
            {"prompt": "p", "completion": "c", "packing": True},
            ConfigError,
            "prompts and completions are not packed into blocks",
        ),
        ({"text": "body"}, DatasetError, "there is no column body; there is text"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], kind: type[Exception], what: str, directory: Path
) -> None:
    with pytest.raises(kind) as raised:
        lm(directory, **settings)
    assert str(raised.value).startswith(what)


def test_a_tokenizer_that_transformers_would_replace_is_refused(directory: Path) -> None:
    tiny.write_model(directory / "qwen", "qwen2")
    with pytest.raises(ProblemError, match="with another vocabulary of tokenizer"):
        lm(directory, model=str(directory / "qwen"))
    tiny.tokenizer().save_pretrained(directory / "alone")
    problem = lm(directory, model=str(directory / "qwen"), tokenizer=str(directory / "alone"))
    assert problem.train[0]["input_ids"].tolist() == words(tiny.texts(ROWS, 1)[0])


def test_a_configuration_that_asks_for_its_own_code_runs_none_of_it(directory: Path) -> None:
    model = directory / "model-0"
    (model / "config.json").write_text(
        '{"model_type": "its_own", "auto_map": {"AutoConfig": "own.C", '
        '"AutoModelForCausalLM": "own.M"}}'
    )
    (model / "own.py").write_text(f"open({str(directory / 'ran')!r}, 'w')\nC = M = 1\n")
    with pytest.raises(ProblemError, match="the configuration can't be read"):
        lm(directory)
    assert not (directory / "ran").exists()


def test_a_pickle_is_not_read_where_adapters_need_weights(directory: Path) -> None:
    write_adapter(directory / "adapter", directory / "model-0", 1)
    model = directory / "model-0"
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    with pytest.raises(ProblemError, match="the model can't be built as AutoModelForCausalLM"):
        lm(directory, checkpoints=[str(directory / "adapter")])


@pytest.mark.parametrize("label", ["d", 3, -1, 1.5, None, True])
def test_a_class_that_the_model_does_not_have_is_refused(label: Any, tmp_path: Path) -> None:
    tiny.write_model(
        tmp_path / "m", "bert", "AutoModelForSequenceClassification", num_labels=3, **CLASSES
    )
    path = write_rows(tmp_path / "train.jsonl", 3, 1, label=["a", label, label])
    with pytest.raises(DatasetError) as raised:
        text_classification.problem(str(tmp_path / "m"), str(path), {}, length=24)
    assert raised.value.what == (
        f"{label!r} in row 1 of column 'label' is no class of the model, nor are 1 others; its "
        "classes are a (0), b (1), c (2)"
    )


def test_a_regression_is_no_text_classification(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "m", "bert", "AutoModelForSequenceClassification", num_labels=1)
    with pytest.raises(ProblemError, match="no classifier of one class of several: 1 labels"):
        text_classification.problem(str(tmp_path / "m"), "x.jsonl", {})


def test_a_missing_package_is_named_with_the_command(
    launch: Launch, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    ended = launch(*command(directory))
    assert ended.code == 2
    assert "a Hugging Face model needs the package transformers" in ended.err
    assert "pip install 'trak_dist[hf]'" in ended.err
