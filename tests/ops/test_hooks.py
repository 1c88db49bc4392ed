"""Hooks on whole models against vmap, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from devices import DEVICE
from gathered_gradients import gathered
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from trak_dist import ImageClassification
from trak_dist.errors import NotCovered, ProblemError
from trak_dist.ops.gradients import VmapGradients
from trak_dist.ops.hooks import HookGradients
from trak_dist.problems import networks

BATCH, CLASSES = 4, 3
LABELS = torch.arange(BATCH) % CLASSES

# No batching rule for attention's backward; normalisation of an example by a batch of one.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randint(0, 11, (BATCH, 6), generator=torch.Generator().manual_seed(2))


class Pooled(nn.Module):
    """A head on the mean over positions."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).mean(1))


class Residual(nn.Module):
    """Residual blocks whose non-linearities and sums are in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.down, self.head = nn.Conv2d(2, 4, 1), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.down(x)
        x = self.relu(self.norm(self.first(x)))
        x = self.second(x)
        x += identity
        return self.head(self.relu(x).mean((2, 3)))


class Twice(nn.Module):
    """One module used twice, and its weight by another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(self.first(x))))))


class Functional(nn.Module):
    """A layer that is never called: its weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(F.linear(x, self.fc.weight, 2 * self.fc.bias)))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head, self.scale = nn.Linear(8, CLASSES), nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.blocks(x)[:, 0]) * self.scale.exp()


class OwnRMSNorm(nn.Module):
    """As in Hugging Face's models: a bare weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        size = x.to(torch.float64).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(size + 1e-6)).to(x.dtype)


class OwnConv1D(nn.Module):
    """As in Hugging Face's GPT-2."""

    def __init__(self, out: int, inputs: int) -> None:
        super().__init__()
        self.out = out
        self.weight, self.bias = (
            nn.Parameter(torch.randn(inputs, out)),
            nn.Parameter(torch.ones(out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        found = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return found.view(*x.size()[:-1], self.out)


class LanguageModel(nn.Module):
    """Causal attention, embeddings of positions, and one table for input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8, padding_idx=0), nn.Embedding(9, 8)
        self.norm, self.last_norm = OwnRMSNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = OwnConv1D(24, 8), OwnConv1D(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.gamma = nn.Parameter(torch.full((8,), 0.1))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        x += self.positions(torch.arange(ids.shape[1], device=ids.device))
        q, k, v = (
            h.view(*h.shape[:2], 2, 4).transpose(1, 2) for h in self.qkv(self.norm(x)).split(8, -1)
        )
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(found.transpose(1, 2).reshape(x.shape))
        x = x + self.gamma * self.down(F.gelu(self.up(self.norm(x))))
        return self.head(self.last_norm(x))[:, -1, :CLASSES]


class Written(nn.Module):
    """A use of a parameter without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :1] = self.weight
        return x


def normed(norm: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), norm, nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, CLASSES)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: networks.mlp(16, CLASSES), (1, 4, 4)),
    "cnn": (lambda: networks.cnn(1, CLASSES), (1, 28, 28)),
    "resnet9": (lambda: networks.resnet9(CLASSES), (3, 32, 32)),
    "residual, in place": (Residual, (2, 6, 6)),
    "used twice": (Twice, (6,)),
    "used by another function": (Functional, (6,)),
    "vit": (Vit, (2, 8, 8)),
    "language model": (LanguageModel, ()),
    "bag of tokens": (lambda: Pooled(nn.Embedding(11, 5), 5), ()),
    "group norm": (lambda: normed(nn.GroupNorm(2, 4)), (2, 8, 8)),
    "layer norm": (lambda: normed(nn.LayerNorm([4, 6, 6])), (2, 8, 8)),
    "sequence": (lambda: Pooled(nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4)), 4), (5, 3)),
    "up and down": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding="valid", groups=2), Written(),
            nn.ConvTranspose2d(4, 2, 3, dilation=2), nn.Flatten(), nn.LazyLinear(CLASSES),
        ), (2, 9, 9),
    ),
}  # fmt: skip


