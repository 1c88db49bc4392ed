"""Names that a script written for TRAK imports besides `TRAKer`. Loads no torch.

They only select; the computation is in `trak_dist.ops`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import StrEnum
from typing import Any

from trak_dist.errors import ConfigError


class AbstractModelOutput(ABC):
    """Base of a model output written for TRAK: two methods, the first of one example.

    With a third, `get_batch_output(model, weights, buffers, batch)` → f of each example, gradients
    come from one batched pass (docs/your-problem.md).
    """

    def __init__(self) -> None:  # TRAK's subclasses call it
        super().__init__()

    @abstractmethod
    def get_output(self, model: Any, weights: Any, buffers: Any, *example: Any) -> Any:
        """f(z; θ) of one example, whose tensors come without a batch dimension."""

    @abstractmethod
    def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Any:
        """Q = −∂loss/∂f of each example of a batch."""


class ProjectionType(StrEnum):
    """The dense projections."""

    normal = "normal"
    rademacher = "rademacher"


class NoOpProjector:
    """No projection: kernels of p × p, for tiny models. Whatever it is called with is ignored."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


class BasicProjector:
    """A dense projection; its random numbers are those of `ops.draws`, not of TRAK's generator.

    Parameters
    ----------
    proj_dim, seed, proj_type
        As in TRAK; what else its projector takes (`grad_dim`, `device`, `dtype`, …) is ignored,
        since nothing follows from it here.

    Raises
    ------
    ConfigError
        If `proj_type` is neither.
    """

    def __init__(
        self,
        grad_dim: int = 0,  # noqa: ARG002
        proj_dim: int = 2048,
        seed: int = 0,
        proj_type: ProjectionType | str = ProjectionType.normal,
        *_: Any,
        **__: Any,
    ) -> None:
        kinds = {"normal": "gaussian", "rademacher": "rademacher"}
        if str(proj_type) not in kinds:
            raise ConfigError(
                f"proj_type {proj_type!r} is not one of normal, rademacher",
                where="projector",
                next="ProjectionType.normal, ProjectionType.rademacher, or no projector",
            )
        self.kind, self.proj_dim, self.seed = kinds[str(proj_type)], proj_dim, seed


class FunctionalGradientComputer:
    """Gradients by hooks where they cover the model, else by `torch.func` (`gradients=auto`)."""

    gradients = "auto"


class IterativeGradientComputer:
    """Gradients of one example after the other, for any model (`gradients=loop`)."""

    gradients = "loop"
