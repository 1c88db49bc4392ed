"""Which entries of a tensor belong to which example of a batch.

In a model's forward pass examples move: a batch is sorted, its padding left out, its tokens sent to
experts, its dimensions put in another order. `ExampleAxis` says along which dimension they are;
`Untracked` that this is unknown, and since which function. A tensor with neither does not depend on
examples. The rules of functions are in `ops.tracking`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int64
from torch import Tensor

NO_EXAMPLE = -1


@dataclass(frozen=True, eq=False)
class ExampleAxis:
    """Examples are along a dimension: index j of it depends on example `ids[j]` alone.

    `ids` is on the CPU, whatever device the tensor is on; `NO_EXAMPLE` where no example is. A
    tensor without dimensions has one id.
    """

    dim: int
    ids: Int64[Tensor, " size"]

    @cached_property
    def single_example(self) -> int | None:
        """The one example that all of the tensor is of; None if there are several, or none."""
        if not len(self.ids):
            return None
        minimum, most = (int(found) for found in self.ids.aminmax())
        return minimum if minimum == most != NO_EXAMPLE else None

    def has_same_examples(self, other: ExampleAxis) -> bool:
        """Whether both have the same examples at the same indices."""
        return self.ids is other.ids or torch.equal(self.ids, other.ids)

    def expand_to(self, shape: Sequence[int]) -> Int64[Tensor, "..."]:
        """The example of each entry of a tensor of this shape; takes no memory of that size."""
        if not shape:
            return self.ids.reshape(())
        own = [1] * len(shape)
        own[self.dim] = len(self.ids)
        return self.ids.view(own).expand(tuple(shape))


@dataclass(frozen=True)
class Untracked:
    """The example of an entry is unknown, or it depends on several; since the function `by`."""

    by: str


AxisInfo = ExampleAxis | Untracked | None


def axis_of(value: object) -> AxisInfo:
    """The axis of the examples in a tensor; None if it does not depend on them."""
    if not isinstance(value, Tensor):
        return None
    found, version = recorded_axis(value)
    base = value._base  # noqa: SLF001
    if version == value._version or (base is None and version is None):  # noqa: SLF001
        return found
    if base is None:
        return Untracked("a change in place that was not seen")
    # It was changed by way of another view; all changes are noted on what they are views of.
    return axis_in_view(value, base) if axis_of(base) is not None else found


def recorded_axis(tensor: Tensor) -> tuple[AxisInfo, int | None]:
    """What was recorded last, and at which version of the tensor."""
    last: tuple[AxisInfo, int | None] = getattr(tensor, "_examples", (None, None))
    return last


def record_axis(tensor: Tensor, found: AxisInfo) -> Tensor:
    """Recorded on the tensor itself, since ids of tensors are reused."""
    tensor._examples = (found, tensor._version)  # type: ignore[attr-defined]  # noqa: SLF001
    return tensor


def entry_owners(tensor: Tensor) -> Int64[Tensor, "..."]:
    """The example of each entry of a tensor; `NO_EXAMPLE` where that is unknown."""
    found = axis_of(tensor)
    if isinstance(found, ExampleAxis):
        return found.expand_to(tensor.shape)
    return torch.full((), NO_EXAMPLE).expand(tensor.shape)


def axis_in_view(view: Tensor, base: Tensor) -> AxisInfo:
    """The axis of the examples in a view, from its base tensor."""
    found, by = axis_of(base), "a change in place of what it is a view of"
    if not isinstance(found, ExampleAxis) or not base.is_contiguous() or view.dtype != base.dtype:
        return found if isinstance(found, Untracked) else Untracked(by)
    own = entry_owners(base).contiguous()
    offset = view.storage_offset() - base.storage_offset()
    return axis_from_owners(own.as_strided(view.shape, view.stride(), offset), by)


def mark_batch_first(tensor: Tensor, size: int) -> Tensor:
    """Record that the examples of a batch are a tensor's first dimension."""
    if not tensor.ndim or len(tensor) != size:
        return record_axis(
            tensor, Untracked(f"a batch of {size} with a tensor of shape {tuple(tensor.shape)}")
        )
    return record_axis(tensor, ExampleAxis(0, torch.arange(size)))


