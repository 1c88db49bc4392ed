"""What projected per-sample gradients cost, against a training step on the same batch.

    OMP_NUM_THREADS=1 python benchmarks/featurize.py [--device cuda] [model …]

One thread, one process; the ways take turns. Seconds are the processor's, which others on the
machine disturb less, or those until a GPU is done; medians over rounds. All is computed as in a
cell: without TF32, in an order that is fixed. The unit is a plain training step without the
optimiser: forward, and backward by all weights, by the faster of two memory formats. The floor of
whatever keeps examples apart is `by activations`: forward, and backward without any weight
gradient.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from models import CASES, Case
from rounds import Seconds, medians, ratios, take_turns
from torch import Tensor

from trak_dist.checkpoints.featurizer import projecting_sink
from trak_dist.ops import numerics
from trak_dist.ops.gradients import GradientComputer, VmapGradients, select_params
from trak_dist.ops.hooks import HookGradients
from trak_dist.ops.model_outputs import out_to_loss
from trak_dist.ops.projection import Projector, make_projector
from trak_dist.runtime.session import open_device

ROUNDS, DIM = 5, 4096
DIMS = (512, 2048, 16384)
STEPS = ("training step", "the same, channels last")

Batch = tuple[Tensor, Tensor]


def main(names: Sequence[str] = tuple(CASES), device: str = "cpu") -> dict[str, dict]:
    on = open_device(device)
    torch.set_num_threads(1)
    if on.type == "cuda":
        print(f"{torch.cuda.get_device_name(on)}, torch {torch.__version__}")
    found = {}
    for name in names:
        torch.manual_seed(0)
        with numerics.preserve():
            numerics.fix(on)
            found[name] = measure(CASES[name](), on)
        report(name, found[name])
    return found


def measure(case: Case, device: torch.device) -> dict:
    case.model.to(device)
    images_or_ids, labels = case.batch(case.rows)
    batch = (images_or_ids.to(device), labels.to(device))
    ways: dict[str, Callable[[], object]] = {STEPS[0]: lambda: training_step(case, batch)}
    if batch[0].ndim == 4:
        last = replace(case, model=copy.deepcopy(case.model).to(memory_format=torch.channels_last))
        images = batch[0].contiguous(memory_format=torch.channels_last)
        ways[STEPS[1]] = lambda: training_step(last, (images, batch[1]))
    ways["by activations"] = lambda: by_activations(case, batch)
    ways[f"hooks, sjlt to {DIM}"] = featurizing(case, batch, DIM)
    ways["vmap, the same"] = featurizing(case, batch, DIM, VmapGradients)
    for dim in DIMS:
        ways[f"hooks, sjlt to {dim}"] = featurizing(case, batch, dim)
    parameters = sum(p.numel() for p in case.model.parameters())
    clock = time.process_time if device.type == "cpu" else when_done
    seconds = take_turns(ways, ROUNDS, clock)
    return {"rows": case.rows, "parameters": parameters, "seconds": seconds}


def when_done() -> float:
    """Seconds, once a GPU has done all that it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


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
        into = torch.zeros(case.rows, dim, device=batch[0].device)
        f = compute(batch, projecting_sink(project, into))
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


def faster_step(seconds: Seconds) -> str:
    return min((way for way in seconds if way in STEPS), key=medians(seconds).__getitem__)


def report(name: str, found: dict) -> None:
    seconds, rows = found["seconds"], found["rows"]
    found_ratios = ratios(seconds, faster_step(seconds))
    print(f"{name}: p {found['parameters']:,}, {rows} rows")
    print(f"{'way':<26}{'ms':>8}{'rows/s':>9}{'÷ step':>8}")
    for way, median in medians(seconds).items():
        print(f"{way:<26}{median * 1e3:>8.1f}{rows / median:>9.1f}{found_ratios[way]:>8.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=tuple(CASES))
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    main(given.models, given.device)
