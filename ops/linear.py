"""`ternary_linear`, and the same operator registered with torch.library so that torch.compile sees one opaque node."""

import torch
from torch import Tensor

from .registry import BACKENDS, resolve
from .weight import TernaryWeight


def ternary_linear(
    x: Tensor,
    weight: TernaryWeight,
    bias: Tensor | None = None,
    activations: str = "full",
    backend: str | None = None,
) -> Tensor:
    """x [..., K] times a ternary weight [N, K] transposed, plus bias [N]: [..., N] in the dtype of x.

    activations  "full": the weight is expanded to the dtype of x (W1.58A16, as in arXiv 2412.18653).
                 "int8": every token is quantized to int8 with scale absmax / 127, the products are summed exactly in
                 int32, and scales, low-rank part and bias are applied in fp32 (W1.58A8). Needs row x integer scales.
                 Tokens are multiplied by the weight's column scales, if it has any, before they are quantized.
                 "e4m3": the same with 8-bit floats and fp32 sums, scale absmax / 448 (Triton, compute capability 9.0
                 and 10.x; int8 elsewhere). "auto": the fastest on the device of x that the scales allow, or
                 "full" where the weight says so.
    backend      a name of `registry.BACKENDS`; by default the best one for the device of x.

    Not differentiable. Raises ValueError where K of x and weight differ or the scales do not fit the activations.
    """
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"input has {x.shape[-1]} features, the ternary weight {n} x {k} needs {k}")
    if backend is None:
        floats = activations == "auto" and weight.scale.ndim == 2  # a format that is asked for is had, or refused
        choice = resolve(x.device, activations, float_groups=floats, full_precision=weight.full_precision)
        backend, activations = choice.backend.NAME, choice.activations
    if torch.compiler.is_compiling():
        w = weight
        return torch.ops.ternary_flux.linear(
            x, w.trits, w.scale, w.group, w.down, w.up, w.column, bias, n, k, activations, backend
        )
    return _run(x, weight, bias, activations, backend)


def _run(x: Tensor, weight: TernaryWeight, bias: Tensor | None, activations: str, backend: str) -> Tensor:
    y = BACKENDS[backend].linear(x.reshape(-1, weight.shape[1]), weight, bias, activations)
    return y.view(*x.shape[:-1], weight.shape[0])


def _linear(x, trits, scale, group, down, up, column, bias, n, k, activations, backend):
    return _run(x, TernaryWeight(trits, scale, (n, k), group, down, up, column), bias, activations, backend)


def _linear_meta(x, trits, scale, group, down, up, column, bias, n, k, activations, backend):
    return x.new_empty((*x.shape[:-1], n))


# A second import of the pack under another name (a custom node folder beside an installed package) finds it registered.
if not hasattr(torch.ops.ternary_flux, "linear"):
    torch.library.define(
        "ternary_flux::linear",
        "(Tensor x, Tensor trits, Tensor scale, Tensor? group, Tensor? down, Tensor? up, Tensor? column, Tensor? bias, "
        "SymInt n, SymInt k, str activations, str backend) -> Tensor",
    )
    torch.library.impl("ternary_flux::linear", "default", _linear)
    # Not register_fake: it looks for its caller's source in every module there is, most of the time a start would take.
    torch.library.impl("ternary_flux::linear", "meta", _linear_meta)
