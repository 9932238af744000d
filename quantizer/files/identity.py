"""What a file is, decided once: one sentence with a remedy, which the node, `inspect` and every command say alike.

A whole FLUX transformer is recognised by its own keys; whatever else lies in the file is counted and left alone.
"""

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .advice import command
from .architecture import Architecture, canonical, detect
from .container import TensorFile
from .sources.encodings import Encoding, encoding_of, stated_format, stated_layers
from .sources.names import FIRST, Part, assemble, parts_shape
from .sources.source import Source, open_source

_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.")  # of ours, the likeliest first
_DIFFUSION = "Load it with ComfyUI's node Load Diffusion Model; here FLUX.1 and FLUX.2 become ternary"
_ORIGINAL = "Give the original in 16 or 32 bits, or in fp8 or GGUF, to make it ternary"


@dataclass(frozen=True)
class Rows:
    """Rows of a parameter and where they are stored: `part.rows` rows from `part.first` of the encoded tensor."""

    encoding: Encoding
    part: Part


@dataclass(frozen=True)
class Identity:
    """What a file is.

    kind          "ternary", "dense" (a FLUX that can be made ternary), "quantized" (a FLUX that cannot), "incomplete",
                  "lora", "vae", "text encoder", "model" (another one) or "other"
    what, remedy  for people
    architecture, parameters   of a dense FLUX; parameters by BFL name
    lossy         what a dense FLUX was rounded to before; "" for 16 and 32 bits
    ignored       tensors of the file that are not the model's
    """

    kind: str
    what: str
    remedy: str
    architecture: Architecture | None = None
    parameters: Mapping[str, tuple[Rows, ...]] = field(default_factory=dict, repr=False)
    lossy: str = ""
    ignored: int = 0

    @property
    def sentence(self) -> str:
        return f"{self.what}. {self.remedy}"


def identify(source: Source | TensorFile | str | os.PathLike) -> Identity:
    """What a file or folder is, by the header's keys, shapes and JSON alone: no tensor is read.

    Raises FormatError where it cannot be opened (naming what it is, where that can be told) or its JSON is damaged,
    and OSError.
    """
    if isinstance(source, TensorFile):
        source = Source.of(source)
    elif not isinstance(source, Source):
        source = open_source(source)
    prefix = find_prefix(source.entries)
    if prefix is not None and _is_ternary(source, prefix):
        if len(source.files) > 1:
            what = f"this is a ternary FLUX in {len(source.files)} parts, and ternary files are read from one"
            return Identity("ternary", what, "Get it as one file, or put the parts' tensors and metadata into one")
        dense = command("export", source.path, "-dense")
        return Identity(
            "ternary", "this is a ternary FLUX", f"Load it with the node Load Ternary FLUX; as dense: {dense}"
        )
    found = _flux(source, prefix)
    if found and found.kind == "dense":
        return found
    return _relative(source.entries, _VARIANTS) or _quantized(source) or found or _other(source)


def layout(keys: Mapping[str, tuple[int, ...]], prefix: str | None) -> dict[str, tuple[Part, ...]] | None:
    """BFL name -> the parts that are its parameter; `keys` (with shapes) are BFL's names after `prefix`, or diffusers'.

    None where there is neither. Raises ValueError where a parameter is there twice, under two names.
    """
    diffusers = None if prefix is not None else _common_prefix(keys, FIRST, "single_transformer_blocks.")
    prefix = diffusers if prefix is None else prefix
    if prefix is None:
        return None
    shapes = {key.removeprefix(prefix): shape for key, shape in keys.items() if key.startswith(prefix)}
    if diffusers is None:
        parts: dict[str, tuple[Part, ...]] = {
            canonical(name): (Part(prefix + name, 0, (*shape, 1)[0], 0),) for name, shape in shapes.items()
        }
        if len(parts) < len(shapes):
            name = next(name for name in shapes if canonical(name) != name and canonical(name) in shapes)
            raise ValueError(f"{prefix}{name} and {prefix}{canonical(name)} are the same parameter")
        return parts
    return {
        name: tuple(Part(prefix + part.key, part.first, part.rows, part.at) for part in parts)
        for name, parts in assemble(shapes).items()
    }


def find_prefix(keys: Iterable[str]) -> str | None:
    """What precedes BFL's names of a FLUX in a file, such as "model.diffusion_model."; None where there is no FLUX."""
    return _common_prefix(keys, "img_in.weight", "double_blocks.")


