"""Ternary Linears that can be trained: codes, scales, low-rank factors and bias of one layer as parameters.

What a forward multiplies by is what the file will hold: scales are rounded to row x integer-group form inside the
forward and gradients pass straight through the rounding (the straight-through estimator of arXiv 1308.3432). Scales are
trained as logarithms and codes as latents in units of their scale, so that one learning rate means the same in every
layer and model.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops import GROUP_SIZE, TernaryWeight
from ...ops.packing import unpack_planes32
from ...ops.scales import fit_integer_groups, nearest_integer_groups

THRESHOLD = 0.5  # latents beyond it, in units of the scale, are +-1
_REACH = 1.5  # latents stay within it: beyond, a code could not come back
_MARGIN = 0.02  # a latent that must start at another code than its weight's starts this far inside the code's interval


class TernaryLinear(nn.Module):
    """x [..., K] -> [..., N] with W[n, k] = code[n, k] * scale(n, k // 128) * column[k] + (up @ down)[n, k].

    Parameters: `log_scale` fp32 [ceil(K/128), N], relative to the starting scales; `log_column` fp32 [K], likewise,
    where the weight has column scales; `bias` [N] or None; with a rank `down` [r, K] and `up` [N, r]; with trained
    codes `latent` [N, K]. Frozen codes are a buffer, int8 [N, K] or packed in planes32 where memory is dearer than
    time.
    """

    start_scale: Tensor
    start_column: Tensor | None
    frozen: Tensor | None
    latent: nn.Parameter | None

    def __init__(self, weight: TernaryWeight, bias: Tensor | None, packed: bool = False):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.full_precision = weight.full_precision
        scales = weight.group_scales().clone()
        self.register_buffer("start_scale", scales)
        self.log_scale = nn.Parameter(torch.zeros_like(scales))
        self.register_buffer("start_column", weight.column)
        self.log_column = None if weight.column is None else nn.Parameter(torch.zeros(self.in_features))
        self.register_buffer("frozen", weight.trits.clone() if packed else weight.codes())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        self.register_parameter("latent", None)
        self.register_parameter("down", None)
        self.register_parameter("up", None)
        if weight.up is not None:
            self.down, self.up = nn.Parameter(weight.down.float()), nn.Parameter(weight.up.float())

    def train_codes(self, dense: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """Replace the frozen codes by latents that start as the dense weight [N, K], moved where its codes differ."""
        codes = self.codes().float()
        scale = _spread(self.scales().detach(), self.in_features)
        if self.log_column is not None:
            scale = scale * self.column().detach()
        latent = torch.where(scale != 0, dense.to(scale) / scale, 0.0)
        low = torch.where(codes < 0, -_REACH, (codes - 1 + THRESHOLD) + _MARGIN)
        high = torch.where(codes > 0, _REACH, (codes + 1 - THRESHOLD) - _MARGIN)
        self.latent = nn.Parameter(latent.clamp_(low, high).to(dtype))
        self.frozen = None

    def codes(self) -> Tensor:
        """int8 [N, K] of -1, 0, +1."""
        if self.latent is not None:
            return ternary(self.latent.detach()).to(torch.int8)
        if self.frozen.dtype == torch.uint8:
            return unpack_planes32(self.frozen, self.in_features)
        return self.frozen

    def scales(self) -> Tensor:
        """fp32 [ceil(K/128), N]: row x integer-group values, with the gradient of the unrounded ones."""
        scales = self.start_scale * self.log_scale.exp()
        row, group = nearest_integer_groups(scales.detach())
        return scales + (row * group - scales).detach()

    def column(self) -> Tensor | None:
        """fp32 [K] with the values that are stored, and the gradient of the unrounded ones; None without them."""
        if self.log_column is None:
            return None
        column = self.start_column.float() * self.log_column.exp()
        return column + (column.detach().to(self.start_column.dtype).float() - column.detach())

    def weight(self) -> Tensor:
        """fp32 [N, K], low-rank part excluded; differentiable."""
        column, weight = self.column(), self._trits_times_scales()
        return weight if column is None else weight * column

    def _trits_times_scales(self) -> Tensor:
        if self.latent is not None:
            return _Latent.apply(self.latent, self.scales())
        return _Frozen.apply(self.codes(), self.scales())

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        tokens, dense_size = x.numel() // self.in_features, self.in_features * self.out_features
        if self.up is not None and tokens * (self.in_features + self.out_features) > dense_size:
            return F.linear(x, torch.addmm(self.weight(), self.up, self.down).to(x.dtype), bias)
        column = self.column()
        scaled = x if column is None else (x * column).to(x.dtype)
        y = F.linear(scaled, self._trits_times_scales().to(x.dtype), bias)
        if self.up is None:
            return y
        return y + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

    @torch.no_grad()
    def export(self) -> TernaryWeight:
        """The weight as it is stored."""
        row, group = fit_integer_groups(self.start_scale * self.log_scale.exp())
        down, up = (None if factor is None else factor.bfloat16() for factor in (self.down, self.up))
        column = None if self.log_column is None else self.column().to(self.start_column.dtype)
        weight = TernaryWeight.from_codes(self.codes(), row, group, down=down, up=up, column=column)
        return replace(weight, full_precision=self.full_precision)


def ternary(latent: Tensor) -> Tensor:
    """-1, 0 or +1 in the dtype of the latent: +-1 beyond THRESHOLD, which is where rounding to integers changes."""
    return latent.clamp(-1, 1).round_()


def _spread(scales: Tensor, inputs: int) -> Tensor:
    """Scales [ceil(K/128), N] to every weight: [N, K]."""
    return scales.t().repeat_interleave(GROUP_SIZE, dim=1)[:, :inputs]


def _times_scales(codes: Tensor, scales: Tensor) -> Tensor:
    """codes [N, K] times scales [ceil(K/128), N], in the dtype of the scales."""
    n, k = codes.shape
    codes = codes.to(scales.dtype)  # a product of int8 and fp32 is ten times slower on CPUs
    if k % GROUP_SIZE:
        return codes * _spread(scales, k)
    return (codes.view(n, -1, GROUP_SIZE) * scales.t().contiguous()[:, :, None]).view(n, k)


def _scale_gradient(gradient: Tensor, codes: Tensor) -> Tensor:
    """d loss / d scales [ceil(K/128), N] from d loss / d weight [N, K]."""
    product = gradient * codes.to(gradient.dtype)
    product = F.pad(product, (0, -product.shape[1] % GROUP_SIZE))
    return product.view(product.shape[0], -1, GROUP_SIZE).sum(-1).t()


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        return _times_scales(codes, scales)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, _scale_gradient(gradient, *ctx.saved_tensors)


class _Latent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latent: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(latent, scales)
        return _times_scales(ternary(latent), scales)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        latent, scales = ctx.saved_tensors
        of_latent = _times_scales(gradient, scales) if ctx.needs_input_grad[0] else None
        return of_latent, _scale_gradient(gradient, ternary(latent))


def svd_low_rank(residual: Tensor, rank: int, second_moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation up [N, r] @ down [r, K] of a residual [N, K], fp32, balanced between the factors.

    "Best" is in the output for inputs with these second moments [K] (per input) if they are given, else in the weights.
    """
    weights = torch.ones_like(residual[0]) if second_moments is None else second_moments.to(residual).sqrt()
    weights = weights.clamp_min(1e-3 * float(weights.mean()))
    scaled = residual * weights
    if min(scaled.shape) <= 1024:
        u, s, v = torch.linalg.svd(scaled, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], v[:rank].t()
    else:
        with torch.random.fork_rng([residual.device] if residual.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(scaled, q=rank + 16, niter=4)
        u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    up, down = u * s.sqrt(), (v * s.sqrt()).t() / weights
    balance = (down.norm() / up.norm().clamp_min(1e-30)).sqrt()
    return up * balance, down / balance
