"""How alike two pictures are: PSNR, SSIM and MS-SSIM.

SSIM is that of Wang, Bovik, Sheikh and Simoncelli (2004), MS-SSIM that of Wang, Simoncelli and Bovik (2003), on windows
that lie within the picture. Here, because torchmetrics takes five seconds to import and is not in ComfyUI's Python, and
kornia, which is, has no MS-SSIM; the tests compare with both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights, from fine to coarse
LEAST_SIDE = _WINDOW * 2 ** (len(_SCALES) - 1)  # of a picture, in pixels, for MS-SSIM
_ROUNDING = 1 / 255**2 / 12  # mean square of what rounding to 8 bits changes


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in 0..1 that were rounded to 8 bits, which shows 58.9 dB at most."""
    return float(-10 * (a - b).square().mean().clamp_min(_ROUNDING).log10())


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of pictures [C, H, W] in 0..1, at least 11 pixels high and wide; 1 for equal ones."""
    return float(_structure(a[None], b[None])[0])


def ms_ssim(a: Tensor, b: Tensor) -> float:
    """SSIM on five scales, for pictures of at least LEAST_SIDE pixels; 0 where a scale's structures are opposite."""
    if min(a.shape[1:]) < LEAST_SIDE:
        raise ValueError(f"MS-SSIM needs pictures of {LEAST_SIDE} pixels, not {a.shape[2]} x {a.shape[1]}")
    a, b, product = a[None], b[None], 1.0
    for scale, weight in enumerate(_SCALES):
        whole, contrast = _structure(a, b)
        product *= float((whole if scale == len(_SCALES) - 1 else contrast).clamp_min(0)) ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product


def _structure(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Means of SSIM and of its contrast and structure terms alone, of pictures [1, C, H, W]."""
    places = torch.arange(_WINDOW, dtype=a.dtype, device=a.device) - _WINDOW // 2
    line = torch.exp(-places.square() / (2 * _SIGMA**2))
    moments = torch.cat((a, b, a.square() + b.square(), a * b), dim=1).contiguous(memory_format=torch.channels_last)
    for kernel in (line.view(1, 1, -1, 1), line.view(1, 1, 1, -1)):
        kernel = (kernel / line.sum()).expand(moments.shape[1], -1, -1, -1)
        moments = F.conv2d(moments, kernel, groups=moments.shape[1])
    mean_a, mean_b, squares, product = moments.chunk(4, dim=1)
    contrast = (2 * (product - mean_a * mean_b) + _C2) / (squares - mean_a.square() - mean_b.square() + _C2)
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a.square() + mean_b.square() + _C1)
    return (luminance * contrast).mean(), contrast.mean()
