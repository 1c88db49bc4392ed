"""Which units dropout masks keep, in Python's whole numbers: an oracle, of nothing in trak_dist."""

from __future__ import annotations

import hashlib

MASK = 2**64 - 1


def kept(seed: int, name: str, units: int, rate: float) -> list[int]:
    """The units that the mask of a seed keeps of a module: SplitMix64 by counter."""
    raw = hashlib.blake2b(repr((1, "dropout", seed, name)).encode(), digest_size=8).digest()
    key = int.from_bytes(raw, "little")

    def bits(counter: int) -> int:
        z = (key + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    return [i for i in range(units) if bits(i) / 2**64 >= rate]
