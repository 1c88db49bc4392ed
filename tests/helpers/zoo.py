"""Models as people write them, composed at random: blocks that move the examples of a batch about.

A block takes (batch, tokens, WIDTH) and where tokens are no padding, and gives the same shape.
`MIXING` ones make an example depend on the other examples of its batch, on purpose.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, rnn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.utils.checkpoint import checkpoint

WIDTH, TOKENS, CLASSES = 4, 5, 3
Forward = Callable[["Block", Tensor, Tensor], Tensor]
BLOCKS: dict[str, Forward] = {}
MIXING: dict[str, Forward] = {}


def block(name: str, kind: dict[str, Forward] = BLOCKS) -> Callable[[Forward], Forward]:
    def add(forward: Forward) -> Forward:
        kind[name] = forward
        return forward

    return add


class Block(nn.Module):
    """What blocks use: each takes what it needs of it."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.way = forward
        self.layer, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.twice = nn.ModuleList([self.layer] * 2)
        self.norm = nn.LayerNorm(WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.gru = nn.GRU(WIDTH, WIDTH)
        self.cell = nn.LSTMCell(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.table = nn.Embedding(5, WIDTH, max_norm=0.5)
        self.old = old_weight_norm(nn.Linear(WIDTH, WIDTH))
        self.new = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.spectral = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.batch_norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return h + torch.tanh(self.way(self, h, keep))


class Net(nn.Module):
    """Blocks, and a head on the mean over tokens."""

    def __init__(self, names: list[str], *, entry: str) -> None:
        super().__init__()
        self.entry = entry
        ways = {**BLOCKS, **MIXING}
        self.blocks = nn.ModuleList([Block(ways[name]) for name in names])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        keep = (x != 0).any(-1)
        if self.entry == "in place":
            x.sub_(0.1).div_(1.1)
        elif self.entry == "in place, by a view":
            x[:, :1].mul_(2)
        h = x
        for one in self.blocks:
            h = one(h, keep)
        weight = keep[..., None].to(h.dtype)
        return self.head((h * weight).sum(1) / weight.sum(1))


@block("linear")
def _(m, h, keep):
    return m.layer(h)


@block("sorted by length")
def _(m, h, keep):
    order = keep.sum(1).argsort(descending=True, stable=True)
    return m.layer(h[order])[order.argsort()]


@block("sorted, index_select")
def _(m, h, keep):
    _, order = keep.sum(1).sort(descending=True, stable=True)
    found = m.layer(h.index_select(0, order))
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return found.index_select(0, back)


@block("packed by a mask")
def _(m, h, keep):
    full = torch.zeros_like(h)
    full[keep] = m.layer(h[keep])
    return full


@block("packed by nonzero, index_add")
def _(m, h, keep):
    at = keep.flatten().nonzero()[:, 0]
    rows = m.layer(h.flatten(0, 1)[at])
    return torch.zeros_like(h).flatten(0, 1).index_add(0, at, rows).view_as(h)


@block("packed, index_put")
def _(m, h, keep):
    at = keep.nonzero(as_tuple=True)
    return torch.zeros_like(h).index_put(at, m.layer(h[at]))


@block("packed, masked_scatter by scatter")
def _(m, h, keep):
    at = keep.flatten().nonzero()[:, 0]
    rows = m.layer(h.flatten(0, 1).index_select(0, at))
    flat = torch.zeros_like(h).flatten(0, 1)
    return flat.scatter(0, at[:, None].expand_as(rows), rows).view_as(h)


@block("experts, Mixtral")
def _(m, h, keep):
    rows = h.reshape(-1, WIDTH)
    weights, chosen = m.gate(rows).softmax(-1).topk(2, dim=-1)
    out = torch.zeros_like(rows)
    mask = F.one_hot(chosen, 3).permute(2, 1, 0)
    for expert, layer in enumerate(m.experts):
        which, at = torch.where(mask[expert])
        found = layer(rows[None, at].reshape(-1, WIDTH)) * weights[at, which, None]
        out.index_add_(0, at, found)
    return out.view_as(h)


@block("experts, sorted")
def _(m, h, keep):
    rows = h.reshape(-1, WIDTH)
    chosen = m.gate(rows).topk(2, dim=-1).indices.flatten()
    order = chosen.argsort(stable=True)
    parts = rows[order // 2].split(chosen.bincount(minlength=3).tolist())
    done = torch.cat([layer(part) for layer, part in zip(m.experts, parts, strict=True)])
    return done[order.argsort()].view(-1, 2, WIDTH).sum(1).view_as(h)


@block("experts of a capacity")
def _(m, h, keep):
    rows = h.reshape(-1, WIDTH)
    chosen = F.one_hot(m.gate(rows).argmax(-1), 3)
    place = (chosen.cumsum(0) * chosen).sum(-1)
    out = torch.zeros_like(rows)
    for expert, layer in enumerate(m.experts):
        at = ((chosen[:, expert] == 1) & (place <= 4)).nonzero()[:, 0]
        out = out.index_copy(0, at, layer(rows[at]))
    return out.view_as(h)


@block("a head for each task")
def _(m, h, keep):
    task, out = (h[:, 0, 0] > 0).long() + (h[:, 0, 1] > 0).long(), h.new_zeros(h.shape)
    for number, layer in enumerate(m.experts):
        at = (task == number).nonzero()[:, 0]
        if len(at):
            out[at] = layer(h[at])
    return out


@block("heads by a mask")
def _(m, h, keep):
    first = h[:, 0].sum(-1) > 0
    return torch.where(first[:, None, None], m.experts[0](h), m.experts[1](h))


@block("one module under two names")
def _(m, h, keep):
    return m.twice[1](torch.tanh(m.twice[0](h)))


@block("tied, by F.linear")
def _(m, h, keep):
    return F.linear(torch.tanh(m.layer(h)), m.layer.weight.T, m.layer.bias)


@block("in place")
def _(m, h, keep):
    found = m.layer(h)
    found += 1
    return F.relu(found, inplace=True) * m.scale


@block("in place on views")
def _(m, h, keep):
    found = m.layer(h) * 1
    found[:, :1].mul_(2)
    found[..., :2].add_(found[..., 2:])
    found[..., 0] = 0.5
    return m.experts[0](found)


@block("written into a buffer of the batch")
def _(m, h, keep):
    space = h.new_zeros(h.shape)
    one = space[:, 0]
    space.copy_(m.layer(h))
    return space + m.experts[0](one)[:, None]


@block("masked_fill")
def _(m, h, keep):
    return m.layer(h.masked_fill(~keep[..., None], 0.0)) * keep[..., None]


@block("two views, cat and chunk")
def _(m, h, keep):
    first, second = m.layer(torch.cat([h, 2 * h])).chunk(2)
    return first * second


@block("two views, stack and flatten")
def _(m, h, keep):
    both = torch.stack([h, -h], 1).flatten(0, 1)
    return m.layer(both).unflatten(0, (-1, 2)).prod(1)


@block("flattened")
def _(m, h, keep):
    return m.layer(h.reshape(-1, WIDTH)).view_as(h)


@block("tokens first")
def _(m, h, keep):
    return m.layer(h.transpose(0, 1).contiguous()).transpose(0, 1)


@block("tokens first, flattened")
def _(m, h, keep):
    turned = h.transpose(0, 1)
    return m.layer(turned.reshape(-1, WIDTH)).view(turned.shape).transpose(0, 1)


@block("one example after the other")
def _(m, h, keep):
    return torch.stack([m.layer(one) for one in h])


@block("one after the other, by lengths")
def _(m, h, keep):
    found = [m.layer(one[:n]).mean(0) for one, n in zip(h, keep.sum(1).tolist(), strict=True)]
    return torch.stack(found)[:, None] + 0 * h


@block("counts and averages")
def _(m, h, keep):
    m.calls += 1
    m.mean.mul_(0.9).add_(0.1 * h.detach().mean((0, 1)))
    return m.layer(h)


@block("a table with max_norm")
def _(m, h, keep):
    return m.table((h[..., 0].abs() * 2).long().clamp(max=4))


@block("LSTM")
def _(m, h, keep):
    return m.lstm(h)[0]


@block("GRU, tokens first")
def _(m, h, keep):
    return m.gru(h.transpose(0, 1))[0].transpose(0, 1)


@block("LSTM, packed")
def _(m, h, keep):
    packed = rnn.pack_padded_sequence(h, keep.sum(1), batch_first=True, enforce_sorted=False)
    found = m.lstm(packed)[0]
    return rnn.pad_packed_sequence(found, batch_first=True, total_length=h.shape[1])[0]


@block("LSTM cell")
def _(m, h, keep):
    state, found = None, []
    for token in h.unbind(1):
        state = m.cell(token, state)
        found.append(state[0])
    return torch.stack(found, 1)


@block("checkpoint")
def _(m, h, keep):
    return checkpoint(m.layer, h, use_reentrant=False)


@block("checkpoint, reentrant")
def _(m, h, keep):
    return checkpoint(m.layer, h * m.scale, use_reentrant=True)


@block("weight norms")
def _(m, h, keep):
    return m.old(torch.tanh(m.new(h)))


@block("spectral norm")
def _(m, h, keep):
    return m.spectral(h)


@block("top tokens")
def _(m, h, keep):
    at = h[..., 0].topk(2, dim=1).indices[..., None].expand(-1, -1, WIDTH)
    best = m.layer(h.gather(1, at))
    return torch.zeros_like(h).scatter(1, at, best)


@block("take_along_dim")
def _(m, h, keep):
    order = h.argsort(1)
    return m.layer(torch.take_along_dim(h, order, 1))


@block("last tokens")
def _(m, h, keep):
    last = h[torch.arange(len(h)), keep.sum(1) - 1]
    return m.layer(last)[:, None].expand_as(h)


@block("one of the classes")
def _(m, h, keep):
    return m.layer(F.one_hot(h.argmax(-1), WIDTH).to(h.dtype)) * h


@block("a number at a place")
def _(m, h, keep):
    mark = torch.zeros_like(h)
    mark[torch.arange(len(h)), h[..., 0].argmax(1)] = 1.0
    return m.layer(mark + h)


@block("convolution and norm")
def _(m, h, keep):
    return m.norm(m.conv(h.mT).mT)


@block("attention")
def _(m, h, keep):
    return m.attention(h, h, h, key_padding_mask=~keep, need_weights=False)[0]


@block("einsum")
def _(m, h, keep):
    return torch.einsum("btd,ed->bte", h, m.layer.weight)


@block("padding told by arange")
def _(m, h, keep):
    inside = torch.arange(h.shape[1]) < keep.sum(1, keepdim=True)
    return m.layer(h) * inside[..., None]


@block("largest length")
def _(m, h, keep):
    found = m.layer(h[:, : int(keep.sum(1).max())])
    return F.pad(found, (0, 0, 0, h.shape[1] - found.shape[1])) * keep[..., None]


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / (1 + grad.norm())


square, sign, clipped = _Square.apply, _Sign.apply, _Clipped.apply


@block("a function of one's own")
def _(m, h, keep):
    return m.layer(square(h))


@block("weights through a function of one's own")
def _(m, h, keep):
    return F.linear(h, sign(m.layer.weight)) + F.linear(h, sign(2 * m.experts[0].weight))


@block("weights written to a buffer")
def _(m, h, keep):
    weight = torch.zeros(WIDTH, WIDTH, dtype=h.dtype)
    weight[:2] = m.layer.weight[:2]
    return F.linear(h, weight)


@block("weights written to the batch")
def _(m, h, keep):
    h = h.clone()
    h[:, 0] = m.scale
    return m.layer(h)


@block("weights detached")
def _(m, h, keep):
    return F.linear(h, m.layer.weight.detach()) + m.experts[0](h)


@block("by numpy")
def _(m, h, keep):
    return m.layer(torch.from_numpy(h.detach().numpy() * 2) + h)


@block("vmap inside")
def _(m, h, keep):
    return torch.func.vmap(m.layer)(h)


@block("a bias by position")
def _(m, h, keep):
    at = torch.arange(TOKENS)
    bias = m.table.weight[(at[:, None] - at).abs()][..., 0].clone()
    bias.mul_(2)
    logits = torch.where(keep[:, None], h @ h.mT + bias[: h.shape[1], : h.shape[1]], -1e9)
    return logits.softmax(-1) @ h


@block("scaled in place")
def _(m, h, keep):
    found = m.layer(h)
    found[:, :2].mul_(m.scale)
    found.pow_(2).add_(m.scale[0])
    return found


@block("packed, and an exponent")
def _(m, h, keep):
    full = torch.zeros_like(h)
    full[keep] = (1 + h[keep].abs()) ** m.scale
    return full


@block("a weight on the left")
def _(m, h, keep):
    order = keep.sum(1).argsort(stable=True)
    return (m.layer.weight @ h[order].mT).mT[order.argsort()] + m.layer.bias


@block("positions repeated for each example")
def _(m, h, keep):
    keys = m.norm(m.table.weight[: h.shape[1]])[None].repeat(len(h), 1, 1)
    return torch.bmm(h, keys.mT).softmax(-1) @ h


@block("a learned query")
def _(m, h, keep):
    query = m.layer(m.scale[None, None].expand(len(h), 1, -1))
    return F.scaled_dot_product_attention(query, h, h, keep[:, None]) + h


# Examples that depend on their companions -----------------------------------------------------


@block("batch statistics", MIXING)
def _(m, h, keep):
    return m.batch_norm(h.mT).mT


@block("centred over the batch", MIXING)
def _(m, h, keep):
    return m.layer(h - h.mean(0))


@block("softmax over the batch", MIXING)
def _(m, h, keep):
    return m.layer(h.softmax(0))


@block("attention over the batch", MIXING)
def _(m, h, keep):
    flat = h.flatten(0, 1)
    return m.layer((flat @ flat.T).softmax(-1) @ flat).view_as(h)


@block("the next example", MIXING)
def _(m, h, keep):
    return m.layer(h + h.roll(1, 0))


@block("largest of the batch, by numpy", MIXING)
def _(m, h, keep):
    return m.layer(torch.from_numpy(h.detach().numpy() - h.detach().numpy().mean(0)) + h)


@block("largest of the batch, by item", MIXING)
def _(m, h, keep):
    return m.layer(h / h.abs().max().item())


@block("a backward pass over the batch", MIXING)
def _(m, h, keep):
    return clipped(m.layer(h))


@block("a hook over the batch", MIXING)
def _(m, h, keep):
    found = m.layer(h)
    if found.requires_grad:
        found.register_hook(lambda grad: grad / (1 + grad.norm()))
    return found


@block("changed by .data", MIXING)
def _(m, h, keep):
    h = h.clone()
    h.data.sub_(h.data.mean(0))
    return m.layer(h)


@block("changed by a sibling", MIXING)
def _(m, h, keep):
    h = h.clone()
    one, other = h[:, 0], h.view(-1)
    other.copy_(h.flip(0).reshape(-1) + other)
    return m.layer(one)[:, None].expand_as(h)


@block("experts choose tokens", MIXING)
def _(m, h, keep):
    rows = h.reshape(-1, WIDTH)
    at = m.gate(rows)[:, 0].topk(1 + len(rows) // 2).indices
    return torch.zeros_like(rows).index_copy(0, at, m.layer(rows[at])).view_as(h)


ENTRIES = ("plain", "in place", "in place, by a view")


def drawn(seed: int) -> tuple[list[str], nn.Module, tuple[Tensor, Tensor]]:
    """A model's blocks, the model, and a batch of it; some examples come twice."""
    choose = random.Random(seed)
    names = choose.choices(list(BLOCKS), k=choose.randint(1, 3))
    if choose.random() < 0.2:
        names.insert(choose.randint(0, len(names)), choose.choice(list(MIXING)))
    torch.manual_seed(seed)
    model: Any = Net(names, entry=choose.choice(ENTRIES)).double().eval()
    size = choose.choice((1, 2, 3, 4, 6))
    x = torch.randn(size, TOKENS, WIDTH, dtype=torch.float64)
    lengths = torch.randint(1, TOKENS + 1, (size, 1))
    x = x * (torch.arange(TOKENS) < lengths)[..., None]
    if size > 2:
        x[-1] = x[0]
    return names, model, (x, torch.randint(CLASSES, (size,)))
