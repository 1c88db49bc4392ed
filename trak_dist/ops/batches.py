"""Batches: what collate gives, every tensor with the examples first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trak_dist.errors import ProblemError

Batch = tuple[Any, ...]


def examples_in(batch: Sequence[Any]) -> int:
    """The number of examples in a batch: the length of its first tensor.

    Raises
    ------
    ProblemError
        If no tensor is in it, or one that has no examples.
    """
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            if leaf.ndim:
                return len(leaf)
            break
    raise ProblemError(
        "a batch holds no tensor with the examples first",
        where="the batch",
        next="let the collate function give tensors whose first dimension is the examples",
    )


def content(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values, in its own type, for a digest."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def clone_batch(batch: Sequence[Any]) -> tuple[Any, ...]:
    """A copy of a batch's tensors, for a model that may change its input in place."""
    copied: tuple[Any, ...] = pytree.tree_map_only(Tensor, torch.clone, tuple(batch))
    return copied


def rows_of(batch: Sequence[Any], rows: slice | Sequence[int] | int) -> Batch:
    """Some examples of a batch; of one number that example, without a batch dimension."""
    chosen: Batch = pytree.tree_map_only(Tensor, lambda t: t[rows], tuple(batch))
    return chosen


def batch_of_one(example: Sequence[Any]) -> Batch:
    """An example without a batch dimension as a batch of one."""
    batch: Batch = pytree.tree_map_only(Tensor, lambda t: t.unsqueeze(0), tuple(example))
    return batch
