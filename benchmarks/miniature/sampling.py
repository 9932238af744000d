"""Plain Euler sampling of a rectified flow, as ComfyUI's `euler` sampler and `simple` scheduler do for FLUX-schnell."""

from collections.abc import Callable

import torch
from torch import Tensor


def sigmas(steps: int) -> Tensor:
    """Noise levels [steps + 1] from 1 to 0: evenly spaced, because FLUX-schnell's shift is 1."""
    return torch.linspace(1, 0, steps + 1)


def sample(model: Callable[..., Tensor], context: Tensor, pooled: Tensor, noise: Tensor, steps: int = 20) -> Tensor:
    """Latents [B, 16, h, w] in model space from noise of the same shape.

    `model(latent, t [B], context, pooled)` gives the velocity noise - picture; `context` is [B, T, C], `pooled` [B, V].
    """
    latent = noise
    with torch.inference_mode():
        levels = sigmas(steps)
        for now, following in zip(levels[:-1], levels[1:], strict=True):
            t = torch.full((len(latent),), now.item(), device=latent.device)
            latent = latent + (following - now).item() * model(latent, t, context, pooled)
    return latent
