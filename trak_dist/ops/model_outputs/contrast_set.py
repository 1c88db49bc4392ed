"""The contrast set of `CLIP`: batches that are read once, identified, and given to any model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from trak_dist.errors import ConfigError
from trak_dist.hashing import truncated
from trak_dist.ops.batches import Batch, clone_batch, content, examples_in
from trak_dist.ops.model_outputs.protocol import Weights


def read(contrast: Iterable[Any]) -> tuple[Batch, ...]:
    """The batches, as model outputs take them.

    Raises
    ------
    ConfigError
        If they are none, or hold no pairs.
    """
    if isinstance(contrast, Tensor | Mapping | str | Dataset) or not isinstance(contrast, Iterable):
        raise ConfigError(
            f"contrast is {type(contrast).__name__}, not batches",
            where="CLIP",
            next="a DataLoader of pairs, or a list of batches, as collate gives them",
        )
    batches = tuple(
        (dict(b),) if isinstance(b, Mapping) else tuple(b) if isinstance(b, list | tuple) else (b,)
        for b in contrast
    )
    for batch in batches:
        sizes = {len(leaf) if leaf.ndim else 0 for _, leaf in _leaves(batch) if leaf is not None}
        if len(sizes) != 1:
            raise ConfigError(
                f"a batch of contrast holds tensors of {sorted(sizes)} rows",
                where="CLIP",
                next="batches of pairs as collate gives them: tensors with the examples first",
            )
    if not sum(map(examples_in, batches)):
        raise ConfigError(
            "contrast holds no pairs",
            where="CLIP",
            next="some hundred pairs that are no train rows",
        )
    return batches


def digest(batches: Sequence[Batch]) -> str:
    """What identifies their content and order."""
    sha = hashlib.sha256()
    for name, leaf in _leaves(batches):
        sha.update(f"{name} {leaf is None or (leaf.dtype, tuple(leaf.shape))}".encode())
        if leaf is not None:
            sha.update(content(leaf))
    return truncated(sha)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor | None]]:
    """The tensors of batches, and where they are; None where there is none."""
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _leaves(inner, f"{name}/{key}")
    elif value is None or isinstance(value, Tensor):
        yield name, value
    else:
        raise ConfigError(
            f"a batch of contrast holds {type(value).__name__}, not tensors",
            where="CLIP",
            next="let collate give tensors, in tuples, lists or dicts",
        )


def copy_for(weights: Weights, batch: Batch) -> Batch:
    """A copy of a batch on the device of the weights, and of their type where they have one."""
    floating = {w.dtype for w in weights.values() if w.is_floating_point()}
    device = next((w.device for w in weights.values()), None)

    def moved(tensor: Tensor) -> Tensor:
        convert = tensor.is_floating_point() and len(floating) == 1
        return tensor.to(device, next(iter(floating)) if convert else None)

    converted: Batch = pytree.tree_map_only(Tensor, moved, clone_batch(batch))
    return converted
