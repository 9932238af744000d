"""The node "Load Ternary FLUX", and the loading behind it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from comfy_api.latest import io, ui

from ..quantizer.files.container import FormatError
from ..quantizer.files.identity import identify
from ..quantizer.files.metadata import stated
from ..quantizer.files.sources.source import open_source
from ..quantizer.files.summary import in_bytes, sizes, stated_errors
from ..quantizer.files.ternary import TernaryFile, open_ternary
from . import files, layout, origin
from .compat import accepted, core
from .linear import operations
from .patcher import TernaryPatcher, TernaryPatcherDynamic

comfy = core()

ACTIVATIONS = {
    "auto": "8 bits where a kernel makes them fast (int8, or fp8 on a B200), full precision elsewhere.",
    "int8": "8-bit activations (W1.58A8): fastest on NVIDIA GPUs.",
    "full": "activations in the model's own precision (W1.58A16), as in the 1.58-bit FLUX paper.",
}


BACKENDS = {
    "auto": "the fastest that this machine can run.",
    "triton": "the GPU kernels; refused, with the reason, where they cannot run.",
    "eager": "plain PyTorch, slower: to compare, or where a kernel misbehaves.",
}
STAGES = {
    "least-squares": "rounded only: expect noise",
    "absmean": "rounded only: expect noise",
    "calibrate": "calibrated",
    "distill": "distilled",
    "import": "imported bit for bit",
}


class LoadTernaryFlux(io.ComfyNode):
    """Loads a FLUX model whose weights are ternary."""

    @classmethod
    def define_schema(cls) -> io.Schema:
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
                    tooltip=f"How activations meet the ternary weights.\n{_listed(ACTIVATIONS)}",
                    **accepted(io.Combo.Input, advanced=True),
                ),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default="auto",
                    optional=True,  # workflows saved before it was there do not name it
                    tooltip=f"What multiplies by the ternary weights.\n{_listed(BACKENDS)}",
                    **accepted(io.Combo.Input, advanced=True),
                ),
            ],
            "outputs": [io.Model.Output(tooltip="The model, for samplers and every node that takes a FLUX model.")],
        }
        newer = accepted(
            io.Schema,
            search_aliases=[
                "load diffusion model",
                "unet loader",
                "1.58-bit",
                "ternary",
                "bitnet",
                "quantized flux",
                "low vram",
            ],
            has_intermediate_output=True,  # the status text is shown again when the model comes from the cache
        )
        return io.Schema(**schema, **newer)

    @classmethod
    def validate_inputs(cls, file: str | None = None):
        """Refuse a wrong file when the workflow is queued, before anything else runs.

        A name that comes from another node is not known yet (None) and is checked when the node runs.
        """
        if file is None:
            return True
        try:
            check(files.find(str(file)))
        except (OSError, ValueError) as error:
            return explain(error, str(file))
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **settings) -> str:
        """A file that was converted again is loaded again; where the name comes from another node, when any was."""
        return f"{file} {files.state(file)} {settings}"

    @classmethod
    def execute(cls, file: str, activations: str, backend: str = "auto") -> io.NodeOutput:
        try:
            opened = check(files.find(str(file)), check_codes=True)
        except (FormatError, OSError) as error:
            raise ValueError(explain(error, file)) from None
        model = load_file(opened, activations, backend)
        said = [status(opened, model.load_device, activations, backend), *scale_errors(model)]
        return io.NodeOutput(model, ui=ui.PreviewText("\n".join(said)))


def _listed(choices: dict[str, str]) -> str:
    return "\n".join(f"{name}: {meaning}" for name, meaning in choices.items())


def explain(error: Exception, name: str) -> str:
    """An error for people: the file by the name that they know, not by the server's path."""
    if path := getattr(error, "path", None):  # only at the start: a command that is offered keeps its whole path
        return name + str(error).removeprefix(str(path))
    path = getattr(error, "filename", None)
    return str(error) if path is None else str(error).replace(str(path), name)


def check(path: str, check_codes: bool = False) -> TernaryFile:
    """Open a ternary FLUX file. Anything else raises FormatError saying what the file is and what to do with it."""
    source = open_source(path)
    identity = identify(source)
    if identity.kind != "ternary":
        raise FormatError(path, identity.sentence)
    file = open_ternary(source, check_codes=check_codes)
    file.architecture  # noqa: B018 - raises where the file is not a whole FLUX transformer
    return file


