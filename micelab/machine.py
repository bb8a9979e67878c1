"""The machine that a number was measured on: what it is called and which precision suits it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Literal

import torch


def default_precision(device: str = "cpu") -> Literal["bf16", "fp32"]:
    """What to train in: "bf16" where the machine multiplies it natively (AVX-512 BF16, AMX, CUDA from Ampere on), else "fp32"."""
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def machine() -> str:
    """Processor or GPU, thread count and torch version of this process: what a number should carry."""
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return f"{chip}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        return names[0] if names else platform.machine()
    return platform.processor() or platform.machine()
