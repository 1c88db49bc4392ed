"""Each rule against vmap on the CPU, over its settings: in float64, each example apart."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICE
from gathered_gradients import gathered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from trak_dist.ops import segments
from trak_dist.ops.gradients import VmapGradients
from trak_dist.ops.hooks import HookGradients

BATCH = 3
examples = settings(max_examples=40, deadline=None, derandomize=True)
pytestmark = pytest.mark.device


class Weighed:
    """F: the sum of a smooth function of what a model gives, with weights unlike each other."""

    def get_output(self, model, weights, buffers, *example) -> Tensor:
        return self.get_batch_output(model, weights, buffers, [x[None] for x in example])[0]

    def get_batch_output(self, model, weights, buffers, batch) -> Tensor:
        out = functional_call(model, (dict(weights), dict(buffers)), tuple(batch))
        out = out.flatten(1)
        weights = torch.arange(1, out.shape[1] + 1, device=out.device)
        return (torch.sin(out) * weights).sum(1)


def moved(model: nn.Module) -> nn.Module:
    """In float64, with weights and running statistics that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(0)
    model = model.cpu().double().eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.mul_(0.5).add_(0.2 + 0.5 * noise)
    return model


def assert_agree(model: nn.Module, *batch: Tensor, piece_elements: int = 2**20) -> None:
    model = moved(model)
    wanted = gathered(VmapGradients(model, Weighed(), ["*"]), model, batch)
    model.to(DEVICE)
    hooks = HookGradients(model, Weighed(), ["*"], piece_elements=piece_elements)
    found = gathered(hooks, model, [t.to(DEVICE) for t in batch])
    for name, grads in wanted.items():
        difference = (found[name] - grads).reshape(BATCH, -1).norm(dim=1)
        assert (difference <= 1e-9 * grads.reshape(BATCH, -1).norm(dim=1) + 1e-12).all(), name
    assert any(grads.any() for grads in wanted.values())


def inputs(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)


def tokens(vocabulary: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, vocabulary, (BATCH, *shape), generator=generator)


@examples
@given(
    st.lists(st.integers(1, 4), max_size=2),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([1, 7, 2**20]),
)
def test_linear(
    between: list[int], features: int, out: int, bias: bool, piece_elements: int
) -> None:
    layer = nn.Linear(features, out, bias=bias)
    assert_agree(layer, inputs(*between, features), piece_elements=piece_elements)


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@examples
@given(st.data(), st.sampled_from([1, 2, 2, 3]))
def test_convolution(data: st.DataObject, dims: int) -> None:
    sizes = st.tuples(*[st.integers(1, 3)] * dims)
    groups = data.draw(st.integers(1, 3), label="groups")
    padding = data.draw(st.one_of(st.just("same"), st.just("valid"), st.integers(0, 2), sizes))
    layer = CONVOLUTIONS[dims](
        groups * data.draw(st.integers(1, 2), label="in"),
        groups * data.draw(st.integers(1, 2), label="out"),
        data.draw(sizes, label="kernel"),
        stride=1 if padding == "same" else data.draw(sizes, label="stride"),
        padding=padding,
        dilation=data.draw(sizes, label="dilation"),
        groups=groups,
        bias=data.draw(st.booleans(), label="bias"),
        padding_mode=data.draw(st.sampled_from(["zeros", "replicate", "circular"]), label="mode"),
    )
    side = {1: 12, 2: 8, 3: 7}[dims]
    piece = data.draw(st.sampled_from([1, 50, 2**20]), label="piece")
    assert_agree(layer, inputs(layer.in_channels, *[side] * dims), piece_elements=piece)


