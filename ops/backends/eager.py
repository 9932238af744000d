"""Plain torch: the path of machines without Triton, such as CPUs and Macs.

A slice of the outputs at a time is decoded into a small scratch, [inputs, outputs] so that scales and sums run along
contiguous memory, and multiplied by torch's own matmul.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear
from torch.nn.functional import pad

from ..packing import GROUP_SIZE, decode_planes32
from ..weight import TernaryWeight

NAME = "eager"
SCRATCH_BYTES = 64 << 20  # no temporary tensor of a weight exceeds this, whatever the layer

CPU_SCRATCH_BYTES = 12 << 20  # on a CPU it stays in the cache until it is multiplied

# Partial sums of 8 groups stay below 8 * 128 * 127 * 127 < 2**24, where fp32 holds every integer.
_EXACT_FP32_INPUTS = 8 * GROUP_SIZE


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`; None, since it always can."""
    return None


def formats(device: torch.device) -> tuple[str, ...]:
    """The activations it multiplies on `device` at no loss of speed, the default first: int8 needs int8 products."""
    return ("full", "int8") if _int_mm_is_exact(device) else ("full",)


@torch.no_grad()
def linear(x: Tensor, weight: TernaryWeight, bias: Tensor | None, activations: str) -> Tensor:
    """x [M, K] times the weight, [M, N] in the dtype of x; see `ops.ternary_linear`."""
    dtype, multiply = x.dtype, _linear_int8 if activations == "int8" else _linear_full
    x = x.to(_product_dtype(x))
    y = multiply(x, weight)
    if weight.up is not None:
        y += dense_linear(dense_linear(x, weight.down.to(x.dtype)), weight.up.to(x.dtype))
    if bias is not None:
        y += bias.to(y.dtype)
    return y.to(dtype)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale a token: x [M, K] -> int8 [M, K] and fp32 [M, 1]; x ~ int8 * scale."""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale).round_().to(torch.int8), scale


def _product_dtype(x: Tensor) -> torch.dtype:
    """What x is multiplied in: fp32 for 16-bit inputs on a CPU whose matmul is slower in their dtype."""
    if x.device.type != "cpu" or x.dtype not in (torch.float16, torch.bfloat16):
        return x.dtype
    supported = "_is_mkldnn_fp16_supported" if x.dtype == torch.float16 else "_is_mkldnn_bf16_supported"
    fast = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, supported)()
    return x.dtype if fast else torch.float32


def _decoded(weight: TernaryWeight, dtype: torch.dtype) -> Iterator[tuple[slice, TernaryWeight, Tensor]]:
    """(outputs, their rows of the weight, their decoded trits [G, 128, outputs]), in a scratch that is used again."""
    n, groups = weight.shape[0], weight.trits.shape[0]
    output_bytes = groups * GROUP_SIZE * dtype.itemsize
    limit = CPU_SCRATCH_BYTES if weight.device.type == "cpu" else SCRATCH_BYTES
    step = max(1, min(limit // output_bytes, n))
    scratch = torch.empty(groups * GROUP_SIZE * step, dtype=dtype, device=weight.device)
    for start in range(0, n, step):
        stop = min(start + step, n)
        out = scratch[: groups * GROUP_SIZE * (stop - start)].view(groups, GROUP_SIZE, stop - start)
        rows = weight.rows(start, stop)
        yield slice(start, stop), rows, decode_planes32(rows.trits, out)


def _linear_full(x: Tensor, weight: TernaryWeight) -> Tensor:
    n, k = weight.shape
    y = x.new_empty(x.shape[0], n)
    for outputs, rows, dense in _decoded(weight, x.dtype):
        dense *= (0.5 * rows.group_scales()).to(x.dtype)[:, None]  # a decoded 1 is 2.0
        dense = dense.view(weight.planes, -1, dense.shape[2])
        if weight.planes == 2:
            dense[0] += dense[1]
        y[:, outputs] = x @ dense[0, :k]
    return y


def _linear_int8(x: Tensor, weight: TernaryWeight) -> Tensor:
    if weight.scale.ndim == 2:
        raise ValueError("int8 activations need row x integer scales: convert the weight with with_integer_groups()")
    codes, token_scale = quantize_tokens(x)
    codes = weight.repeat_inputs(codes)
    multiply, dtype = (_int_mm, torch.int8) if _int_mm_is_exact(x.device) else (_fp32_mm, torch.float32)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    for outputs, rows, integers in _decoded(weight, dtype):
        if dtype == torch.int8:
            integers.bitwise_right_shift_(6)  # a decoded 1 is 64
            if rows.group is not None:
                integers *= rows.group.to(dtype)[:, None]
        else:
            integers *= 0.5 if rows.group is None else (0.5 * rows.group)[:, None]
        y[:, outputs] = multiply(codes, integers.view(-1, integers.shape[2])) * token_scale
    return y.mul_(weight.scale)


def _fp32_mm(a: Tensor, b: Tensor) -> Tensor:
    """int8 [M, K] times integers -127..127 [K, N] in fp32, K a multiple of 128: the exact int32 [M, N]."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _EXACT_FP32_INPUTS):
        inputs = slice(start, start + _EXACT_FP32_INPUTS)
        total += (a[:, inputs].float() @ b[inputs]).int()
    return total


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """torch._int_mm on int8 [M, K] and [K, N]; its CUDA version demands M > 16, N a multiple of 8, b column-major."""
    m, n = a.shape[0], b.shape[1]
    if a.is_cuda:
        a, b = pad(a, (0, 0, 0, max(0, 17 - m))), pad(b, (0, -n % 8)).t().contiguous().t()
    return torch._int_mm(a, b)[:m, :n]


@functools.cache
def _int_mm_is_exact(device: torch.device) -> bool:
    """Whether torch._int_mm works here without saturating: CPUs without VNNI add pairs of products in 16 bits."""
    try:
        a = torch.full((32, 128), -127, dtype=torch.int8, device=device)
        return all(bool((_int_mm(sign * a, a.t()) == sign * 127 * 127 * 128).all()) for sign in (1, -1))
    except (RuntimeError, NotImplementedError, AssertionError):  # torch built without this device: AssertionError
        return False
