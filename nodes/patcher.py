"""ComfyUI's model patchers, taught that LoRAs act beside quantized weights and are never rounded into them.

`TernaryPatcherDynamic` is for ComfyUI's dynamic VRAM, `TernaryPatcher` for everything else (CPU, AMD, WSL, hooks,
torch.compile). Both leave scheduling, offloading and whatever is not a quantized Linear to their base class.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from functools import partial

import torch

from . import fit, layout, lora
from .compat import core
from .linear import entries

comfy = core()


class _KeepsWeights:
    """Mixin before a core patcher."""

    def quantized_linears(self) -> dict[str, torch.nn.Module]:
        """Weight key -> module of every Linear that is ternary, or fp8 or int8 in a file of mixed formats."""
        return {f"{name}.weight": module for name, module in self.model.named_modules() if _is_quantized(module)}

    def quantized_linear(self, key: str) -> torch.nn.Module | None:
        name, _, attribute = key.rpartition(".")
        module = self.model.get_submodule(name) if attribute == "weight" else None
        return module if _is_quantized(module) else None

    def _effect(self, key: str, patches, device):
        wrapped = key in self.weight_wrapper_patches  # other extensions' functions of the dense, patched weight
        effect = lora.build(key, patches, device, self.model.get_dtype_inference(), dense=wrapped)
        if isinstance(effect, lora.DensePatches):
            lora.warn_once(self.model, patches)
        return effect

    # Adding patches

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        """As in core, without patches that do not fit this model or change nothing."""
        useful = {
            key: value
            for key, value in self._fitting(patches).items()
            if not fit.changes_nothing(value, strength_patch, strength_model)
        }
        added = super().add_patches(useful, strength_patch, strength_model)
        return [*added, *(patches.keys() - useful.keys())]

    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        fitting = self._fitting(patches)
        added = super().add_hook_patches(hook, fitting, strength_patch, strength_model)
        return [*added, *(patches.keys() - fitting.keys())]

    def _fitting(self, patches: dict) -> dict:
        """The patches that fit, by key; says in one line how many of a LoRA's layers do not."""
        fitting = {key: value for key, value in patches.items() if self._fits(key, value)}
        if dropped := patches.keys() - fitting.keys():
            lora.warn_misfits(self.model, patches, dropped)
        return fitting

    def _fits(self, key, value) -> bool:
        name, offset = (key, None) if isinstance(key, str) else key[:2]
        try:
            weight = comfy.get_attr(self.model, name)
        except AttributeError:
            return True  # core reports keys that the model does not have
        if weight is None:  # a part of a quantized weight
            return True
        shape = comfy.calculate_shape(self.patches.get(name, ()), weight, name)
        return fit.fits(value, offset, tuple(shape))

    # Loading and unloading

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False, **kwargs):
        if origin := self._origin():
            origin.check()
        linears = self.quantized_linears()
        device = device_to or self.load_device
        effects = self._effects(linears, device, lowvram_model_memory / 2 if lowvram_model_memory else None)
        branches = sum(effect.nbytes for effect in effects.values())
        if lowvram_model_memory:  # a budget for weights; 0 stands for no limit
            lowvram_model_memory = max(lowvram_model_memory - branches, 1)
            full_load = full_load and lowvram_model_memory > self.model_size()
        super().load(device_to, lowvram_model_memory, force_patch_weights, full_load, **kwargs)
        for key, module in linears.items():
            effects[key].attach(module)
        self.model.model_loaded_weight_memory += branches
        self.model.ternary_baked = self._baked()

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        """As in core, which unloads all weights where any patch changed; effects are exchanged without that."""
        loaded = self.model.current_weight_patches_uuid
        if loaded not in (None, self.patches_uuid) and not force_patch_weights and self._only_effects_differ():
            self._exchange_effects(device_to)
        return super().partially_load(device_to, extra_memory, force_patch_weights)

    def _baked(self) -> list[tuple]:
        """What core does to weights as it loads them: patches of dense parameters, other extensions' functions."""
        linears = self.quantized_linears()
        patches = [(key, *patch) for key in sorted(self.patches.keys() - linears.keys()) for patch in self.patches[key]]
        return patches + [(key, f) for key, functions in self.weight_wrapper_patches.items() for f in functions]

    def _only_effects_differ(self) -> bool:
        before, now = self.model.ternary_baked, self._baked()
        return len(before) == len(now) and all(map(_same, before, now))

    def _exchange_effects(self, device) -> None:
        self.unpatch_hooks()
        linears = self.quantized_linears()
        before = sum(module.attached[1].nbytes for module in linears.values())
        effects = self._effects(linears, device, 0 if self.model.model_lowvram else None)
        for key, module in linears.items():
            effects[key].attach(module)
        self.model.model_loaded_weight_memory += sum(effect.nbytes for effect in effects.values()) - before
        self.model.current_weight_patches_uuid = self.patches_uuid

    def _effects(self, linears: dict, device, budget: float | None) -> dict[str, lora.Effect]:
        """The effect of every quantized Linear; what dense patches need lies on `device` within `budget` bytes."""
        effects = {}
        for key, module in linears.items():
            tag = self.patches_uuid, device, key in self.weight_wrapper_patches
            loaded, before = module.attached
            if loaded != tag:
                effect = self._effect(key, self.patches.get(key, ()), device)
                if isinstance(effect, lora.DensePatches) and (budget is None or budget > 0):
                    effect.to(device, before)
                module.attached = tag, effect
            effects[key] = module.attached[1]
            if budget is not None:
                budget -= effects[key].nbytes
        return effects

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False, force_cast=False):
        module = self.quantized_linear(key)
        if module is None:
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, force_cast)
        if return_weight:
            return self._dense(key, module, device_to)
        if force_cast:  # dynamic VRAM makes small layers resident and restores them from the backup
            self.backup.setdefault(key, _Original(module.weight))
            module.weight = layout.parameter(module.weight.to(device=device_to))

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            for module in self.quantized_linears().values():
                module.attached = None, lora.Effect()
                module.hooked = False
                module.attached[1].attach(module)
        return super().unpatch_model(device_to, unpatch_weights)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        freed = super().partially_unload(device_to, memory_to_free, force_patch_weights)
        for module in self.quantized_linears().values():  # offloaded layers were given core's own patch functions
            module.weight_function = [f for f in module.weight_function if not getattr(f, "is_lowvram_patch", False)]
        return freed

    # Hooks: LoRAs that change between prompts or steps

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        module = self.quantized_linear(key)
        if module is None or key not in combined_patches:
            return super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
        patches = [*self.patches.get(key, ()), *combined_patches[key]]
        effect = self._effect(key, patches, self.load_device)
        effect.attach(module)
        module.hooked = True
        if self.hook_mode == comfy.EnumHookMode.MaxSpeed:
            self.cached_hook_patches.setdefault(hooks, {})[key] = effect

    def patch_cached_hook_weights(self, cached_weights, key, memory_counter):
        module = self.quantized_linear(key)
        if module is None:
            return super().patch_cached_hook_weights(cached_weights, key, memory_counter)
        cached_weights[key].attach(module)
        module.hooked = True

    def unpatch_hooks(self, whitelist_keys_set=None):
        for key, module in self.quantized_linears().items():
            if module.hooked and (not whitelist_keys_set or key in whitelist_keys_set):
                module.attached[1].attach(module)
                module.hooked = False
        super().unpatch_hooks(whitelist_keys_set)

    # Merging and saving

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
        if isinstance(metadata, dict) and (origin := self._origin()):
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
        quantized = {name: module for name, module in modules if _is_quantized(module)}
        with _as_patched(quantized.values()) as patched:
            state_dict = super().model_state_dict_for_saving(model, prefix)
        dense = []
        for name, module in quantized.items():
            weight = self._merged(f"{prefix}{name}.weight", module)
            if layout.is_ternary(module.weight):
                for key in entries(module.weight, f"{name}."):
                    state_dict.pop(key)
                if layout.is_ternary(weight):
                    state_dict |= entries(weight, f"{name}.", module.packing)
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

    def _restore_dtypes(self, state_dict: dict, prefix: str) -> None:
        origin = self._origin()
        for name, tensor in state_dict.items() if origin else ():
            dtype = origin.dtype(name)
            if dtype not in (None, tensor.dtype) and tensor.is_floating_point():
                if f"{prefix}{name}" in self.patches and not isinstance(tensor.device, torch.device):  # core's promise
                    tensor = self.patch_weight_to_device(f"{prefix}{name}", self.load_device, return_weight=True)
                state_dict[name] = tensor.data.to(dtype)

    def _origin(self):
        return getattr(self.model, "ternary_origin", None)


