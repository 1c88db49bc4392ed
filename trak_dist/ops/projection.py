"""Projections of per-sample gradients from p parameters to k numbers.

A projector adds one parameter's gradients at a time into one (batch, k) accumulator. What it draws
for a parameter follows from the seed, the `model_id`, the parameter's name and its shape alone, so
that every worker, device, batch size and order of parameters has the same projection.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trak_dist.configuration.config import CACHE_BYTES
from trak_dist.ops import draws, segments
from trak_dist.ops.bundles import Bundles, has_bundles
from trak_dist.ops.segments import Segments

BLOCK_ELEMENTS = 2**22
CACHED_PIECE = 2**20  # 4 MiB: what was just computed is still in the processor's cache
WHOLE_BATCH = 2**62

Drawn = TypeVar("Drawn", bound=Tensor | Segments)


class Projector(Protocol):
    """A linear map from gradients to `dim` numbers.

    `piece_elements` is how many numbers of a parameter's gradients it likes to get at a time.
    """

    dim: int
    piece_elements: int

    def bundles(self, name: str, device: torch.device) -> Bundles | None:
        """Those of parameter `name`, if its gradients may be handed over bundled."""
        ...

    def add(
        self, into: Float[Tensor, "batch k"], name: str, grads: Float[Tensor, "batch ..."]
    ) -> None:
        """Add the projection of the gradients of parameter `name` to `into`.

        They have the parameter's shape, or its `bundled_shape`: the projection is the same.
        """
        ...


class _Draws:
    """The streams of one (seed, model_id), and a bounded cache of what was drawn from them."""

    def __init__(self, seed: int, model_id: int, shapes: Mapping[str, torch.Size]) -> None:
        self._seed, self._model_id, self._shapes = seed, model_id, shapes
        self._cache: dict[tuple[str, torch.Size, int], Any] = {}
        self._free = CACHE_BYTES

    def key(self, name: str, *more: str) -> int:
        return draws.stream_key(self._seed, self._model_id, name, tuple(self._shapes[name]), *more)

    def cached(self, name: str, grads: Tensor, start: int, make: Callable[[], Drawn]) -> Drawn:
        key = (name, grads.shape[1:], start)
        found: Drawn | None = self._cache.get(key)
        if found is None:
            found = make()
            if found.nbytes <= self._free:
                self._free -= found.nbytes
                self._cache[key] = found
        return found


def _flat(grads: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch m"]:
    return grads[:, None] if grads.ndim == 1 else grads.flatten(1)


class Sjlt:
    """Sparse Johnson–Lindenstrauss transform with one non-zero per column: CountSketch.

    Each coordinate goes, with a random sign, to one random bucket: O(p) work per sample whatever k
    is (Charikar, Chen & Farach-Colton 2002; Kane & Nelson 2014 for the family). The bucket is a
    hash modulo k, so that summing columns modulo k' gives the sketch of dimension k' where k'
    divides k.
    E⟨Sx, Sy⟩ = ⟨x, y⟩; Var = (‖x‖²‖y‖² + ⟨x, y⟩² − 2 Σ xᵢ²yᵢ²) / k, where hashes are independent.
    Those of a parameter that `has_bundles` are so by bundles only; see there for what that adds.

    Positive and negative signs have sums of their own, subtracted at the end: so the gradients are
    read once, and no signed copy is made of them, unless that is the smaller one. Where scattered
    sums come in any order, on a GPU, the order of each sum is drawn with it (`ops.segments`).
    """

    piece_elements = CACHED_PIECE

    def __init__(
        self, dim: int, seed: int, model_id: int, shapes: Mapping[str, torch.Size]
    ) -> None:
        self.dim = dim
        self._draws = _Draws(seed, model_id, shapes)
        self._bundled = {name for name, shape in shapes.items() if has_bundles(shape)}
        self._shapes = shapes
        self._bundles: dict[str, Bundles] = {}

    def bundles(self, name: str, device: torch.device) -> Bundles | None:
        """See `Projector`."""
        if name in self._bundled and name not in self._bundles:
            key = self._draws.key(name, "bundles")
            self._bundles[name] = Bundles.draw(key, self._shapes[name], device)
        return self._bundles.get(name)

    def add(
        self, into: Float[Tensor, "batch k"], name: str, grads: Float[Tensor, "batch ..."]
    ) -> None:
        """See `Projector`."""
        bundles = self.bundles(name, grads.device)
        if grads.shape[1:] != self._shapes[name]:
            assert bundles and grads.shape[1:] == bundles.bundled_shape
            bundles = None
        flat = _flat(grads)
        for start in range(0, flat.shape[1], BLOCK_ELEMENTS):
            block = flat[:, start : start + BLOCK_ELEMENTS]
            draw = functools.partial(self._places, name, bundles, start, block)
            places = self._draws.cached(name, grads, start, draw)
            if isinstance(places, Segments):
                by_sign = places.sums(block.T).view(2, self.dim, -1)
                into += (by_sign[0] - by_sign[1]).T
                continue
            if len(places) < self.dim:
                signed = torch.where(places < self.dim, block, -block)
                into.scatter_add_(1, (places % self.dim).expand(block.shape), signed)
                continue
            sums = into.new_zeros(len(into), 2 * self.dim)
            sums.scatter_add_(1, places.expand(block.shape), block)
            into += sums[:, : self.dim] - sums[:, self.dim :]

    def _places(
        self, name: str, bundles: Bundles | None, start: int, block: Float[Tensor, "batch m"]
    ) -> Int64[Tensor, " m"] | Segments:
        """Buckets, those of negative signs from k on, of a block of a parameter's numbers."""
        counters = torch.arange(start, start + block.shape[1], device=block.device)
        if bundles:
            counters, bundled = bundles.places(counters)
        bucket, sign = draws.bucket_and_sign(self._draws.key(name), counters, self.dim)
        if bundles:
            sign *= bundled
        places = torch.where(sign < 0, bucket + self.dim, bucket)
        if segments.scatters_in_order(block.device):
            return places
        return Segments.of(places, 2 * self.dim)


