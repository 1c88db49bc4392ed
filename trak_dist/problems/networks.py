"""The networks of the shipped problems."""

from __future__ import annotations

from torch import Tensor, nn


def mlp(pixels: int, classes: int) -> nn.Module:
    """784 → 128 → 64 → 10 for MNIST: p = 109,386."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def cnn(channels: int, classes: int) -> nn.Module:
    """Two strided convolutions and a linear layer, for images of 28 × 28."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, classes),
    )


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.inner(x)
        return x + inner


class _Scale(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


def _convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(
            inputs, outputs, size, stride=stride, padding=size // 2 if size == 3 else 2, bias=False
        ),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def resnet9(classes: int) -> nn.Module:
    """ResNet-9 as in TRAK's quickstart, for images of 32 × 32 with 3 channels."""
    return nn.Sequential(
        _convolution(3, 64),
        _convolution(64, 128, size=5, stride=2),
        _Residual(nn.Sequential(_convolution(128, 128), _convolution(128, 128))),
        _convolution(128, 256),
        nn.MaxPool2d(2),
        _Residual(nn.Sequential(_convolution(256, 256), _convolution(256, 256))),
        nn.Conv2d(256, 128, 3, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(128, classes, bias=False),
        _Scale(0.2),
    )