@examples
@given(st.data(), st.sampled_from([1, 2, 2, 3]))
def test_transposed_convolution(data: st.DataObject, dims: int) -> None:
    sizes = st.tuples(*[st.integers(1, 3)] * dims)
    groups = data.draw(st.integers(1, 2), label="groups")
    stride = data.draw(sizes, label="stride")
    kernel = data.draw(sizes, label="kernel")
    layer = TRANSPOSED[dims](
        groups * data.draw(st.integers(1, 2), label="in"),
        groups * data.draw(st.integers(1, 2), label="out"),
        kernel,
        stride=stride,
        padding=[data.draw(st.integers(0, k - 1)) for k in kernel],
        output_padding=[data.draw(st.integers(0, s - 1)) for s in stride],
        dilation=stride,
        groups=groups,
        bias=data.draw(st.booleans(), label="bias"),
    )
    assert_agree(layer, inputs(layer.in_channels, *[4] * dims))


@examples
@given(st.lists(st.integers(1, 4), max_size=2), st.sampled_from([None, 0, 2, -1]))
def test_embedding(shape: list[int], padding: int | None) -> None:
    assert_agree(nn.Embedding(5, 3, padding_idx=padding), tokens(5, *shape))


@pytest.mark.parametrize("shape", [(), (1,), (400,), (2, 3)])
def test_embedding_with_its_sums_in_a_drawn_order(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "scatters_in_order", lambda device: False)
    for padding in (None, 2):
        assert_agree(nn.Embedding(5, 3, padding_idx=padding), tokens(5, *shape))


@examples
@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.lists(st.integers(2, 4), min_size=1, max_size=2),
    st.booleans(),
)
def test_layer_and_rms_norm(between: list[int], shape: list[int], bias: bool) -> None:
    x = inputs(*between, *shape)
    assert_agree(nn.Sequential(nn.LayerNorm(shape, bias=bias), nn.Tanh()), x)
    assert_agree(nn.Sequential(nn.RMSNorm(shape, eps=0.1), nn.Tanh()), x)


@examples
@given(st.integers(1, 3), st.integers(2, 3), st.lists(st.integers(1, 3), max_size=3))
def test_group_norm(groups: int, each: int, between: list[int]) -> None:
    assert_agree(nn.GroupNorm(groups, groups * each), inputs(groups * each, *between))


@examples
@given(st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_instance_norm(channels: int, dims: int, own: bool) -> None:
    kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    layer = kinds[dims - 1](channels, affine=True, track_running_stats=not own)
    assert_agree(layer, inputs(channels, *[3, 2, 2][:dims]))


@examples
@given(st.integers(1, 4), st.integers(0, 2), st.booleans())
def test_prelu(channels: int, dims: int, one: bool) -> None:
    assert_agree(nn.PReLU(1 if one else channels), -inputs(channels, *[3, 2][:dims]))


@examples
@given(st.integers(1, 4), st.integers(0, 3))
def test_batch_norm_by_its_running_statistics(channels: int, dims: int) -> None:
    kinds = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    assert_agree(kinds[dims](channels), inputs(channels, *[3, 2, 2][:dims]))


class Attention(nn.Module):
    def __init__(self, *, batch_first: bool, bias: bool, separate: bool, need_weights: bool):
        super().__init__()
        other = 5 if separate else 6
        self.inner = nn.MultiheadAttention(
            6, 2, bias=bias, batch_first=batch_first, kdim=other, vdim=other
        )
        self.first, self.need_weights = batch_first, need_weights

    def forward(self, x: Tensor, y: Tensor, ignored: Tensor) -> Tensor:
        x, y = (x, y) if self.first else (x.transpose(0, 1), y.transpose(0, 1))
        queries = x.shape[-2 if self.first else 0]
        causal = torch.ones(queries, 4, dtype=torch.bool, device=x.device).triu(1)
        out, weights = self.inner(
            x, y, y, ignored, need_weights=self.need_weights, attn_mask=causal
        )
        out = out if self.first else out.transpose(0, 1)
        return out if weights is None else torch.cat([out.flatten(1), weights.flatten(1)], 1)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_with_masks(
    batch_first: bool, bias: bool, separate: bool, need_weights: bool
) -> None:
    model = Attention(
        batch_first=batch_first, bias=bias, separate=separate, need_weights=need_weights
    )
    ignored = torch.tensor([[False] * 4, [False, False, True, True], [False, True, False, False]])
    assert_agree(model, inputs(3, 6), inputs(4, 5 if separate else 6), ignored)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((3 * len(x), 4, 4), 0.3, dtype=x.dtype, device=x.device)
        return self.inner(x, x, x, attn_mask=mask, average_attn_weights=False)[0]


def test_self_attention_with_an_additive_mask_for_each_head() -> None:
    assert_agree(SelfAttention(), inputs(4, 6))


class Bare(nn.Module):
    """A parameter that goes straight into arithmetic."""

    def __init__(self, use, *shape: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.rand(shape))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.p)


