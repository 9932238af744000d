"""Fine detail: the energy of an image's high frequencies.

A model that blurs can have small velocity and pixel errors; the ratio of its detail to the original's shows it.
"""

import math

import torch
from torch import Tensor

_CUTOFF = 0.25  # cycles per pixel: half of the highest that a row of pixels has
_PATCHES = 128  # channels of FLUX.2's latents: 2 x 2 patches of 32


def detail(images: Tensor) -> Tensor:
    """Energy [B] of images or latents [B, C, H, W] above a quarter cycle per pixel, by the orthonormal DCT-II.

    The transform continues images as mirrors do, so that their borders are no detail.
    """
    rows, columns = (_cosines(size, images) for size in images.shape[-2:])
    spectrum = rows @ images.float() @ columns.t()
    vertical, horizontal = (torch.arange(size, device=images.device) / (2 * size) for size in images.shape[-2:])
    high = torch.hypot(vertical[:, None], horizontal[None]) >= _CUTOFF
    return (spectrum.square() * high).sum((1, 2, 3))


def _cosines(size: int, like: Tensor) -> Tensor:
    """The matrix of the orthonormal DCT-II [size, size]."""
    places = torch.arange(size, device=like.device, dtype=torch.float32)
    matrix = torch.cos(math.pi / size * (places + 0.5) * places[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def predicted(latent: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """The pictures [B, C, H, W] that velocities at times t [B] lead to: latent - t velocity.

    Channels of control models beyond the velocity's are left out, and pixels of FLUX.2's patches put in their places.
    """
    channels = velocity.shape[1]
    picture = latent[:, :channels].float() - t.float().view(-1, 1, 1, 1) * velocity.float()
    return torch.nn.functional.pixel_shuffle(picture, 2) if channels == _PATCHES else picture
