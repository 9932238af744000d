"""From a layer's input to kernel launches: which kernels, with which tiles, in which order."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from ...packing import GROUP_SIZE, groups_of
from ...weight import TernaryWeight
from . import configs
from .dequantize import dequantize
from .linear_a8 import linear_a8
from .linear_a16 import linear_a16
from .quantize_rows import quantize_rows

# Bound of the dense scratch weight. FLUX.1's largest layer (21504 x 3072, 132 MB) fits at once: one matmul with a fused
# bias. Larger layers are done in parts.
SCRATCH_BYTES = 160 << 20

# wgmma and tcgen05 read x from shared memory. Tiles of more tokens have no room there for x times its column scales
# (256 x 128 on sm_90 needs 238 KB of 227), which is then written beforehand.
_MOST_SCALED = 64


def linear(x: Tensor, weight: TernaryWeight, bias: Tensor | None, activations: str) -> Tensor:
    """x [M, K] times the weight, [M, N] in the dtype of x. activations: "int8", "e4m3" or "full".

    No host synchronisation and no memory outside torch's allocator: once its kernels are compiled (any earlier call
    with the same layer and a similar M), a call can be captured in a CUDA graph.
    """
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return linear(x, weight, bias, activations)
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"activations of dtype {x.dtype} are not supported: use fp16, bf16 or fp32")
    x, bias = _without_gradient(x), _without_gradient(bias)
    if x.shape[0] == 0 or x.stride(1) != 1:
        x = x.contiguous()
    if x.shape[0] == 0 or weight.shape[0] == 0:
        return x.new_empty(x.shape[0], weight.shape[0])
    chip = configs.chip(x.device)
    if activations == "full":
        return _full(x, weight, bias, chip) if chip.products else _full_on_turing(x, weight, bias, chip)
    if not chip.products:
        raise ValueError(f"{chip.name} has no kernel for {activations} activations: use full")
    if activations == "int8" and weight.scale.ndim == 2:
        raise ValueError("int8 activations need row x integer scales: convert the weight with with_integer_groups()")
    return _eight_bit(x, weight, bias, activations, chip)


def _without_gradient(tensor: Tensor | None) -> Tensor | None:
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor


def _eight_bit(x: Tensor, weight: TernaryWeight, bias: Tensor | None, activations: str, chip: configs.Chip) -> Tensor:
    m = x.shape[0]
    kernel = f"{activations}_{'row' if weight.group is None and weight.scale.ndim == 1 else 'group'}"
    dtype = torch.int8 if activations == "int8" else torch.float8_e4m3fn
    low, up = _low_rank(x, weight)
    codes, token_scale = quantize_rows(x, groups_of(x.shape[1]) * GROUP_SIZE, dtype, weight.column)
    codes = codes if weight.terms == 1 else weight.repeat_inputs(codes)
    y = x.new_empty(m, weight.shape[0])
    return linear_a8(codes, token_scale, weight, low, up, bias, y, configs.tile(chip, kernel, m), chip)


def _full(x: Tensor, weight: TernaryWeight, bias: Tensor | None, chip: configs.Chip) -> Tensor:
    tile = configs.tile(chip, "a16", x.shape[0]) if x.dtype != torch.float32 else None
    if tile is None:
        return dense_product(x, weight, bias, chip)
    low, up = _low_rank(x, weight)
    column = None if weight.column is None else weight.column.to(x.dtype)
    if column is not None and "a16" in chip.wide and tile.block_m > _MOST_SCALED:
        x, column = weight.scale_inputs(x), None
    if weight.terms > 1:
        x = weight.repeat_inputs(x)
        column = None if column is None else weight.repeat_inputs(column[None])[0]
    return linear_a16(x, column, weight, low, up, bias, x.new_empty(x.shape[0], weight.shape[0]), tile, chip)


def _full_on_turing(x: Tensor, weight: TernaryWeight, bias: Tensor | None, chip: configs.Chip) -> Tensor:
    """Dequantize in Triton, all products in torch. bf16, which Turing does not have, is multiplied in fp32."""
    dtype = x.dtype
    x = x.float() if dtype == torch.bfloat16 else x
    y = dense_product(x, replace(weight, down=None, up=None), bias, chip)
    if weight.up is not None:
        down, up = _factors(weight, x.dtype)
        y.addmm_(dense_linear(x, down), up.t())
    return y.to(dtype)


def dense_product(x: Tensor, weight: TernaryWeight, bias: Tensor | None, chip: configs.Chip) -> Tensor:
    """Dequantize, then torch's matmul."""
    n, k = weight.shape
    bias = None if bias is None else bias.to(x.dtype)
    step = max(GROUP_SIZE, SCRATCH_BYTES // (k * x.element_size()) // GROUP_SIZE * GROUP_SIZE)
    down, up = _factors(weight, torch.float16 if x.dtype == torch.float16 else torch.bfloat16)
    scratch = x.new_empty(min(step, n), k)
    if step >= n:
        return dense_linear(x, dequantize(weight, down, up, scratch, chip), bias)
    y = x.new_empty(x.shape[0], n)
    for start in range(0, n, step):
        stop = min(start + step, n)
        part_up = None if up is None else up[start:stop]
        part = dequantize(weight.rows(start, stop), down, part_up, scratch[: stop - start], chip)
        if bias is None:
            torch.mm(x, part.t(), out=y[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, part.t(), out=y[:, start:stop])
    return y


def _low_rank(x: Tensor, weight: TernaryWeight) -> tuple[Tensor | None, Tensor | None]:
    """(x @ down.T [M, r], up [N, r]), both 16-bit, or (None, None)."""
    if weight.up is None:
        return None, None
    dtype = x.dtype if x.dtype != torch.float32 else torch.bfloat16
    down, up = _factors(weight, dtype)
    return dense_linear(x.to(dtype), down), up


def _factors(weight: TernaryWeight, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    if weight.up is None:
        return None, None
    return weight.down.detach().to(dtype).contiguous(), weight.up.detach().to(dtype).contiguous()
