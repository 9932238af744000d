"""FLUX.1's text encoders, T5-XXL and CLIP-L, as files with few channels, and ComfyUI set up to load them."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from ternary_flux.benchmarks import comfyui

CONTEXT, POOLED = 32, 48
_SIZES = {
    "t5xxl_model_config": {"d_model": CONTEXT, "num_heads": 2, "d_kv": 16},
    "clip_l_model_config": {
        "hidden_size": POOLED,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
    },
}


@contextlib.contextmanager
def encoders(folder: Path) -> Iterator[list[Path]]:
    """The two files; inside the block ComfyUI loads them in their narrow sizes."""
    comfyui.make_importable()
    import comfy.sd
    import comfy.text_encoders.flux as flux
    import comfy.text_encoders.long_clipl as long_clipl

    torch.manual_seed(0)
    model = flux.flux_clip(dtype_t5=torch.float32)(dtype=torch.float32, model_options=_SIZES)
    paths = [folder / "t5xxl.safetensors", folder / "clip_l.safetensors"]
    for path, part in zip(paths, (model.t5xxl, model.clip_l), strict=True):
        state = {name: 0.1 * torch.randn(tensor.shape) for name, tensor in part.transformer.state_dict().items()}
        safetensors.torch.save_file(state, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.sd, "load_clip", functools.partial(comfy.sd.load_clip, model_options=_SIZES))
        # CLIP-L's length is read from the file, and would put its full width back
        patch.setattr(long_clipl, "model_options_long_clip", lambda state, tokenizer, options: (tokenizer, options))
        yield paths
