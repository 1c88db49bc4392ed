"""One small problem for each model output, and its f in float64 written another way.

Each case has examples (what a dataset gives), a model, the model output, and `f(model, example)`
and `loss(f)` in float64, which share no code with trak_dist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import trak_dist

ROWS, TOKENS, VOCABULARY = 8, 6, 9


@dataclass(frozen=True)
class Case:
    output: Any
    model: nn.Module
    examples: Sequence[Any]
    f: Callable[[nn.Module, Any], Tensor]
    loss: Callable[[Tensor], Tensor]


class Decoder(nn.Module):
    """A causal language model of one attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 12)
        self.out = nn.Linear(4, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        q, k, v = self.qkv(self.table(input_ids)).chunk(3, -1)
        hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        if attention_mask is not None:
            hidden = hidden | (attention_mask == 0)[:, None, :]
        mixed = (q @ k.mT).masked_fill(hidden, -1e9).softmax(-1) @ v
        return SimpleNamespace(logits=self.out(mixed))


class Encoder(Decoder):
    """The same without its order: each token sees all."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        q, k, v = self.qkv(self.table(input_ids)).chunk(3, -1)
        hidden = (attention_mask == 0)[:, None, :]
        return SimpleNamespace(
            logits=self.out((q @ k.mT).masked_fill(hidden, -1e9).softmax(-1) @ v)
        )


class Translator(nn.Module):
    """A decoder whose tokens also see the mean of the source's."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.decoder = nn.Embedding(VOCABULARY, 4), Decoder()

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Any:
        read = self.source(input_ids).mean(1, keepdim=True)
        h = self.decoder.table(decoder_input_ids) + read
        return SimpleNamespace(logits=self.decoder.out(h.cumsum(1)))

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        shifted = labels.new_zeros(labels.shape)
        shifted[:, 1:] = labels[:, :-1].clone()
        return shifted.masked_fill(shifted == -100, 0)


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Any:
        return {"out": self.conv(images)}


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.conv = nn.Embedding(10, 2), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        return SimpleNamespace(sample=self.conv(sample + self.time(timestep)[:, :, None, None]))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def texts() -> list[dict[str, Tensor]]:
    """Texts of different length, padded to one, with a prompt that does not count."""
    found = []
    for row in range(ROWS):
        ids, length = tokens(TOKENS, seed=row), TOKENS - row % 3
        mask = (torch.arange(TOKENS) < length).long()
        labels = torch.where((mask == 1) & (torch.arange(TOKENS) > row % 2), ids, -100)
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return found


def text_f(net: nn.Module, text: Mapping[str, Tensor], *, shift: int = 1) -> Tensor:
    """Token by token, of the text cut at its length; logits at t are for the label at t + shift."""
    length = int(text["attention_mask"].sum())
    given = {"input_ids": text["input_ids"][None, :length]}
    logits = net(**given, attention_mask=torch.ones(1, length)).logits[0]
    found = logits.new_zeros(())
    for at in range(shift, length):
        if int(text["labels"][at]) != -100:
            odds = logits[at - shift].exp()
            found = found + (odds[int(text["labels"][at])] / odds.sum()).log()
    return found


def answers() -> list[dict[str, Tensor]]:
    return [
        {
            "input_ids": tokens(4, seed=row),
            "labels": torch.where(torch.arange(5) < 5 - row % 3, tokens(5, seed=50 + row), -100),
        }
        for row in range(ROWS)
    ]


def answer_f(net: nn.Module, row: Mapping[str, Tensor]) -> Tensor:
    answer = [int(label) for label in row["labels"] if int(label) != -100]
    read = torch.tensor([[0, *answer[:-1]]])
    logits = net(row["input_ids"][None], decoder_input_ids=read).logits[0]
    chosen = [logits[i].exp()[y] / logits[i].exp().sum() for i, y in enumerate(answer)]
    return torch.stack(chosen).log().sum()


def preferences() -> list[dict[str, Tensor]]:
    found = []
    for row, (good, bad) in enumerate(zip(texts(), reversed(texts()), strict=True)):
        sides = {"chosen": good, "rejected": bad}
        pair = {f"{side}_{k}": v for side, text in sides.items() for k, v in text.items()}
        logps = {f"ref_{side}_logps": random(1, seed=row + i)[0] for i, side in enumerate(sides)}
        found.append(pair | logps)
    return found


def preference_f(net: nn.Module, row: Mapping[str, Tensor]) -> Tensor:
    sides = []
    for side in ("chosen", "rejected"):
        text = {k: row[f"{side}_{k}"] for k in ("input_ids", "attention_mask", "labels")}
        sides.append(text_f(net, text) - row[f"ref_{side}_logps"].double())
    return 0.3 * (sides[0] - sides[1])


def pixel_f(net: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
    image, labels = example
    odds = net(image[None].double())["out"][0].exp()
    found = [
        (odds[int(labels[i, j]), i, j] / odds[:, i, j].sum()).log()
        for i in range(labels.shape[0])
        for j in range(labels.shape[1])
        if int(labels[i, j]) != 255
    ]
    return torch.stack(found).mean()


def labels_f(net: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
    p = 1 / (1 + (-net(example[0][None].double())[0]).exp())
    return sum((q if y else 1 - q).log() for q, y in zip(p, example[1].tolist(), strict=True))


def distance_f(net: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
    error = example[1].double().reshape(-1) - net(example[0][None].double())[0]
    return -(error * error).sum().sqrt()


def noise_f(net: nn.Module, row: Mapping[str, Tensor]) -> Tensor:
    found = [
        (noise.double() - net(sample[None].double(), time[None]).sample[0]).square().sum()
        for sample, time, noise in zip(row["sample"], row["timestep"], row["noise"], strict=True)
    ]
    return -sum(found) / row["noise"].numel()


def absolute(model: Callable[..., Tensor], batch: Sequence[Any]) -> Tensor:
    return (model(batch[0]) - batch[1]).abs().sum(1)


def pixels() -> list[tuple[Tensor, Tensor]]:
    classes = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (ROWS, 4, 5), generator=classes)
    for row in range(ROWS):
        labels[row, 0, : row % 4] = 255
    return list(zip(random(ROWS, 2, 4, 5), labels, strict=True))


def net(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))


def minus(f: Tensor) -> Tensor:
    return -f


def half_square(f: Tensor) -> Tensor:
    return 0.5 * f * f


def logistic(f: Tensor) -> Tensor:
    return (1 + (-f).exp()).log()


def noised() -> list[Any]:
    alphas = torch.linspace(0.99, 0.01, 10)
    rows = trak_dist.NoisedRows(list(random(ROWS, 2, 3, 4)), alphas, draws=3)
    return [rows[i] for i in range(ROWS)]


def case(name: str) -> Case:
    torch.manual_seed(0)
    inputs = random(ROWS, 3)
    one, two = random(ROWS, seed=1), random(ROWS, 2, seed=2)
    marks = (random(ROWS, 4, seed=4) > 0).long()
    build: dict[str, Callable[[], tuple[Any, ...]]] = {
        "causal": lambda: (trak_dist.LanguageModeling(), Decoder(), texts(), text_f, minus),
        "masked": lambda: (
            trak_dist.MaskedLanguageModeling(),
            *(Encoder(), texts(), lambda net, text: text_f(net, text, shift=0), minus),
        ),
        "sequence": lambda: (
            trak_dist.SequenceToSequence(),
            *(Translator(), answers(), answer_f, minus),
        ),
        "regression": lambda: (
            trak_dist.Regression(),
            *(net(1), list(zip(inputs, one, strict=True)), distance_f, half_square),
        ),
        "regression of two": lambda: (
            trak_dist.Regression(),
            *(net(2), list(zip(inputs, two, strict=True)), distance_f, half_square),
        ),
        "many labels": lambda: (
            trak_dist.MultiLabelClassification(),
            *(net(4), list(zip(inputs, marks, strict=True)), labels_f, minus),
        ),
        "segmentation": lambda: (
            trak_dist.Segmentation(ignore_index=255),
            *(Pixels(), pixels(), pixel_f, minus),
        ),
        "preference": lambda: (
            trak_dist.Preference(beta=0.3),
            *(Decoder(), preferences(), preference_f, logistic),
        ),
        "diffusion": lambda: (trak_dist.Diffusion(), Denoiser(), noised(), noise_f, minus),
        "loss": lambda: (
            trak_dist.LossOutput(absolute),
            net(2),
            list(zip(inputs, two, strict=True)),
            lambda net, e: -(net(e[0][None].double())[0] - e[1].double()).abs().sum(),
            minus,
        ),
    }
    return Case(*build[name]())


CASES = (
    *("causal", "masked", "sequence", "regression", "regression of two", "many labels"),
    *("segmentation", "preference", "diffusion", "loss"),
)
