"""Linears in 8 bits or two ternary terms beside ternary ones: what the mixed profile writes, and its name in a file."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .layer import INT8
from .metadata import stated
from .ternary import TernaryFile

PRECISIONS = ("two-terms", "int8")  # two ternary terms, or 8 bits


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric rounding of [N, K] to int8 with one scale a row: int8 [N, K] and fp32 [N, 1]."""
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (weight / scale).round_().to(torch.int8), scale


def int8_tensors(teacher: Checkpoint, precisions: Mapping[str, str]) -> dict[str, Tensor]:
    """What a file holds, by key, for those of the original's Linears whose precision is int8."""
    entry = torch.frombuffer(bytearray(json.dumps({"format": INT8}).encode()), dtype=torch.uint8)
    tensors = {}
    for name in (name for name, precision in precisions.items() if precision == "int8"):
        codes, scale = int8(teacher.tensor(f"{name}.weight"))
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scale, f"{name}.comfy_quant": entry}
    return tensors


def metadata(precisions: Mapping[str, str]) -> dict[str, str]:
    """What a file says of its precisions; `precisions_of` reads it."""
    return {"ternary.mixed": json.dumps(dict(precisions))} if precisions else {}


def precisions_of(file: TernaryFile) -> dict[str, str]:
    """The precisions (name -> precision) that `mixed` chose for this file; none for others."""
    return stated(file.metadata, "ternary.mixed")
