"""Prompts through ComfyUI's own text encoders, exactly as its CLIPTextEncode node would."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..comfyui import import_comfyui
from ..files.container import read_header
from ..files.inputs import check_regular
from .conditioning import create_conditioning

_FLUX2_TOKENS = 512  # to which ComfyUI's Flux2 model pads contexts, with zeros on the left
_NOT_FLUX = (
    "these are not the text encoders of a FLUX: give T5-XXL and CLIP-L for FLUX.1, "
    "or the one Mistral-3 (dev) or Qwen3 (klein) encoder for FLUX.2"
)
PROMPTS = Path(__file__).with_name("prompts.txt")  # the pack's own, a prompt in each line


def embed(
    prompts: Sequence[str],
    encoders: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    overwrite: bool = False,
    on_progress: Callable[[int], object] = lambda prompts: None,
) -> tuple[int, int, int | None]:
    """Encode prompts with these text encoder files and write a conditioning file; returns T, C and V.

    FLUX.1 takes T5-XXL and CLIP-L, in any order; FLUX.2 its one Mistral (dev) or Qwen3 (klein). All prompts are given
    the tokens of the longest. FileNotFoundError without ComfyUI or a file, ValueError for files of another kind.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("there must be at least one prompt, and none may be empty")
    for path in encoders:
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: there is no such text encoder file")
        check_regular(path, "a text encoder's file")
        read_header(path)
    import_comfyui()
    clip = _load(encoders)
    files = ", ".join(Path(path).name for path in encoders)
    return encode(
        prompts, clip, output, metadata={"text_encoders": files}, overwrite=overwrite, on_progress=on_progress
    )


def encode(
    prompts: Sequence[str],
    clip,
    output: str | os.PathLike,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int], object] = lambda prompts: None,
) -> tuple[int, int, int | None]:
    """`embed` with text encoders that are loaded, as ComfyUI's CLIP. ValueError where they are not a FLUX's."""
    import comfy.text_encoders.flux as flux

    flux2 = isinstance(clip.cond_stage_model, flux.Flux2TEModel)
    if not flux2 and not isinstance(clip.cond_stage_model, flux.FluxClipModel):
        raise ValueError(_NOT_FLUX)
    options = _same_length(clip, prompts)
    with torch.inference_mode():
        first = _encode(clip, prompts[0], options)
        tokens = max(first[0].shape[0], _FLUX2_TOKENS) if flux2 else first[0].shape[0]
        shape = (tokens, first[0].shape[1])
        pooled_size = None if flux2 else first[1].shape[0]
        with create_conditioning(
            output, prompts, context_shape=shape, pooled_size=pooled_size, metadata=metadata, overwrite=overwrite
        ) as file:
            for i, prompt in enumerate(prompts):
                context, pooled = _encode(clip, prompt, options) if i else first
                missing = tokens - context.shape[0]
                context = torch.nn.functional.pad(context, (0, 0, missing, 0)) if flux2 and missing > 0 else context
                file.add(context, None if flux2 else pooled)
                on_progress(1)
    return *shape, pooled_size


def _load(encoders: Sequence[str | os.PathLike]):
    """ComfyUI's CLIP object."""
    import comfy.sd
    import comfy.text_encoders.flux as flux

    flux2 = len(encoders) == 1
    kind = comfy.sd.CLIPType.FLUX2 if flux2 else comfy.sd.CLIPType.FLUX
    try:
        clip = comfy.sd.load_clip([str(path) for path in encoders], clip_type=kind)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"ComfyUI cannot load {', '.join(map(str, encoders))} as text encoders: {reason}") from error
    expected = flux.Flux2TEModel if flux2 else flux.FluxClipModel
    if not isinstance(clip.cond_stage_model, expected):
        names = ", ".join(str(path) for path in encoders)
        raise ValueError(f"{names}: {_NOT_FLUX}")
    return clip


def _same_length(clip, prompts: Sequence[str]) -> dict[str, int]:
    """Tokenizer options that pad every prompt of T5 as the longest (ComfyUI's minimum is 256 tokens)."""
    longest: dict[str, int] = {}
    for prompt in prompts:
        for name, chunks in clip.tokenize(prompt).items():
            longest[name] = max(longest.get(name, 0), sum(len(chunk) for chunk in chunks))
    return {f"{name}_min_length": length for name, length in longest.items() if name == "t5xxl"}


def _encode(clip, prompt: str, options: dict[str, int]) -> tuple[Tensor, Tensor | None]:
    """Context [T, C] and pooled vector [V]."""
    context, pooled = clip.encode_from_tokens(clip.tokenize(prompt, tokenizer_options=options), return_pooled=True)
    return context[0].float().cpu(), None if pooled is None else pooled[0].float().cpu()
