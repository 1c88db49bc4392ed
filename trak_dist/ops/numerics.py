"""Numerical settings of torch in this process: kernels, precision, order of sums."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def fix(device: torch.device) -> None:
    """Make torch use deterministic kernels and exact float32."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for place in _precisions():  # these can be set by two names, and torch heeds the newer one
        place.fp32_precision = "ieee"
    if device.type == "cuda":  # on the CPU it only costs the import of inductor, 1.4 s
        # A warning where there is no such kernel: that is the user's model.
        torch.use_deterministic_algorithms(True, warn_only=True)
        # With warnings only, fused attention's backward pass still sums in any order.
        for enable in _ATTENTION:
            enable(enable is torch.backends.cuda.enable_math_sdp)


@contextlib.contextmanager
def preserve() -> Iterator[None]:
    """Restore what `fix` sets."""
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    strict = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    attention = {enable: enabled() for enable, enabled in _ATTENTION.items()}
    precisions = [(place, place.fp32_precision) for place in _precisions()]
    products = convolutions = None
    with contextlib.suppress(
        RuntimeError
    ):  # torch refuses to say it where it was set by both names
        products = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        convolutions = cudnn.allow_tf32
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = flags
        if (strict, warns) != (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ):
            torch.use_deterministic_algorithms(strict, warn_only=warns)
        for enable, enabled in attention.items():
            enable(enabled)
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        for place, precision in precisions:
            place.fp32_precision = precision


def _precisions() -> list[Any]:
    """What has a precision of float32 of its own, from torch 2.9 on."""
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):
        return []
    cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn
    return [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


_ATTENTION: dict[Callable[[bool], None], Callable[[], bool]] = {
    torch.backends.cuda.enable_math_sdp: torch.backends.cuda.math_sdp_enabled,
    torch.backends.cuda.enable_flash_sdp: torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.enable_mem_efficient_sdp: torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.enable_cudnn_sdp: torch.backends.cuda.cudnn_sdp_enabled,
}
