"""Rules of products, of layers, and of what else a network is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trak_dist.ops.example_axis import AxisInfo, ExampleAxis, Untracked, axis_of
from trak_dist.ops.tracking.call import Call, Rule
from trak_dist.ops.tracking.elementwise import broadcast


def matmul(call: Call) -> AxisInfo:
    """`a @ b`: examples may be rows of a, columns of b, or a dimension that both are batched by."""
    left, right = call.args[:2] if len(call.args) > 1 else call.tensors[:2]
    return _product(left, right, call.outs[0], call)


def linear(call: Call) -> AxisInfo:
    """`x Wᵀ + b`."""
    found, x = axis_of(call.first), call.first
    if (
        not isinstance(found, ExampleAxis)
        or len(call.tracked_operands) > 1
        or found.dim == x.ndim - 1
    ):
        return call.untracked()
    return found


def added_product(call: Call) -> AxisInfo:
    """`c + a @ b`."""
    start, left, right = call.args[:3] if len(call.args) > 2 else call.tensors[:3]
    out = call.outs[0]
    product = _product(left, right, out, call) if axis_of(left) or axis_of(right) else None
    if isinstance(product, Untracked):
        return product
    like = torch.empty(()).expand(out.shape)
    return broadcast([(start, axis_of(start)), (like, product)], out.shape, call)


def grouped(call: Call) -> AxisInfo:
    """Rows times a matrix each; up to which row which one is for is a choice, as `if` and `for`."""
    found, x = axis_of(call.first), call.first
    plain = x.ndim == 2 and axis_of(call.args[1]) is None and call.kwargs.get("bias") is None
    return found if isinstance(found, ExampleAxis) and not found.dim and plain else call.untracked()


def _product(left: Tensor, right: Tensor, out: Tensor, call: Call) -> AxisInfo:
    """By dimensions from the end, of which the last of a is added up with the last but one of b."""
    a, b = axis_of(left), axis_of(right)
    if isinstance(a, ExampleAxis) and isinstance(b, ExampleAxis):
        batched = a.dim - left.ndim == b.dim - right.ndim < -2 and a.has_same_examples(b)
        return ExampleAxis(out.ndim + a.dim - left.ndim, a.ids) if batched else call.untracked()
    if isinstance(a, ExampleAxis) and left.ndim > 1 and a.dim < left.ndim - 1:
        from_end = a.dim - left.ndim + (right.ndim == 1)
    elif isinstance(b, ExampleAxis) and right.ndim > 1 and b.dim != right.ndim - 2:
        from_end = b.dim - right.ndim + (left.ndim == 1 and b.dim < right.ndim - 2)
    else:
        return call.untracked()
    found = a if isinstance(a, ExampleAxis) else b
    assert isinstance(found, ExampleAxis)
    return _sized(out.ndim + from_end, found, out, call)


def _sized(dim: int, found: ExampleAxis, out: Tensor, call: Call) -> AxisInfo:
    """Examples along `dim`, where one that was broadcast is all of it."""
    if len(found.ids) not in (1, out.shape[dim]):
        return call.untracked()
    return ExampleAxis(dim, found.ids.expand(out.shape[dim]))


def einsum(call: Call) -> AxisInfo:
    """Examples are a letter that all that hold them have, and the result too."""
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    terms, _, result = str(equation).replace(" ", "").partition("->")
    names = terms.split(",")
    if "." in terms or not result or len(names) != len(operands):
        return call.untracked()
    held = [
        (n[f.dim], f)
        for n, t in zip(names, operands, strict=True)
        if isinstance(f := axis_of(t), ExampleAxis)
    ]
    letter, found = held[0]
    if any(name != letter or not f.has_same_examples(found) for name, f in held):
        return call.untracked()
    return (
        ExampleAxis(result.index(letter), found.ids)
        if result.count(letter) == 1
        else call.untracked()
    )


def attention(call: Call) -> AxisInfo:
    """Scaled dot products: examples are a dimension that all operands are batched by."""
    if any(found.dim - tensor.ndim > -3 for tensor, found in call.tracked_operands):
        return call.untracked()
    # Without the dimensions that are added up: no shape of theirs is the result's.
    before = [(torch.empty(()).expand(t.shape[:-2]), axis_of(t)) for t in call.tensors]
    out = call.outs[0].shape[:-2]
    return broadcast(before, out, call)


def images(spatial: int, *, channels: bool) -> Rule:
    """Works on the last dimensions; with `channels` on the one before them too."""

    def rule(call: Call) -> AxisInfo:
        found, x = axis_of(call.first), call.first
        if not isinstance(found, ExampleAxis) or any(
            f.dim or not f.has_same_examples(found) for _, f in call.tracked_operands[1:]
        ):
            return call.untracked()
        return found if found.dim < x.ndim - spatial - channels else call.untracked()

    return rule


def come_first(call: Call) -> AxisInfo:
    """Each example apart, of one tensor or of several, where examples come first in all of them."""
    found = call.tracked_operands[0][1]
    return (
        call.untracked()
        if any(f.dim or not f.has_same_examples(found) for _, f in call.tracked_operands)
        else found
    )


def layer_norm(call: Call) -> AxisInfo:
    """Normalises the last dimensions."""
    shape: Sequence[int] = call.get(1, "normalized_shape")
    found = axis_of(call.first)
    if not isinstance(found, ExampleAxis) or len(call.tracked_operands) > 1:
        return call.untracked()
    return found if found.dim < call.first.ndim - len(shape) else call.untracked()


def by_example(call: Call) -> AxisInfo:
    """Normalises, or works on, all of an example at once: examples must come first."""
    found = axis_of(call.first)
    return (
        found
        if isinstance(found, ExampleAxis) and not found.dim and len(call.tracked_operands) == 1
        else call.untracked()
    )


def batch_norm(call: Call) -> AxisInfo:
    """Normalises channels by their running statistics; by the batch's, examples would mix."""
    running, training = call.get(1, "running_mean"), call.get(5, "training", default=False)
    found = axis_of(call.first)
    mixes = training or running is None or len(call.tracked_operands) > 1
    return (
        found
        if isinstance(found, ExampleAxis) and found.dim != 1 and not mixes
        else call.untracked()
    )


