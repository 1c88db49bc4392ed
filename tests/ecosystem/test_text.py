"""Text classification: a real BERT, small, against gradients in float64."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import datasets
import numpy as np
import oracle
import pytest
import tiny_bert
import torch
from command_result import Launch
from gathered_gradients import gathered
from torch import Tensor, nn

import trak_dist
from trak_dist import ImageClassification, TextClassification, open_run
from trak_dist.ops.gradients import LoopGradients, VmapGradients
from trak_dist.ops.hooks import HookGradients

NAMES = ("input_ids", "token_type_ids", "attention_mask", "labels")


class Given(nn.Module):
    """Logits that were given as input."""

    def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
        return input_ids


def test_the_margin_and_out_to_loss_are_those_of_images() -> None:
    logits, labels = torch.randn(9, 4), torch.arange(9) % 4
    text = {"input_ids": logits, "labels": labels}
    of_images, of_text = ImageClassification(), TextClassification()
    wanted = of_images.get_batch_output(nn.Identity(), {}, {}, (logits, labels))
    assert torch.equal(of_text.get_batch_output(Given(), {}, {}, [text]), wanted)
    q = of_images.get_out_to_loss_grad(nn.Identity(), {}, {}, (logits, labels))
    assert torch.equal(of_text.get_out_to_loss_grad(Given(), {}, {}, [text]), q)


def in_float64(model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    """∂f/∂θ of each text, one after the other, with f = log p − log(1 − p) of the softmax."""
    model = copy.deepcopy(model).double()
    grads: dict[str, list[np.ndarray]] = {name: [] for name, _ in model.named_parameters()}
    for row in range(len(batch[0])):
        inputs = {name: batch[at][row : row + 1] for at, name in enumerate(NAMES[:3])}
        out = model(**inputs)
        p = torch.softmax(getattr(out, "logits", out), 1)[0, batch[3][row]]
        found = torch.autograd.grad(p.log() - (1 - p).log(), [*model.parameters()])
        for name, grad in zip(grads, found, strict=True):
            grads[name].append(grad.numpy())
    return {name: np.stack(rows) for name, rows in grads.items()}


@pytest.mark.parametrize("way", ["hooks", "vmap", "loop"])
def test_gradients_of_a_bert_are_those_in_float64(way: str) -> None:
    """By vmap those of the wrapper: in the model itself numbers decide whether to mask."""
    model = (tiny_bert.Logits() if way == "vmap" else tiny_bert.net()).eval()
    model.load_state_dict(tiny_bert.state(5, type(model)))
    output, batch = TextClassification(), tiny_bert.batch(6, seed=3)
    compute = {
        "hooks": lambda: HookGradients(model, output, ["*"], piece_elements=10**6),
        "vmap": lambda: VmapGradients(model, output, ["*"]),
        "loop": lambda: LoopGradients(model, output, ["*"]),
    }
    found, wanted = gathered(compute[way](), model, batch), in_float64(model, batch)
    assert found.keys() == wanted.keys()
    whole = np.sqrt(sum(np.square(grads).sum() for grads in wanted.values()))
    for name, grads in wanted.items():
        error = np.linalg.norm(found[name].numpy() - grads)
        assert error <= 1e-5 * np.linalg.norm(grads) + 1e-7 * whole, name


def rows(count: int, seed: int) -> datasets.Dataset:
    columns = zip(NAMES, tiny_bert.batch(count, seed), strict=True)
    return datasets.Dataset.from_dict({n: t.tolist() for n, t in columns}).with_format("torch")


def problem(directory: str) -> trak_dist.Problem:
    """Called by name in a job: Hugging Face's datasets, whose rows are mappings."""
    return trak_dist.Problem(
        model=tiny_bert.net(),
        model_output=TextClassification(),
        train=rows(20, seed=1),
        targets={"val": rows(4, seed=2)},
        checkpoints=sorted(Path(directory).glob("*/")),
    )


def test_datasets_and_models_of_hugging_face_through_hydra_and_through_traker(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "text_problem", sys.modules[__name__])
    for seed in range(2):
        model = tiny_bert.net()
        model.load_state_dict(tiny_bert.state(seed, type(model)))
        model.save_pretrained(tmp_path / f"models/{seed}", max_shard_size="2KB")
    assert (tmp_path / "models/0/model.safetensors.index.json").exists()
    ended = launch(
        *("problem._target_=text_problem.problem", f"+problem.directory={tmp_path / 'models'}"),
        *("cluster=debug", f"run_dir={tmp_path / 'run'}", "proj_dim=64", "targets=val"),
        *("featurize.dtype=float32", "reduce.lambda_reg=0.5", "reduce.lambda_unit=absolute"),
        "reduce.curvature=none",
    )
    assert ended.code == 0, ended.err
    assert "gradients by hooks" in ended.out

    asked = problem(str(tmp_path / "models"))
    traker = trak_dist.TRAKer(
        model=tiny_bert.net(),
        task="text_classification",
        train_set_size=20,
        save_dir=tmp_path / "fed",
        device="cpu",
        proj_dim=64,
        use_half_precision=False,
        lambda_reg=0.5 * 64,
    )
    for model_id, path in enumerate(asked.checkpoints):
        traker.load_checkpoint(path, model_id=model_id)
        for batch in torch.utils.data.DataLoader(asked.train, batch_size=8):
            traker.featurize(batch=batch, num_samples=len(batch["labels"]))
    traker.finalize_features()
    for model_id, path in enumerate(asked.checkpoints):
        traker.start_scoring_checkpoint("val", path, model_id, num_targets=4)
        for batch in torch.utils.data.DataLoader(asked.targets["val"], batch_size=3):
            traker.score(batch=batch, num_samples=len(batch["labels"]))
    of_hydra = open_run(tmp_path / "run").scores("val")
    errors = oracle.column_errors(traker.finalize_scores("val"), of_hydra.astype(np.float64))
    assert errors.max() < 1e-4
