"""Which patients made a network predict a disease as it does? Would it be worse without them?

    python examples/regression.py [DIRECTORY]

scikit-learn's diabetes data: 342 patients to train on, 100 targets, a small network trained five
times. Prints the LDS against retrained networks, and for targets that are predicted too low and too
high how often the error rises when the network is trained again without their 30 most helpful rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import trak_dist
from trak_dist.problem import MapDataset

TRAIN, REMOVED = 342, 30


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))


def problem() -> trak_dist.Problem:
    features, values = load_diabetes(return_X_y=True, scaled=True)
    order = np.random.default_rng(0).permutation(len(values))
    inputs = torch.tensor(features[order] / features[order[:TRAIN]].std(0)).float()
    outputs = torch.tensor((values[order] - values[order[:TRAIN]].mean()) / values.std()).float()
    return trak_dist.Problem(
        model=make_model(),
        model_output=trak_dist.Regression(),
        train=TensorDataset(inputs[:TRAIN], outputs[:TRAIN]),
        targets={"val": TensorDataset(inputs[TRAIN:], outputs[TRAIN:])},
        checkpoints=(),
        train_checkpoint=train_checkpoint,
    )


def train_checkpoint(train: MapDataset, seed: int, device: torch.device) -> Mapping[str, Tensor]:
    torch.manual_seed(seed)
    model = make_model().to(device)
    examples = [train[i] for i in range(len(train))]
    inputs, values = (torch.stack(part).to(device) for part in zip(*examples, strict=True))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.mse_loss(model(inputs)[:, 0], values).backward()
        optimiser.step()
    return model.state_dict()


def main(directory: Path, targets: int, subsets: int) -> None:
    run = trak_dist.plan_run(
        problem=problem,
        run_dir=directory,
        cluster="debug",
        proj_dim=256,
        checkpoints={"train": 5},
        ground_truth={"subsets": subsets, "seeds": 2},
        counterfactuals={"targets": targets, "remove": [REMOVED], "seeds": 2},
    )
    run.execute()
    figures = run.results().evaluation("val")
    lds = figures["lds"]
    print(f"LDS {lds['mean']:.3f} [{lds['low']:.3f}, {lds['high']:.3f}], {subsets} subsets")
    (found,) = figures["counterfactuals"]
    rises = np.array(found["without_random"]) > np.array(found["without_helpful"])
    low = predicted_too_low(directory, found["targets"])
    for name, chosen in {"too low": low, "too high": ~low}.items():
        print(
            f"predicted {name}: without its {REMOVED} most helpful rows the error rises for "
            f"{rises[chosen].mean():.0%} of {chosen.sum()} targets"
        )


def predicted_too_low(directory: Path, targets: list[int]) -> np.ndarray:
    """By the first network."""
    model = make_model()
    model.load_state_dict(load_file(directory / "checkpoints/full/0.safetensors"))
    inputs, values = problem().targets["val"][targets]
    return (model(inputs)[:, 0] < values).numpy()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs/diabetes"))
    parser.add_argument("--targets", type=int, default=60)
    parser.add_argument("--subsets", type=int, default=60)
    arguments = parser.parse_args()
    main(arguments.directory, arguments.targets, arguments.subsets)
