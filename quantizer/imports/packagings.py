"""The forms in which ternary models are published, each as rows of codes with group scales.

unpacked  floats of which every group of 128 inputs is exactly {-s, 0, s}
mlx       X.weight uint32 [N, K/16], X.scales and X.biases [N, K/128] with biases = -scales
gemlite   X.W_q uint8 [K/4, N], X.scales and X.zeros [K/128, N] with zeros = -scales, X.metadata, X.orig_shape

In the last two a code 0, 1, 2 means -s, 0, s; four lie in a byte, the first in the lowest bits.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ops import GROUP_SIZE
from ...ops.packing import groups_of
from ..files.container import DTYPES, FormatError
from ..files.sources.encodings import FLOATS
from .tensors import Tensors

_BINARY = "this is a binary (1-bit) model, such as Bonsai Image's binary variant"
_ONLY = "ternary models are imported; download the ternary variant"
_AGAIN = "the file is damaged, or packed in a way that is not known; download it again"


class Packaging(Protocol):
    """Linears by their own names, `X` for the weight `X.weight`."""

    name: str
    tensors: Tensors
    linears: dict[str, tuple[int, int]]  # X -> [N, K] of those that are known to be ternary
    keys: set[str]  # that belong to these Linears

    def scale_dtype(self, linear: str) -> torch.dtype:
        """In which the group scales are kept."""

    def rows(self, linear: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Codes int8 [rows, K] of -1, 0, +1 and group scales [rows, ceil(K/128)]. Raises FormatError."""


def packaging_of(tensors: Tensors, configuration: dict) -> Packaging:
    """Which of the forms these tensors have. Raises FormatError for a binary model, other bits or other groups."""
    bits, group = configuration.get("bits"), configuration.get("group_size")
    if bits == 1 or "binary" in str(configuration.get("format", "")):
        raise FormatError(tensors.path, f"{_BINARY}; {_ONLY}")
    form = next((form for form in (Gemlite, Mlx) if any(key.endswith(form.MARK) for key in tensors.shapes)), None)
    if form is None:
        return Unpacked(tensors)
    if bits not in (None, 2) or group not in (None, GROUP_SIZE):
        problem = f"{bits} bits in groups of {group}; 2 bits in groups of {GROUP_SIZE} are imported"
        raise FormatError(tensors.path, problem)
    return form(tensors)


