"""From latents to pictures: ComfyUI's own VAE, or false colours where none is given."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..comfyui import import_comfyui
from ..files.architecture import Architecture
from ..files.container import read_header

Decode = Callable[[Tensor], np.ndarray]  # latents [B, C, H, W] -> pictures [B, h, w, 3] in 0..1


def preview(latents: Tensor) -> Decode:
    """Colours for latents where there is no decoder: the three main directions of the channels of these latents."""
    channels = latents.movedim(1, -1).flatten(0, -2)
    mean, deviation = channels.mean(0), channels.std(0).clamp_min(1e-6)
    _, _, directions = torch.linalg.svd((channels - mean) / deviation, full_matrices=False)
    basis = directions[:3].t()
    spread = (((channels - mean) / deviation) @ basis).std(0).clamp_min(1e-6)

    def decode(latents: Tensor) -> np.ndarray:
        colours = ((latents.movedim(1, -1) - mean) / deviation) @ basis / spread
        return (0.5 + colours / 5).clamp(0, 1).numpy()

    return decode


def vae_decoder(path: str | os.PathLike, arch: Architecture) -> Decode:
    """The decoder of `load_vae`, for latents in this FLUX's own space."""
    vae = load_vae(path, arch)
    import comfy.latent_formats

    latent_format = comfy.latent_formats.Flux() if arch.version == 1 else comfy.latent_formats.Flux2()

    @torch.inference_mode()
    def decode(latents: Tensor) -> np.ndarray:
        return vae.decode(latent_format.process_out(latents.float())).float().clamp(0, 1).cpu().numpy()

    return decode


def load_vae(path: str | os.PathLike, arch: Architecture):
    """ComfyUI's VAE of a file that "Load VAE" reads, for this FLUX.

    Raises FileNotFoundError without the file or without ComfyUI, ValueError for files of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such VAE file")
    if Path(path).suffix.lower() in (".safetensors", ".sft"):
        read_header(path)
    import_comfyui()
    import comfy.sd
    import comfy.utils

    try:
        state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        vae = comfy.sd.VAE(sd=state, metadata=metadata)
        vae.throw_exception_if_invalid()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: ComfyUI cannot load this as a VAE: {reason}") from error
    channels = 16 if arch.version == 1 else 128
    if vae.latent_channels != channels:
        raise ValueError(
            f"{path}: this VAE has {vae.latent_channels} latent channels, "
            f"and {arch.name} paints {channels}: give the VAE you use with it"
        )
    return vae