def load(path: str, activations: str = "auto", backend: str = "auto", disable_dynamic: bool = False):
    """Load a ternary file as a ComfyUI model (a ModelPatcher). Raises FormatError, OSError.

    disable_dynamic  leaves out dynamic VRAM; ComfyUI asks for it where hooks or torch.compile need whole models.
    """
    return load_file(check(path, check_codes=True), activations, backend, disable_dynamic)


def load_file(file: TernaryFile, activations: str = "auto", backend: str = "auto", disable_dynamic: bool = False):
    """`load` for a file that is open and checked. Raises ValueError where the backend cannot run."""
    path = str(file.path)
    files.READ.add(path)
    bar = comfy.ProgressBar(len(file.layers))

    def after_load():
        comfy.throw_exception_if_processing_interrupted()
        bar.update(1)

    file.file.give_back()  # what checking it has mapped
    # ComfyUI's own reader: dynamic VRAM streams the weights of its tensors from the file.
    state_dict, metadata = comfy.load_torch_file(path, return_metadata=True)
    state_dict = {k.removeprefix(file.prefix): v for k, v in state_dict.items() if k in file.keys}
    config = comfy.model_config_from_unet(state_dict, "", metadata=metadata)
    device = comfy.get_torch_device()
    dtype = comfy.unet_manual_cast(None, device, config.supported_inference_dtypes)
    model = comfy.load_diffusion_model_state_dict(
        state_dict,
        # ComfyUI's options for dense weights, such as --fp8_e4m3fn-unet, would round the little that is dense here.
        model_options={
            "custom_operations": operations(dtype, device, activations, after_load, backend),
            "dtype": dtype,
        },
        metadata=metadata,
        disable_dynamic=disable_dynamic,
    )
    patcher = TernaryPatcherDynamic if model.is_dynamic() else TernaryPatcher
    model = patcher(model.model, model.load_device, model.offload_device)
    model.model.ternary_origin = origin.Origin.of(file, mapped=model.is_dynamic())
    model.cached_patcher_init = load, (path, activations, backend)
    return model


def status(file: TernaryFile, device: torch.device, activations: str, backend: str = "auto") -> str:
    """What was loaded and how it will run, for people: short lines that fit into the node."""
    layers, size = file.layers.values(), sizes(file)
    double = sum(layer.terms == 2 for layer in layers)
    terms = f" ({double} of two ternary terms)" if double else ""
    others = f" and {len(file.int8)} int8 layers" if file.int8 else ""
    choice = layout.choice_for(device, activations, backend)
    full = (
        sum(layer.full_precision for layer in layers) if activations == "auto" and choice.activations != "full" else 0
    )
    but = f", but full ones in {full} layers that lose too much with 8 bits" if full else ""
    return "\n".join(
        [
            Path(file.path).name,
            f"{file.architecture.name}, {len(layers)} ternary layers{terms}{others}",
            f"{in_bytes(size.bytes)}, {size.bits_per_weight:.2f} bits per weight, {size.ratio:.1f}x smaller than bf16",
            stage(file.metadata),
            f"{choice.activations} activations{but}, backend {choice.backend.NAME} ({choice.reason})",
        ]
    )


def scale_errors(model) -> list[str]:
    """A line on the scales that were rounded for 8-bit activations when the model was loaded; none where none were."""
    layers = [m for m in model.model.modules() if getattr(m, "scale_error", None) is not None]
    if not layers:
        return []
    rounded = [layer.scale_error for layer in layers if layer.weight._params.scale.ndim == 1]
    lines = []
    if rounded:
        mean = sum(rounded) / len(rounded)
        lines.append(f"group scales rounded for int8, by {mean:.2%} (at most {max(rounded):.2%})")
    if kept := len(layers) - len(rounded):
        lines.append(f"{kept} of {len(layers)} layers in full precision: their scales are too far apart for int8")
    return lines


def stage(metadata: Mapping[str, str]) -> str:
    """How far the conversion of a file went, and the error that it states, by its metadata."""
    method = metadata.get("ternary.method")
    name = STAGES.get(method, "the file does not say how it was made" if method is None else method)
    distilled = stated(metadata, "ternary.settings").get("distill")
    velocity = distilled.get("velocity_error") if isinstance(distilled, dict) else None
    if isinstance(velocity, int | float):
        return f"{name}, velocity error {velocity:.3g}"
    errors = stated_errors(metadata)
    return f"{name}, weight error {sum(errors.values()) / len(errors):.2f}" if errors else name