class Unpacked:
    name = "unpacked"

    def __init__(self, tensors: Tensors):
        self.tensors = tensors
        self.linears: dict[str, tuple[int, int]] = {}  # any matrix may be; `rows` tells
        self.keys: set[str] = set()

    def scale_dtype(self, linear: str) -> torch.dtype:
        return DTYPES[self.tensors.dtypes[f"{linear}.weight"]]

    def rows(self, linear: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        key = f"{linear}.weight"
        if self.tensors.dtypes[key] not in FLOATS:
            problem = f"the tensor is {self.tensors.dtypes[key]}; a ternary model in bf16, fp16 or fp32 is needed"
            raise FormatError(self.tensors.path_of(key), problem, key)
        weight = self.tensors.rows(key, start, stop).contiguous()
        try:
            return exact(weight)
        except ValueError as error:
            raise FormatError(self.tensors.path_of(key), str(error), key) from None


def exact(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Floats [rows, K] as codes int8 [rows, K] and scales [rows, ceil(K/128)]; minus zero counts as zero.

    Raises ValueError where a group of 128 has another value than -s, 0 and s, or one is not finite.
    """
    n, k = weight.shape
    integer = torch.int32 if weight.dtype == torch.float32 else torch.int16
    bits = pad(weight, (0, groups_of(k) * GROUP_SIZE - k)).view(integer).view(n, -1, GROUP_SIZE)
    magnitude = bits & torch.iinfo(integer).max  # floats without their sign are ordered as integers are
    scale = magnitude.amax(2)
    scales = scale.view(weight.dtype)
    if not scales.isfinite().all():
        raise ValueError("the weight has values that are not finite; the file is damaged")
    nonzero = magnitude != 0
    if not ((magnitude == scale[:, :, None]) | ~nonzero).all():
        raise ValueError(
            "the weight is not ternary: a group of 128 inputs has other values than -s, 0 and s; "
            "make a ternary model of it with `convert` or `round`"
        )
    codes = nonzero.to(torch.int8).mul_((bits < 0).to(torch.int8).mul_(-2).add_(1))
    return codes.view(n, -1)[:, :k], scales


@dataclass
class _Packed:
    """What mlx and gemlite share: 2-bit codes, scales and their negatives."""

    MARK: ClassVar[str]
    PARTS: ClassVar[tuple[str, ...]]
    tensors: Tensors

    def __post_init__(self):
        ends = [key.removesuffix(self.MARK) for key in self.tensors.shapes if key.endswith(self.MARK)]
        self.linears = {linear: self._shape(linear) for linear in ends}
        self.keys = {f"{linear}.{part}" for linear in ends for part in self.PARTS}

    def _shape(self, linear: str) -> tuple[int, int]:
        raise NotImplementedError

    def _have(self, linear: str, *parts: str) -> None:
        for part in parts:
            if f"{linear}.{part}" not in self.tensors.shapes:
                raise FormatError(self.tensors.path, f"the tensor is missing; {_AGAIN}", f"{linear}.{part}")

    def _refuse(self, linear: str, part: str, problem: str):
        key = f"{linear}.{part}"
        raise FormatError(self.tensors.path_of(key), problem, key)

    def _check_scales(self, linear: str, offsets: str, scales: Tensor, found: Tensor) -> None:
        if not (scales.isfinite().all() and (scales >= 0).all()):
            self._refuse(linear, "scales", f"a scale is not finite or is negative; {_AGAIN}")
        if not torch.equal(found, -scales):
            if torch.equal(found, -scales / 2):
                self._refuse(linear, offsets, f"{_BINARY}; {_ONLY}")
            self._refuse(linear, offsets, f"the codes do not mean -s, 0 and s: {offsets} are not -scales; {_AGAIN}")

    def _codes(self, linear: str, part: str, packed: Tensor, scales: Tensor) -> Tensor:
        """uint8 [rows, K/4] -> int8 [rows, K]; a group of scale 0 has zeros, whatever its codes are."""
        if (packed & (packed >> 1) & 0x55).any():
            self._refuse(linear, part, f"a code 3, and ternary codes are 0, 1 and 2; {_AGAIN}")
        codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).view(torch.int8).sub_(1)
        codes = codes.view(len(packed), -1, GROUP_SIZE)
        if (empty := scales == 0).any():
            codes.mul_(~empty[:, :, None])
        return codes.view(len(packed), -1)


class Mlx(_Packed):
    name = "mlx-2bit"
    MARK = ".biases"
    PARTS = ("weight", "scales", "biases")

    def scale_dtype(self, linear: str) -> torch.dtype:
        return DTYPES[self.tensors.dtypes[f"{linear}.scales"]]

    def _shape(self, linear: str) -> tuple[int, int]:
        self._have(linear, "weight", "scales")
        weight, scales, biases = (self.tensors.shapes[f"{linear}.{part}"] for part in self.PARTS)
        dtypes = [self.tensors.dtypes[f"{linear}.{part}"] for part in self.PARTS]
        if dtypes[0] != "U32" or len(weight) != 2 or len(scales) != 2 or weight[0] != scales[0] or biases != scales:
            found = f"{dtypes[0]} {list(weight)} with scales {list(scales)} and biases {list(biases)}"
            self._refuse(linear, "weight", f"{found} is no layout of MLX that is known; {_AGAIN}")
        if dtypes[1] != dtypes[2] or dtypes[1] not in FLOATS:
            self._refuse(linear, "scales", f"scales {dtypes[1]} and biases {dtypes[2]}; fp16, bf16 or fp32 is expected")
        inputs = scales[1] * GROUP_SIZE
        if weight[1] * 32 == inputs:
            self._refuse(linear, "weight", f"{_BINARY}; {_ONLY}")
        if weight[1] * 16 != inputs:
            problem = f"{weight[1]} words of 32 bits do not hold {inputs} codes of 2 bits in groups of {GROUP_SIZE}"
            self._refuse(linear, "weight", f"{problem}; {_ONLY}")
        return weight[0], inputs

    def rows(self, linear: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        packed, scales, biases = (self.tensors.rows(f"{linear}.{part}", start, stop) for part in self.PARTS)
        self._check_scales(linear, "biases", scales, biases)
        return self._codes(linear, "weight", packed, scales), scales


class Gemlite(_Packed):
    name = "gemlite-2bit"
    MARK = ".W_q"
    PARTS = ("W_q", "scales", "zeros", "metadata", "orig_shape", "meta_scale")

    def scale_dtype(self, linear: str) -> torch.dtype:
        """fp32 scales that bf16 holds exactly become bf16, so that all forms of a model give one file."""
        scales = self.tensors.tensor(f"{linear}.scales")
        fits = scales.dtype == torch.float32 and torch.equal(scales, scales.bfloat16().float())
        return torch.bfloat16 if fits else scales.dtype

    def _shape(self, linear: str) -> tuple[int, int]:
        self._have(linear, "W_q", "scales", "zeros", "orig_shape", "metadata")
        shapes, dtypes = self.tensors.shapes, self.tensors.dtypes
        original = self.tensors.tensor(f"{linear}.orig_shape").tolist()
        bits, group = self._stated(linear)
        if bits == 1:
            self._refuse(linear, "W_q", f"{_BINARY}; {_ONLY}")
        if bits != 2 or group != GROUP_SIZE:
            problem = f"{bits} bits in groups of {group}; 2 bits in groups of {GROUP_SIZE} are imported"
            self._refuse(linear, "metadata", problem)
        match original:
            case [int(n), int(k)] if n > 0 and k > 0 and k % GROUP_SIZE == 0:
                pass
            case _:
                self._refuse(linear, "orig_shape", f"{original} is no [outputs, inputs] in groups of 128; {_AGAIN}")
        if dtypes[f"{linear}.W_q"] != "U8" or shapes[f"{linear}.W_q"] != (k // 4, n):
            found = f"{dtypes[f'{linear}.W_q']} {list(shapes[f'{linear}.W_q'])}"
            self._refuse(linear, "W_q", f"{found} where U8 {[k // 4, n]} is expected; {_AGAIN}")
        for part in ("scales", "zeros"):
            key = f"{linear}.{part}"
            if shapes[key] != (k // GROUP_SIZE, n) or dtypes[key] not in FLOATS:
                found = f"{dtypes[key]} {list(shapes[key])}"
                self._refuse(linear, part, f"{found} where floats {[k // GROUP_SIZE, n]} are expected; {_AGAIN}")
        return n, k

    def _stated(self, linear: str) -> tuple[int, int]:
        values = self.tensors.tensor(f"{linear}.metadata").flatten().tolist()
        if len(values) < 3:
            self._refuse(linear, "metadata", f"{len(values)} numbers where 12 are expected; {_AGAIN}")
        return values[1], values[2]

    def rows(self, linear: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        columns = (self.tensors.tensor(f"{linear}.{part}")[:, start:stop] for part in self.PARTS[:3])
        packed, scales, zeros = (part.t().contiguous() for part in columns)
        self._check_scales(linear, "zeros", scales, zeros)
        return self._codes(linear, "W_q", packed, scales), scales
