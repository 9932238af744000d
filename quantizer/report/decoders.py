"""From latents to pictures: a VAE in TAESD form, or false colours where there is none."""

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..files.container import TensorFile

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


def taesd_decoder(path: str | os.PathLike) -> Decode:
    """A decoder from a VAE file in TAESD form (`taesd_decoder.*` keys, any width and number of latent channels).

    Raises ValueError for other files.
    """
    file = TensorFile(path)
    prefix = "taesd_decoder."
    state = {key.removeprefix(prefix): file.tensor(key).float() for key in file.entries if key.startswith(prefix)}
    if "1.weight" not in state:
        raise ValueError(
            f"{path}: no {prefix}1.weight: a VAE in TAESD form is needed (as taef1_decoder, with its keys)"
        )
    layers = _taesd_layers(state)

    @torch.inference_mode()
    def decode(latents: Tensor) -> np.ndarray:
        return layers(latents.float()).clamp(0, 1).movedim(1, -1).numpy()

    return decode


def _taesd_layers(state: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """TAESD's decoder from its weights: the numbers in the keys are positions in its list of layers."""
    convolve = torch.nn.functional.conv2d
    last = max(int(key.split(".")[0]) for key in state)

    def convolution(x: Tensor, name: str) -> Tensor:
        return convolve(x, state[f"{name}.weight"], state.get(f"{name}.bias"), padding=1)

    def run(x: Tensor) -> Tensor:
        x = torch.tanh(x / 3) * 3
        for index in range(1, last + 1):
            if f"{index}.conv.0.weight" in state:
                inner = x
                for place in (0, 2, 4):
                    inner = convolution(inner, f"{index}.conv.{place}")
                    inner = inner.relu() if place < 4 else inner
                x = (inner + x).relu()
            elif f"{index}.weight" in state:
                # A layer without bias follows an upsampling.
                x = x if f"{index}.bias" in state else torch.nn.functional.interpolate(x, scale_factor=2)
                x = convolution(x, str(index))
                x = x.relu() if index == 1 else x
        return x

    return run