def _common_prefix(keys: Iterable[str], first: str, blocks: str) -> str | None:
    """Of the prefixes with which `first` and the first of the `blocks` are there, that of the most of their keys."""
    starts = {key.removesuffix(first) for key in keys if key.endswith(first)}
    if not starts:
        return None
    counts = Counter(key[:at] for key in keys if (at := key.find(blocks)) >= 0)
    found = {key[:at] for key in keys if (at := key.find(f"{blocks}0.")) >= 0}
    rank = {prefix: number for number, prefix in enumerate(_PREFIXES)}
    both = sorted(
        starts & found,
        key=lambda prefix: ("ema" in prefix, -counts[prefix], rank.get(prefix, len(rank)), len(prefix), prefix),
    )
    return both[0] if both else None


def _is_ternary(source: Source, prefix: str) -> bool:
    return any(
        key.endswith(".comfy_quant") and key.startswith(prefix) and b'"ternary_v' in file.bytes(key)[:4096].tobytes()
        for key, file in source.homes.items()
    )


def _flux(source: Source, prefix: str | None) -> Identity | None:
    """What a FLUX with its names after `prefix`, or in diffusers' names, is; None where neither is there."""
    shapes = {key: entry.shape for key, entry in source.entries.items()}
    try:
        parts = layout(shapes, prefix)
        if not parts:
            return None
        architecture = detect({name: parts_shape(of, shapes) for name, of in parts.items()})
    except ValueError as error:
        what = f"this is no whole FLUX transformer: {str(error).rstrip('.')}"
        return Identity("incomplete", what, "Download it again, or give the whole model")
    layers = {id(file): stated_layers(file) for file in source.files}
    parameters, foreign = {}, []
    for name in architecture.shapes:
        found = [(_encoding(source, part.key, layers), part) for part in parts[name]]
        rows = tuple(Rows(encoding, part) for encoding, part in found if not isinstance(encoding, str))
        if unknown := next((encoding for encoding, _ in found if isinstance(encoding, str)), None):
            foreign.append((unknown, parts[name][0].key))
        else:
            parameters[name] = rows
    if foreign:
        unknown, key = foreign[0]
        what = f"this is {architecture.name} with {len(foreign)} tensors in {_STATED.get(unknown, unknown):.60}"
        return Identity("quantized", f"{what} ({key} is the first)", f"{_ORIGINAL}; that format is not decoded")
    lossy = Counter(e.encoding.lossy for of in parameters.values() for e in of)
    del lossy[None]
    lossy = ", ".join(sorted(lossy))
    used = {e.encoding.key for of in parameters.values() for e in of}
    used |= {e.encoding.scale for of in parameters.values() for e in of}
    beside = {f"{key.removesuffix('.weight')}.{end}" for key in used if key for end in ("comfy_quant", *_INPUTS)}
    beside |= {key for key in source.entries if key.endswith("scaled_fp8")}
    ignored = len(source.entries.keys() - used - beside)
    what = f"this is {architecture.name}{f' in {lossy}' if lossy else ''}, not ternary"
    return Identity("dense", what, _remedy(source, lossy), architecture, parameters, lossy, ignored)


_INPUTS = ("input_scale", "scale_input")


def _encoding(source: Source, key: str, layers: Mapping[int, Mapping[str, object]]) -> Encoding | str:
    file = source.homes[key]
    return encoding_of(file, key, layers[id(file)])


def _remedy(source: Source, lossy: str) -> str:
    """What to do with a dense FLUX."""
    node = "a GGUF loader node" if source.gguf else "the node Load Diffusion Model"
    load = "" if len(source.files) > 1 or source.path.is_dir() else f"Load it with {node}, or make it ternary"
    if source.gguf and lossy and importlib.util.find_spec("gguf") is None:
        return f"{load or 'Make it ternary'} after pip install gguf"
    given = command("convert", source.path, "-1.58bit", "--conditioning conditioning.safetensors")
    return f"{load or 'Make it ternary'} (hours on a GPU; the README explains it): {given}"


