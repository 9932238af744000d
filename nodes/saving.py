"""What leaves a patched model: its weights as other code reads them, and as files hold them."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Mapping
from functools import partial

import torch

from . import layout, lora
from .linear import entries


def is_quantized(module) -> bool:
    return isinstance(module, lora.Patched) and layout.is_quantized(getattr(module, "weight", None))


class SavesWeights:
    """Mixin before a core patcher."""

    def quantized_linears(self) -> dict[str, torch.nn.Module]:
        """Weight key -> module of every Linear that is ternary, or fp8 or int8 in a file of mixed formats."""
        return {f"{name}.weight": module for name, module in self.model.named_modules() if is_quantized(module)}

    def quantized_linear(self, key: str) -> torch.nn.Module | None:
        name, _, attribute = key.rpartition(".")
        module = self.model.get_submodule(name) if attribute == "weight" else None
        return module if is_quantized(module) else None

    def origin(self):
        """The file that the model was loaded from; None where it was not loaded by this pack."""
        return getattr(self.model, "ternary_origin", None)

    def model_state_dict(self, filter_prefix=None):
        """As in core, with the merged dense weight in place of a quantized one and its parts, made when it is read."""
        linears = self.quantized_linears()
        values = {}
        for key, value in super().model_state_dict(filter_prefix).items():
            module, _, part = key.rpartition(".")
            if part in ("weight", "bias") or f"{module}.weight" not in linears:
                values[key] = value
        readers = {
            key: partial(self._dense, key, module, self.load_device) for key, module in linears.items() if key in values
        }
        return _StateDict(values, readers)

    def _dense(self, key: str, module, device) -> torch.Tensor:
        """A quantized weight with this patcher's patches, dense, fp32 [N, K]."""
        weight = module.weight.to(device=device, dtype=torch.float32).dequantize()
        patches = self.patches.get(key, ())
        return lora.DensePatches(key, patches)(weight) if patches else weight

    def _merged(self, key: str, module):
        """A quantized weight with this patcher's patches: LoRAs become its low-rank part, where it is ternary.

        A dense tensor where a ternary weight's patches cannot be that.
        """
        if key not in self.patches:
            return module.weight
        if not layout.is_ternary(module.weight):
            return module.set_weight(self._dense(key, module, self.load_device), return_weight=True)
        effect = lora.build(key, self.patches[key], module.weight.device, torch.float32)
        if isinstance(effect, lora.DensePatches):
            return self._dense(key, module, self.load_device).to(torch.bfloat16)
        if not isinstance(effect, lora.Branch):
            return module.weight
        params = module.weight._params
        down, up = (factor.to(torch.bfloat16) for factor in effect.factors(*module.weight.shape))
        if params.up is not None:
            down, up = torch.cat([params.down, down]), torch.cat([params.up, up], 1)
        params = dataclasses.replace(params, down=down, up=up)
        return layout.QuantizedTensor(module.weight._qdata, layout.LAYOUT, params)

    def state_dict_for_saving(self, *args, **kwargs):
        """As in core; the file's metadata goes into the header of the new file too."""
        state_dict = super().state_dict_for_saving(*args, **kwargs)
        # Core's functions that save have the header's metadata in a variable beside the state dict, and no hook for it.
        metadata = sys._getframe(1).f_locals.get("metadata")
        if isinstance(metadata, dict) and (origin := self.origin()):
            ternary = any(key.endswith(".comfy_quant") for key in state_dict)
            for key, value in origin.metadata.items():
                if ternary or not key.startswith("ternary."):
                    metadata.setdefault(key, value)
        return state_dict

    def model_state_dict_for_saving(self, model=None, prefix=""):
        """As in core, which cannot save integer tensors that are not loaded; those are written here.

        Dense parameters get the dtype that they have in the file which the model came from.
        """
        modules = (self.model if model is None else model).named_modules()
        quantized = {name: module for name, module in modules if is_quantized(module)}
        with _as_patched(quantized.values()) as patched:
            state_dict = super().model_state_dict_for_saving(model, prefix)
        dense = []
        for name, module in quantized.items():
            weight = self._merged(f"{prefix}{name}.weight", module)
            if layout.is_ternary(module.weight):
                for key in module.weight.state_dict(f"{name}.weight").keys() | {f"{name}.comfy_quant"}:
                    state_dict.pop(key)
                if layout.is_ternary(weight):
                    state_dict |= entries(weight, f"{name}.", module.packing)
                    self._restore_scales(state_dict, name, module)
                else:
                    state_dict[f"{name}.weight"] = weight
                    dense.append(name)
            else:
                state_dict |= weight.state_dict(f"{name}.weight")
            if module not in patched and f"{prefix}{name}.bias" in self.patches:
                bias = self.patch_weight_to_device(f"{prefix}{name}.bias", self.load_device, return_weight=True)
                state_dict[f"{name}.bias"] = bias
        self._restore_dtypes(state_dict, prefix)
        if dense:
            lora.warn_dense(len(dense), sum(layout.is_ternary(module.weight) for module in quantized.values()))
        return state_dict

    def _restore_scales(self, state_dict: dict, name: str, module) -> None:
        """Put back the group scales of the file, where loading rounded them for 8-bit activations."""
        if module.scale_error is None or module.weight._params.scale.ndim == 2 or not self.origin():
            return
        scale = self.origin().scale(name.removeprefix("diffusion_model."))
        if scale is not None:
            state_dict.pop(f"{name}.weight_group")
            state_dict[f"{name}.weight_scale"] = scale

    def _restore_dtypes(self, state_dict: dict, prefix: str) -> None:
        origin = self.origin()
        for name, tensor in state_dict.items() if origin else ():
            dtype = origin.dtype(name.removeprefix("diffusion_model."))
            if dtype not in (None, tensor.dtype) and tensor.is_floating_point():
                if f"{prefix}{name}" in self.patches and not isinstance(tensor.device, torch.device):  # core's promise
                    tensor = self.patch_weight_to_device(f"{prefix}{name}", self.load_device, return_weight=True)
                state_dict[name] = tensor.data.to(dtype)


class _StateDict(dict):
    """A state dict some of whose values are made each time they are read."""

    def __init__(self, values: dict, readers: Mapping[str, Callable[[], torch.Tensor]]):
        super().__init__(values)
        self._readers = readers

    def __getitem__(self, key):
        value = super().__getitem__(key)
        return self._readers[key]() if key in self._readers else value

    def get(self, key, default=None):
        return self[key] if key in self else default

    def pop(self, key, *default):
        value = self[key] if key in self else None
        super().pop(key, *default)
        return value if value is not None else default[0]

    def values(self):
        return (self[key] for key in self)

    def items(self):
        return ((key, self[key]) for key in self)


@contextlib.contextmanager
def _as_patched(modules):
    """Have core treat weights as final while it collects them; yields the modules that really are."""
    modules = list(modules)
    patched = {m for m in modules if getattr(m, "comfy_patched_weights", False)}
    try:
        for module in modules:
            module.comfy_patched_weights = True
        yield patched
    finally:
        for module in set(modules) - patched:
            del module.comfy_patched_weights
