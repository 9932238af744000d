"""Checkpoints of FLUX's real architecture, small and random."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from ternary_flux.quantizer.files.architecture import Architecture

FLUX1 = Architecture(
    version=1,
    hidden=128,
    depth=1,
    depth_single=2,
    in_channels=16,
    out_channels=16,
    context_dim=64,
    vec_dim=32,
    guidance=True,
)
FLUX2 = replace(FLUX1, version=2, depth_single=1, in_channels=128, out_channels=128, context_dim=96, vec_dim=None)


def tensors(arch: Architecture = FLUX1, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: (torch.randn(shape, generator=generator) * 0.05).to(dtype) for name, shape in arch.shapes.items()}


def write(
    path: Path,
    arch: Architecture = FLUX1,
    dtype: torch.dtype = torch.bfloat16,
    prefix: str = "",
    extra: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A dense checkpoint with random weights of standard deviation 0.05; `extra` tensors are added as they are."""
    state = {prefix + name: tensor for name, tensor in tensors(arch, dtype).items()}
    save_file(state | (extra or {}), path, {"modelspec.title": "Synthetic", "modelspec.license": "none"})
    return path
