"""Plain Euler sampling of a rectified flow, as ComfyUI's `euler` sampler does for FLUX."""

from collections.abc import Callable

import torch
from torch import Tensor


def sample(
    model: Callable[..., Tensor], context: Tensor, pooled: Tensor, noise: Tensor, steps: int = 20, shift: float = 0.0
) -> Tensor:
    """Latents [B, C, h, w] in model space from noise of the same shape.

    `model(latent, t [B], context, pooled)` gives the velocity noise - picture; `context` is [B, T, C], `pooled` [B, V].
    FLUX.1-schnell's shift is 0, FLUX.2's is 2.02 (see `noise_levels`).
    """
    from ...quantizer.pictures.sampler import noise_levels

    latent = noise
    with torch.inference_mode():
        levels = noise_levels(steps, shift)
        for now, following in zip(levels[:-1], levels[1:], strict=True):
            t = torch.full((len(latent),), now.item(), device=latent.device)
            latent = latent + (following - now).item() * model(latent, t, context, pooled)
    return latent