class _StateDict(dict):
    """A state dict some of whose values are made each time they are read."""

    def __init__(self, values: dict, readers: dict[str, Callable[[], torch.Tensor]]):
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


class TernaryPatcher(_KeepsWeights, comfy.ModelPatcher):
    """Core's ModelPatcher for models with ternary Linears."""


class TernaryPatcherDynamic(_KeepsWeights, comfy.ModelPatcherDynamic):
    """Core's ModelPatcherDynamic for models with ternary Linears."""

    def __new__(cls, model=None, load_device=None, *args, **kwargs):
        if load_device is not None and load_device.type == "cpu":  # core, too, has no dynamic VRAM on CPUs
            return TernaryPatcher(model, load_device, *args, **kwargs)
        return super().__new__(cls, model, load_device, *args, **kwargs)

    def clone(self, *args, **kwargs):
        clone = super().clone(*args, **kwargs)
        if type(clone) is comfy.ModelPatcher:  # core names its own class for the clone without dynamic VRAM
            clone.__class__ = TernaryPatcher
        return clone


class _Original:
    """A quantized weight in core's backup, which core makes a Parameter of again, in inference mode or not."""

    inplace_update = False

    def __init__(self, weight):
        self._weight = weight

    @property
    def weight(self):
        return layout.rewrap(self._weight)


def _same(a: tuple, b: tuple) -> bool:
    """Whether two patches are the same: numbers and names by value, tensors and functions by identity."""
    return len(a) == len(b) and all(
        x is y or (isinstance(x, int | float | str | tuple) and type(x) is type(y) and _equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def _equal(x, y) -> bool:
    return _same(x, y) if isinstance(x, tuple) else x == y


def _is_quantized(module) -> bool:
    return hasattr(module, "attached") and layout.is_quantized(module.weight)


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
