"""`TernaryWeight`: the trits and scales of one Linear, as they lie in the file and in the kernels' memory."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import packing
from .packing import GROUP_SIZE
from .scales import fit_integer_groups

TENSORS = ("trits", "scale", "group", "down", "up", "column")  # of a TernaryWeight; the first two are always there


@dataclass(frozen=True, eq=False)
class TernaryWeight:
    """Weight [N, K] of a Linear: W[n, k] = trit[n, k] * scale(n, k // 128) * column[k] + (up @ down)[n, k].

    The scale of row n and group j is `scale[n] * group[j, n]`, or `scale[n]` without `group`, or `scale[j, n]` where
    `scale` has two dimensions (scales imported bit-exactly; see `with_integer_groups`).

    With two ternary terms W is the sum of two such products: a ternary weight for the inputs repeated twice, with the
    groups of the first term before those of the second. G below is terms * ceil(K/128).

    `column` multiplies the inputs before they meet the trits; the low-rank part sees the inputs as they come.
    """

    trits: Tensor  # uint8 [G, N, 32], planes32
    scale: Tensor  # fp32 [N], or bf16 / fp16 / fp32 [G, N]
    shape: tuple[int, int]  # (N, K)
    group: Tensor | None = None  # uint8 [G, N], 1..127
    down: Tensor | None = None  # bf16 [r, K]
    up: Tensor | None = None  # bf16 [N, r]
    column: Tensor | None = None  # bf16 or fp32 [K]
    full_precision: bool = False  # 8-bit activations were found to lose too much here; "auto" takes full ones

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, group: Tensor | None = None, *, down=None, up=None, terms=1, column=None
    ) -> "TernaryWeight":
        """Pack int8 codes [N, terms * K] of -1, 0, +1."""
        shape = codes.shape[0], codes.shape[1] // terms
        return cls(packing.pack_planes32(codes, terms), scale, shape, group, down, up, column)

    @property
    def terms(self) -> int:
        """Ternary matrices whose sum W is: 1 or 2."""
        return self.trits.shape[0] // packing.groups_of(self.shape[1])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        return {name: value for name in TENSORS if (value := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def device(self) -> torch.device:
        return self.trits.device

    def to(self, device) -> "TernaryWeight":
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, **moved)

    def rows(self, start: int, stop: int) -> "TernaryWeight":
        """The rows start..stop, as views."""
        stop = min(stop, self.shape[0])
        return replace(
            self,
            trits=self.trits[:, start:stop],
            scale=self.scale[..., start:stop],
            shape=(stop - start, self.shape[1]),
            group=None if self.group is None else self.group[:, start:stop],
            up=None if self.up is None else self.up[start:stop],
        )

    def codes(self) -> Tensor:
        """int8 [N, terms * K] of -1, 0, +1, the terms side by side."""
        return packing.unpack_planes32(self.trits, self.shape[1])

    def group_scales(self) -> Tensor:
        """fp32 [terms * ceil(K/128), N]."""
        if self.scale.ndim == 2:
            return self.scale.float()
        if self.group is None:
            return self.scale.expand(self.trits.shape[0], -1)
        return self.scale * self.group

    def dequantize_ternary(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Trits times scales, [N, K] in `dtype`, without the low-rank part. Scales are rounded to `dtype` first."""
        n, k = self.shape
        codes = packing.unpack_planes32(self.trits, self.trits.shape[0] * GROUP_SIZE).view(n, -1, GROUP_SIZE)
        dense = codes.to(dtype).mul_(self.group_scales().to(dtype).t()[:, :, None]).view(n, self.terms, -1)
        dense = (dense[:, 0] if self.terms == 1 else dense.sum(1))[:, :k]
        return dense if self.column is None else dense * self.column.to(dtype)

    def scale_inputs(self, x: Tensor) -> Tensor:
        """x [..., K] times the column scales, rounded once to the dtype of x."""
        return x if self.column is None else (x * self.column).to(x.dtype)

    def repeat_inputs(self, x: Tensor) -> Tensor:
        """x [M, K] as the packed trits meet it: padded with zeros, once for every term, [M, 128 * G]."""
        return pad(x, (0, -x.shape[1] % GROUP_SIZE)).repeat(1, self.terms)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K] in `dtype`; with column scales or a low-rank part it is computed in fp32."""
        if self.up is None:
            return self.dequantize_ternary(dtype if self.column is None else torch.float32).to(dtype)
        return (self.dequantize_ternary() + self.up.float() @ self.down.float()).to(dtype)

    def with_integer_groups(self) -> tuple["TernaryWeight", float]:
        """Float group scales as row x integer, which int8 activations need, and the relative RMS change of the scales.

        A weight whose scales have that form already is returned as it is, with 0.
        """
        if self.scale.ndim == 1:
            return self, 0.0
        scales = self.scale.float()
        row, group = fit_integer_groups(scales)
        change = (row * group - scales) * (scales > 0)  # the trits of a group of scale 0 are zeros
        error = change.norm() / scales.norm().clamp_min(torch.finfo(torch.float32).tiny)
        return replace(self, scale=row, group=group), float(error)
