"""A checkpoint in memory: its model, gradient computer and projector, as planned."""

from __future__ import annotations

import copy
import logging
import math
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trak_dist.errors import NotCovered
from trak_dist.ops.batches import Batch, clone_batch
from trak_dist.ops.curvature import FisherModelOutput, LogLikelihood
from trak_dist.ops.draws import Uniform
from trak_dist.ops.gradients import (
    GradientComputer,
    GradientSink,
    LoopGradients,
    VmapGradients,
    select_params,
)
from trak_dist.ops.hooks import HookGradients
from trak_dist.ops.model_outputs import BadLabel, ModelOutput, bad_label, out_to_loss, prepared
from trak_dist.ops.model_state import ModelStateGuard, copy_model
from trak_dist.ops.projection import Projector, make_projector
from trak_dist.plan import Plan

log = logging.getLogger("trak_dist")


class CheckpointFeaturizer:
    """A model with a checkpoint's weights, on the device, and its gradient computer and projector.

    Parameters
    ----------
    method : str
        `hooks`, `vmap` or `loop`: that of the plan, unless an audit failed.
    """

    def __init__(
        self,
        plan: Plan,
        model_id: int,
        digest: str,
        model: nn.Module,
        model_output: ModelOutput,
        *,
        method: str = "",
    ) -> None:
        self.model_id, self.digest = model_id, digest
        self.plan, self.model_output = plan, model_output
        self.model = model_in(plan.spec.featurize.compute, model)
        self.projector = make_checkpoint_projector(plan, model_id, self.model)
        self.method = method or plan.gradients
        self.slower_batches = 0
        self._state_guard = ModelStateGuard(self.model)
        self.gradient_computer = make_gradient_computer(
            plan, self.method, self.model, model_output, self.projector
        )

    @cached_property
    def loop(self) -> GradientComputer:
        """Plain autograd, one example after the other."""
        return make_gradient_computer(
            self.plan, "loop", self.model, self.model_output, self.projector
        )

    @cached_property
    def likelihood(self) -> CheckpointFeaturizer:
        """The same of the log-likelihood of labels, which the model output has to offer."""
        other = copy.copy(self)
        vars(other).pop("loop", None)
        other.model_output = LogLikelihood(cast(FisherModelOutput, self.model_output))
        other.gradient_computer = make_gradient_computer(
            self.plan, self.method, self.model, other.model_output, self.projector
        )
        return other

    def draw_labels(self, batch: Batch, uniform: Uniform) -> Batch:
        """A batch on the device with its labels drawn from the model's own prediction."""
        batch = batch_in(self.plan.spec.featurize.compute, batch)
        state = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        output = prepared(cast(FisherModelOutput, self.model_output), self.model)
        with torch.no_grad(), self._state_guard.preserve():
            return tuple(output.draw_labels(self.model, *state, clone_batch(batch), uniform))

    def bad_label(self, batch: Batch) -> BadLabel | None:
        """The first label of a batch on the device that the model can't have."""
        batch = batch_in(self.plan.spec.featurize.compute, batch)
        with self._state_guard.preserve():
            return bad_label(self.model_output, self.model, batch)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the parameters whose gradients are used."""
        return select_params(self.model, self.plan.spec.featurize.params)

    def featurize(self, batch: Batch, into: Float[Tensor, "batch k"]) -> Float[Tensor, " batch"]:
        """Add X / √p of a batch on the device to zeroed rows; returns its Q.

        A batch in which the model uses parameters in a way that planning never saw is computed one
        by one, if `featurize.gradients` is `auto`.

        Raises
        ------
        NotCovered
            If it does not.
        ProblemError
            If there is not one Q for each example.
        """
        batch = batch_in(self.plan.spec.featurize.compute, batch)
        try:
            f = self.gradient_computer(batch, projecting_sink(self.projector, into))
        except NotCovered as error:
            if self.plan.spec.featurize.gradients != "auto":
                raise
            if not self.slower_batches:
                log.warning("a batch is computed one by one, not by hooks: %s", error.what)
            self.slower_batches += 1
            f = self.loop(batch, projecting_sink(self.projector, into.zero_()))
        into /= math.sqrt(self.plan.parameters)
        with self._state_guard.preserve():
            return out_to_loss(self.model_output, self.model, batch, f).to(into)


def make_gradient_computer(
    plan: Plan, method: str, model: nn.Module, model_output: ModelOutput, into: Projector
) -> GradientComputer:
    """The gradient computer for `method`, for a projection."""
    params = plan.spec.featurize.params
    if method != "hooks":
        kind = VmapGradients if method == "vmap" else LoopGradients
        return kind(model, model_output, params)
    return HookGradients(
        model, model_output, params, piece_elements=into.piece_elements, bundles=into.bundles
    )


def projecting_sink(project: Projector, into: Float[Tensor, "batch k"]) -> GradientSink:
    """A sink that projects gradients and adds them to a batch's rows."""

    def sink(name: str, rows: slice, grads: Float[Tensor, "rows ..."]) -> None:
        project.add(into[rows], name, grads.float())

    return sink


def make_checkpoint_projector(plan: Plan, model_id: int, model: nn.Module) -> Projector:
    """The projection of one checkpoint's gradients."""
    return make_projector(
        plan.spec.projection.kind,
        dim=plan.store_dim,
        seed=plan.spec.projection.seed,
        model_id=model_id,
        shapes=select_params(model, plan.spec.featurize.params),
    )


def model_in(compute: str, model: nn.Module) -> nn.Module:
    """`model`, or a copy of it in the type `compute`."""
    return model if compute == "model" else copy_model(model).to(getattr(torch, compute))


def batch_in(compute: str, batch: Batch) -> Batch:
    """A batch whose floating-point tensors have the type `compute`."""
    if compute == "model":
        return batch
    dtype = getattr(torch, compute)
    converted: Batch = pytree.tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, batch
    )
    return converted
