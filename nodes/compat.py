"""Every ComfyUI name outside its documented API that this pack uses, in one place.

The nodes work on ComfyUI's own Flux model through the mechanism core uses for its fp8 and int8 weights. That mechanism
is public in practice but not by contract, so `problem()` probes for it by capability, and the pack then registers one
node that says what to update instead of failing with a stack trace. Importing this module never fails.
"""

import functools
import inspect
import sys
from importlib import import_module
from types import SimpleNamespace

MINIMUM = "0.30.0"  # the version this pack is tested with; used in messages only

# What is used, by module. A missing attribute is a missing capability.
_NAMES = {
    "comfy.ops": ("mixed_precision_ops", "cast_bias_weight", "uncast_bias_weight", "run_every_op"),
    "comfy.quant_ops": ("QUANT_ALGOS", "QuantizedTensor", "QuantizedLayout", "register_layout_op"),
    "comfy_kitchen.tensor": ("BaseLayoutParams", "register_layout_class"),
    "comfy.model_patcher": ("ModelPatcher", "ModelPatcherDynamic"),
    "comfy.model_management": (
        "get_free_memory",
        "get_torch_device",
        "load_models_gpu",
        "minimum_inference_memory",
        "throw_exception_if_processing_interrupted",
        "unet_manual_cast",
        "unload_all_models",
    ),
    "comfy.model_detection": ("model_config_from_unet",),
    "comfy.sample": ("fix_empty_latent_channels", "prepare_noise", "sample_custom"),
    "comfy.samplers": ("KSAMPLER", "SAMPLER_NAMES", "SCHEDULER_NAMES", "calculate_sigmas", "sampler_object"),
    "comfy.sd": ("load_diffusion_model_state_dict",),
    "comfy.utils": ("get_attr", "load_torch_file", "ProgressBar"),
    "comfy.lora": ("calculate_shape", "calculate_weight"),
    "comfy.weight_adapter": ("LoRAAdapter", "WeightAdapterBase"),
    "comfy.hooks": ("EnumHookMode",),
    "comfy.float": ("stochastic_rounding",),
    "comfy.latent_formats": ("Flux", "Flux2"),
    "latent_preview": ("prepare_callback",),
}
_ARGUMENTS = {
    "comfy.ops.cast_bias_weight": ("offloadable", "compute_dtype", "want_requant"),
    "comfy.sd.load_diffusion_model_state_dict": ("model_options", "metadata", "disable_dynamic"),
    "comfy.model_patcher.ModelPatcher.clone": ("disable_dynamic", "model_override"),
    "comfy.model_patcher.ModelPatcher.patch_weight_to_device": ("return_weight", "force_cast"),
}


def _attribute(path: str):
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:cut]))
        if module is not None:
            value = module
            for part in parts[cut:]:
                value = getattr(value, part)
            return value
    raise AttributeError(path)


def missing() -> list[str]:
    """The capabilities this ComfyUI lacks, as dotted names; empty where the pack can work."""
    lacking = []
    for module, names in _NAMES.items():
        try:
            found = import_module(module)
        except ImportError:
            lacking.append(module)
        else:
            lacking += [f"{module}.{name}" for name in names if not hasattr(found, name)]
    if not lacking:
        for path, arguments in _ARGUMENTS.items():
            accepted = inspect.signature(_attribute(path)).parameters
            lacking += [f"{path}({argument}=)" for argument in arguments if argument not in accepted]
    return lacking


def problem() -> str | None:
    """One message saying what to update, or None where everything needed is there."""
    lacking = missing()
    if not lacking:
        return None
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    return (
        f"Ternary FLUX needs ComfyUI {MINIMUM} or newer with its requirements installed; this is {version()}. "
        f"Update ComfyUI and run `pip install -r requirements.txt` in its folder (missing: {lacking[0]}{more})."
    )


def version() -> str:
    try:
        return f"ComfyUI {import_module('comfyui_version').__version__}"
    except (ImportError, AttributeError):
        return "an older ComfyUI"


def accepted(function, **wanted) -> dict:
    """The keyword arguments among `wanted` that this ComfyUI's `function` knows."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in wanted.items() if name in known}


def send_text(text: str, node_id: str | None) -> None:
    """Show text on a node while it runs, where this ComfyUI can."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if node_id is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, node_id)


@functools.cache
def core() -> SimpleNamespace:
    """ComfyUI's internals as one namespace. Call it inside functions or after `problem()` returned None."""
    names = {name: getattr(import_module(module), name) for module, names in _NAMES.items() for name in names}
    return SimpleNamespace(**names)
