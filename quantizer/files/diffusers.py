"""FLUX's parameters by the names that diffusers gives them, and by BFL's: one table for each version, read both ways.

Where diffusers keeps apart what BFL stacks (query, key and value; in FLUX.1's single blocks the first MLP Linear too),
the rows of a BFL tensor are those of the diffusers tensors one below the other. The last modulation has shift above
scale in BFL's files and scale above shift in diffusers': its halves change places.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

SWAPPED = "final_layer.adaLN_modulation.1"  # its halves change places

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_NORMS = {
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
}
_SINGLE_NORMS = {"norm.query_norm": ("attn.norm_q",), "norm.key_norm": ("attn.norm_k",)}
_ATTENTION = {
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _ADDED_QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
}
_ENDS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    SWAPPED: ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}


def _embedder(name: str, diffusers: str) -> dict[str, tuple[str, ...]]:
    return {f"{name}.in_layer": (f"{diffusers}.linear_1",), f"{name}.out_layer": (f"{diffusers}.linear_2",)}


_OUTSIDE = {
    1: _ENDS
    | _embedder("time_in", "time_text_embed.timestep_embedder")
    | _embedder("vector_in", "time_text_embed.text_embedder")
    | _embedder("guidance_in", "time_text_embed.guidance_embedder"),
    2: _ENDS
    | _embedder("time_in", "time_guidance_embed.timestep_embedder")
    | _embedder("guidance_in", "time_guidance_embed.guidance_embedder")
    | {
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    },
}
_DOUBLE = {
    1: _NORMS
    | _ATTENTION
    | {
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
    },
    2: _NORMS
    | _ATTENTION
    | {
        "img_mlp.0": ("ff.linear_in",),
        "img_mlp.2": ("ff.linear_out",),
        "txt_mlp.0": ("ff_context.linear_in",),
        "txt_mlp.2": ("ff_context.linear_out",),
    },
}
_SINGLE = {
    1: _SINGLE_NORMS | {"modulation.lin": ("norm.linear",), "linear1": (*_QKV, "proj_mlp"), "linear2": ("proj_out",)},
    2: _SINGLE_NORMS | {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
}


def _modules(version: int) -> dict[str, tuple[str, ...]]:
    blocks = ("double_blocks.{}", "transformer_blocks.{}"), ("single_blocks.{}", "single_transformer_blocks.{}")
    modules = dict(_OUTSIDE[version])
    for (ours, theirs), inside in zip(blocks, (_DOUBLE[version], _SINGLE[version]), strict=True):
        for name, parts in inside.items():
            modules[f"{ours}.{name}"] = tuple(f"{theirs}.{part}" for part in parts)
    return modules


# version -> BFL's module -> diffusers' modules, whose rows stand one below the other; {} is the number of a block
MODULES = {version: _modules(version) for version in (1, 2)}


def is_diffusers(keys: Iterable[str]) -> bool:
    """Whether these are FLUX's parameters under diffusers' names, without a prefix."""
    keys = set(keys)
    return "x_embedder.weight" in keys and any(key.startswith("transformer_blocks.0.") for key in keys)


def parameters(keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """BFL's parameter -> those of the diffusers `keys` that it consists of, from top to bottom.

    Keys that belong to no parameter of FLUX are left out. Raises ValueError, naming it, where a part is missing.
    """
    keys = list(keys)
    version = 2 if "double_stream_modulation_img.linear.weight" in keys else 1
    owners = {part: name for name, parts in MODULES[version].items() for part in parts}
    found: dict[str, tuple[str, ...]] = {}
    for key in keys:
        module, _, suffix = key.rpartition(".")
        number = _block_number(module)
        name = owners.get(module if number is None else module.replace(f".{number}.", ".{}.", 1))
        if name is None or suffix not in ("weight", "bias"):
            continue
        parts = tuple(f"{part.format(number)}.{suffix}" for part in MODULES[version][name])
        found[_parameter(name.format(number), suffix)] = parts
    have = set(keys)
    for name, parts in found.items():
        if missing := [part for part in parts if part not in have]:
            raise ValueError(f"{missing[0]} is missing, a part of FLUX.{version}'s {name}")
    return found


def _block_number(module: str) -> str | None:
    first, _, rest = module.partition(".")
    number = rest.partition(".")[0]
    return number if first in ("transformer_blocks", "single_transformer_blocks") and number.isdecimal() else None


def _parameter(module: str, suffix: str) -> str:
    return f"{module}.scale" if module.endswith(("query_norm", "key_norm")) else f"{module}.{suffix}"


def shapes(found: Mapping[str, tuple[str, ...]], theirs: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of BFL's parameters that consist of diffusers tensors of these shapes: what `detect` takes.

    Raises ValueError where parts do not fit one below the other.
    """
    joined = {}
    for name, parts in found.items():
        first, *others = (theirs[part] for part in parts)
        if any(not first or shape[1:] != first[1:] or not shape for shape in others):
            listed = ", ".join(f"{part} {list(theirs[part])}" for part in parts)
            raise ValueError(f"the parts of {name} do not fit one below the other: {listed}")
        joined[name] = (sum(theirs[part][0] for part in parts), *first[1:]) if others else first
    return joined


def join(name: str, parts: Iterable[Tensor]) -> Tensor:
    """BFL's tensor `name` of its parts in diffusers; memory is shared where nothing has to be moved."""
    parts = list(parts)
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return torch.cat(tensor.chunk(2)[::-1]) if name.rpartition(".")[0] == SWAPPED else tensor
