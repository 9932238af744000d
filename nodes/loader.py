"""The node "Load Ternary FLUX", and the loading behind it."""

import math
from pathlib import Path

import torch
from comfy_api.latest import io, ui

from ..quantizer.files.checkpoint import kind_of
from ..quantizer.files.container import FormatError, Header, read_header
from ..quantizer.files.ternary import TernaryFile, open_ternary
from . import files, layout, origin
from .compat import accepted, core
from .linear import operations
from .patcher import TernaryPatcher, TernaryPatcherDynamic

comfy = core()

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
                    options=files.names(),
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
    def validate_inputs(cls, file: str | None = None, input_types: dict | None = None):
        """Refuse a wrong file when the workflow is queued, before anything else runs.

        A name that comes from another node, of any type, is not known yet (None) and is checked when the node runs.
        """
        if file is None:
            return True
        try:
            check(files.find(file))
        except (OSError, ValueError) as error:
            return explain(error, file)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **settings) -> str:
        """A file that was converted again is loaded again."""
        try:
            state = origin.changes() if file is None else files.stamp(files.find(file))
        except OSError:
            state = "missing"
        return f"{file} {state} {settings}"

    @classmethod
    def execute(cls, file: str, activations: str) -> io.NodeOutput:
        try:
            path = files.find(str(file))
            model = load(path, activations)
        except FormatError as error:
            raise ValueError(explain(error, file)) from None
        status = describe(check(path), model.load_device, activations)
        return io.NodeOutput(model, ui=ui.PreviewText(status))


def explain(error: Exception, name: str) -> str:
    """An error for people: the file by the name that they know, not by the server's path."""
    path = getattr(error, "path", None)
    return str(error) if path is None else str(error).replace(str(path), name)


def check(path: str, check_codes: bool = False) -> TernaryFile:
    """Open a ternary FLUX file. Anything else raises FormatError saying what the file is and what to do with it."""
    if problem := _not_ternary(read_header(path)):
        raise FormatError(path, problem)
    file = open_ternary(path, check_codes=check_codes)
    file.architecture  # noqa: B018 - raises where the file is not a whole FLUX transformer
    return file


def _not_ternary(header: Header) -> str | None:
    name = header.path.name
    keys = header.entries
    match kind_of(header):
        case "ternary":
            return None
        case "flux":
            return (
                "this FLUX model is not ternary. Load it with the node Load Diffusion Model, or convert it: "
                f"python -m quantizer round {name} -o {header.path.stem}-ternary.safetensors"
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
        # ComfyUI's options for dense weights, such as --fp8_e4m3fn-unet, would round the little that is dense here.
        model_options={"custom_operations": operations(dtype, device, activations, after_load), "dtype": dtype},
        metadata=metadata,
        disable_dynamic=disable_dynamic,
    )
    patcher = TernaryPatcherDynamic if model.is_dynamic() else TernaryPatcher
    model = patcher(model.model, model.load_device, model.offload_device)
    model.model.ternary_origin = origin.Origin.of(file, mapped=model.is_dynamic())
    model.cached_patcher_init = load, (path, activations)
    return model


def describe(file: TernaryFile, device: torch.device, activations: str) -> str:
    """What was loaded and how it will run, for people."""
    layers = file.layers.values()
    weights = sum(n * k for n, k in (layer.shape for layer in layers))
    bits = 8 * sum(layer.nbytes for layer in layers) / weights
    size = file.path.stat().st_size
    dense = sum(math.prod(shape) for shape in file.architecture.shapes.values()) * torch.bfloat16.itemsize
    double = sum(layer.planes == 2 for layer in layers)
    planes = f" ({double} of two trit planes)" if double else ""
    others = f" and {len(file.int8)} int8 layers" if file.int8 else ""
    choice = layout.choose(device, activations)
    return "\n".join(
        [
            Path(file.path).name,
            f"{file.architecture.name}, {len(layers)} ternary layers{planes}{others}, {bits:.2f} bits per weight",
            f"{_bytes(size)}, {dense / size:.1f}x smaller than bf16",
            f"{choice.activations} activations, backend {choice.backend.NAME} ({choice.reason})",
        ]
    )


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