def _quantized(source: Source) -> Identity | None:
    """A model in a format that is not decoded, by what only that format has."""
    flux = any("single_transformer_blocks.0." in key or "double_blocks.0." in key for key in source.entries)
    model = "a FLUX" if flux else "a model"
    for what, ends, remedy in _FORMATS:
        if any(key.endswith(ends) for key in source.entries):
            if remedy is _IMPORT:
                remedy = f"If it is ternary, this imports it: {command('import', source.path, '-1.58bit')}"
                return Identity("quantized", f"this is {model} in {what}", remedy)
            return Identity("quantized", f"this is {model} in {what}", f"{remedy}. {_ORIGINAL}")
    for file in source.files:
        layers = stated_layers(file)
        names = {key.removesuffix(".comfy_quant") for key in file.entries if key.endswith(".comfy_quant")}
        for layer in (*names, *layers):
            if isinstance(said := stated_format(file, layer, layers), str) and not said.startswith("ternary_v"):
                remedy = "Load it with the node Load Diffusion Model"
                what = f"this is {model} in {_STATED.get(said, said):.60}"
                return Identity("quantized", what, f"{remedy}. {_ORIGINAL}")
    return None


_STATED = {
    "nvfp4": "NVFP4 (4 bits)",
    "mxfp8": "MXFP8 (8 bits with a scale for each block)",
    "convrot_w4a4": "4 bits in a rotated basis (ConvRot)",
    "int8_tensorwise with convrot": "8 bits in a rotated basis (ConvRot)",
}
_IMPORT = "import"  # in the place of a remedy
_FORMATS = (
    (
        "bitsandbytes' 4 bits (NF4 or FP4)",
        (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".weight.quant_map"),
        "Load it with a node for NF4 checkpoints",
    ),
    ("bitsandbytes' 8 bits", (".SCB",), "Load it with diffusers"),
    (
        "SVDQuant's 4 bits (nunchaku)",
        (".wscales", ".smooth_factor", ".smooth_factor_orig", ".wtscale"),
        "Load it with the nodes of ComfyUI-nunchaku",
    ),
    (
        "OrbitQuant's rotated codes",
        (".packed_weight_indices", ".row_norms"),
        "Load it with the nodes of OrbitQuant",
    ),
    ("optimum-quanto's format", (".weight._data", ".weight._scale"), "Load it with optimum-quanto"),
    (
        "diffusers' names with fused projections",
        (".to_qkv.weight", ".to_added_qkv.weight"),
        "Save it with unfused ones (unfuse_qkv_projections)",
    ),
    (
        "a training tool's form, with an adapter that is not merged (PEFT)",
        (".base_layer.weight",),
        "Merge the adapter (merge_and_unload) and save it again",
    ),
    ("torchao's format", (".weight._weight_qdata", "._weight_qdata"), "Load it with diffusers and torchao"),
    ("flux-fp8-api's format", (".float8_data",), "Load it with flux-fp8-api"),
    ("SDNQ's format", (".zero_point", ".svd_up"), "Load it with diffusers and sdnq"),
    ("gemlite's or HQQ's packing", (".W_q",), _IMPORT),
    ("MLX's packing", (".biases",), _IMPORT),
    ("GPTQ's or AWQ's format", (".qweight", ".qzeros"), "Load it with the library that made it"),
    ("NVFP4 (4 bits)", (".weight_scale_2",), "Load it with the node Load Diffusion Model"),
)


@dataclass(frozen=True)
class _Relative:
    """A kind of file, known by a key that has one of `marks` within it."""

    kind: str
    what: str
    marks: tuple[str, ...]
    remedy: str = _DIFFUSION


