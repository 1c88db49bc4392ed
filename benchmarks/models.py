"""The models that benchmarks run, each with a batch and a model output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from trak_dist import ImageClassification
from trak_dist.ops.model_outputs import BatchedModelOutput
from trak_dist.problems.networks import resnet9

CLASSES, VOCABULARY, LENGTH = 10, 8192, 128


@dataclass(frozen=True)
class Case:
    """A model in `eval()`, how many examples it is run on, and what a training step minimises."""

    model: nn.Module
    output: BatchedModelOutput
    batch: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    first: nn.Module  # nothing before its output is differentiated by activations
    rows: int


class ViT(nn.Module):
    """The size of ViT-tiny: 12 blocks of width 192, here on 8 × 8 patches of 4 × 4."""

    def __init__(self, width: int = 192, depth: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 65, width))
        self.blocks = nn.Sequential(*[Block(width, heads, causal=False) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x)[:, 0]))


class LanguageModel(nn.Module):
    """Two causal blocks of width 512 on 128 of 8,192 tokens; the head has weights of its own."""

    def __init__(self, width: int = 512, depth: int = 2, heads: int = 8) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = nn.Sequential(*[Block(width, heads, causal=True) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            h.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for h in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        found = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class NextToken:
    """The mean over positions of the log-probability of the next token."""

    def get_output(
        self, model: nn.Module, weights: Any, buffers: Any, ids: Tensor, following: Tensor
    ) -> Tensor:
        batch = (ids[None], following[None])
        return self.get_batch_output(model, weights, buffers, batch)[0]

    def get_batch_output(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        batch: Sequence[Any],
    ) -> Tensor:
        ids, following = batch
        logits = functional_call(model, (dict(weights), dict(buffers)), (ids,))
        return -F.cross_entropy(logits.mT, following, reduction="none").mean(1)

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Any, buffers: Any, batch: Sequence[Any]
    ) -> Tensor:
        return torch.ones(len(batch[0]), device=batch[0].device)  # the output is minus the loss


def resnet9_case() -> Case:
    model = resnet9(CLASSES)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    return Case(model.eval(), ImageClassification(), images, F.cross_entropy, first, rows=64)


def vit_case() -> Case:
    model = ViT().eval()
    return Case(model, ImageClassification(), images, F.cross_entropy, model.patches, rows=32)


def language_model_case() -> Case:
    model = LanguageModel().eval()

    def loss(logits: Tensor, following: Tensor) -> Tensor:
        return F.cross_entropy(logits.mT, following)

    return Case(model, NextToken(), texts, loss, model.tokens, rows=16)


def images(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, 32, 32), torch.arange(rows) % CLASSES


def texts(rows: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


CASES: dict[str, Callable[[], Case]] = {
    "ResNet-9": resnet9_case,
    "ViT-tiny": vit_case,
    "language model": language_model_case,
}
