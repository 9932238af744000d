"""The models of the quality benchmark as plain dense ones, and ordinary 4- and 3-bit rounding to compare with."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from ...ops import TernaryWeight
from ...ops.backends.eager import quantize_tokens
from ...quantizer.files.checkpoint import open_checkpoint
from ...quantizer.files.container import TensorFile
from ...quantizer.files.identity import identify
from ...quantizer.files.summary import sizes
from ...quantizer.files.ternary import open_ternary
from ...quantizer.model.flux import Flux, linear_of
from . import peer

GROUP = 128
_BITS = "benchmark.bits"  # in the metadata: per weight of the block Linears, with their scales
_CLIPS = torch.linspace(0.5, 1.0, 26)


def dense_of(path: Path, device: torch.device) -> tuple[Flux, int, float]:
    """The model of a dense or ternary file in fp32, the bytes it takes, and bits per weight of its block Linears."""
    opened = TensorFile(path)
    if identify(opened).kind == "ternary":
        file = open_ternary(opened)
        extra = {f"{name}.{part}" for name in file.int8 for part in ("weight_scale", "comfy_quant")}
        state = {name: file.parameter(name).float() for name in file.dense.keys() - extra}
        state |= {f"{name}.weight": file.weight(name).dequantize() for name in file.layers}
        return _model(file.architecture, state, device), path.stat().st_size, sizes(file).bits_per_quantized_weight
    checkpoint = open_checkpoint(opened)
    state = {name: checkpoint.tensor(name).float() for name in checkpoint.names}
    model = _model(checkpoint.architecture, state, device)
    if name := checkpoint.metadata.get(peer.NAME):
        peer.quantize(model, peer.PEERS[name])
    if _BITS not in checkpoint.metadata:
        return model, path.stat().st_size, 16.0
    each = float(checkpoint.metadata[_BITS])
    weights = sum(n * k for n, k in checkpoint.architecture.linear_shapes.values())
    others = sum(value.numel() for value in state.values()) - weights
    return model, 2 * others + round(weights * each / 8), each


def _model(arch, state: dict[str, Tensor], device: torch.device) -> Flux:
    model = Flux(arch)
    model.load_state_dict(state)
    return model.to(device).eval().requires_grad_(False)


def with_int8_activations(model: Flux, path: Path) -> Flux:
    """The same model, in place, with the activations that the loader's `auto` gives a ternary file's Linears on a GPU:
    int8 with a scale for each token, but where the file asks for full precision.
    """
    file = open_ternary(path)
    for name in file.layers:
        weight = file.weight(name)
        if not weight.full_precision:
            linear_of(model, name).register_forward_hook(_int8_noise(weight))
    return model


def _int8_noise(weight: TernaryWeight) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    ternary = replace(weight, column=None).dequantize_ternary()

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = weight.scale_inputs(inputs[0])
        rounded, scale = quantize_tokens(x.flatten(0, -2))
        return output + linear((rounded * scale).view(x.shape) - x, ternary)

    return hook


def round_to_bits(source: Path, target: Path, count: int) -> None:
    """Round every block Linear to `count` bits in groups of 128 with the best clipped scale, and write it in bf16."""
    checkpoint = open_checkpoint(source)
    state = {name: checkpoint.tensor(name).clone() for name in checkpoint.names}
    for name in checkpoint.architecture.linears:
        state[f"{name}.weight"] = rounded(state[f"{name}.weight"].float(), count).bfloat16()
    save_file(state, target, {_BITS: str(count + 16 / GROUP)})


def round_by_peer(source: Path, target: Path, name: str) -> None:
    """Let another quantizer round, and write what is multiplied with in fp32. Where it quantizes activations too, the
    weights are the original's, and `dense_of` lets it round again.
    """
    checkpoint, chosen = open_checkpoint(source), peer.PEERS[name]
    state = {key: checkpoint.tensor(key).float() for key in checkpoint.names}
    model = _model(checkpoint.architecture, state, torch.device("cpu"))
    each = peer.quantize(model, chosen)
    if chosen.activations is not None:
        save_file(state, target, {_BITS: str(each), peer.NAME: name})
        return
    save_file(state | peer.weights(model), target, {_BITS: str(each)})


def rounded(weight: Tensor, count: int) -> Tensor:
    """Rounding of [N, K] to 2^count levels, evenly spaced around zero; the clip of each group is the best of 26."""
    n, k = weight.shape
    groups = torch.nn.functional.pad(weight, (0, -k % GROUP)).view(n, -1, GROUP)
    top, last = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12), 2 ** (count - 1) - 0.5
    best, least = groups, torch.full_like(top, torch.inf)
    for clip in _CLIPS:
        scale = top * clip / last
        candidate = ((groups / scale).floor() + 0.5).clamp(-last, last) * scale
        error = (candidate - groups).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, candidate, best), torch.minimum(error, least)
    return best.reshape(n, -1)[:, :k]
