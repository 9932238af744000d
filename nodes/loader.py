"""The node "Load Ternary FLUX", and the loading behind it."""

import math
import os
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..quantizer.files.checkpoint import file_kind
from ..quantizer.files.container import FormatError, TensorFile
from ..quantizer.files.ternary import TernaryFile, open_ternary
from . import layout
from .compat import accepted, core
from .linear import operations
from .patcher import TernaryPatcher, TernaryPatcherDynamic

comfy = core()

FOLDER = "diffusion_models"
EXTENSIONS = (".safetensors", ".sft")
ACTIVATIONS = {
    "auto": "int8 where a kernel makes it fast, full precision elsewhere.",
    "int8": "8-bit activations (W1.58A8): fastest on NVIDIA GPUs.",
    "full": "activations in the model's own precision (W1.58A16), as in the 1.58-bit FLUX paper.",
}


class LoadTernaryFlux(io.ComfyNode):
    """Loads a FLUX model whose weights are ternary."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        choices = "\n".join(f"{name}: {meaning}" for name, meaning in ACTIVATIONS.items())
        schema = {
            "node_id": "TernaryFluxLoader",
            "display_name": "Load Ternary FLUX",
            "category": "model/loaders",
            "description": "Loads a FLUX.1 or FLUX.2 model with 1.58-bit weights. "
            "LoRA, ControlNet and other model nodes work as usual.",
            "inputs": [
                io.Combo.Input(
                    "file",
                    options=files(),
                    tooltip="A ternary FLUX file in models/diffusion_models, made with this pack's quantizer.",
                ),
                io.Combo.Input(
                    "activations",
                    options=list(ACTIVATIONS),
                    default="auto",
                    tooltip=f"How activations meet the ternary weights.\n{choices}",
                    **accepted(io.Combo.Input, advanced=True),
                ),
            ],
            "outputs": [io.Model.Output(tooltip="The model, for samplers and every node that takes a FLUX model.")],
        }
        newer = accepted(
            io.Schema,
            search_aliases=["1.58-bit", "ternary", "bitnet", "quantized flux", "unet loader"],
            has_intermediate_output=True,  # the status text is shown again when the model comes from the cache
        )
        return io.Schema(**schema, **newer)

    @classmethod
    def validate_inputs(cls, file: str):
        """Refuse a wrong file when the workflow is queued, before anything else runs."""
        try:
            check(find(file))
        except (OSError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str, activations: str) -> str:
        """A file that was converted again is loaded again."""
        file_status = os.stat(find(file))
        return f"{file} {file_status.st_size} {file_status.st_mtime_ns} {activations}"

    @classmethod
    def execute(cls, file: str, activations: str) -> io.NodeOutput:
        path = find(file)
        model = load(path, activations)
        text = status(check(path), model.load_device, activations)
        return io.NodeOutput(model, ui=ui.PreviewText(text))


def files() -> list[str]:
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.lower().endswith(EXTENSIONS)]


def find(file: str) -> str:
    path = folder_paths.get_full_path(FOLDER, file)
    if path is None:
        raise FileNotFoundError(f"{file} is not in models/{FOLDER}; put it there and press R to refresh the node")
    return path


def check(path: str, check_codes: bool = False) -> TernaryFile:
    """Open a ternary FLUX file. Anything else raises FormatError saying what the file is and what to do with it."""
    opened = TensorFile(path)
    if problem := _not_ternary(opened):
        raise FormatError(path, problem)
    file = open_ternary(opened, check_codes=check_codes)
    file.architecture  # noqa: B018 - raises where the file is not a whole FLUX transformer
    return file


def _not_ternary(file: TensorFile) -> str | None:
    name, keys = file.path.name, file.entries
    match file_kind(file):
        case "ternary":
            return None
        case "flux":
            return (
                "this FLUX model is not ternary. Load it with the node Load Diffusion Model, or convert it: "
                f"python -m quantizer round {name} -o {file.path.stem}-ternary.safetensors"
            )
        case "quantized":
            return "this FLUX model is quantized in another format. Load it with the node Load Diffusion Model"
        case "lora":
            return "this is a LoRA. Move it to models/loras and apply it to this node's MODEL with the node Load LoRA"
    if any(key.startswith(("decoder.", "first_stage_model.", "vae.", "taesd_")) for key in keys):
        return "this is a VAE. Move it to models/vae and load it with the node Load VAE"
    if any(".self_attn." in key or ".SelfAttention." in key or "text_model." in key for key in keys):
        return "this is a text encoder. Move it to models/text_encoders and load it with the node Load CLIP"
    return "this is not a ternary FLUX model. Choose a file made with this pack's quantizer"


def load(path: str, activations: str = "auto", disable_dynamic: bool = False):
    """Load a ternary file as a ComfyUI model (a ModelPatcher). Raises FormatError, OSError.

    disable_dynamic  leaves out dynamic VRAM; ComfyUI asks for it where hooks or torch.compile need whole models.
    """
    file = check(path, check_codes=True)
    bar = comfy.ProgressBar(len(file.layers))

    def after_load():
        comfy.throw_exception_if_processing_interrupted()
        bar.update(1)

    # ComfyUI's own reader: dynamic VRAM streams the weights of its tensors from the file.
    state_dict, metadata = comfy.load_torch_file(path, return_metadata=True)
    state_dict = {k.removeprefix(file.prefix): v for k, v in state_dict.items() if k.startswith(file.prefix)}
    config = comfy.model_config_from_unet(state_dict, "", metadata=metadata)
    device = comfy.get_torch_device()
    dtype = comfy.unet_manual_cast(None, device, config.supported_inference_dtypes)
    model = comfy.load_diffusion_model_state_dict(
        state_dict,
        model_options={"custom_operations": operations(dtype, device, activations, after_load)},
        metadata=metadata,
        disable_dynamic=disable_dynamic,
    )
    patcher = TernaryPatcherDynamic if model.is_dynamic() else TernaryPatcher
    model = patcher(model.model, model.load_device, model.offload_device)
    model.cached_patcher_init = load, (path, activations)
    return model


def status(file: TernaryFile, device: torch.device, activations: str) -> str:
    """What was loaded and how it will run, for people."""
    layers = file.layers.values()
    weights = sum(n * k for n, k in (layer.shape for layer in layers))
    bits = 8 * sum(layer.nbytes for layer in layers) / weights
    size = file.path.stat().st_size
    dense = sum(math.prod(shape) for shape in file.architecture.shapes.values()) * torch.bfloat16.itemsize
    double = sum(layer.terms == 2 for layer in layers)
    terms = f" ({double} of two ternary terms)" if double else ""
    others = f" and {len(file.int8)} int8 layers" if file.int8 else ""
    choice = layout.choice_for(device, activations)
    return "\n".join(
        [
            Path(file.path).name,
            f"{file.architecture.name}, {len(layers)} ternary layers{terms}{others}, {bits:.2f} bits per weight",
            f"{_bytes(size)}, {dense / size:.1f}x smaller than bf16",
            f"{choice.activations} activations, backend {choice.backend.NAME} ({choice.reason})",
        ]
    )


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
