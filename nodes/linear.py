"""ComfyUI's Linear for mixed-precision checkpoints, taught the ternary format."""

import copy
import json
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from ..ops import Choice, TernaryWeight, ternary_linear
from ..ops.packing import pack_base3
from ..ops.scales import SHOWS
from ..quantizer.files.layer import PARTS, LayerPlan, read_plan, read_weight
from . import layout
from .compat import core
from .lora import DensePatches, Patched

comfy = core()


def operations(
    compute_dtype: torch.dtype,
    device: torch.device,
    activations: str = "auto",
    after_load: Callable[[], None] = lambda: None,
    backend: str = "auto",
):
    """The operations class for `model_options["custom_operations"]`.

    compute_dtype  what ComfyUI computes in: the logical dtype of the weights and the dtype of the biases
    device         where it computes
    activations    "auto", "int8" or "full"; see `ops.ternary_linear`
    after_load     called after each loaded ternary layer, for progress and cancellation
    backend        "auto" or a name of `ops.registry.BACKENDS`

    Layers without a ternary `comfy_quant` entry load as core loads them: dense, fp8, int8.
    """
    base = comfy.mixed_precision_ops({"mixed_ops": True}, compute_dtype)

    class TernaryOps(base):
        class Linear(_TernaryLinear, base.Linear):
            _activations = activations
            _backend = backend
            _load_device = device
            _after_load = staticmethod(after_load)

    return TernaryOps


class _TernaryLinear(Patched):
    """Mixin before core's mixed-precision Linear."""

    packing = "planes32"  # in the file
    scale_error: float | None = (
        None  # of row x integer scales, where the file has others and 8-bit activations are used
    )
    _choice: Choice | None = None
    _choice_device: torch.device | None = None

    # Core's merge code looks up every state-dict key as an attribute, also those that a quantized weight adds.
    weight_scale = weight_group = weight_down = weight_up = weight_column = comfy_quant = property(lambda self: None)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        configuration = read_configuration(state_dict, prefix)
        arguments = local_metadata, strict, missing, unexpected, errors
        if not local_metadata.get("assign_to_params_buffers"):  # only dynamic VRAM reads the file later
            for key in [key for key in state_dict if key.startswith(prefix)]:
                state_dict[key] = state_dict[key].clone()
        if configuration.get("format") != layout.FORMAT:
            return super()._load_from_state_dict(state_dict, prefix, *arguments)
        weight = take_weight(state_dict, prefix)
        if weight.shape != self._orig_shape:
            raise ValueError(f"{prefix}weight is {list(weight.shape)}; this model needs {list(self._orig_shape)}")
        if layout.choice_for(self._load_device, self._activations, self._backend).activations == "int8":
            weight, self.scale_error = fit_scales(weight, self._activations)
        device = self.factory_kwargs["device"] or weight.device
        self.quant_format, self.layout_type = layout.FORMAT, layout.LAYOUT
        self.packing = configuration["packing"]
        self._configuration = LayerPlan.of(weight).comfy_quant
        quantized = layout.wrap(weight.to(device), self.factory_kwargs["dtype"], self._activations, self._backend)
        self.weight = layout.parameter(quantized)
        self._choose(self._load_device, quantized._params)
        torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *arguments)
        missing[:] = [key for key in missing if key != f"{prefix}weight"]
        self._after_load()

    def _apply(self, fn, recurse=True):
        """As in core, in inference mode or not: a wrapper of one mode cannot become a Parameter in the other."""
        if layout.is_quantized(getattr(self, "weight", None)):
            self.weight = layout.parameter(self.weight)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo):
        """As for any module; torch itself cannot copy a quantized weight."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        if layout.is_quantized(weight := self._parameters.get("weight")):
            memo[id(weight)] = layout.parameter(weight.clone())
        memo[id(self._choice)] = self._choice  # holds a module
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def forward(self, input, *args, **kwargs):
        if layout.is_ternary(self.weight):
            y = self._ternary_forward(input)
        else:
            y = super().forward(input, *args, **kwargs)
        if self.branch is not None:
            self.branch.add_to(y, input)
        return y

    def _ternary_forward(self, input: Tensor) -> Tensor:
        comfy.run_every_op()
        weight, bias = self.weight, self.bias
        if self._at_hand(weight, bias, input.device):
            return self._multiply(input, weight, bias)
        patched = any(isinstance(function, DensePatches) for function in self.weight_function)
        weight, bias, offloaded = comfy.cast_bias_weight(
            self,
            dtype=torch.float32 if patched else self.weight.dtype,
            device=input.device,
            bias_dtype=input.dtype,
            offloadable=True,
            compute_dtype=input.dtype,
            want_requant=True,
        )
        y = self._multiply(input, weight, bias)
        comfy.uncast_bias_weight(self, weight, bias, offloaded)
        return y

    def _at_hand(self, weight, bias: Tensor | None, device: torch.device) -> bool:
        """Whether core's cast would return weight and bias as they are, which takes it 20 microseconds to find out."""
        if self.weight_function or self.bias_function or weight._qdata.device != device:
            return False
        return bias is None or bias.device == device

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """As in core, which cannot update a dense weight in place, as hooks do."""
        if not inplace_update or return_weight:
            return super().set_weight(weight, seed=seed, return_weight=return_weight, **kwargs)
        self.weight.data.copy_(comfy.stochastic_rounding(weight, self.weight.dtype, seed=seed))

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not layout.is_ternary(weight):  # a function in weight_function made it dense
            return dense_linear(x, weight.to(x.dtype), bias)
        if self._choice_device != x.device:
            self._choose(x.device, weight._params)
        ternary = layout.ternary_weight(weight._qdata, weight._params)
        choice = self._choice.activations, self._choice.backend.NAME
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _Trained.apply(x, bias, ternary, *choice)
        return ternary_linear(x, ternary, bias, *choice)

    def _choose(self, device: torch.device, params: layout.TernaryLayout.Params) -> None:
        self._choice = layout.choice_of(device, params)
        self._choice_device = device

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        if not layout.is_ternary(self.weight):
            return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        state_dict = {} if destination is None else destination
        if self.bias is not None:
            state_dict[f"{prefix}bias"] = self.bias
        state_dict.update(self.weight.state_dict(f"{prefix}weight"))
        state_dict[f"{prefix}comfy_quant"] = self._configuration  # kept: core asks once for every key it merges
        return state_dict


