"""Training of the shipped classifiers, deterministic in the seed: SGD with a cosine decay."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from trak_dist.problem import MapDataset, TrainCheckpoint


def half_squared_error(predicted: Tensor, values: Tensor) -> Tensor:
    """The mean over a batch of ½‖y − ŷ‖²."""
    return (predicted - values).square().sum(1).mean() / 2


def classifier_trainer(
    make_model: Callable[[], nn.Module],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> TrainCheckpoint:
    """A `train_checkpoint` for a dataset of (inputs, labels).

    Parameters
    ----------
    make_model
        Builds a model; its initial weights follow from the seed.
    epochs, batch_size, learning_rate, weight_decay
        Of SGD with Nesterov momentum 0.9; the learning rate falls to 0 along a half cosine.
    loss
        Of what the model gives and the labels, the mean over the batch.
    """

    def train_checkpoint(
        train: MapDataset, seed: int, device: torch.device
    ) -> Mapping[str, Tensor]:
        # Its own generators, so that neither what ran before nor what runs after is disturbed.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model = make_model().to(device).train()
            order = torch.Generator().manual_seed(seed)
            examples = [train[i] for i in range(len(train))]
            columns = zip(*examples, strict=True)
            images, labels = (torch.stack(column).to(device) for column in columns)
            steps = -(-len(images) // batch_size)
            optimiser = torch.optim.SGD(
                model.parameters(),
                lr=learning_rate,
                momentum=0.9,
                nesterov=True,
                weight_decay=weight_decay,
            )
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=epochs * steps)
            for _ in range(epochs):
                for batch in torch.split(torch.randperm(len(images), generator=order), batch_size):
                    found = loss(model(images[batch]), labels[batch])
                    optimiser.zero_grad(set_to_none=True)
                    found.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                    schedule.step()
        return model.state_dict()

    return train_checkpoint
