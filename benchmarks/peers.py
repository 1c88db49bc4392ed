"""Projected per-sample gradients of ResNet-9, against TRAK's own package and dattri.

    python benchmarks/peers.py

The same model, batch of 64 and dimension for all; one thread, one process, the ways take turns.
Of the peers their per-sample gradients, projection to k numbers and out-to-loss are timed, as
they are on a machine without a GPU: TRAK's `BasicProjector` and dattri's `random_project`, both
of which draw their normal matrix anew for each batch. Nothing is written to disk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from dattri.func.projection import random_project
from dattri.task import AttributionTask
from featurize import featurizing
from models import CASES, Case
from rounds import Seconds, medians, ratios, take_turns
from torch import Tensor, nn
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput
from trak.projectors import BasicProjector, ProjectionType

DIMS, ROUNDS = (512, 2048, 4096), 2

Batch = tuple[Tensor, Tensor]


def main() -> dict[str, object]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = CASES["ResNet-9"]()
    batch = case.batch(case.rows)
    found: dict[str, Seconds] = {}
    for dim in DIMS:
        ways: dict[str, Callable[[], object]] = {
            "trak_dist": featurizing(case, batch, dim),
            "traker": of_traker(case, batch, dim),
            "dattri": of_dattri(case, batch, dim),
        }
        found[str(dim)] = take_turns(ways, ROUNDS)
        report(dim, case.rows, found[str(dim)])
    return {"rows": case.rows, "seconds": found}


def of_traker(case: Case, batch: Batch, dim: int) -> Callable[[], object]:
    parameters = sum(p.numel() for p in case.model.parameters())
    settings = {"grad_dim": parameters, "dtype": torch.float32, "device": "cpu"}
    compute = FunctionalGradientComputer(
        model=case.model, task=ImageClassificationModelOutput(), **settings
    )
    projector = BasicProjector(
        proj_dim=dim, seed=0, proj_type=ProjectionType.normal, model_id=0, **settings
    )

    def featurize() -> tuple[Tensor, Tensor]:
        grads = compute.compute_per_sample_grad(batch)
        return projector.project(grads, model_id=0), compute.compute_loss_grad(batch)

    return featurize


def of_dattri(case: Case, batch: Batch, dim: int) -> Callable[[], object]:
    def output(weights: dict[str, Tensor], example: Batch) -> Tensor:
        image, label = example
        logits = torch.func.functional_call(case.model, weights, image[None])
        p = torch.exp(-nn.functional.cross_entropy(logits, label[None]))
        return torch.log(p / (1 - p))

    def probability(weights: dict[str, Tensor], example: Batch) -> Tensor:
        logits = torch.func.functional_call(case.model, weights, example[0][None])
        return torch.exp(-nn.functional.cross_entropy(logits, example[1][None]))

    task = AttributionTask(
        loss_func=output, model=case.model, checkpoints=[case.model.state_dict()]
    )
    compute = task.get_grad_loss_func(in_dims=(None, 0))
    weights = task.get_param(ckpt_idx=0)[0]
    named = dict(case.model.named_parameters())
    probabilities = torch.func.vmap(probability, in_dims=(None, 0))
    project: list[Callable[..., Tensor]] = []

    def featurize() -> tuple[Tensor, Tensor]:
        grads = compute(weights, batch)
        if not project:
            project.append(random_project(grads, len(grads), dim, 32, device="cpu"))
        return project[0](grads, ensemble_id=0), 1 - probabilities(named, batch)

    return featurize


def report(dim: int, rows: int, seconds: Seconds) -> None:
    found = ratios(seconds, "trak_dist")
    print(f"ResNet-9, {rows} rows, k = {dim}")
    print(f"{'':<12}{'ms per row':>12}{'÷ trak_dist':>13}")
    for way, median in medians(seconds).items():
        print(f"{way:<12}{median * 1e3 / rows:>12.1f}{found[way]:>13.1f}")


if __name__ == "__main__":
    main()
