"""ComfyUI's model patchers, taught that LoRAs act beside quantized weights and are never rounded into them.

`TernaryPatcherDynamic` is for ComfyUI's dynamic VRAM, `TernaryPatcher` for everything else (CPU, AMD, WSL, hooks,
torch.compile). Both leave scheduling, offloading and whatever is not a ternary Linear to their base class. An effect is
what a patch list does to one Linear: a `lora.Branch`, `lora.DensePatches`, or None.
"""

import contextlib
import dataclasses

import torch

from . import layout, lora
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

    # Loading and unloading

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False, **kwargs):
        linears = self.quantized_linears()
        device = device_to or self.load_device
        effects = {}
        for key, module in linears.items():
            tag = self.patches_uuid, device, key in self.weight_wrapper_patches
            if module.attached[0] != tag:
                module.attached = tag, self._effect(key, self.patches.get(key, ()), device)
            effects[key] = module.attached[1]
        branches = sum(effect.nbytes for effect in effects.values() if effect is not None)
        if lowvram_model_memory:  # a budget for weights; 0 stands for no limit
            lowvram_model_memory = max(lowvram_model_memory - branches, 1)
            full_load = full_load and lowvram_model_memory > self.model_size()
        super().load(device_to, lowvram_model_memory, force_patch_weights, full_load, **kwargs)
        for key, module in linears.items():
            _apply(module, effects[key])
        self.model.model_loaded_weight_memory += branches

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False, force_cast=False):
        module = self.quantized_linear(key)
        if module is None:
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, force_cast)
        if return_weight and layout.is_ternary(module.weight):
            return self._merged(key, module)
        if return_weight:
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, force_cast)
        if force_cast:  # dynamic VRAM makes small layers resident and restores them from the backup
            self.backup.setdefault(key, _Original(module.weight))
            module.weight = layout.parameter(module.weight.to(device=device_to))

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            for module in self.quantized_linears().values():
                module.attached = None, None
                module.hooked = False
                _apply(module, None)
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
        _apply(module, effect)
        module.hooked = True
        if self.hook_mode == comfy.EnumHookMode.MaxSpeed:
            self.cached_hook_patches.setdefault(hooks, {})[key] = effect

    def patch_cached_hook_weights(self, cached_weights, key, memory_counter):
        module = self.quantized_linear(key)
        if module is None:
            return super().patch_cached_hook_weights(cached_weights, key, memory_counter)
        _apply(module, cached_weights[key])
        module.hooked = True

    def unpatch_hooks(self, whitelist_keys_set=None):
        for key, module in self.quantized_linears().items():
            if module.hooked and (not whitelist_keys_set or key in whitelist_keys_set):
                _apply(module, module.attached[1])
                module.hooked = False
        super().unpatch_hooks(whitelist_keys_set)

    # Merging and saving

    def get_key_patches(self, filter_prefix=None):
        """As in core, without the keys that only exist in saved quantized weights."""
        patches = super().get_key_patches(filter_prefix)
        return {key: value for key, value in patches.items() if value[0][0] is not None}

    def _merged(self, key: str, module):
        """A ternary weight with this patcher's LoRAs in its low-rank part; a dense tensor where they cannot be that."""
        effect = lora.build(key, self.patches.get(key, ()), module.weight.device, torch.float32)
        if effect is None:
            return module.weight
        if isinstance(effect, lora.DensePatches):
            return effect(module.weight.to(dtype=torch.float32).dequantize()).to(torch.bfloat16)
        params = module.weight._params
        down, up = (factor.to(torch.bfloat16) for factor in effect.factors(*module.weight.shape))
        if params.up is not None:
            down, up = torch.cat([params.down, down]), torch.cat([params.up, up], 1)
        params = dataclasses.replace(params, down=down, up=up)
        return layout.QuantizedTensor(module.weight._qdata, layout.LAYOUT, params)

    def model_state_dict_for_saving(self, model=None, prefix=""):
        """As in core, which cannot save integer tensors that are not loaded; those are written here."""
        modules = (self.model if model is None else model).named_modules()
        quantized = {name: module for name, module in modules if _is_quantized(module)}
        with _as_patched(quantized.values()) as patched:
            state_dict = super().model_state_dict_for_saving(model, prefix)
        for name, module in quantized.items():
            weight = self.patch_weight_to_device(f"{prefix}{name}.weight", self.load_device, return_weight=True)
            if layout.is_ternary(module.weight):
                for key in entries(module.weight, f"{name}."):
                    state_dict.pop(key)
                state_dict |= entries(weight, f"{name}.") if layout.is_ternary(weight) else {f"{name}.weight": weight}
            else:
                state_dict |= weight.state_dict(f"{name}.weight")
            if module not in patched and f"{prefix}{name}.bias" in self.patches:
                bias = self.patch_weight_to_device(f"{prefix}{name}.bias", self.load_device, return_weight=True)
                state_dict[f"{name}.bias"] = bias
        return state_dict


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


def _is_quantized(module) -> bool:
    return hasattr(module, "attached") and layout.is_quantized(module.weight)


def _apply(module, effect) -> None:
    dense = isinstance(effect, lora.DensePatches)
    module.weight_function = [effect, *_wrappers(module)] if dense else _wrappers(module)
    module.weight_lowvram_function = None
    module.branch = None if dense else effect


def _wrappers(module) -> list:
    functions = module.weight_function
    return [f for f in functions if not (getattr(f, "is_lowvram_patch", False) or isinstance(f, lora.DensePatches))]


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
