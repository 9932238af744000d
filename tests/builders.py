"""What many tests start from: a random FLUX, a random ternary weight, a conditioning file."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from ternary_flux.ops import TernaryWeight
from ternary_flux.ops.packing import groups_of
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.model.flux import Flux
from ternary_flux.quantizer.pictures import conditioning
from torch import Tensor

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flux_state(arch: Architecture, seed: int = 0) -> dict[str, Tensor]:
    """bf16 parameters of a FLUX with outputs of about unit size."""
    g, state = generator(seed), {}
    for name, parameter in Flux(arch).named_parameters():
        scale, mean = (0.08, 0.0) if parameter.ndim == 2 else (0.1, float(name.endswith("scale")))
        state[name] = (mean + scale * torch.randn(parameter.shape, generator=g)).bfloat16()
    return state


def flux(arch: Architecture, seed: int = 0) -> Flux:
    """The model of `flux_state`, fp32, without gradients."""
    model = Flux(arch)
    model.load_state_dict({name: value.float() for name, value in flux_state(arch, seed).items()})
    return model.requires_grad_(False)


def write_flux(path: Path, arch: Architecture, seed: int = 0) -> Path:
    """The checkpoint of `flux_state`."""
    save_file(flux_state(arch, seed), path)
    return path


def write_conditioning(path: Path, arch: Architecture, prompts: int = 20, tokens: int = 5, seed: int = 1) -> Path:
    """Random contexts (and pooled vectors) of "prompt 0", "prompt 1" and so on."""
    g = generator(seed)
    context = torch.randn(prompts, tokens, arch.context_dim, generator=g)
    pooled = None if arch.vec_dim is None else torch.randn(prompts, arch.vec_dim, generator=g)
    conditioning.write(path, [f"prompt {i}" for i in range(prompts)], context, pooled)
    return path


def ternary_weight(
    n: int,
    k: int,
    scales: str = "integer",
    rank: int = 0,
    seed: int = 0,
    terms: int = 1,
    column: torch.dtype | None = None,
) -> TernaryWeight:
    """A random weight [N, K].

    scales   "row", "integer" groups, or groups in "bf16", "fp16" or "fp32"
    column   dtype of a scale for each input, None for none
    """
    g = generator(seed)
    codes = torch.randint(-1, 2, (n, terms * k), dtype=torch.int8, generator=g)
    groups = terms * groups_of(k), n
    row, group = torch.rand(n, generator=g) * 0.01 + 1e-3, None
    if scales == "integer":
        group = torch.randint(1, 128, groups, dtype=torch.uint8, generator=g)
    elif scales != "row":
        row = (torch.rand(groups, generator=g) * 0.01 + 1e-3).to(_DTYPES[scales])
    down = torch.randn(rank, k, generator=g).bfloat16() if rank else None
    up = torch.randn(n, rank, generator=g).bfloat16() if rank else None
    inputs = (torch.randn(k, generator=g) * 0.7).exp().to(column) if column else None
    return TernaryWeight.from_codes(codes, row, group, down=down, up=up, terms=terms, column=inputs)
