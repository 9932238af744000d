"""The miniatures: complete small FLUX systems with trained weights, to test claims about pictures on pictures.

    context, pooled = encode_prompts(["a red circle and a blue square"])
    latents = sample(load_transformer(), context, pooled, torch.randn(1, 16, 8, 8))
    correct = check(decode(latents)[0], "a red circle and a blue square")

FLUX.2's lie in a folder of their own, `FLUX2`, in files of the same names; it has FLUX.1's text encoder. They show that
the pipeline works and rank recipes; they do not measure FLUX's own quality. See MODEL_CARD.md.
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
    "AUTOENCODER", "CATEGORIES", "FLUX1", "FLUX2", "LATENT_SHAPE", "STOCK_AUTOENCODER", "TERNARY", "TEXT_ENCODER",
    "TRANSFORMER", "Found", "Result", "check", "decode", "encode_prompts", "load_autoencoder", "load_text_encoder",
    "load_transformer", "prompts", "sample", "write_conditioning", "write_stock_autoencoder",
]  # fmt: skip

FLUX1 = Path(__file__).parent / "weights"
FLUX2 = FLUX1 / "flux2"
TRANSFORMER = FLUX1 / "flux-miniature.safetensors"  # bf16, BFL's names: ComfyUI reads it as FLUX.1-schnell
TERNARY = FLUX1 / "flux-miniature-1.58bit.safetensors"  # of TRANSFORMER, by `convert`
AUTOENCODER = FLUX1 / "autoencoder.safetensors"  # compact; `write_stock_autoencoder` writes what ComfyUI reads
TEXT_ENCODER = FLUX1 / "text-encoder.safetensors"
LATENT_SHAPE = (16, 8, 8)  # of the 64-pixel pictures that the trained weights paint; FLUX.2's is (128, 4, 4)
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
def load_autoencoder(path: Path = AUTOENCODER) -> "Autoencoder":
    from .autoencoder import load

    return load(load_file(path))


def encode_prompts(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Context [P, 8, 128] and pooled [P, 128] of prompts, fp32."""
    return load_text_encoder().encode(list(texts))


def decode(latents: Tensor) -> np.ndarray:
    """Pictures float32 [B, H, W, 3] in 0..1 of either model's latents, [B, 16, H/8, W/8] or [B, 128, H/16, W/16]."""
    folder = FLUX1 if latents.shape[1] == LATENT_SHAPE[0] else FLUX2
    vae = load_autoencoder(folder / AUTOENCODER.name)
    with torch.inference_mode():
        return vae.decode(latents.float().cpu()).clamp(0, 1).movedim(1, 3).numpy()


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
