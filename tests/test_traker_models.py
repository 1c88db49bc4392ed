"""TRAKer on models as people write them: right scores by a float64 oracle, or a clear error."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from trak_dist import ImageClassification, NoOpProjector, TRAKer, open_run
from trak_dist.errors import ProblemError

LAMBDA = 1e-2
TRAIN, TARGETS = 24, 5

# No batching rule for old weight norm's backward: what it is made of goes one by one.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

Rows = list[tuple[Tensor, Tensor]]


class Counting(nn.Module):
    """Counts its calls, and keeps an average of what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.layer(x)


class Renormed(nn.Module):
    """Its table is renormalised in place by each look-up."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 6, max_norm=1.0), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids).mean(1)))


class Normalising(nn.Module):
    """Normalises its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.3).div_(1.7)
        return self.head(torch.tanh(self.layer(x)))


class TwoViews(nn.Module):
    """Two views of each example in one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.tanh(self.layer(torch.cat([x, x.flip(1)])))
        one, other = both.chunk(2)
        return self.head(one * other)


class Sorting(nn.Module):
    """Sorts its batch by length, and puts it back."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 6, padding_idx=0), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        order = (ids != 0).sum(1).argsort(descending=True, stable=True)
        return self.head(torch.tanh(self.table(ids[order]).sum(1)))[order.argsort()]


class Packing(nn.Module):
    """Its layers see no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden = nn.Embedding(20, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        keep = ids != 0
        tokens = torch.tanh(self.hidden(self.table(ids[keep])))
        full = tokens.new_zeros(*ids.shape, 6)
        full[keep] = tokens
        return self.head(full.sum(1) / keep.sum(1, keepdim=True))


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.inner = nn.ModuleList([self.one, nn.Tanh(), self.one])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = layer(x)
        return self.head(x)


def weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(nn.Linear(6, 8))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 3))


def images(rows: int) -> Rows:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, generator=draw), torch.randint(3, (), generator=draw)) for _ in range(rows)
    ]


def texts(rows: int) -> Rows:
    draw = torch.Generator().manual_seed(2)
    found = []
    for length in torch.randint(2, 9, (rows,), generator=draw).tolist():
        ids = torch.zeros(8, dtype=torch.long)
        ids[:length] = torch.randint(1, 20, (length,), generator=draw)
        found.append((ids, torch.randint(3, (), generator=draw)))
    return found


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Rows]]] = {
    "counts its calls": (Counting, images),
    "renormalises its table": (Renormed, texts),
    "normalises its input in place": (Normalising, images),
    "two views": (TwoViews, images),
    "sorts": (Sorting, texts),
    "packs": (Packing, texts),
    "one module, two names": (Twice, images),
    "old weight norm": (weight_norm, images),
}


def fed(model: nn.Module, rows: Rows, where: Path, sizes: list[int], task: object) -> np.ndarray:
    traker = TRAKer(
        model=model,
        task=task,
        train_set_size=TRAIN,
        save_dir=where,
        projector=NoOpProjector(),
        use_half_precision=False,
        lambda_reg=LAMBDA,
        logging_level=logging.WARNING,
    )
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    traker.load_checkpoint(state, model_id=0)
    done = 0
    for size in sizes:
        x, y = (torch.stack(column) for column in zip(*rows[done : done + size], strict=True))
        before = x.clone()
        traker.featurize(batch=[x, y], num_samples=len(x))
        assert torch.equal(x, before), "the caller's batch is not touched"
        done += size
    traker.finalize_features()
    traker.start_scoring_checkpoint("val", state, 0, num_targets=TARGETS)
    x, y = (torch.stack(column) for column in zip(*rows[TRAIN:], strict=True))
    traker.score(batch=[x, y], num_samples=TARGETS)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), f"{name} is as it was"
    return traker.finalize_scores("val")


@pytest.mark.parametrize("sizes", [[8, 8, 8], [1, 7, 13, 3]], ids=["eights", "one first"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_oracle_for_a_model_that(
    name: str, sizes: list[int], tmp_path: Path
) -> None:
    make, draw = MODELS[name]
    torch.manual_seed(0)
    model, rows = make().eval(), draw(TRAIN + TARGETS)
    fresh = make()
    for module in fresh.modules():  # what old weight norm computes anew, and can't be copied
        vars(module).pop("weight", None)
    member = oracle.member(fresh, model.state_dict(), rows[:TRAIN], rows[TRAIN:])
    settings = {"lambda_reg": LAMBDA, "lambda_unit": "absolute", "kernel_scale": "mean_abs"}
    wanted, _ = oracle.scores([member], **settings)
    found = fed(model, rows, tmp_path / "run", sizes, "image_classification")
    assert open_run(tmp_path / "run").plan.gradients == "hooks"
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.head(x), 0.5)


class ByBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(2, track_running_stats=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.view(-1, 2, 3, 1)).flatten(1))


class Noisy(ImageClassification):
    def get_batch_output(self, *arguments: object) -> Tensor:
        return super().get_batch_output(*arguments) + torch.rand(())


class OfArrays(ImageClassification):
    get_out_to_loss_from_output = None

    def __init__(self, kind: Callable[[Tensor], object]) -> None:
        self.kind = kind

    def get_out_to_loss_grad(self, *arguments: object) -> object:
        return self.kind(super().get_out_to_loss_grad(*arguments))


REFUSED = {
    "drops at random": (Dropping(), "image_classification", "when it is computed again"),
    "is random in its output": (nn.Linear(6, 3), Noisy(), "when it is computed again"),
    "normalises by the batch": (
        ByBatch(),
        "image_classification",
        "depends on the other examples of its batch",
    ),
    "gives no out-to-loss": (nn.Linear(6, 3), OfArrays(lambda q: None), "came as NoneType"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_is_refused_that(name: str, tmp_path: Path) -> None:
    model, task, message = REFUSED[name]
    with pytest.raises(ProblemError, match=message):
        fed(model.eval(), images(TRAIN + TARGETS), tmp_path / "run", [8, 8, 8], task)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [Tensor.numpy, Tensor.tolist], ids=["numpy", "list"])
def test_out_to_loss_may_be_an_array_or_a_list(kind: Callable, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, rows = nn.Linear(6, 3).eval(), images(TRAIN + TARGETS)
    sizes = [8, 8, 8]
    wanted = fed(copy.deepcopy(model), rows, tmp_path / "one", sizes, ImageClassification())
    found = fed(model, rows, tmp_path / "other", sizes, OfArrays(kind))
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


class Doubled(ImageClassification):
    """Written for one example; the batched form that it inherits is another function."""

    def get_output(self, *arguments: object) -> Tensor:
        return 2 * super().get_output(*arguments)


def test_an_inherited_form_for_batches_of_another_output_is_not_used(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, rows = nn.Linear(6, 3).eval(), images(TRAIN + TARGETS)
    fed(model, rows, tmp_path / "run", [8, 8, 8], Doubled())
    run = open_run(tmp_path / "run")
    assert run.plan.gradients == "vmap"


def test_weights_of_bfloat16_go_by_hooks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))
    rows = [(x.bfloat16(), y) for x, y in images(TRAIN + TARGETS)]
    fed(model.bfloat16().eval(), rows, tmp_path / "run", [8, 8, 8], "image_classification")
    assert open_run(tmp_path / "run").plan.gradients == "hooks"