def built(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    inputs = images(*shape).to(dtype) if shape else tokens()
    with torch.no_grad():
        model(inputs)
        for tensor in model.state_dict().values():  # nothing stays 0 or 1
            tensor.add_(0.05 * torch.rand_like(tensor)) if tensor.is_floating_point() else None
    return model, (inputs, LABELS)


def by_hooks(model: nn.Module, batch: tuple[Tensor, Tensor], *params: str) -> dict[str, Tensor]:
    chosen = params or ("*",)
    model.to(DEVICE)
    hooks = HookGradients(model, ImageClassification(), chosen, piece_elements=1000)
    return gathered(hooks, model, [t.to(DEVICE) for t in batch], chosen)


def by_vmap(model: nn.Module, batch: tuple[Tensor, Tensor], *params: str) -> dict[str, Tensor]:
    chosen = params or ("*",)
    model.cpu()
    return gathered(VmapGradients(model, ImageClassification(), chosen), model, batch, chosen)


def assert_agree(found: dict[str, Tensor], wanted: dict[str, Tensor], to: float) -> None:
    """Each example and parameter apart; what is zero but for rounding, to rounding of the whole."""
    assert list(found) == list(wanted)
    whole = torch.stack([w.reshape(BATCH, -1).norm(dim=1) for w in wanted.values()]).norm(dim=0)
    for name, grads in wanted.items():
        error = (found[name] - grads).reshape(BATCH, -1).norm(dim=1)
        size = grads.reshape(BATCH, -1).norm(dim=1)
        assert (error <= to * torch.maximum(size, 1e-3 * whole)).all(), name


@pytest.mark.device
@pytest.mark.parametrize("name", [n for n in MODELS if n != "up and down"])
def test_hooks_agree_with_vmap_on(name: str) -> None:
    model, batch = built(name)
    assert_agree(by_hooks(model, batch), by_vmap(model, batch), to=1e-10)


@pytest.mark.device
@pytest.mark.parametrize("name", ["cnn", "resnet9", "vit", "language model"])
def test_hooks_agree_with_vmap_in_float32_on(name: str) -> None:
    model, batch = built(name, torch.float32)
    assert_agree(by_hooks(model, batch), by_vmap(model, batch), to=1e-5)


@pytest.mark.device
def test_chosen_parameters_have_the_gradients_that_they_have_among_all() -> None:
    model, batch = built("vit")
    everything = by_hooks(model, batch)
    for glob in ("head.*", "*.bias", "token", "blocks.layers.1.self_attn.*"):
        found = by_hooks(model, batch, glob)
        assert 0 < len(found) < len(everything)
        assert_agree(found, {n: everything[n] for n in found}, to=1e-10)


def test_pieces_are_small_and_their_order_is_always_the_same() -> None:
    model, batch = built("resnet9", torch.float32)
    handed: list[list[tuple[str, int, int]]] = [[], []]
    hooks = HookGradients(model, ImageClassification(), ["*"], piece_elements=40_000)
    for pieces in handed:

        def take(name: str, rows: slice, grads: Tensor, pieces: list = pieces) -> None:
            pieces.append((name, rows.start, rows.stop))
            assert len(grads) == rows.stop - rows.start
            assert grads.numel() <= 40_000 or len(grads) == 1

        hooks(batch, take)
    assert handed[0] == handed[1]
    assert handed[0][0] == ("11.weight", 0, BATCH), "the last layer comes first"


@pytest.mark.device
def test_hooks_give_the_same_bits_every_time() -> None:
    model, batch = built("vit", torch.float32)
    first, second = by_hooks(model, batch), by_hooks(model, batch)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_hooks_leave_model_and_batch_as_they_were() -> None:
    model, batch = built("residual, in place")
    before = {k: v.clone() for k, v in (*model.state_dict().items(), ("x", batch[0]))}
    by_hooks(model, batch)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(batch[0], before["x"])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not batch[0].requires_grad
    assert not vars(batch[0])


# What they refuse -----------------------------------------------------------------------------


def refusal(model: nn.Module, batch: tuple[Tensor, Tensor], *params: str) -> str:
    with pytest.raises(NotCovered) as caught:
        by_hooks(model, batch, *params)
    return caught.value.what


def test_parameters_of_functions_without_a_rule_are_named() -> None:
    model, batch = built("up and down")
    assert refusal(model, batch) == "1.weight (in torch.Tensor.__setitem__)"
    covered = ("[!1].*",)
    found = by_hooks(model, batch, *covered)
    assert len(found) == 6
    assert_agree(found, by_vmap(model, batch, *covered), to=1e-10)


class Maxima(nn.Module):
    """Tables whose use has no rule, and one whose use has."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList([nn.EmbeddingBag(11, CLASSES, mode="max") for _ in range(4)])
        self.table = nn.Embedding(11, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return sum(bag(x) for bag in self.bags) + self.table(x).mean(1)


def test_what_stands_in_the_way_is_said_on_one_line() -> None:
    by = "torch.nn.functional.embedding_bag"
    assert refusal(Maxima().double(), (tokens(), LABELS)) == (
        f"bags.0.weight (in {by}), bags.1.weight (in {by}) and 2 more"
    )


class Overwriting(nn.Module):
    """Changes a layer's input in place after the layer has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        logits = self.second(x)
        x.mul_(2)
        return logits + x[:, :CLASSES]


def test_an_input_that_is_changed_in_place_later_is_refused() -> None:
    model = Overwriting().double().eval()
    message = refusal(model, (images(6), LABELS))
    assert message == "second.weight, second.bias (its input was changed in place)"


class ByBatch(nn.Module):
    """Batch normalisation by the batch, also in `eval()`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x))


def test_batch_norm_by_the_batch_is_refused() -> None:
    assert "norm.weight (in" in refusal(ByBatch().double().eval(), (images(6), LABELS))


class PerSample:
    """Written for TRAK."""

    def get_output(self, model, weights, buffers, image, label) -> Tensor:
        return ImageClassification().get_output(model, weights, buffers, image, label)


def test_a_model_output_without_a_batched_form_is_refused() -> None:
    with pytest.raises(NotCovered, match="PerSample has no get_batch_output"):
        HookGradients(nn.Linear(2, 2), PerSample(), ["*"], piece_elements=1)


class Mean(ImageClassification):
    def get_batch_output(self, *arguments) -> Tensor:
        return super().get_batch_output(*arguments).mean()


def test_a_batched_output_that_takes_the_mean_is_refused() -> None:
    model, batch = built("mlp")
    with pytest.raises(ProblemError, match="no mean over the batch"):
        HookGradients(model, Mean(), ["*"], piece_elements=1)(batch, lambda *_: None)


def test_an_unused_parameter_has_no_gradient() -> None:
    model, batch = built("mlp")
    model.unused = nn.Linear(2, 2).double()
    model.forward = lambda x: nn.Sequential.forward(model[:6], x)
    assert not by_hooks(model, batch)["unused.weight"].any()


class ChangedSequences(nn.Module):
    """What a linear layer with a bias makes of sequences is a view, here changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        y = self.second(x)
        y += x
        return self.head(F.relu(y, inplace=True).mean(1))


def test_sequences_that_are_changed_in_place_after_a_layer_keep_its_gradients() -> None:
    torch.manual_seed(0)
    model, batch = ChangedSequences().double().eval(), (images(5, 3), LABELS)
    assert_agree(by_hooks(model, batch), by_vmap(model, batch), to=1e-10)
