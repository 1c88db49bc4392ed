"""Rules of products, of layers, and of what else a network is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trak_dist.ops.examples import Along, Found, Lost, of
from trak_dist.ops.following.call import Call, Rule
from trak_dist.ops.following.entries import broadcast


def matmul(call: Call) -> Found:
    """`a @ b`: examples may be rows of a, columns of b, or a dimension that both are batched by."""
    left, right = call.args[:2] if len(call.args) > 1 else call.tensors[:2]
    return _product(left, right, call.outs[0], call)


def linear(call: Call) -> Found:
    """`x Wᵀ + b`."""
    found, x = of(call.first), call.first
    if not isinstance(found, Along) or len(call.held) > 1 or found.dim == x.ndim - 1:
        return call.lost()
    return found


def added_product(call: Call) -> Found:
    """`c + a @ b`."""
    start, left, right = call.args[:3] if len(call.args) > 2 else call.tensors[:3]
    out = call.outs[0]
    product = _product(left, right, out, call) if of(left) or of(right) else None
    if isinstance(product, Lost):
        return product
    like = torch.empty(()).expand(out.shape)
    return broadcast([(start, of(start)), (like, product)], out.shape, call)


def _product(left: Tensor, right: Tensor, out: Tensor, call: Call) -> Found:
    """By dimensions from the end, of which the last of a is added up with the last but one of b."""
    a, b = of(left), of(right)
    if isinstance(a, Along) and isinstance(b, Along):
        batched = a.dim - left.ndim == b.dim - right.ndim < -2 and a.as_good_as(b)
        return Along(out.ndim + a.dim - left.ndim, a.ids) if batched else call.lost()
    if isinstance(a, Along) and left.ndim > 1 and a.dim < left.ndim - 1:
        from_end = a.dim - left.ndim + (right.ndim == 1)
    elif isinstance(b, Along) and right.ndim > 1 and b.dim != right.ndim - 2:
        from_end = b.dim - right.ndim + (left.ndim == 1 and b.dim < right.ndim - 2)
    else:
        return call.lost()
    found = a if isinstance(a, Along) else b
    assert isinstance(found, Along)
    return _sized(out.ndim + from_end, found, out, call)


def _sized(dim: int, found: Along, out: Tensor, call: Call) -> Found:
    """Examples along `dim`, where one that was broadcast is all of it."""
    if len(found.ids) not in (1, out.shape[dim]):
        return call.lost()
    return Along(dim, found.ids.expand(out.shape[dim]))


def einsum(call: Call) -> Found:
    """Examples are a letter that all that hold them have, and the result too."""
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    terms, _, result = str(equation).replace(" ", "").partition("->")
    names = terms.split(",")
    if "." in terms or not result or len(names) != len(operands):
        return call.lost()
    held = [
        (n[f.dim], f) for n, t in zip(names, operands, strict=True) if isinstance(f := of(t), Along)
    ]
    letter, found = held[0]
    if any(name != letter or not f.as_good_as(found) for name, f in held):
        return call.lost()
    return Along(result.index(letter), found.ids) if result.count(letter) == 1 else call.lost()


def attention(call: Call) -> Found:
    """Scaled dot products: examples are a dimension that all operands are batched by."""
    if any(found.dim - tensor.ndim > -3 for tensor, found in call.held):
        return call.lost()
    # Without the dimensions that are added up: no shape of theirs is the result's.
    before = [(torch.empty(()).expand(t.shape[:-2]), of(t)) for t in call.tensors]
    out = call.outs[0].shape[:-2]
    return broadcast(before, out, call)


def images(spatial: int, *, channels: bool) -> Rule:
    """Works on the last dimensions; with `channels` on the one before them too."""

    def rule(call: Call) -> Found:
        found, x = of(call.first), call.first
        if not isinstance(found, Along) or any(
            f.dim or not f.as_good_as(found) for _, f in call.held[1:]
        ):
            return call.lost()
        return found if found.dim < x.ndim - spatial - channels else call.lost()

    return rule


def come_first(call: Call) -> Found:
    """Each example apart, of one tensor or of several, where examples come first in all of them."""
    found = call.held[0][1]
    return call.lost() if any(f.dim or not f.as_good_as(found) for _, f in call.held) else found


def layer_norm(call: Call) -> Found:
    """Normalises the last dimensions."""
    shape: Sequence[int] = call.get(1, "normalized_shape")
    found = of(call.first)
    if not isinstance(found, Along) or len(call.held) > 1:
        return call.lost()
    return found if found.dim < call.first.ndim - len(shape) else call.lost()


def by_example(call: Call) -> Found:
    """Normalises, or works on, all of an example at once: examples must come first."""
    found = of(call.first)
    return (
        found if isinstance(found, Along) and not found.dim and len(call.held) == 1 else call.lost()
    )


def batch_norm(call: Call) -> Found:
    """Normalises channels by their running statistics; by the batch's, examples would mix."""
    running, training = call.get(1, "running_mean"), call.get(5, "training", default=False)
    found = of(call.first)
    mixes = training or running is None or len(call.held) > 1
    return found if isinstance(found, Along) and found.dim != 1 and not mixes else call.lost()


def prelu(call: Call) -> Found:
    """Slopes of channels, which hold nothing of examples."""
    slopes = call.get(1, "weight")
    return call.lost() if of(slopes) else of(call.first)


def embedding(call: Call) -> Found:
    """Rows of a table that holds nothing of examples."""
    index, table = call.get(0, "input"), call.get(1, "weight")
    return call.lost() if of(table) else of(index)


def embedding_bag(call: Call) -> Found:
    """Sums of rows of a table, one for each row of indices."""
    index = call.get(0, "input")
    found = of(index)
    of_rows = isinstance(found, Along) and not found.dim and index.ndim == 2
    if len(call.held) > 1:
        return call.lost()
    return found if of_rows and call.get(2, "offsets") is None else call.lost()


def recurrent(call: Call) -> Found | list[Found]:
    """`lstm`, `gru`, `rnn_tanh`, `rnn_relu`: outputs as the input, states with examples second."""
    x, *_ = call.args
    found = of(x)
    if not isinstance(found, Along) or not isinstance(call.args[-1], bool) or x.ndim != 3:
        return call.lost()  # packed
    if found.dim != (0 if call.args[-1] else 1):
        return call.lost()
    states = [(t, f) for t, f in call.held if t is not x]
    if any(f.dim != t.ndim - 2 or not f.as_good_as(found) for t, f in states):
        return call.lost()
    return [found, *(Along(1, found.ids) for _ in call.outs[1:])]


def recurrent_cell(call: Call) -> Found:
    """One step of these."""
    found = of(call.first)
    same = all(not f.dim and f.as_good_as(call.held[0][1]) for _, f in call.held)
    return found if isinstance(found, Along) and same and call.first.ndim == 2 else call.lost()
