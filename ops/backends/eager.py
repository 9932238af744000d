"""Plain torch: the correctness reference, and the path of machines without Triton (CPU, MPS, Turing)."""

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear
from torch.nn.functional import pad

from ..packing import GROUP_SIZE, unpack_planes32
from ..weight import TernaryWeight

NAME = "eager"
SCRATCH_BYTES = 64 << 20  # no temporary tensor of a weight exceeds this, whatever the layer

# Partial sums of 8 groups stay below 8 * 128 * 127 * 127 < 2**24, where fp32 holds every integer.
_EXACT_FP32_INPUTS = 8 * GROUP_SIZE


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`; None, since it always can."""
    return None


def formats(device: torch.device) -> tuple[str, ...]:
    """The activations it multiplies, fastest first."""
    return ("full", "int8")


def linear(x: Tensor, weight: TernaryWeight, bias: Tensor | None, activations: str) -> Tensor:
    """x [M, K] times the weight, [M, N] in the dtype of x; see `ops.ternary_linear`."""
    multiply = _linear_int8 if activations == "int8" else _linear_full
    y = multiply(x, weight)
    if weight.up is not None:
        y += dense_linear(dense_linear(x, weight.down.to(x.dtype)), weight.up.to(x.dtype))
    if bias is not None:
        y += bias.to(y.dtype)
    return y.to(x.dtype)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale a token: x [M, K] -> int8 [M, K] and fp32 [M, 1]; x ~ int8 * scale."""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale).round_().to(torch.int8), scale


def _row_chunks(weight: TernaryWeight, itemsize: int):
    n, padded = weight.shape[0], weight.trits.shape[0] * GROUP_SIZE
    rows = max(1, SCRATCH_BYTES // (padded * itemsize))
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n)), weight.rows(start, start + rows)


def _linear_full(x: Tensor, weight: TernaryWeight) -> Tensor:
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    for columns, rows in _row_chunks(weight, x.element_size()):
        y[:, columns] = x @ rows.dequantize_ternary(x.dtype).t()
    return y


def _linear_int8(x: Tensor, weight: TernaryWeight) -> Tensor:
    if weight.scale.ndim == 2:
        raise ValueError("int8 activations need row x integer scales: convert the weight with with_integer_groups()")
    codes, token_scale = quantize_tokens(x)
    codes = weight.repeat_inputs(codes)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    for columns, rows in _row_chunks(weight, torch.float32.itemsize):
        y[:, columns] = _matmul_int32(codes, _integer_weight(rows)) * token_scale * rows.scale
    return y


def _integer_weight(weight: TernaryWeight) -> Tensor:
    """Trits times integer group multipliers: int8 [N, terms * K padded to 128]."""
    padded = weight.trits.shape[0] * GROUP_SIZE
    codes = unpack_planes32(weight.trits, padded)
    if weight.group is None:
        return codes
    grouped = codes.view(-1, weight.trits.shape[0], GROUP_SIZE) * weight.group.t()[:, :, None].to(torch.int8)
    return grouped.view(-1, padded)


def _matmul_int32(a: Tensor, b: Tensor) -> Tensor:
    """int8 [M, K] times int8 [N, K] transposed, K a multiple of 128: the exact int32 [M, N]."""
    if _int_mm_is_exact(a.device):
        return _int_mm(a, b)
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _EXACT_FP32_INPUTS):
        inputs = slice(start, start + _EXACT_FP32_INPUTS)
        total += (a[:, inputs].float() @ b[:, inputs].float().t()).int()
    return total


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """torch._int_mm, with the rows padded to what its CUDA version demands (M > 16, N a multiple of 8)."""
    m, n = a.shape[0], b.shape[0]
    if a.is_cuda:
        a, b = pad(a, (0, 0, 0, max(0, 17 - m))), pad(b, (0, 0, 0, -n % 8))
    return torch._int_mm(a, b.t())[:m, :n]


@functools.cache
def _int_mm_is_exact(device: torch.device) -> bool:
    """Whether torch._int_mm works here without saturating: CPUs without VNNI add pairs of products in 16 bits."""
    a = torch.full((32, 128), -127, dtype=torch.int8, device=device)
    try:
        return bool((_int_mm(a, a) == 127 * 127 * 128).all()) and bool((_int_mm(-a, a) == -127 * 127 * 128).all())
    except RuntimeError:
        return False
