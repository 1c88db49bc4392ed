"""A GPU that Slurm granted and torch does not see is an error, not a reason to be slow."""

from __future__ import annotations

import os

import pytest
import torch

from trak_dist.errors import DeviceError
from trak_dist.runtime.session import open_device


@pytest.fixture(autouse=True)
def _cuda_build_that_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.delenv("SLURM_STEP_GPUS", raising=False)
    monkeypatch.delenv("SLURM_JOB_GPUS", raising=False)


@pytest.mark.parametrize("variable", ["SLURM_STEP_GPUS", "SLURM_JOB_GPUS"])
def test_a_granted_gpu_that_torch_does_not_see(monkeypatch, variable: str) -> None:
    monkeypatch.setenv(variable, "3")
    with pytest.raises(DeviceError) as caught:
        open_device("auto")
    assert str(caught.value) == (
        f"Slurm gave this task GPU 3, torch {torch.__version__} sees no CUDA device\n"
        "  where: cluster.device\n"
        "  next:  leave the node out (cluster.exclude), or compute without: cluster.device=cpu"
    )


def test_without_a_granted_gpu_it_computes_on_the_cpu() -> None:
    assert open_device("auto") == torch.device("cpu")


def test_a_build_without_cuda_computes_on_the_cpu(monkeypatch) -> None:
    monkeypatch.setenv("SLURM_STEP_GPUS", "0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert open_device("auto") == torch.device("cpu")


def test_who_asks_for_the_cpu_gets_it(monkeypatch) -> None:
    monkeypatch.setenv("SLURM_STEP_GPUS", "0")
    assert open_device("cpu") == torch.device("cpu")


def test_who_asks_for_cuda_does_not_get_the_cpu(monkeypatch) -> None:
    monkeypatch.setenv("SLURM_STEP_GPUS", "0")
    with pytest.raises(DeviceError, match="device cuda was asked for, torch sees no CUDA device"):
        open_device("cuda")


def test_a_gpu_that_torch_sees_is_used(monkeypatch) -> None:
    monkeypatch.setenv("SLURM_STEP_GPUS", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # and as it was, afterwards
    assert open_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1"])
def test_before_a_gpu_is_used_cublas_is_reported_to_sum_in_one_order(
    monkeypatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    open_device(name)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    open_device(name)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