def axis_from_owners(owners: Int64[Tensor, "..."], by: str) -> AxisInfo:
    """The axis of the examples, from the example of each entry.

    There is one if all entries at each index of a dimension are of one example, or of none.
    """
    if not owners.ndim:
        one = owners.reshape(1)
        return None if int(one) == NO_EXAMPLE else ExampleAxis(0, one)
    if not owners.numel():
        return ExampleAxis(owners.shape.index(0), owners.new_empty(0))
    # Along a dimension of stride 0 all is as at its first index.
    varied = [d for d in range(owners.ndim) if owners.shape[d] > 1 and owners.stride(d)]
    for dim in dict.fromkeys((0, *varied)):
        seen = {*varied, dim}
        some = owners[tuple(slice(None if d in seen else 1) for d in range(owners.ndim))]
        columns = some.movedim(dim, 0).flatten(1) if owners.ndim > 1 else some[:, None]
        ids = columns.amax(1)
        if ((columns == ids[:, None]) | (columns == NO_EXAMPLE)).all():
            return None if bool((ids == NO_EXAMPLE).all()) else ExampleAxis(dim, ids)
    return Untracked(by)


def merge_owners(owners: Sequence[Int64[Tensor, "..."]], shape: Sequence[int], by: str) -> AxisInfo:
    """The axis of the examples in the elementwise result of tensors with these owners."""
    most = torch.full((), NO_EXAMPLE).expand(tuple(shape))
    for own in owners:
        own = own.expand(tuple(shape))  # noqa: PLW2901
        if ((own != most) & (own != NO_EXAMPLE) & (most != NO_EXAMPLE)).any():
            return Untracked(by)
        most = torch.maximum(most, own)
    return axis_from_owners(most, by)


class RowsByExample:
    """The rows of a tensor, grouped by example.

    Where each example has equally many consecutive rows, that is a view of the tensor; else
    examples are padded with zero rows.
    """

    def __init__(self, ids: Int64[Tensor, " rows"], size: int) -> None:
        self._size, self._each = size, len(ids) // size
        self._index: Tensor | None = None
        self._unowned: Tensor | None = None
        regular = torch.arange(size).repeat_interleave(self._each)
        if torch.equal(ids, regular):
            return
        taken = (ids != NO_EXAMPLE).nonzero()[:, 0]
        if len(taken) < len(ids):
            self._unowned = (ids == NO_EXAMPLE).nonzero()[:, 0]
        order = taken[ids[taken].argsort(stable=True)]
        counts = ids[taken].bincount(minlength=size)
        first = counts.cumsum(0) - counts
        self._each = max(1, int(counts.max()))
        steps = torch.arange(self._each)
        self._blank = steps >= counts[:, None]
        places = (first[:, None] + steps).clamp(max=max(0, len(order) - 1))
        self._index = order[places] if len(order) else torch.zeros_like(places)

    def group(self, tensor: Tensor) -> Tensor:
        """A tensor (rows, ...) as (size, rows of each, ...)."""
        if self._index is None:
            return tensor.reshape(self._size, self._each, *tensor.shape[1:])
        if not len(tensor):
            return tensor.new_zeros(self._size, self._each, *tensor.shape[1:])
        found = tensor[self._index.to(tensor.device)]
        if not tensor.is_floating_point():
            return found
        blank = self._blank.to(tensor.device)
        return found.masked_fill_(blank.view(*blank.shape, *[1] * (tensor.ndim - 1)), 0)

    def unowned_have_gradient(self, grad: Tensor) -> bool:
        """Whether rows of no example have a gradient, which would be lost."""
        if self._unowned is None:
            return False
        return bool(grad[self._unowned.to(grad.device)].any())