def prelu(call: Call) -> AxisInfo:
    """Slopes of channels, which do not depend on examples."""
    slopes = call.get(1, "weight")
    return call.untracked() if axis_of(slopes) else axis_of(call.first)


def embedding(call: Call) -> AxisInfo:
    """Rows of a table that holds nothing of examples."""
    index, table = call.get(0, "input"), call.get(1, "weight")
    return call.untracked() if axis_of(table) else axis_of(index)


def embedding_bag(call: Call) -> AxisInfo:
    """Sums of rows of a table, one for each row of indices."""
    index = call.get(0, "input")
    found = axis_of(index)
    of_rows = isinstance(found, ExampleAxis) and not found.dim and index.ndim == 2
    if len(call.tracked_operands) > 1:
        return call.untracked()
    return found if of_rows and call.get(2, "offsets") is None else call.untracked()


def recurrent(call: Call) -> AxisInfo | list[AxisInfo]:
    """`lstm`, `gru`, `rnn_tanh`, `rnn_relu`: outputs as the input, states with examples second."""
    x, *_ = call.args
    found = axis_of(x)
    if not isinstance(found, ExampleAxis) or not isinstance(call.args[-1], bool) or x.ndim != 3:
        return call.untracked()  # packed
    if found.dim != (0 if call.args[-1] else 1):
        return call.untracked()
    states = [(t, f) for t, f in call.tracked_operands if t is not x]
    if any(f.dim != t.ndim - 2 or not f.has_same_examples(found) for t, f in states):
        return call.untracked()
    return [found, *(ExampleAxis(1, found.ids) for _ in call.outs[1:])]


def recurrent_cell(call: Call) -> AxisInfo:
    """One step of these."""
    found = axis_of(call.first)
    same = all(
        not f.dim and f.has_same_examples(call.tracked_operands[0][1])
        for _, f in call.tracked_operands
    )
    return (
        found
        if isinstance(found, ExampleAxis) and same and call.first.ndim == 2
        else call.untracked()
    )
