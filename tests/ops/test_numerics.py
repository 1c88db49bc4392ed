"""How torch computes in a cell, whatever a script or a problem's file has set; and afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from trak_dist import worker
from trak_dist.ops import numerics

CPU, GPU = torch.device("cpu"), torch.device("cuda")
EXACT = {"ieee", False, "highest"}


@pytest.fixture(autouse=True)
def _leave_flags_as_they_were() -> Iterator[None]:
    with numerics.preserve():
        yield


def precisions() -> dict[str, Any]:
    """What torch says of float32, by its older and its newer names; `refused` where it does not."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    asked: dict[str, Callable[[], Any]] = {
        "products": torch.get_float32_matmul_precision,
        "allow_tf32 of products": lambda: cuda.matmul.allow_tf32,
        "allow_tf32 of cudnn": lambda: cudnn.allow_tf32,
    }
    for place in (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn):
        asked[f"fp32_precision {len(asked)}"] = lambda place=place: place.fp32_precision
    found = {}
    for name, ask in asked.items():
        try:
            found[name] = ask()
        except RuntimeError:
            found[name] = "refused"
    return found


def everywhere(precision: str) -> None:
    torch.backends.fp32_precision = precision


def of_convolutions(precision: str) -> None:
    torch.backends.cudnn.conv.fp32_precision = precision


def of_products(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = precision


def allowed() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


SETTINGS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "tf32 allowed": allowed,
    "tf32 everywhere": lambda: everywhere("tf32"),
    "ieee everywhere": lambda: everywhere("ieee"),
    "ieee of convolutions": lambda: of_convolutions("ieee"),
    "tf32 of products": lambda: of_products("tf32"),
}


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_float32_is_exact_in_a_cell_and_as_it_was_afterwards(
    setting: str, device: torch.device
) -> None:
    general = torch.backends.fp32_precision
    try:
        SETTINGS[setting]()
        before = precisions()
        with numerics.preserve():
            numerics.fix(device)
            assert set(precisions().values()) <= EXACT
        assert precisions() == before
    finally:
        torch.backends.fp32_precision = general


def test_a_script_that_uses_torchs_newer_names_can_feed() -> None:
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    of_convolutions("ieee")
    assert precisions()["allow_tf32 of cudnn"] == "refused"
    with worker.cell_numerics(CPU):
        pass


def attention() -> list[bool]:
    cuda = torch.backends.cuda
    fused = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled)
    return [cuda.math_sdp_enabled(), *(enabled() for enabled in fused)]


def test_on_a_gpu_kernels_with_one_order_are_asked_for() -> None:
    torch.backends.cudnn.benchmark = True
    before = attention()
    with numerics.preserve():
        numerics.fix(GPU)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert attention() == [True, False, False, False]
        assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert attention() == before
    assert torch.backends.cudnn.benchmark


def test_on_the_cpu_attention_is_left_alone() -> None:
    """Its kernels there add in one order, and runs of earlier versions have their bits."""
    before = attention()
    numerics.fix(CPU)
    assert attention() == before
    assert not torch.are_deterministic_algorithms_enabled()
