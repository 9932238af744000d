"""ComfyUI's model patchers, taught that LoRAs act beside quantized weights and are never rounded into them.

`TernaryPatcherDynamic` is for ComfyUI's dynamic VRAM, `TernaryPatcher` for everything else (CPU, AMD, WSL, hooks,
torch.compile). Both leave scheduling, offloading and whatever is not a quantized Linear to their base class.
"""

from . import fit, layout, lora
from .compat import core
from .saving import SavesWeights

comfy = core()


class _KeepsWeights(SavesWeights):
    """Mixin before a core patcher."""

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
        if origin := self.origin():
            origin.check()
        linears = self.quantized_linears()
        device = device_to or self.load_device
        effects = self._effects(linears, device, self._room(device, lowvram_model_memory))
        branches = sum(effect.nbytes for _, effect in effects.values())
        if lowvram_model_memory:  # a budget for weights; 0 stands for no limit
            lowvram_model_memory = max(lowvram_model_memory - branches, 1)
            full_load = full_load and lowvram_model_memory > self.model_size()
        super().load(device_to, lowvram_model_memory, force_patch_weights, full_load, **kwargs)
        for key, module in linears.items():
            module.load_effect(*effects[key])
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
        before, now = getattr(self.model, "ternary_baked", ()), self._baked()
        return len(before) == len(now) and all(map(_same, before, now))

    def _exchange_effects(self, device) -> None:
        self.unpatch_hooks()
        linears = self.quantized_linears()
        before = sum(module.effect.nbytes for module in linears.values())
        effects = self._effects(linears, device, self._room(device))
        for key, module in linears.items():
            module.load_effect(*effects[key])
        self.model.model_loaded_weight_memory += sum(effect.nbytes for _, effect in effects.values()) - before
        self.model.current_weight_patches_uuid = self.patches_uuid

    def _room(self, device, lowvram_model_memory: float = 0) -> float:
        """Bytes on `device` for what dense patches need: other models' weights in merges, mostly."""
        missing = self.model_size() - self.loaded_size()
        room = comfy.get_free_memory(device) - missing - comfy.minimum_inference_memory()
        return min(room, lowvram_model_memory / 2) if lowvram_model_memory else room

    def _effects(self, linears: dict, device, room: float) -> dict[str, tuple]:
        """(tag, effect) of every quantized Linear; what dense patches need lies on `device` as far as there is room."""
        effects = {}
        for key, module in linears.items():
            tag = self.patches_uuid, device, key in self.weight_wrapper_patches
            effect = module.effect
            if module.effect_tag != tag:
                effect = self._effect(key, self.patches.get(key, ()), device)
                if isinstance(effect, lora.DensePatches) and room > 0:
                    effect.to(device, before=module.effect)
            effects[key] = tag, effect
            room -= effect.nbytes
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
                module.load_effect(None, lora.Effect())
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
        module.hook_effect(effect)
        if self.hook_mode == comfy.EnumHookMode.MaxSpeed:
            self.cached_hook_patches.setdefault(hooks, {})[key] = effect

    def patch_cached_hook_weights(self, cached_weights, key, memory_counter):
        module = self.quantized_linear(key)
        if module is None:
            return super().patch_cached_hook_weights(cached_weights, key, memory_counter)
        module.hook_effect(cached_weights[key])

    def unpatch_hooks(self, whitelist_keys_set=None):
        for key, module in self.quantized_linears().items():
            if not whitelist_keys_set or key in whitelist_keys_set:
                module.unhook_effect()
        super().unpatch_hooks(whitelist_keys_set)


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
