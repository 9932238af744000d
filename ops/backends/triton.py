"""Triton kernels on NVIDIA GPUs of compute capability 8.0 and newer."""

import torch

NAME = "triton"


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None."""
    return f"kernels run on CUDA devices, not on {device.type}"
