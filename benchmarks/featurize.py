"""What projected per-sample gradients cost, against a training step on the same batch.

    OMP_NUM_THREADS=1 python benchmarks/featurize.py [model …]

One thread, one process; the ways take turns. Seconds are the processor's, which others on the
machine disturb less; medians over rounds. The unit is a plain training step without the optimiser:
forward, and backward by all weights, by the faster of two memory formats. The floor of whatever
keeps examples apart is `by activations`: forward, and backward without any weight gradient.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from models import CASES, Case
from rounds import medians, ratios, take_turns
from torch import Tensor

from trak_dist.ops.gradients import GradientComputer, VmapGradients, select_params
from trak_dist.ops.hooks import HookGradients
from trak_dist.ops.model_outputs import out_to_loss
from trak_dist.ops.projection import Projector, make_projector
from trak_dist.stages.session import adding

ROUNDS, DIM = 5, 4096
DIMS = (512, 2048, 16384)
STEP = "training step"

Batch = tuple[Tensor, Tensor]


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for name in sys.argv[1:] or CASES:
        torch.manual_seed(0)
        found[name] = measure(CASES[name]())
        report(name, found[name])
    print(json.dumps(found))


def measure(case: Case) -> dict[str, object]:
    batch = case.batch(case.rows)
    channels_last = (batch[0], batch[1])
    if batch[0].ndim == 4:
        channels_last = (batch[0].contiguous(memory_format=torch.channels_last), batch[1])
    ways: dict[str, Callable[[], object]] = {
        STEP: lambda: training_step(case, batch),
        "the same, channels last": lambda: training_step(case, channels_last),
        "by activations": lambda: by_activations(case, batch),
        f"hooks, sjlt to {DIM}": featurizing(case, batch, DIM),
        "vmap, the same": featurizing(case, batch, DIM, VmapGradients),
        **{f"hooks, sjlt to {dim}": featurizing(case, batch, dim) for dim in DIMS},
    }
    if batch[0].ndim < 4:
        del ways["the same, channels last"]
    parameters = sum(p.numel() for p in case.model.parameters())
    return {"rows": case.rows, "parameters": parameters, "seconds": take_turns(ways, ROUNDS)}


def featurizing(
    case: Case, batch: Batch, dim: int, kind: type[VmapGradients] | None = None
) -> Callable[[], object]:
    project = make_projector(
        "sjlt", dim=dim, seed=0, model_id=0, shapes=select_params(case.model, ["*"])
    )
    compute: GradientComputer = (
        kind(case.model, case.output, ["*"]) if kind else hooks(case, project)
    )

    def featurize() -> Tensor:
        f = compute(batch, adding(project, torch.zeros(case.rows, dim)))
        return out_to_loss(case.output, case.model, batch, f)

    return featurize


def hooks(case: Case, project: Projector) -> HookGradients:
    return HookGradients(
        case.model,
        case.output,
        ["*"],
        piece_elements=project.piece_elements,
        bundles=project.bundles,
    )


def training_step(case: Case, batch: Batch) -> None:
    loss = case.loss(case.model(batch[0]), batch[1])
    torch.autograd.grad(loss, list(case.model.parameters()))


def by_activations(case: Case, batch: Batch) -> None:
    """Forward, and backward as far as the first layer's output."""
    weights = {n: p.detach() for n, p in case.model.named_parameters()}
    first: list[Tensor] = []
    hook = case.first.register_forward_hook(
        lambda _module, _inputs, out: first.append(out.requires_grad_())
    )
    outputs = torch.func.functional_call(case.model, weights, (batch[0],))
    hook.remove()
    torch.autograd.grad(case.loss(outputs, batch[1]), first)


def report(name: str, found: dict) -> None:
    seconds = found["seconds"]
    step = min(
        (w for w in seconds if "hooks" not in w and "vmap" not in w and "act" not in w),
        key=lambda w: medians(seconds)[w],
    )
    print(f"{name}: p {found['parameters']:,}, {found['rows']} rows")
    print(f"{'way':<26}{'ms':>8}{'rows/s':>9}{'÷ step':>8}")
    for way, median in medians(seconds).items():
        rate, ratio = found["rows"] / median, ratios(seconds, step)[way]
        print(f"{way:<26}{median * 1e3:>8.0f}{rate:>9.1f}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
