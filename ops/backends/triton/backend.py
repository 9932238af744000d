"""Triton kernels: NVIDIA GPUs of compute capability 7.5 and newer; others through the portable decode."""

import functools

import torch
from torch import Tensor

from ...weight import TernaryWeight

NAME = "triton"


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None. The first call for a device runs a small kernel."""
    try:
        import triton
    except Exception as error:  # a broken installation raises whatever its parts raise
        return f"Triton cannot be imported ({_first_line(error)})"
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    if device.type not in ("cuda", "xpu"):
        return f"kernels run on GPUs with Triton, not on {device.type}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (7, 5):
            return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, kernels need 7.5"
    try:
        return _probe(device)
    except Exception as error:  # no C compiler, an unsupported driver, a broken cache folder, ...
        return f"Triton cannot run a kernel here ({_first_line(error)})"


def formats(device: torch.device) -> tuple[str, ...]:
    """The activations that have kernels on `device`, fastest first."""
    from . import configs

    return configs.chip(device).formats


def linear(x: Tensor, weight: TernaryWeight, bias: Tensor | None, activations: str) -> Tensor:
    """x [M, K] times the weight, [M, N] in the dtype of x; see `ops.ternary_linear` and `dispatch`."""
    return _dispatch()(x, weight, bias, activations)


@functools.cache
def _dispatch():
    from .dispatch import linear

    return linear


def _probe(device: torch.device) -> str | None:
    from . import configs
    from .dequantize import dequantize

    weight = TernaryWeight.from_codes(torch.ones(16, 128, dtype=torch.int8), torch.ones(16)).to(device)
    with torch.get_device_module(device).device(device):
        dense = dequantize(weight, None, None, torch.empty(16, 128, device=device), configs.chip(device))
    return None if bool((dense == 1).all()) else "a test kernel gave a wrong result"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
