"""Two small towers on made-up pairs, and their formulas again in float64 numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import trak_dist

PIXELS, WORDS, LENGTH, DIMENSIONS = 6, 9, 3, 4
TRAIN, TARGETS, CONTRAST = 12, 5, 7


class Towers(nn.Module):
    """Cosines of tanh(W image + b) and the mean of a text's rows of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(PIXELS, DIMENSIONS)
        self.words = nn.Embedding(WORDS, DIMENSIONS)
        self.logit_scale = nn.Parameter(torch.tensor(1.2))

    def encode_image(self, images: Tensor) -> Tensor:
        return self.image(images).tanh()

    def encode_text(self, texts: Tensor) -> Tensor:
        return self.words(texts).mean(1)


def towers(seed: int = 0) -> Towers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Towers().eval()


class Pairs(torch.utils.data.Dataset):
    def __init__(self, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(rows, PIXELS, generator=generator)
        self.texts = torch.randint(WORDS, (rows, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.images[row], self.texts[row]

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.images, self.texts


def output(seed: int = 3, **settings: Any) -> trak_dist.CLIP:
    loader = torch.utils.data.DataLoader(Pairs(CONTRAST, seed), batch_size=4)
    return trak_dist.CLIP(loader, **settings)


def train_checkpoint(dataset: Any, seed: int, device: torch.device) -> Mapping[str, Tensor]:
    """A few steps of CLIP's own loss, whose negatives are the batch's."""
    model = towers(100 + seed).to(device)
    rows = [dataset[row] for row in range(len(dataset))]
    images, texts = (torch.stack(column) for column in zip(*rows, strict=True))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(8):
        x, y = (
            nn.functional.normalize(e)
            for e in (model.encode_image(images), model.encode_text(texts))
        )
        logits, own = model.logit_scale.exp() * x @ y.mT, torch.arange(len(x))
        loss = sum(nn.functional.cross_entropy(s, own) for s in (logits, logits.mT))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.state_dict()


def problem(
    directory: str = "", contrast: int = 3, model_output: Any = None, trained: bool = False
) -> trak_dist.Problem:
    return trak_dist.Problem(
        model=towers(),
        model_output=model_output or output(contrast),
        train=Pairs(TRAIN, seed=1),
        targets={"val": Pairs(TARGETS, seed=2)},
        checkpoints=[] if trained else sorted(Path(directory).glob("*.pt")),
        train_checkpoint=train_checkpoint,
    )


def write_checkpoints(directory: Path, count: int = 2) -> None:
    directory.mkdir()
    for seed in range(count):
        torch.save(towers(10 + seed).state_dict(), directory / f"{seed}.pt")


# In float64, by numpy alone ---------------------------------------------------------------------

State = Mapping[str, np.ndarray]


def exact(state: Mapping[str, Tensor]) -> State:
    return {name: tensor.detach().double().numpy() for name, tensor in state.items()}


def embedded(state: State, images: Any, texts: Any) -> tuple[np.ndarray, np.ndarray]:
    x = np.tanh(np.asarray(images, float) @ state["image.weight"].T + state["image.bias"])
    y = state["words.weight"][np.asarray(texts)].mean(1)
    return tuple(e / np.linalg.norm(e, axis=1, keepdims=True) for e in (x, y))


def value(
    state: State, fixed: tuple[np.ndarray, np.ndarray], pair: Any, scale: Any = None
) -> float:
    """TRAK's formula, −log Σⱼ exp(−x·(y − yⱼ)) and its mirror image, of embeddings times √s."""
    root = np.sqrt(np.exp(state["logit_scale"]) if scale is None else scale)
    (x,), (y,) = (root * e for e in embedded(state, pair[0][None], pair[1][None]))
    others_x, others_y = (root * e for e in fixed)
    by_image = -np.log(np.exp(-(y - others_y) @ x).sum())
    by_text = -np.log(np.exp(-(x - others_x) @ y).sum())
    return float(by_image + by_text)


def values(state: State, contrast: Pairs, pairs: Pairs, scale: Any = None) -> np.ndarray:
    fixed = embedded(state, *contrast.batch())
    return np.array([value(state, fixed, pair, scale) for pair in pairs])


def log_probabilities(state: State, fixed: tuple[np.ndarray, np.ndarray], pair: Any) -> np.ndarray:
    """(2, 1 + contrasts): of the texts by the image, of the images by the text; its own first."""
    x, y = embedded(state, pair[0][None], pair[1][None])
    cosines = [x @ np.concatenate([y, fixed[1]]).T, y @ np.concatenate([x, fixed[0]]).T]
    logits = np.exp(state["logit_scale"]) * np.concatenate(cosines)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def differentiated(function: Callable[[State], np.ndarray], state: State) -> np.ndarray:
    """(…, p) by central differences, parameters in order of name."""
    step, columns = 1e-5, []
    for name in sorted(state):
        for at in np.ndindex(state[name].shape):
            ends = []
            for sign in (1, -1):
                moved = {n: v.copy() for n, v in state.items()}
                moved[name][at] += sign * step
                ends.append(function(moved))
            columns.append((ends[0] - ends[1]) / (2 * step))
    return np.stack(columns, -1)


def gradients(state: State, contrast: Pairs, pairs: Pairs) -> np.ndarray:
    """(rows, p) of f, the contrast set's embeddings held constant."""
    fixed = embedded(state, *contrast.batch())
    return differentiated(lambda moved: np.array([value(moved, fixed, p) for p in pairs]), state)


def fisher_rows(state: State, contrast: Pairs, pairs: Pairs) -> np.ndarray:
    """(2 rows (1 + contrasts), p): √p ∇ log p of every label, whose UᵀU is the Fisher matrix."""
    fixed = embedded(state, *contrast.batch())

    def all_of(moved: State) -> np.ndarray:
        return np.stack([log_probabilities(moved, fixed, pair) for pair in pairs])

    roots = np.exp(all_of(state) / 2)[..., None]
    return (roots * differentiated(all_of, state)).reshape(-1, sum(v.size for v in state.values()))


def out_to_loss(state: State, contrast: Pairs, pairs: Pairs) -> np.ndarray:
    """TRAK's 1 − (p + p′)/2, the first diagonal entry of a batch of the pair and the contrasts."""
    found, (others_x, others_y) = [], embedded(state, *contrast.batch())
    for image, text in pairs:
        x, y = embedded(state, image[None], text[None])
        s = (
            np.exp(state["logit_scale"])
            * np.concatenate([x, others_x])
            @ np.concatenate([y, others_y]).T
        )
        both = [np.exp(s) / np.exp(s).sum(axis, keepdims=True) for axis in (1, 0)]
        found.append(1 - (both[0][0, 0] + both[1][0, 0]) / 2)
    return np.array(found)
