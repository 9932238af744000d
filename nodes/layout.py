"""The ternary weight as a comfy_kitchen `QuantizedTensor`: what ComfyUI moves, offloads, flattens and saves."""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..ops import Choice, TernaryWeight, resolve, ternary_linear
from ..ops.weight import TENSORS
from ..quantizer.files.layer import FORMAT
from .compat import core

comfy = core()
QuantizedTensor = comfy.QuantizedTensor

# The pack can be imported twice (as a custom node and as an installed package): each copy has a layout of its own.
LAYOUT = f"{__package__}.TernaryLayout"


class TernaryLayout(comfy.QuantizedLayout):
    """Trits as storage; scales and low-rank factors in `Params`, so that they travel with the weight."""

    @dataclass(frozen=True)
    class Params(comfy.BaseLayoutParams):
        """The tensors and `full_precision` as in `ops.TernaryWeight`; `activations` and `backend` are the user's."""

        group: Tensor | None = None
        down: Tensor | None = None
        up: Tensor | None = None
        column: Tensor | None = None
        full_precision: bool = False
        activations: str = "auto"
        backend: str = "auto"
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            return [name for name in TENSORS[1:] if getattr(self, name) is not None]

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        scale=None,
        stochastic_rounding=0,
        inplace_ops=False,
        activations="auto",
        backend="auto",
        terms=1,
        column=None,
        full_precision=False,
        **_,
    ):
        """Least-squares ternary of a dense weight [N, K], in one or two ternary terms, with these column scales.

        `scale` is always recomputed.
        """
        from ..quantizer.rounding.one_term import ternarize
        from ..quantizer.rounding.two_terms import two_terms

        if terms == 1:
            weight, _ = ternarize(tensor, column=column)
        else:
            weight, _ = two_terms(tensor if column is None else tensor / column)
            weight = dataclasses.replace(weight, column=column)
        weight = dataclasses.replace(weight, full_precision=full_precision).to(tensor.device)
        return weight.trits, cls.params(weight, tensor.dtype, activations, backend)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: "TernaryLayout.Params") -> Tensor:
        return ternary_weight(qdata, params).dequantize(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor) -> tuple[Tensor | None, ...]:
        params = qtensor._params
        return qtensor._qdata, params.scale, params.group, params.down, params.up, params.column

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: "TernaryLayout.Params") -> dict[str, Tensor]:
        return {"": qdata} | {f"_{name}": getattr(params, name) for name in params._tensor_fields()}

    @classmethod
    def requantize_kwargs(cls, qtensor) -> dict:
        terms = ternary_weight(qtensor._qdata, qtensor._params).terms
        params = qtensor._params
        settings = {"activations": params.activations, "backend": params.backend}
        return settings | {"terms": terms, "column": params.column, "full_precision": params.full_precision}

    @classmethod
    def params(
        cls, weight: TernaryWeight, dtype: torch.dtype, activations: str, backend: str
    ) -> "TernaryLayout.Params":
        return cls.Params(
            scale=weight.scale,
            orig_dtype=dtype,
            orig_shape=tuple(weight.shape),
            group=weight.group,
            down=weight.down,
            up=weight.up,
            column=weight.column,
            full_precision=weight.full_precision,
            activations=activations,
            backend=backend,
        )


def wrap(weight: TernaryWeight, dtype: torch.dtype, activations: str = "auto", backend: str = "auto"):
    """A QuantizedTensor of logical shape [N, K] and logical dtype `dtype`, sharing the weight's memory."""
    return QuantizedTensor(weight.trits, LAYOUT, TernaryLayout.params(weight, dtype, activations, backend))


def is_quantized(tensor) -> bool:
    """Ternary, or fp8 or int8 in a file of mixed formats."""
    return isinstance(tensor, QuantizedTensor)


def is_ternary(tensor) -> bool:
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls == LAYOUT


def rewrap(tensor):
    """The same quantized tensor, sharing its memory, as a tensor of the current inference mode."""
    return QuantizedTensor(tensor._qdata, tensor._layout_cls, tensor._params)


def parameter(tensor) -> torch.nn.Parameter:
    """A quantized tensor as a Parameter, in inference mode or not, whichever it was made in."""
    return torch.nn.Parameter(rewrap(tensor), requires_grad=False)


def ternary_weight(qdata: Tensor, params: TernaryLayout.Params) -> TernaryWeight:
    """The `ops` view of a QuantizedTensor's parts, whichever way it is transposed."""
    shape = params.orig_shape[::-1] if params.transposed else params.orig_shape
    tensors = {name: getattr(params, name) for name in params._tensor_fields()}
    return TernaryWeight(qdata, shape=tuple(shape), full_precision=params.full_precision, **tensors)


choice_for = lru_cache(maxsize=64)(resolve)


def choice_of(device: torch.device, params: TernaryLayout.Params) -> Choice:
    """How a weight with these parameters is multiplied on `device`, as `ops.resolve` decides it."""
    return choice_for(
        device,
        params.activations,
        params.backend,
        float_groups=params.scale.ndim == 2,
        full_precision=params.full_precision,
    )


def multiply(x: Tensor, tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times a ternary QuantizedTensor [N, K] transposed."""
    params = tensor._params
    choice = choice_of(x.device, params)
    weight = ternary_weight(tensor._qdata, params)
    return ternary_linear(x, weight, bias, activations=choice.activations, backend=choice.backend.NAME)


# F.linear reaches a layout as aten.linear under inference_mode, and as aten.t with aten.mm or aten.addmm under no_grad
# and in compiled graphs. Without a handler for each, comfy_kitchen would silently multiply by a dense weight.


def _linear(qt, args, kwargs):
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
    if not is_ternary(weight) or weight._params.transposed or isinstance(x, QuantizedTensor):
        return torch.nn.functional.linear(*_dense(x, weight, bias))
    return multiply(x, weight, bias)


def _t(qt, args, kwargs):
    params = qt._params
    params = dataclasses.replace(params, orig_shape=params.orig_shape[::-1], transposed=not params.transposed)
    return QuantizedTensor(qt._qdata, LAYOUT, params)


def _mm(qt, args, kwargs):
    x, weight = args
    if not is_ternary(weight) or not weight._params.transposed or isinstance(x, QuantizedTensor):
        return torch.mm(*_dense(x, weight))
    return multiply(x, weight, None)


def _addmm(qt, args, kwargs):
    bias, x, weight = args
    if not is_ternary(weight) or not weight._params.transposed or isinstance(x, QuantizedTensor) or kwargs:
        return torch.addmm(*_dense(bias, x, weight), **kwargs)
    return multiply(x, weight, bias)


def _dense(*tensors):
    return [tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor for tensor in tensors]


class _OwnLoader(dict):
    """A format as core's loaders look it up: they have no way to read it."""

    def __missing__(self, key):
        raise ValueError(f"this FLUX model is ternary ({FORMAT}): load it with the node Load Ternary FLUX")


def register() -> None:
    """Make the layout known, and have core's own loaders refuse our files with the name of the node that loads them."""
    comfy.register_layout_class(LAYOUT, TernaryLayout)
    aten = torch.ops.aten
    handlers = {aten.linear.default: _linear, aten.t.default: _t, aten.mm.default: _mm, aten.addmm.default: _addmm}
    for operator, handler in handlers.items():
        comfy.register_layout_op(operator, TernaryLayout)(handler)
    comfy.QUANT_ALGOS.setdefault(FORMAT, _OwnLoader(quantize_input=False))


register()