def in_place(x: Tensor, p: Tensor) -> Tensor:
    x = x * p
    x += p
    x -= p.sin()
    return x


BARE = {
    "x + p": (lambda x, p: x + p, 4, 5),
    "p + x": (lambda x, p: p + x, 1, 4, 5),
    "x - p": (lambda x, p: x - p, 5),
    "p - x": (lambda x, p: p - x, 4, 1),
    "x * p": (lambda x, p: x * p, 1, 1, 5),
    "p * x, a scalar": (lambda x, p: p * x,),
    "x / p": (lambda x, p: x / (p + 1), 5),
    "p / x": (lambda x, p: p / x, 4, 5),
    "p has more dimensions": (lambda x, p: x[:, 0, 0, None] * p, 1, 7),
    "in place": (in_place, 4, 5),
    "exponent": (lambda x, p: p.exp() * x,),
    "slice": (lambda x, p: x + p[:, :4], 1, 9, 5),
    "transposed": (lambda x, p: x @ p.t(), 7, 5),
    "x @ p": (lambda x, p: x @ p, 5, 7),
    "as Conv1D does": (
        lambda x, p: torch.addmm(p[0], x.view(-1, 5), p[1:]).view(*x.shape[:2], 7), 6, 7,
    ),
    "F.linear with a column": (lambda x, p: F.linear(x, p, p[:, 0]), 7, 5),
    "class token": (lambda x, p: torch.cat([p.expand(len(x), -1, -1), x], 1), 1, 1, 5),
    "repeated token": (lambda x, p: torch.cat((x, p.repeat(len(x), 1, 1)), dim=-2), 1, 2, 5),
    "expanded and added": (lambda x, p: x * p.expand(len(x), 4, 5), 4, 5),
    "weight of norm 1": (lambda x, p: F.linear(x, p / p.norm(dim=1, keepdim=True)), 7, 5),
    "positions": (lambda x, p: x + F.embedding(torch.arange(4, device=x.device), p), 9, 5),
    "two parts": (lambda x, p: F.linear(x, p.chunk(2)[0], p.chunk(2)[1][:, 0]), 8, 5),
    "frames in the batch": (
        lambda x, p: F.conv1d(x.reshape(-1, 1, 5), p).view(len(x), 4, -1), 2, 1, 3,
    ),
    "einsum": (lambda x, p: torch.einsum("bti,oi->bto", x, p), 7, 5),
    "einsum, parameter first": (lambda x, p: torch.einsum("i, bti -> bt", [p, x]), 5),
    "einsum, elementwise": (lambda x, p: torch.einsum("bti,ti->bti", x, p), 4, 5),
    "not for the gradient": (lambda x, p: F.linear(x, p) * p.detach().sum(), 7, 5),
}  # fmt: skip


@pytest.mark.parametrize("use", BARE)
def test_bare_parameters(use: str) -> None:
    formula, *shape = BARE[use]
    assert_agree(Bare(formula, *shape), inputs(4, 5))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_parametrized_weights() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
    assert_agree(layer, inputs(4, 5))
