"""A random FLUX.1 of the real architecture, small enough for every test: ternary file, dense twin, inputs."""

from dataclasses import replace
from pathlib import Path

import torch
from ternary_flux.ops import TernaryWeight
from ternary_flux.ops.packing import groups_of
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.files.layer import LayerPlan
from ternary_flux.quantizer.files.ternary import open_ternary, write_ternary

HIDDEN = 256
FLUX1 = Architecture(
    version=1,
    hidden=HIDDEN,
    depth=1,
    depth_single=1,
    in_channels=16,
    out_channels=16,
    context_dim=128,
    vec_dim=64,
    guidance=True,
)
CPU = torch.device("cpu")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense_tensors(arch: Architecture, g: torch.Generator, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Random parameters under BFL names, scaled so that activations keep their size."""
    tensors = {}
    for name, shape in arch.shapes.items():
        spread = shape[1] ** -0.5 if len(shape) == 2 else 0.1
        tensors[name] = (torch.randn(shape, generator=g) * spread + float(name.endswith("norm.scale"))).to(dtype)
    return tensors


def ternary_weight(shape, g: torch.Generator, rank=0, float_groups=False, terms=1, columns=False) -> TernaryWeight:
    n, k = shape
    codes = torch.randint(-1, 2, (n, terms * k), generator=g, dtype=torch.int8)
    row = (torch.rand(n, generator=g) + 0.5) * k**-0.5 / 100
    group = torch.randint(60, 128, (terms * groups_of(k), n), generator=g, dtype=torch.uint8)
    scales = ((row * group).to(torch.bfloat16), None) if float_groups else (row, group)
    down = up = None
    if rank:
        down = (torch.randn(rank, k, generator=g) * k**-0.5).to(torch.bfloat16)
        up = (torch.randn(n, rank, generator=g) * 0.3).to(torch.bfloat16)
    column = (torch.randn(k, generator=g) * 0.5).exp().to(torch.bfloat16) if columns else None
    return TernaryWeight.from_codes(codes, *scales, down=down, up=up, terms=terms, column=column)


def write(
    path: Path,
    arch: Architecture = FLUX1,
    packing="planes32",
    seed=0,
    prefix="",
    dtype=torch.float32,
    metadata=None,
    columns: bool | str = False,
    **weights,
) -> Path:
    """Write a random ternary FLUX; `dtype` of what is dense.

    columns: column scales; "half": in every second Linear, and activations in full precision in every fourth.
    """
    g = generator(seed)
    dense = dense_tensors(arch, g, dtype)
    for name in arch.linears:
        del dense[f"{name}.weight"]
    layers = {}
    for i, (name, shape) in enumerate(arch.linear_shapes.items()):
        scaled = i % 2 == 0 if columns == "half" else columns
        weight = ternary_weight(shape, g, columns=scaled, **weights)
        layers[f"{prefix}{name}"] = replace(weight, full_precision=columns == "half" and i % 4 == 0)
    plans = {name: LayerPlan.of(weight, packing) for name, weight in layers.items()}
    dense = {f"{prefix}{name}": tensor for name, tensor in dense.items()}
    header = metadata or {"modelspec.title": "tiny"}
    write_ternary(path, plans, layers.__getitem__, dense, header, overwrite=True)
    return path


def dense_twin(path: Path) -> dict[str, torch.Tensor]:
    """The same model with dequantized fp32 weights, as a dense checkpoint's state dict."""
    file = open_ternary(path)
    state = {name: file.tensor(name) for name in file.dense}
    return state | {f"{name}.weight": file.weight(name).dequantize() for name in file.layers}


def run(patcher, mode=torch.inference_mode, dtype=torch.float32) -> torch.Tensor:
    """The velocity for fixed random inputs, computed in `dtype`."""
    latent = torch.randn(1, 16, 16, 16, generator=generator(1))
    context = torch.randn(1, 8, 128, generator=generator(2))
    pooled = torch.randn(1, 64, generator=generator(3))
    inputs = [tensor.to(dtype) for tensor in (latent, torch.tensor([0.5]), context, pooled, torch.tensor([3.5]))]
    with mode():
        return patcher.model.diffusion_model(*inputs).float().clone()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance of a from b."""
    return float((a - b).norm() / b.norm())
