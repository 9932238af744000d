"""The key sets are written out here, from what diffusers saves, and not taken from the table that they test."""

from dataclasses import replace

import pytest
import torch
from ternary_flux.quantizer.files import diffusers
from ternary_flux.quantizer.files.architecture import Architecture, detect
from ternary_flux.tests.quantizer import synthetic

DEV = Architecture(1, 3072, 19, 38, 16, 16, 4096, 768, True)
KLEIN_4B = Architecture(2, 3072, 5, 20, 128, 128, 7680, None, False)
MODELS = {
    "FLUX.1 dev": DEV,
    "FLUX.1 schnell": replace(DEV, guidance=False),
    "FLUX.1 Fill": replace(DEV, in_channels=96),
    "FLUX.1 Canny": replace(DEV, in_channels=32),
    "FLUX.2 klein 4B": KLEIN_4B,
    "FLUX.2 klein 9B": replace(KLEIN_4B, hidden=4096, depth=8, depth_single=24, context_dim=12288),
    "FLUX.2 dev": replace(KLEIN_4B, hidden=6144, depth=8, depth_single=48, context_dim=15360, guidance=True),
}


def flux1_keys(doubles: int, singles: int, guidance: bool) -> set[str]:
    time = ["timestep_embedder", "text_embedder", *(["guidance_embedder"] if guidance else [])]
    linears = ["x_embedder", "context_embedder", "norm_out.linear", "proj_out"]
    linears += [f"time_text_embed.{part}.linear_{i}" for part in time for i in (1, 2)]
    norms = []
    for block in (f"transformer_blocks.{i}" for i in range(doubles)):
        linears += [f"{block}.norm1.linear", f"{block}.norm1_context.linear", f"{block}.attn.to_out.0"]
        linears += [f"{block}.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_add_out")]
        linears += [f"{block}.attn.add_{x}_proj" for x in "qkv"]
        linears += [f"{block}.{ff}.{name}" for ff in ("ff", "ff_context") for name in ("net.0.proj", "net.2")]
        norms += [f"{block}.attn.norm_{x}" for x in ("q", "k", "added_q", "added_k")]
    for block in (f"single_transformer_blocks.{i}" for i in range(singles)):
        linears += [f"{block}.norm.linear", f"{block}.proj_mlp", f"{block}.proj_out"]
        linears += [f"{block}.attn.to_{x}" for x in "qkv"]
        norms += [f"{block}.attn.norm_{x}" for x in "qk"]
    return {f"{name}.{part}" for name in linears for part in ("weight", "bias")} | {f"{n}.weight" for n in norms}


def flux2_keys(doubles: int, singles: int, guidance: bool) -> set[str]:
    time = ["timestep_embedder", *(["guidance_embedder"] if guidance else [])]
    names = ["x_embedder", "context_embedder", "norm_out.linear", "proj_out", "single_stream_modulation.linear"]
    names += [f"time_guidance_embed.{part}.linear_{i}" for part in time for i in (1, 2)]
    names += [f"double_stream_modulation_{stream}.linear" for stream in ("img", "txt")]
    for block in (f"transformer_blocks.{i}" for i in range(doubles)):
        names += [f"{block}.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")]
        names += [f"{block}.attn.add_{x}_proj" for x in "qkv"]
        names += [f"{block}.{ff}.linear_{way}" for ff in ("ff", "ff_context") for way in ("in", "out")]
        names += [f"{block}.attn.norm_{x}" for x in ("q", "k", "added_q", "added_k")]
    for block in (f"single_transformer_blocks.{i}" for i in range(singles)):
        names += [f"{block}.attn.{name}" for name in ("to_qkv_mlp_proj", "to_out", "norm_q", "norm_k")]
    return {f"{name}.weight" for name in names}


def keys(arch: Architecture) -> set[str]:
    complete = flux1_keys if arch.version == 1 else flux2_keys
    return complete(arch.depth, arch.depth_single, arch.guidance)


@pytest.mark.parametrize("arch", MODELS.values(), ids=MODELS)
def test_complete_key_sets_forth_and_back(arch):
    found = diffusers.parameters([*keys(arch), "pos_embed.proj.weight", "transformer_blocks.x.attn.to_q.weight"])
    assert found.keys() == arch.shapes.keys()
    parts = [part for parts in found.values() for part in parts]
    assert len(parts) == len(set(parts)) and set(parts) == keys(arch)
    assert diffusers.is_diffusers(keys(arch)) and not diffusers.is_diffusers(arch.shapes)


def test_klein_has_as_many_tensors_as_published():
    assert len(keys(KLEIN_4B)) == 169 and len(KLEIN_4B.shapes) == 149


@pytest.mark.parametrize("arch", [synthetic.FLUX1, synthetic.FLUX2], ids=["FLUX.1", "FLUX.2"])
def test_tensors_split_as_diffusers_does_are_joined_again(arch):
    state = synthetic.tensors(arch)
    h, theirs = arch.hidden, {}
    for name, parts in diffusers.parameters(keys(arch)).items():
        tensor = state[name]
        if name.startswith("final_layer.adaLN_modulation.1."):
            tensor = torch.cat([tensor[h:], tensor[:h]])  # scale above shift
        sizes = [h, h, h, len(tensor) - 3 * h][: len(parts)] if len(parts) > 1 else [len(tensor)]
        theirs |= dict(zip(parts, tensor.split(sizes), strict=True))
    found = diffusers.parameters(theirs)
    assert detect(diffusers.shapes(found, {key: tuple(t.shape) for key, t in theirs.items()})) == arch
    for name, parts in found.items():
        assert torch.equal(diffusers.join(name, (theirs[part] for part in parts)), state[name]), name


def test_a_missing_or_misshapen_part_is_named():
    complete = keys(KLEIN_4B)
    with pytest.raises(ValueError, match="transformer_blocks.3.attn.to_v.weight is missing.*double_blocks.3.img_attn"):
        diffusers.parameters(complete - {"transformer_blocks.3.attn.to_v.weight"})
    found = {"double_blocks.0.img_attn.qkv.weight": ("q", "k", "v")}
    for shape in ((4, 3), ()):
        with pytest.raises(ValueError, match="double_blocks.0.img_attn.qkv.weight do not fit.*k "):
            diffusers.shapes(found, {"q": (4, 4), "k": shape, "v": (4, 4)})
