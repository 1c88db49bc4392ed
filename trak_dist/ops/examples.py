"""Where the examples of a batch lie in a tensor that was made of them.

In a model's forward pass examples move: a batch is sorted, its padding left out, its tokens sent to
experts, its dimensions put in another order. `Along` says where they are; `Lost` that this is not
known, and since which function. A tensor with neither holds nothing of any example. Which function
does what to them is in `ops.following`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int64
from torch import Tensor

NOBODY = -1


@dataclass(frozen=True, eq=False)
class Along:
    """Examples lie along a dimension: what is at index j of it is of example `ids[j]` alone.

    `ids` is on the CPU, whatever device the tensor is on; `NOBODY` where no example is. A tensor
    without dimensions has one id.
    """

    dim: int
    ids: Int64[Tensor, " size"]

    @cached_property
    def only(self) -> int | None:
        """The one example that all of the tensor is of; None if there are several, or none."""
        if not len(self.ids):
            return None
        least, most = (int(found) for found in self.ids.aminmax())
        return least if least == most != NOBODY else None

    def as_good_as(self, other: Along) -> bool:
        """Whether the same examples lie at the same indices."""
        return self.ids is other.ids or torch.equal(self.ids, other.ids)

    def spread(self, shape: Sequence[int]) -> Int64[Tensor, "..."]:
        """The example of each entry of a tensor of this shape; takes no memory of that size."""
        if not shape:
            return self.ids.reshape(())
        own = [1] * len(shape)
        own[self.dim] = len(self.ids)
        return self.ids.view(own).expand(tuple(shape))


@dataclass(frozen=True)
class Lost:
    """Of which example an entry is, is not known, or it is of several; since the function `by`."""

    by: str


Found = Along | Lost | None


def of(value: object) -> Found:
    """Where the examples lie in a tensor; None where it holds nothing of them."""
    if not isinstance(value, Tensor):
        return None
    found, version = noted(value)
    base = value._base  # noqa: SLF001
    if version == value._version or (base is None and version is None):  # noqa: SLF001
        return found
    if base is None:
        return Lost("a change in place that was not seen")
    # It was changed by way of another view; all changes are noted on what they are views of.
    return within(value, base) if of(base) is not None else found


def noted(tensor: Tensor) -> tuple[Found, int | None]:
    """What was noted last, and at which version of the tensor."""
    last: tuple[Found, int | None] = getattr(tensor, "_examples", (None, None))
    return last


def put(tensor: Tensor, found: Found) -> Tensor:
    """Note it on the tensor itself, since a tensor's id may be another's later on."""
    tensor._examples = (found, tensor._version)  # type: ignore[attr-defined]  # noqa: SLF001
    return tensor


def owners(tensor: Tensor) -> Int64[Tensor, "..."]:
    """The example of each entry of a tensor; nobody where that is not known."""
    found = of(tensor)
    if isinstance(found, Along):
        return found.spread(tensor.shape)
    return torch.full((), NOBODY).expand(tensor.shape)


def within(view: Tensor, base: Tensor) -> Found:
    """Where examples lie in a view, by the tensor that it is a view of."""
    found, by = of(base), "a change in place of what it is a view of"
    if not isinstance(found, Along) or not base.is_contiguous() or view.dtype != base.dtype:
        return found if isinstance(found, Lost) else Lost(by)
    own = owners(base).contiguous()
    offset = view.storage_offset() - base.storage_offset()
    return located(own.as_strided(view.shape, view.stride(), offset), by)


def come_first(tensor: Tensor, size: int) -> Tensor:
    """Note that the examples of a batch are a tensor's first dimension."""
    if not tensor.ndim or len(tensor) != size:
        return put(tensor, Lost(f"a batch of {size} with a tensor of shape {tuple(tensor.shape)}"))
    return put(tensor, Along(0, torch.arange(size)))


def located(owners: Int64[Tensor, "..."], by: str) -> Found:
    """Where examples lie in a tensor whose entries are of these ones.

    That is along one dimension, if the entries at each of its indices are all of one example but
    for those that are nobody's.
    """
    if not owners.ndim:
        one = owners.reshape(1)
        return None if int(one) == NOBODY else Along(0, one)
    if not owners.numel():
        return Along(owners.shape.index(0), owners.new_empty(0))
    # Along a dimension of stride 0 all is as at its first index.
    varied = [d for d in range(owners.ndim) if owners.shape[d] > 1 and owners.stride(d)]
    for dim in dict.fromkeys((0, *varied)):
        seen = {*varied, dim}
        some = owners[tuple(slice(None if d in seen else 1) for d in range(owners.ndim))]
        columns = some.movedim(dim, 0).flatten(1) if owners.ndim > 1 else some[:, None]
        ids = columns.amax(1)
        if ((columns == ids[:, None]) | (columns == NOBODY)).all():
            return None if bool((ids == NOBODY).all()) else Along(dim, ids)
    return Lost(by)


def merged(owners: Sequence[Int64[Tensor, "..."]], shape: Sequence[int], by: str) -> Found:
    """Where they lie in what is made entry by entry of tensors whose entries are of these ones."""
    most = torch.full((), NOBODY).expand(tuple(shape))
    for own in owners:
        own = own.expand(tuple(shape))  # noqa: PLW2901
        if ((own != most) & (own != NOBODY) & (most != NOBODY)).any():
            return Lost(by)
        most = torch.maximum(most, own)
    return located(most, by)


class Rows:
    """The rows of a tensor, dealt out to the examples that they are of.

    Where each example has equally many, one after the other, that is another view of the tensor;
    else each gets as many as the one that has most, those that are too many being zero.
    """

    def __init__(self, ids: Int64[Tensor, " rows"], size: int) -> None:
        self._size, self._each = size, len(ids) // size
        self._index: Tensor | None = None
        self._nobodys: Tensor | None = None
        regular = torch.arange(size).repeat_interleave(self._each)
        if torch.equal(ids, regular):
            return
        taken = (ids != NOBODY).nonzero()[:, 0]
        if len(taken) < len(ids):
            self._nobodys = (ids == NOBODY).nonzero()[:, 0]
        order = taken[ids[taken].argsort(stable=True)]
        counts = ids[taken].bincount(minlength=size)
        first = counts.cumsum(0) - counts
        self._each = max(1, int(counts.max()))
        steps = torch.arange(self._each)
        self._blank = steps >= counts[:, None]
        places = (first[:, None] + steps).clamp(max=max(0, len(order) - 1))
        self._index = order[places] if len(order) else torch.zeros_like(places)

    def dealt(self, tensor: Tensor) -> Tensor:
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

    def left_out(self, grad: Tensor) -> bool:
        """Whether rows that are of no example have a gradient, so that it would be lost."""
        if self._nobodys is None:
            return False
        return bool(grad[self._nobodys.to(grad.device)].any())
