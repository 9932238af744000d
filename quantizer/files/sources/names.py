"""The names that FLUX's parameters have in diffusers, as a table, and how they make up Black Forest Labs' parameters.

Diffusers keeps q, k and v (and FLUX.1's first single-block MLP Linear) apart where BFL has one matrix, and swaps scale
and shift: the first and second half of the rows of the last modulation.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# BFL's Linear or norm -> diffusers' whose rows it has, one after another; without the block's name.
_DOUBLE: dict[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
}
_SINGLE: dict[str, tuple[str, ...]] = {"norm.query_norm": ("attn.norm_q",), "norm.key_norm": ("attn.norm_k",)}
_OUTSIDE: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_SWAPPED = "final_layer.adaLN_modulation.1"
_DOUBLES: dict[int, dict[str, tuple[str, ...]]] = {
    1: _DOUBLE
    | {
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
    },
    2: _DOUBLE
    | {
        "img_mlp.0": ("ff.linear_in",),
        "img_mlp.2": ("ff.linear_out",),
        "txt_mlp.0": ("ff_context.linear_in",),
        "txt_mlp.2": ("ff_context.linear_out",),
    },
}
_SINGLES: dict[int, dict[str, tuple[str, ...]]] = {
    1: _SINGLE
    | {
        "modulation.lin": ("norm.linear",),
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
    },
    2: _SINGLE | {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
}
_OUTSIDES: dict[int, dict[str, tuple[str, ...]]] = {
    1: _OUTSIDE
    | {
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    },
    2: _OUTSIDE
    | {
        "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
        "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    },
}
_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_TABLES: dict[int, dict[str, dict[str, tuple[str, ...]]]] = {
    version: {"double_blocks": _DOUBLES[version], "single_blocks": _SINGLES[version], "": _OUTSIDES[version]}
    for version in (1, 2)
}
_BACK = {
    version: {
        _BLOCKS.get(kind, ""): {theirs: (ours, i) for ours, names in table.items() for i, theirs in enumerate(names)}
        for kind, table in tables.items()
    }
    for version, tables in _TABLES.items()
}
FIRST = "x_embedder.weight"  # what a FLUX in diffusers' names has, and nothing in BFL's


@dataclass(frozen=True)
class Part:
    """`rows` rows from `first` of the tensor under `key`, which are the parameter's rows from `at`."""

    key: str
    first: int
    rows: int
    at: int


def diffusers_names(name: str, version: int) -> tuple[str, ...]:
    """Diffusers' parameters whose rows make up the parameter `name` of FLUX.`version`. Raises KeyError."""
    block, module, end = _split(name)
    table = _TABLES[version][block[0] if block else ""]
    start = f"{_BLOCKS[block[0]]}.{block[1]}." if block else ""
    return tuple(f"{start}{theirs}.{'weight' if end == 'scale' else end}" for theirs in table[module])


def bfl_name(key: str, version: int) -> tuple[str, int] | None:
    """BFL's parameter that diffusers' `key` belongs to, and which part of it that is; None for other keys."""
    block, module, end = _split(key)
    found = _BACK[version].get(block[0] if block else "", {}).get(module)
    if found is None or end not in ("weight", "bias"):
        return None
    ours, part = found
    start = next((f"{ours_}.{block[1]}." for ours_, theirs in _BLOCKS.items() if block and theirs == block[0]), "")
    return f"{start}{ours}.{'scale' if ours.endswith('_norm') else end}", part


def _split(name: str) -> tuple[tuple[str, str] | None, str, str]:
    """(block's kind and number, the module within it, "weight" and the like)."""
    module, _, end = name.rpartition(".")
    kind, _, rest = module.partition(".")
    number, _, inner = rest.partition(".")
    if kind in _BLOCKS or kind in _BLOCKS.values():
        return (kind, number), inner, end
    return None, module, end


def assemble(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Part, ...]]:
    """BFL's parameters from diffusers' keys and shapes, as far as they are complete; other keys are left out."""
    version = 2 if "double_stream_modulation_img.linear.weight" in shapes else 1
    found: dict[str, dict[int, str]] = {}
    for key in shapes:
        if place := bfl_name(key, version):
            found.setdefault(place[0], {})[place[1]] = key
    return {
        name: tuple(_parts(name, [keys[i] for i in range(len(keys))], shapes))
        for name, keys in found.items()
        if keys.keys() == set(range(len(diffusers_names(name, version)))) and all(shapes[key] for key in keys.values())
    }


def _parts(name: str, keys: list[str], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Part]:
    if name.rpartition(".")[0] == _SWAPPED:
        (key,) = keys
        half, rest = shapes[key][0] // 2, shapes[key][0] - shapes[key][0] // 2
        yield Part(key, 0, half, rest)
        yield Part(key, half, rest, 0)
        return
    position = 0
    for key in keys:
        yield Part(key, 0, shapes[key][0], position)
        position += shapes[key][0]


def parts_shape(parts: tuple[Part, ...], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the parameter that the parts make up: their rows after one another. Raises ValueError."""
    inner = {shapes[part.key][1:] for part in parts}
    if len(inner) > 1:
        keys = ", ".join(dict.fromkeys(part.key for part in parts))
        raise ValueError(f"{keys} have other inner shapes than each other")
    return (sum(part.rows for part in parts), *inner.pop())