def fit_scales(weight: TernaryWeight, activations: str) -> tuple[TernaryWeight, float | None]:
    """The weight with the row x integer scales that int8 activations need, and the error that they bring.

    A weight that has such scales already comes back with None. With "auto" activations one whose error would show
    keeps its own scales, and so computes in full precision.
    """
    if weight.scale.ndim == 1:
        return weight, None
    fitted, error = weight.with_integer_groups()
    return (weight if activations == "auto" and error > SHOWS else fitted), error


def read_configuration(state_dict: dict, prefix: str) -> dict:
    """The JSON of a layer's `comfy_quant` entry; empty for a dense layer."""
    entry = state_dict.get(f"{prefix}comfy_quant")
    return {} if entry is None else json.loads(bytes(entry.tolist()))


def take_weight(state_dict: dict, prefix: str) -> TernaryWeight:
    """Remove a ternary layer's entries from a state dict and return its weight, unpacked to planes32 if need be.

    Raises FormatError where they do not fit each other.
    """
    parts = {suffix: state_dict.pop(f"{prefix}{suffix}", None) for suffix in PARTS}
    return read_weight(parts.get, read_plan(parts.get, "the model's weights", prefix.removesuffix(".")))


def entries(tensor, prefix: str, packing: str = "planes32") -> dict[str, Tensor]:
    """The state-dict entries of a ternary QuantizedTensor: the inverse of `take_weight`."""
    weight = layout.ternary_weight(tensor._qdata, tensor._params)
    values = tensor.state_dict(f"{prefix}weight")
    if packing == "base3":
        values[f"{prefix}weight"] = pack_base3(weight.codes(), weight.terms)
    return values | {f"{prefix}comfy_quant": LayerPlan.of(weight, packing).comfy_quant}


class _Trained(torch.autograd.Function):
    """The layer where something before it is trained, as a LoRA in bypass mode: 8-bit activations pass gradients on as
    if they were full ones, and the weight is decoded once more on the way back.
    """

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, weight: TernaryWeight, activations: str, backend: str) -> Tensor:
        ctx.weight = weight
        return ternary_linear(x, weight, bias, activations, backend)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        of_x = gradient @ ctx.weight.dequantize(gradient.dtype) if ctx.needs_input_grad[0] else None
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return of_x, of_bias, None, None, None
