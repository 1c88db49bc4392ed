"""Model outputs of users, wrapped so that each example is computed alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trak_dist.ops.batches import batch_of_one, content, examples_in, rows_of
from trak_dist.ops.model_outputs import ModelOutput, Weights, prepared


class SingleExampleBatches:
    """A model output written for TRAK's `IterativeGradientComputer`, one example at a time.

    That computer gives a batch, and the model with its weights in it.
    """

    def __init__(self, output: ModelOutput) -> None:
        self._output = output

    def prepare(
        self,
        model: nn.Module,
        weights: Weights,  # noqa: ARG002
        buffers: Weights,  # noqa: ARG002
    ) -> SingleExampleBatches:
        """The same of the prepared model output."""
        return SingleExampleBatches(prepared(self._output, model))

    def get_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, *example: Any
    ) -> Float[Tensor, ""]:
        """F of one example, from a batch of one."""
        return self._output.get_output(model, weights, buffers, *batch_of_one(example)).reshape(())

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """Q of each example, as it is written."""
        return self._output.get_out_to_loss_grad(model, weights, buffers, batch)


class SeededByExample:
    """A model output that draws random numbers: the same ones for the same example, each time.

    It has no form for batches, in which draws would depend on an example's place and on the other
    examples.
    """

    def __init__(self, output: ModelOutput) -> None:
        self._output = output

    def prepare(
        self,
        model: nn.Module,
        weights: Weights,  # noqa: ARG002
        buffers: Weights,  # noqa: ARG002
    ) -> SeededByExample:
        """The same of the prepared model output."""
        return SeededByExample(prepared(self._output, model))

    def get_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, *example: Any
    ) -> Float[Tensor, ""]:
        """F of one example, by the random numbers that are its own."""
        _seed(example)
        return self._output.get_output(model, weights, buffers, *example)

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """Q of each example, by the same numbers."""
        found = []
        for row in range(examples_in(batch)):
            _seed(rows_of(batch, row))
            one = rows_of(batch, slice(row, row + 1))
            q = self._output.get_out_to_loss_grad(model, weights, buffers, one)
            found.append(torch.as_tensor(q).reshape(1))
        return torch.cat(found)


def _seed(example: Sequence[Any]) -> None:
    sha = hashlib.sha256()
    for leaf in pytree.tree_leaves(tuple(example)):
        if isinstance(leaf, Tensor):
            sha.update(content(leaf))
    seed = int.from_bytes(sha.digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
