"""What an index says: which places of a tensor, and of which examples they are."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from trak_dist.ops.example_axis import (
    NO_EXAMPLE,
    AxisInfo,
    ExampleAxis,
    Untracked,
    axis_from_owners,
    axis_of,
    entry_owners,
    record_axis,
)
from trak_dist.ops.tracking.elementwise import shape_of

Owners = Int64[Tensor, "..."]

MASKS = (torch.bool, torch.uint8)


def places_of(index: Any, tensor: Tensor) -> tuple[Any, ...]:
    """An index of each kind as a tuple, masks as the indices of what they choose."""
    places = index if isinstance(index, tuple) else (index,)
    taken = sum(_takes(p) for p in places)
    found: list[Any] = []
    for place in places:
        if isinstance(place, list):
            place = torch.as_tensor(place)  # noqa: PLW2901
        if place is Ellipsis:
            found += [slice(None)] * (tensor.ndim - taken)
        elif isinstance(place, Tensor) and place.dtype in MASKS and place.ndim:
            chosen = place.cpu().nonzero()
            own = axis_of(place)
            if isinstance(own, ExampleAxis):
                own = ExampleAxis(0, entry_owners(place)[tuple(chosen.T)])
            found += [record_axis(column, own) for column in chosen.unbind(1)]
        else:
            found.append(place)
    return tuple(found)


def _takes(place: Any) -> int:
    if place is None or place is Ellipsis:
        return 0
    if isinstance(place, list):
        place = torch.as_tensor(place)
    return place.ndim if isinstance(place, Tensor) and place.dtype in MASKS else 1


def dimension_of(index: Tensor, places: tuple[Any, ...]) -> int:
    """The dimension of a tensor that one of its indices is of."""
    return next(d for d, place in enumerate(by_dimension(places)) if place is index)


def by_dimension(places: tuple[Any, ...]) -> list[Any]:
    """The indices, one for each dimension: without those that add one."""
    return [p for p in places if p is not None]


def on_cpu(place: Any) -> Any:
    """An index, on the CPU if it is a tensor."""
    return place.cpu() if isinstance(place, Tensor) else place


def disagree(own: Owners, other: Owners) -> bool:
    """Whether entries of one shape are of different examples."""
    return bool(((own != other) & (own != NO_EXAMPLE) & (other != NO_EXAMPLE)).any())


def chosen_by(indices: list[Tensor], own: Owners, places: tuple[Any, ...], by: str) -> AxisInfo:
    """Of a table: what is looked up is of the examples that the indices are of."""
    if any(isinstance(axis_of(p), Untracked) for p in indices) or len(places) != len(indices):
        return Untracked(by)
    shape = shape_of(indices)
    grid = torch.full((), NO_EXAMPLE).expand(shape)
    for p in indices:
        index_owners = entry_owners(p).expand(shape)
        if disagree(index_owners, grid):
            return Untracked(by)
        grid = torch.maximum(grid, index_owners)
    spare = [1] * (own.ndim - grid.ndim)
    return axis_from_owners(grid.reshape(*shape, *spare).expand(own.shape), by)
