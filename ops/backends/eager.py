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


# On a CPU the scratch stays in the cache until it is multiplied. The more tokens, the less that is worth beside fewer,
# larger operations: each ends with threads that wait for one another.
CPU_SCRATCH_BYTES, CPU_SCRATCH_BYTES_PER_TOKEN = 12 << 20, 64 << 10

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
    y = multiply(weight.scale_inputs(x), weight)
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


def _decoded(weight: TernaryWeight, dtype: torch.dtype, tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """(outputs, their decoded trits [G, 128, outputs]) until all are done, in a scratch that is used again."""
    groups, n, _ = weight.trits.shape
    limit = SCRATCH_BYTES
    if weight.device.type == "cpu":
        limit = min(limit, CPU_SCRATCH_BYTES + CPU_SCRATCH_BYTES_PER_TOKEN * tokens)
    step = _part(n, limit // (groups * GROUP_SIZE * dtype.itemsize))
    scratch = torch.empty(groups * GROUP_SIZE * step, dtype=dtype, device=weight.device)
    for start in range(0, n, step):
        outputs = slice(start, min(start + step, n))
        trits = weight.trits[:, outputs]
        width = trits.shape[1]
        yield outputs, decode_planes32(trits, scratch[: groups * GROUP_SIZE * width].view(groups, GROUP_SIZE, width))


def _part(n: int, most: int) -> int:
    """How many of n outputs to decode at a time, at most `most`: equal parts, of whole cache lines if they are wide."""
    most = most // 64 * 64 or max(1, most)
    parts = -(-n // most) or 1
    return min(most, -(-n // (64 * parts)) * 64)


def _linear_full(x: Tensor, weight: TernaryWeight) -> Tensor:
    n, k = weight.shape
    scales = (0.5 * weight.group_scales()).to(x.dtype)  # a decoded 1 is 2.0
    y = x.new_empty(x.shape[0], n)
    for outputs, dense in _decoded(weight, x.dtype, x.shape[0]):
        dense *= scales[:, None, outputs]
        dense = dense.view(weight.terms, -1, dense.shape[2])
        if weight.terms == 2:
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
    for outputs, integers in _decoded(weight, dtype, x.shape[0]):
        if dtype == torch.int8:
            integers.bitwise_right_shift_(6)  # a decoded 1 is 64
        else:
            integers *= 0.5  # a decoded 1 is 2.0
        if weight.group is not None:
            integers *= weight.group[:, None, outputs].to(dtype)
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