_CONTROLNET = "Move it to models/controlnet and load it with the node Load ControlNet Model, on a ternary model too"
_LORA = "Move it to models/loras and apply it with the node Load LoRA, to a ternary model too"
_VAE = "Move it to models/vae and load it with the node Load VAE"
_TEXT = "Move it to models/text_encoders and load it with the node Load CLIP"
_LORA_MARKS = re.compile(
    r"lora[_.](A|B|up|down|mid|unet|transformer|te\d?|linear_layer)\b|lora_(unet|transformer|te\d?)_|lora[12]?\.(up|down)\."
    r"|\.(hada|lokr)_[wt]|\.(dora_scale|oft_blocks|oft_diag|boft_\w+)|\.diff(_b)?$|\.[ab][12]\.weight$|lycoris_"
)
# What shares FLUX's block names and is not FLUX.
_VARIANTS = (
    _Relative("model", "Chroma", ("distilled_guidance_layer.",)),
    _Relative("model", "Ovis-Image", ("double_blocks.0.img_mlp.gate_proj.",)),
    _Relative("model", "HunyuanVideo", ("txt_in.individual_token_refiner.", "double_blocks.0.img_attn_qkv.")),
    _Relative(
        "model",
        "a ControlNet of FLUX",
        ("controlnet_x_embedder.", "controlnet_blocks.", "pos_embed_input.", "controlnet_cond_embedding."),
        _CONTROLNET,
    ),
)
_OTHERS = (
    _Relative("model", "Qwen-Image", ("transformer_blocks.0.img_mod.1.", "transformer_blocks.0.txt_mod.1.")),
    _Relative("model", "Stable Diffusion 3", ("joint_blocks.0.", "pos_embed.proj.")),
    _Relative("model", "Stable Diffusion (1.5, 2 or XL)", ("input_blocks.0.", "down_blocks.0."), ""),
    _Relative("model", "Z-Image or Lumina", ("cap_embedder.", "noise_refiner.0.")),
    _Relative("model", "HiDream", ("double_stream_blocks.0.block.",)),
    _Relative("model", "AuraFlow", ("double_layers.0.attn.",)),
    _Relative("model", "LTX-Video", ("patchify_proj.", "adaln_single.linear.")),
    _Relative("model", "Wan", ("blocks.0.self_attn.norm_q.", "condition_embedder.time_embedder.")),
    _Relative("model", "Sana or PixArt", ("caption_projection.", "y_embedder.y_proj.")),
    _Relative("model", "Cosmos", ("blocks.0.adaln_modulation_self_attn.", "blocks.block0.")),
    _Relative(
        "model",
        "FLUX.1 Redux, an adapter for pictures as prompts",
        ("redux_up.",),
        "Move it to models/style_models and load it with the node Load Style Model",
    ),
    _Relative("model", "an IP-Adapter", ("ip_adapter.", "ip_adapter_proj_model."), "Load it with an IP-Adapter node"),
    _Relative(
        "text encoder",
        "a text encoder",
        (".self_attn.", ".SelfAttention.", "text_model.", "encoder.block.0.layer.", "token_embd.", "blk.0."),
        _TEXT,
    ),
    _Relative(
        "text encoder",
        "a vision encoder",
        ("vision_model.",),
        "Move it to models/clip_vision and load it with the node Load CLIP Vision",
    ),
    _Relative(
        "vae",
        "a VAE",
        ("first_stage_model.", "vae.", "taesd_", "decoder.conv_in.", "decoder.conv1.", "decoder.up"),
        _VAE,
    ),
)
_NO_REMEDY = "Load it with ComfyUI's node Load Checkpoint; here FLUX.1 and FLUX.2 become ternary"


def _relative(keys: Mapping[str, object], relatives: tuple[_Relative, ...]) -> Identity | None:
    if relatives is _OTHERS and (lora := _lora(keys)):
        return lora
    for relative in relatives:
        if any(mark in key for key in keys for mark in relative.marks):
            return Identity(relative.kind, f"this is {relative.what}", relative.remedy or _NO_REMEDY)
    return None


def _lora(keys: Mapping[str, object]) -> Identity | None:
    if not any(map(_LORA_MARKS.search, keys)):
        return None
    control = any(key.endswith(("img_in.lora_A.weight", "x_embedder.lora_A.weight")) for key in keys)
    return Identity("lora", "this is a control LoRA" if control else "this is a LoRA", _LORA)


def _other(source: Source) -> Identity:
    """What is no FLUX: a kind that is known, or what it says of itself."""
    if known := _relative(source.entries, _OTHERS):
        return known
    said = source.files[0].architecture if source.gguf else source.metadata.get("modelspec.architecture", "")
    if source.gguf and said not in ("", "flux", "flux2"):
        return Identity("model", f"this is a GGUF of another model ({said:.60})", "Give one of FLUX.1 or FLUX.2")
    first = ", ".join(f"{key:.80}" for key in list(source.entries)[:3])
    what = f"this is no FLUX transformer that is known here{f', but {said:.60}' if said else ''}"
    return Identity("other", f"{what} (its first keys: {first})", "Give a transformer of FLUX.1 or FLUX.2")