class Dense:
    """A dense random matrix with entries of mean 0 and variance 1/k, drawn block by block.

    `rademacher`: signs (Achlioptas 2003), with the variance of `Sjlt`. `gaussian`: normal entries;
    Var⟨Rx, Ry⟩ = (‖x‖²‖y‖² + ⟨x, y⟩²) / k. Both cost O(p k) per sample.
    """

    piece_elements = WHOLE_BATCH  # each piece costs a pass over the matrix, drawn if not cached

    def __init__(
        self, kind: str, dim: int, seed: int, model_id: int, shapes: Mapping[str, torch.Size]
    ) -> None:
        self.dim = dim
        self._entries = {"rademacher": draws.signs, "gaussian": draws.normals}[kind]
        self._draws = _Draws(seed, model_id, shapes)

    def bundles(self, name: str, device: torch.device) -> None:
        """See `Projector`: none."""

    def add(
        self, into: Float[Tensor, "batch k"], name: str, grads: Float[Tensor, "batch ..."]
    ) -> None:
        """See `Projector`."""
        key = self._draws.key(name)
        flat = _flat(grads)
        rows = max(1, BLOCK_ELEMENTS // self.dim)
        for start in range(0, flat.shape[1], rows):
            block = flat[:, start : start + rows]
            stop = start + block.shape[1]
            draw = functools.partial(self._matrix, key, start, stop, flat.device)
            matrix = self._draws.cached(name, grads, start, draw)
            into.addmm_(block, matrix, alpha=1 / math.sqrt(self.dim))

    def _matrix(
        self, key: int, start: int, stop: int, device: torch.device
    ) -> Float[Tensor, "m k"]:
        return self._entries(key, torch.arange(start, stop, device=device), self.dim)


class Identity:
    """No projection: gradients side by side, parameters in order of their names."""

    piece_elements = CACHED_PIECE

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self._slices: dict[str, slice] = {}
        start = 0
        for name in sorted(shapes):
            stop = start + shapes[name].numel()
            self._slices[name] = slice(start, stop)
            start = stop
        self.dim = start

    def bundles(self, name: str, device: torch.device) -> None:
        """See `Projector`: none."""

    def add(
        self, into: Float[Tensor, "batch k"], name: str, grads: Float[Tensor, "batch ..."]
    ) -> None:
        """See `Projector`."""
        into[:, self._slices[name]] += _flat(grads)


def make_projector(
    kind: str, *, dim: int, seed: int, model_id: int, shapes: Mapping[str, torch.Size]
) -> Projector:
    """The projector of one checkpoint.

    Parameters
    ----------
    kind : str
        `sjlt`, `rademacher`, `gaussian` or `identity`.
    dim : int
        k; for `identity` it must be the number of parameters.
    seed, model_id : int
        Name the draw: each checkpoint has its own.
    shapes : mapping
        The shape of each parameter, without the batch.
    """
    if kind == "identity":
        identity = Identity(shapes)
        assert identity.dim == dim
        return identity
    if kind == "sjlt":
        return Sjlt(dim, seed, model_id, shapes)
    return Dense(kind, dim, seed, model_id, shapes)


def fold(grads: Float[Tensor, "rows k"], dim: int) -> Float[Tensor, "rows dim"]:
    """The sketch of dimension `dim` from one of dimension k, a multiple of it (`Sjlt` only)."""
    k = grads.shape[1]
    assert k % dim == 0
    return grads if k == dim else grads.view(-1, k // dim, dim).sum(1)
