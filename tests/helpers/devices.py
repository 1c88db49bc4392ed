"""The device that tests marked `device` compute on: that of `make gpu`, else the CPU."""

from __future__ import annotations

import os

import torch

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
