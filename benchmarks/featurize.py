"""What projected per-sample gradients cost, against a training step on the same batch.

    OMP_NUM_THREADS=1 python benchmarks/featurize.py [rows] [dim]

ResNet-9 on images of 3 × 32 × 32, one thread, one process; the ways take turns. Seconds are those
of the processor, which others on the machine disturb less; medians over rounds. The unit is a plain
training step without the optimiser: forward, and backward by all weights. The floor of whatever
keeps examples apart is `by activations`: forward, and backward without any weight gradient.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trak_dist import ImageClassification
from trak_dist.ops.gradients import GradientComputer, VmapGradients, select_params
from trak_dist.ops.hooks import HookGradients
from trak_dist.ops.model_outputs import out_to_loss
from trak_dist.ops.projection import make_projector
from trak_dist.problems.networks import resnet9
from trak_dist.stages.session import adding

ROUNDS, CLASSES = 5, 10
FLOOR = "training step"

Batch = tuple[Tensor, Tensor]


def main() -> None:
    rows, dim = (*map(int, sys.argv[1:]), *(32, 4096)[len(sys.argv) - 1 :])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = resnet9(CLASSES).eval()
    batch = (torch.randn(rows, 3, 32, 32), torch.arange(rows) % CLASSES)
    output = ImageClassification()
    shapes = select_params(model, ["*"])
    project = make_projector("sjlt", dim=dim, seed=0, model_id=0, shapes=shapes)
    hooks = HookGradients(model, output, ["*"], piece_elements=project.piece_elements, bundles=project.bundles)
    vmap = VmapGradients(model, output, ["*"])

    def sketch(compute: GradientComputer) -> Tensor | None:
        return compute(batch, adding(project, torch.zeros(rows, dim)))

    def featurize(compute: GradientComputer) -> Tensor:
        return out_to_loss(output, model, batch, sketch(compute))

    ways: dict[str, Callable[[], object]] = {
        FLOOR: lambda: training_step(model, batch),
        "by activations": lambda: by_activations(model, batch),
        "hooks": lambda: hooks(batch, lambda *_: None),
        "hooks, sketch": lambda: sketch(hooks),
        "hooks, sketch, Q": lambda: featurize(hooks),
        "vmap, sketch, Q": lambda: featurize(vmap),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways.values():
        way()
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.process_time()
            way()
            seconds[name].append(time.process_time() - started)
    report(seconds, rows)


def training_step(model: nn.Module, batch: Batch) -> None:
    images, labels = batch
    loss = nn.functional.cross_entropy(model(images), labels)
    torch.autograd.grad(loss, list(model.parameters()))


def by_activations(model: nn.Module, batch: Batch) -> None:
    """Forward, and backward as far as the first layer's output."""
    images, labels = batch
    weights = {n: p.detach() for n, p in model.named_parameters()}
    first: list[Tensor] = []
    hook = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(
        lambda _module, _inputs, out: first.append(out.requires_grad_())
    )
    logits = torch.func.functional_call(model, weights, (images,))
    hook.remove()
    torch.autograd.grad(nn.functional.cross_entropy(logits, labels), first)


def report(seconds: dict[str, list[float]], rows: int) -> None:
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    # A round's ways ran one after the other: their ratios lose what slows a whole round.
    ratios = {
        way: statistics.median(t / f for t, f in zip(times, seconds[FLOOR], strict=True))
        for way, times in seconds.items()
    }
    print(f"{'way':<18}{'ms':>8}{'rows/s':>9}{'÷ step':>8}")
    for way, median in medians.items():
        print(f"{way:<18}{median * 1e3:>8.0f}{rows / median:>9.1f}{ratios[way]:>8.2f}")
    print(json.dumps({"rows": rows, "seconds": seconds}))


if __name__ == "__main__":
    main()
