"""The miniature: a complete small FLUX system with trained weights, to test claims about pictures on pictures.

    context, pooled = encode_prompts(["a red circle and a blue square"])
    latents = sample(load_transformer(), context, pooled, torch.randn(1, 16, 8, 8))
    correct = check(decode(latents)[0], "a red circle and a blue square")

It shows that the pipeline works and ranks recipes; it does not measure FLUX's own quality. See MODEL_CARD.md.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from .checker import Found, Result, check
from .sampling import sample
from .scenes import CATEGORIES, prompts

if TYPE_CHECKING:
    from ...quantizer.model.flux import Flux
    from .autoencoder import Autoencoder
    from .text import TextEncoder

__all__ = [
    "AUTOENCODER", "CATEGORIES", "LATENT_SHAPE", "STOCK_AUTOENCODER", "TERNARY", "TEXT_ENCODER", "TRANSFORMER",
    "Found", "Result", "check", "decode", "encode_prompts", "load_autoencoder", "load_text_encoder", "load_transformer",
    "prompts", "sample", "write_conditioning", "write_stock_autoencoder",
]  # fmt: skip

_WEIGHTS = Path(__file__).parent / "weights"
TRANSFORMER = _WEIGHTS / "flux-miniature.safetensors"  # bf16, BFL's names: ComfyUI reads it as FLUX.1-schnell
TERNARY = _WEIGHTS / "flux-miniature-1.58bit.safetensors"  # of TRANSFORMER, by `convert`
AUTOENCODER = _WEIGHTS / "autoencoder.safetensors"  # compact; `write_stock_autoencoder` writes what ComfyUI reads
TEXT_ENCODER = _WEIGHTS / "text-encoder.safetensors"
LATENT_SHAPE = (16, 8, 8)  # of the 64-pixel pictures that the trained weights paint
STOCK_AUTOENCODER = "miniature-vae.safetensors"  # its name in ComfyUI's models/vae


def load_transformer(path: Path = TRANSFORMER, device: str | torch.device = "cpu") -> "Flux":
    """The transformer in fp32 from a dense checkpoint with BFL's names (default: the trained weights)."""
    from ...quantizer.files.architecture import detect
    from ...quantizer.model.flux import Flux

    state = load_file(path)
    model = Flux(detect({name: tuple(value.shape) for name, value in state.items()}))
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.to(device).eval().requires_grad_(False)


@cache
def load_text_encoder() -> "TextEncoder":
    from .text import load

    return load(TEXT_ENCODER)


@cache
def load_autoencoder() -> "Autoencoder":
    from .autoencoder import load

    return load(load_file(AUTOENCODER))


def encode_prompts(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Context [P, 8, 128] and pooled [P, 128] of prompts, fp32."""
    return load_text_encoder().encode(list(texts))


def decode(latents: Tensor) -> np.ndarray:
    """Pictures float32 [B, H, W, 3] in 0..1 of latents [B, 16, H/8, W/8] in model space."""
    with torch.inference_mode():
        return load_autoencoder().decode(latents.float().cpu()).clamp(0, 1).movedim(1, 3).numpy()


def write_stock_autoencoder(path: Path) -> None:
    """Write the autoencoder as the file that ComfyUI's own "Load VAE" reads (fp32, 10 MB)."""
    from ...quantizer.files.container import save
    from .autoencoder import stock_state

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.float() for name, value in stock_state(load_file(AUTOENCODER)).items()}
    save(path, tensors, overwrite=True)


def write_conditioning(path: Path, count: int = 384, seed: int = 0, overwrite: bool = False) -> list[str]:
    """Write a conditioning file for the quantizer: training captions, as many of each category; returns them."""
    from ...quantizer.pictures.conditioning import write

    each = -(-count // len(CATEGORIES))
    columns = [prompts("train", category, each, seed) for category in CATEGORIES]
    captions = [text for row in zip(*columns, strict=True) for text in row][:count]
    context, pooled = encode_prompts(captions)
    write(path, captions, context, pooled, overwrite=overwrite)
    return captions
