"""The node "Save Ternary FLUX"."""

import re
from collections import Counter
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..quantizer.files.layer import LayerPlan
from ..quantizer.files.summary import in_bytes, sizes
from ..quantizer.files.ternary import open_ternary, write_ternary
from . import files, lora
from .compat import accepted, core
from .layout import is_ternary
from .linear import take_weight
from .saving import SavesWeights, is_quantized

comfy = core()

PACKINGS = {
    "as loaded": "each layer keeps the packing that its file had.",
    "planes32": "2 bits a weight, loads without conversion.",
    "base3": "1.6 bits a weight, for sharing.",
}
FOLDER = "diffusion_models"


class SaveTernaryFlux(io.ComfyNode):
    """Writes a ternary model, with the LoRAs on it, as a ternary file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TernaryFluxSave",
            display_name="Save Ternary FLUX",
            category="model/merging",
            description="Saves a ternary FLUX model with its LoRAs as low-rank factors, its scales and its metadata. "
            "Load Ternary FLUX lists the file at once.",
            inputs=[
                io.Model.Input("model", tooltip="From Load Ternary FLUX, with LoRAs or without."),
                io.String.Input(
                    "filename_prefix",
                    default="ternary-flux",
                    tooltip="The file's name, in ComfyUI's output/diffusion_models; a number is added.",
                ),
                io.Combo.Input(
                    "packing",
                    options=list(PACKINGS),
                    default="as loaded",
                    tooltip="\n".join(
                        ["How trits are packed.", *(f"{name}: {meaning}" for name, meaning in PACKINGS.items())]
                    ),
                    **accepted(io.Combo.Input, advanced=True),
                ),
            ],
            outputs=[io.Combo.Output("file", tooltip="The file's name, for Load Ternary FLUX.")],
            is_output_node=True,
            **accepted(io.Schema, search_aliases=["save model", "export", "1.58-bit", "merge lora", "bake lora"]),
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None):
        return True if filename_prefix is None else _prefix_problem(filename_prefix) or True

    @classmethod
    def fingerprint_inputs(cls, filename_prefix: str | None = None, **_) -> int:
        """Writes again where what it wrote is gone."""
        return _lost(filename_prefix)

    @classmethod
    def execute(cls, model, filename_prefix: str, packing: str = "as loaded") -> io.NodeOutput:
        check(model)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            f"{FOLDER}/{filename_prefix}", folder_paths.get_output_directory()
        )
        inside = Path(subfolder)
        if inside.parts[:1] != (FOLDER,) or not name.strip("."):
            raise ValueError(f"{filename_prefix!r}: give the name of a file inside output/{FOLDER}")
        if problem := _prefix_problem(f"{subfolder}/{name}"):
            raise ValueError(problem)
        path = Path(folder) / f"{name}_{counter:05}_.safetensors"
        shown = (inside / path.name).relative_to(FOLDER).as_posix()
        write(model, path, None if packing == "as loaded" else packing)
        _written[filename_prefix] = path
        size = sizes(open_ternary(path, check_codes=False))
        text = f"{shown}\n{in_bytes(size.bytes)}, {size.bits_per_weight:.2f} bits per weight"
        return io.NodeOutput(shown, ui=ui.PreviewText(text))


_written: dict[str, Path] = {}  # by prefix, what was written last
_gone: Counter[str] = Counter()


def _lost(prefix: str | None) -> int:
    """How often the last file of a prefix, or of any where it is not known, was found missing."""
    for known, path in list(_written.items()):
        if not path.exists():
            del _written[known]
            _gone[known] += 1
    return _gone.total() if prefix is None else _gone[prefix]


def _prefix_problem(prefix: str) -> str | None:
    """Why a file cannot have this name, folders in it and ComfyUI's %...% allowed; None where it can."""
    parts = re.sub(r"%[^%/]*%", "x", str(prefix)).replace("\\", "/").split("/")
    named = [part for part in parts[:-1] if part] + parts[-1:]
    return next(filter(None, map(files.name_problem, named)), None)


def check(model) -> None:
    """Raise ValueError where a MODEL is not ternary, or would not stay so in a file."""
    if not isinstance(model, SavesWeights) or not any(map(is_quantized, model.model.modules())):
        raise ValueError("this MODEL is not ternary: save it with the node Save Model, or quantize it first")
    linears = model.quantized_linears()
    dense = [
        key
        for key, module in linears.items()
        if key in model.patches
        and isinstance(lora.build(key, model.patches[key], module.weight.device, torch.float32), lora.DensePatches)
    ]
    if dense:
        raise ValueError(
            f"{len(dense)} of {len(linears)} layers carry patches without a low-rank form (DoRA, LoKr, LoHa, a merge, "
            f"a full difference; the first is {dense[0]}). Take them off, or save with the node Save Model, which "
            "makes these layers dense"
        )


def write(model, path: Path, packing: str | None = None) -> None:
    """Write a ternary model as a file, atomically; `packing` None keeps each layer's own. Raises OSError.

    Layers are packed piece by piece while they are written: no packed copy of the model is in memory.
    """
    comfy.load_models_gpu([model])
    linears = {
        key.removeprefix("diffusion_model.").removesuffix("weight"): module
        for key, module in model.quantized_linears().items()
        if is_ternary(module.weight)
    }
    own = {prefix: module.packing for prefix, module in linears.items()}
    try:
        for module in linears.values():
            module.packing = "planes32"  # as in memory
        tensors = model.model_state_dict_for_saving(model.model.diffusion_model, "diffusion_model.")
    finally:
        for prefix, module in linears.items():
            module.packing = own[prefix]
    weights = {prefix.removesuffix("."): take_weight(tensors, prefix) for prefix in linears}
    plans = {name: LayerPlan.of(weight, packing or own[f"{name}."]) for name, weight in weights.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = model.origin().metadata if model.origin() else {}
    write_ternary(path, plans, weights.__getitem__, tensors, metadata)
