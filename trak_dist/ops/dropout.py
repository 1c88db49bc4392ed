"""Dropout masks that are fixed by a seed: several models of one checkpoint, without training.

Deng et al. 2024, "Efficient Ensembles Improve Training Data Attribution" (arXiv 2405.17293),
Dropout Ensemble. A mask is of units, the same for every example and position, so what is left is a
thinned network (Srivastava et al. 2014, JMLR 15) with gradients per example like any other.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trak_dist.errors import ConfigError
from trak_dist.ops import draws
from trak_dist.ops.model_state import copy_model

WHERE = "checkpoints.dropout_seeds"
_BY_UNIT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_OTHERS = (nn.AlphaDropout, nn.FeatureAlphaDropout)  # they shift what they drop


@dataclass(frozen=True)
class FixedMask:
    """A forward hook of a dropout module in `eval()`, whose output is the input: h ⊙ m / (1 − p).

    As a hook it also keeps torch from fused layers that would pass the module by. It draws again
    each time: what is made within a transform of `torch.func` must not outlive it.
    """

    key: int
    rate: float
    channels: bool

    @classmethod
    def of(cls, name: str, module: nn.Module, seed: int) -> FixedMask:
        """That of a module, which follows from its name in the model and the seed."""
        key = draws.stream_key("dropout", seed, name)
        return cls(key, module.p, not isinstance(module, nn.Dropout))  # type: ignore[arg-type]

    def __call__(self, _: nn.Module, __: Any, output: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """See `torch.nn.Module.register_forward_hook`."""
        dim = self.dimension(output)
        factors = self.factors(output.shape[dim], output)
        return output * factors.view(-1, *[1] * (output.ndim - 1 - dim))

    def dimension(self, output: Tensor) -> int:
        """The dimension of the units: channels, 1, where there are any, else features, the last.

        An input of `nn.Dropout` with four dimensions or more has channels, or attention's heads.
        """
        return 1 if self.channels or output.ndim > 3 else output.ndim - 1

    def factors(self, units: int, like: Tensor) -> Float[Tensor, " units"]:
        """0, or 1 / (1 − p), for each unit."""
        kept = draws.kept(self.key, torch.arange(units, device=like.device), self.rate)
        return kept.to(like.dtype) / (1 - self.rate)


def dropout_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The dropout modules of a model with a rate above 0, by name.

    Raises
    ------
    ConfigError
        If there are none, or one that is not masked by units.
    """
    named = {n: m for n, m in model.named_modules() if isinstance(m, (*_BY_UNIT, *_OTHERS))}
    found: dict[str, nn.Module] = {n: m for n, m in named.items() if m.p > 0}
    for name, module in found.items():
        if isinstance(module, _OTHERS) or module.p == 1:
            raise ConfigError(
                f"{name!r} is {module}, which leaves no thinned network",
                where=WHERE,
                next="nn.Dropout, Dropout1d, Dropout2d or Dropout3d with a rate below 1 in its "
                "place, or leave checkpoints.dropout_seeds out",
            )
    if not found:
        kind = type(model).__qualname__
        raise ConfigError(
            f"{kind} has no dropout module"
            + (f" with a rate above 0: {', '.join(named)}" if named else ""),
            where=WHERE,
            next="a model with nn.Dropout modules (torch.nn.functional.dropout is not seen), "
            "or leave checkpoints.dropout_seeds out",
        )
    return found


def thinned(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a model, sharing its tensors, whose dropout modules multiply by fixed masks.

    Raises
    ------
    ConfigError
        As `dropout_modules` does.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    copied = copy_model(model, shared=tensors)
    for name, module in dropout_modules(copied).items():
        module.register_forward_hook(FixedMask.of(name, module, seed))
    return copied


def check_units_left(model: nn.Module, seeds: int, widths: Mapping[str, int]) -> None:
    """Check that no mask drops all units of a module.

    Parameters
    ----------
    widths : mapping
        How many units the modules that are called have, by name.

    Raises
    ------
    ConfigError
        If one does, or if no module is called.
    """
    modules = dropout_modules(model)
    if not widths:
        raise ConfigError(
            f"{type(model).__qualname__} calls none of its dropout modules in eval(): "
            f"{', '.join(modules)}",
            where=WHERE,
            next="call the modules themselves, or leave checkpoints.dropout_seeds out",
        )
    for (name, units), seed in itertools.product(widths.items(), range(seeds)):
        if not FixedMask.of(name, modules[name], seed).factors(units, torch.zeros(0)).any():
            raise ConfigError(
                f"the mask of seed {seed} drops all {units} units of {name!r}",
                where=WHERE,
                next=f"checkpoints.dropout_seeds={seed}" if seed else "a lower rate, or none",
            )
