"""The model output of models trained on preferences by DPO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from trak_dist.errors import ProblemError
from trak_dist.ops.model_outputs.labels import BadLabel
from trak_dist.ops.model_outputs.language import LanguageModeling
from trak_dist.ops.model_outputs.losses import LogisticLoss
from trak_dist.ops.model_outputs.protocol import Weights

SIDES = ("chosen", "rejected")


class Preference(LogisticLoss):
    """F = β [log π(chosen) − log π(rejected) − (the same of the reference model)].

    Rafailov et al. 2023, "Direct Preference Optimization", equation 7: the loss is
    −log sigmoid(f) = log(1 + exp(−f)), so Q = sigmoid(−f), and each row's curvature is Q(1 − Q).
    A positive score is helpful: it makes the target's chosen answer likelier than the rejected one.

    A batch is one mapping with, for both sides, `chosen_input_ids` (batch, tokens), perhaps
    `chosen_attention_mask` and `chosen_labels`, −100 on the prompt, as `LanguageModeling` takes
    them; and `ref_chosen_logps` and `ref_rejected_logps` (batch,), the reference model's
    log-likelihoods of the same labels.
    """

    def __init__(self, beta: float = 0.1) -> None:
        self.beta = beta

    def get_batch_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """F of each pair, from a forward pass of each side.

        Raises
        ------
        ProblemError
            If the batch lacks something.
        """
        inputs = batch[0]
        needed = [f"{side}_input_ids" for side in SIDES] + [f"ref_{side}_logps" for side in SIDES]
        lacking = [k for k in needed if not isinstance(inputs, Mapping) or k not in inputs]
        if lacking:
            raise ProblemError(
                f"a batch of preferences without {', '.join(lacking)}",
                where="the batch",
                next="one mapping with chosen_ and rejected_ input_ids, attention_mask and labels, "
                "and ref_chosen_logps and ref_rejected_logps",
            )
        if "prompt_input_ids" in inputs:
            raise ProblemError(
                "the prompt is apart, in prompt_input_ids",
                where="the batch",
                next="put it before both answers, in chosen_ and rejected_input_ids, and label it "
                "−100",
            )
        chosen, rejected = (
            LanguageModeling().get_batch_output(model, weights, buffers, (_of(side, inputs),))
            - inputs[f"ref_{side}_logps"].reshape(-1)
            for side in SIDES
        )
        margin: Tensor = self.beta * (chosen - rejected)
        return margin

    def get_bad_label(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> BadLabel | None:
        """The first label of either side that is none."""
        sides = [(_of(side, batch[0]),) for side in SIDES]
        found = (LanguageModeling().get_bad_label(model, weights, buffers, one) for one in sides)
        return next((bad for bad in found if bad), None)


def _of(side: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The model's arguments, and labels, of one side."""
    start = f"{side}_"
    return {name.removeprefix(start): v for name, v in inputs.items() if name.startswith(start)}
