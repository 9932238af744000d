"""The model that distillation trains: a FLUX of `TernaryLinear`s, made from and written to ternary files."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from ...ops import TernaryWeight
from ..files.architecture import Architecture
from ..files.checkpoint import Checkpoint
from ..files.layer import LayerPlan
from ..files.ternary import TernaryFile, write_ternary
from .flux import Flux, make_block
from .ternary_linear import TernaryLinear, svd_low_rank

_Module = TypeVar("_Module", bound=nn.Module)


def load_student(file: TernaryFile, device: torch.device | str = "cpu", packed: bool = False) -> Flux:
    """The model of a ternary file with trainable layers, fp32 parameters; `packed` keeps frozen codes in 2 bits."""
    return _fill(Flux(file.architecture, linear=_placeholder), file, "", packed).to(device)


def load_stem(file: TernaryFile, device: torch.device | str = "cpu") -> Flux:
    """What comes before and after the blocks of a model, as a Flux without blocks, fp32."""
    return _fill(Flux(replace(file.architecture, depth=0, depth_single=0)), file, "", False).to(device)


def load_block(file: TernaryFile, name: str, arch: Architecture, device: torch.device | str = "cpu") -> nn.Module:
    """One block (`double_blocks.0` ...) with trainable layers, fp32; the file may hold this block alone."""
    return _fill(make_block(arch, name, _placeholder), file, f"{name}.", False).to(device)


def _placeholder(inputs: int, outputs: int, bias: bool) -> nn.Module:
    return nn.Identity()


@torch.no_grad()
def _fill(module: _Module, file: TernaryFile, prefix: str, packed: bool) -> _Module:
    """Load parameters from the file and put its Linears, ternary or dense, in the place of the placeholders."""
    for name, parameter in module.named_parameters():
        parameter.copy_(file.tensor(prefix + name))
    holes = [name for name, part in module.named_modules() if type(part) is nn.Identity]
    for hole in holes:
        name = prefix + hole
        bias = file.tensor(f"{name}.bias").float() if f"{name}.bias" in file.dense else None
        if name in file.layers and file.layers[name].terms == 1:
            layer = TernaryLinear(file.weight(name), bias, packed)
        else:
            # Layers of two terms or 8 bits are near the original already: they stay, only their bias is trained.
            near = name in file.layers or name in file.int8
            weight = file.parameter(f"{name}.weight").float()
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=not near)
            layer.bias = None if bias is None else nn.Parameter(bias)
        parent, _, leaf = hole.rpartition(".")
        setattr(module.get_submodule(parent), leaf, layer)
    return module


def ternary_linears(module: nn.Module, prefix: str = "") -> dict[str, TernaryLinear]:
    """Every TernaryLinear below `module`, by name."""
    return {prefix + name: m for name, m in module.named_modules() if isinstance(m, TernaryLinear)}


@torch.no_grad()
def add_low_rank(
    layers: Mapping[str, TernaryLinear], teacher: Checkpoint, rank: int, power: Mapping[str, Tensor] | None = None
) -> None:
    """Give every layer factors of this rank from the SVD of what its ternary weight misses of the teacher's.

    `power`: name -> mean square of every input [K], so that inputs count by their size. Layers that have factors keep
    them.
    """
    for name, layer in layers.items():
        if layer.up is not None:
            continue
        dense = teacher.tensor(f"{name}.weight").to(layer.log_scale.device, torch.float32)
        up, down = svd_low_rank(dense - layer.weight(), rank, None if power is None else power[name])
        layer.up, layer.down = nn.Parameter(up.contiguous()), nn.Parameter(down.contiguous())


@torch.no_grad()
def train_codes(layers: Mapping[str, TernaryLinear], teacher: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
    """Make the codes of every layer trainable, from latents near the teacher's weights."""
    for name, layer in layers.items():
        layer.train_codes(teacher.tensor(f"{name}.weight").to(layer.log_scale.device, torch.float32), dtype)


def freeze_dense(model: nn.Module) -> None:
    """Leave the dense Linears as they are; norms, and biases of 8-bit and two-term Linears, are still trained."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
            layer.requires_grad_(False)


@contextlib.contextmanager
def input_power(layers: Mapping[str, TernaryLinear]) -> Iterator[dict[str, Tensor]]:
    """Collect the mean square of every input [K] of the layers from the forwards within the block."""
    sums = {name: torch.zeros(layer.in_features, device=layer.log_scale.device) for name, layer in layers.items()}
    counts = dict.fromkeys(layers, 0)

    def collect(name: str):
        def hook(_, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            sums[name] += x.square().sum(0)
            counts[name] += len(x)
            power[name] = sums[name] / counts[name]

        return hook

    power: dict[str, Tensor] = {}
    handles = [layer.register_forward_pre_hook(collect(name)) for name, layer in layers.items()]
    try:
        yield power
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def save_student(
    path: str | os.PathLike,
    model: Flux,
    start: TernaryFile,
    *,
    metadata: Mapping[str, str],
    packing: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a ternary file atomically; dense tensors keep the dtypes of the file the student came from."""
    layers = stored_layers(start, ternary_linears(model))
    plans = {name: LayerPlan.of(weight, packing or start.layers[name].packing) for name, weight in layers.items()}
    dense = stored_dense(start, dict(model.named_parameters()))
    write_ternary(path, plans, layers.__getitem__, dense, metadata, overwrite=overwrite)


def stored_layers(
    start: TernaryFile, trained: Mapping[str, TernaryLinear], prefix: str = ""
) -> dict[str, TernaryWeight]:
    """The file's ternary weights under the prefix, with those that were trained in their place."""
    names = [name for name in start.layers if name.startswith(prefix)]
    return {name: trained[name].export() if name in trained else start.weight(name) for name in names}


def stored_dense(start: TernaryFile, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's dense tensors with those that were trained in their place, in the file's dtypes."""
    trained = {name: p.detach() for name, p in parameters.items() if p.requires_grad}
    dense = {name: start.tensor(name) for name in start.dense}
    return dense | {name: trained[name].to(dense[name].dtype) for name in dense.keys() & trained.keys()}


@contextlib.contextmanager
def as_stored(model: nn.Module, dtypes: Mapping[str, torch.dtype], average: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the parameters hold `average`, rounded to what the file will hold."""
    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].data for name in average}
    try:
        for name, value in average.items():
            dtype = dtypes.get(name)
            parameters[name].data = value if dtype is None else value.to(dtype).to(value.dtype)
        yield
    finally:
        for name, value in kept.items():
            parameters[name].data = value


def stored_dtypes(model: nn.Module, start: TernaryFile) -> dict[str, torch.dtype]:
    """Parameter name -> dtype in the file, for the parameters that are stored as they are."""
    dtypes = {name: start.tensor(name).dtype for name, _ in model.named_parameters() if name in start.dense}
    factors = [name for name, _ in model.named_parameters() if name.endswith((".down", ".up"))]
    return dtypes | dict.fromkeys(factors, torch.bfloat16)


def rate_groups(names: Iterable[str]) -> dict[str, str]:
    """Parameter name -> "scale", "code", "rank", "bias", "norm" or "dense": what has a learning rate of its own."""
    leaves = {"log_scale": "scale", "log_column": "scale", "latent": "code", "down": "rank", "up": "rank"}
    leaves |= {"bias": "bias", "scale": "norm"}
    return {name: leaves.get(name.rpartition(".")[2], "dense") for name in names}
