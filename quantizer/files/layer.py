"""One ternary Linear in a file: which tensors it has, and the JSON that says how to decode them."""

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import GROUP_SIZE, TernaryWeight
from ...ops.packing import groups_of, pack_planes32, packed_shape, unpack_base3

FORMAT = "ternary_v1"
INT8 = "int8_tensorwise"  # ComfyUI's name of its 8-bit format
TERMS = (1, 2)
SCALES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PARTS = ("weight", "weight_scale", "weight_group", "weight_down", "weight_up", "comfy_quant")
ROWS = 1024  # rows converted at a time between the packings


@dataclass(frozen=True)
class LayerPlan:
    """Which tensors a ternary Linear has in the file.

    scales: "integer" (row x integer group), "row" (row scales alone), or "bf16" / "fp16" / "fp32" (float group scales).
    rank: of the low-rank part, 0 for none. terms: ternary matrices that are added, 1 or 2.
    """

    shape: tuple[int, int]
    packing: str = "planes32"
    scales: str = "integer"
    rank: int = 0
    terms: int = 1

    @classmethod
    def of(cls, weight: TernaryWeight, packing: str = "planes32") -> "LayerPlan":
        names = {dtype: name for name, dtype in SCALES.items()}
        per_row = "row" if weight.group is None else "integer"
        scales = per_row if weight.scale.ndim == 1 else names[weight.scale.dtype]
        return cls(weight.shape, packing, scales, 0 if weight.up is None else weight.up.shape[1], weight.terms)

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Suffix -> dtype and shape, without comfy_quant."""
        n, k = self.shape
        groups = (self.terms * groups_of(k), n)
        parts = {"weight": (torch.uint8, packed_shape(self.shape, self.packing, self.terms))}
        parts["weight_scale"] = (SCALES[self.scales], groups) if self.scales in SCALES else (torch.float32, (n,))
        if self.scales == "integer":
            parts["weight_group"] = (torch.uint8, groups)
        if self.rank:
            parts |= {"weight_down": (torch.bfloat16, (self.rank, k)), "weight_up": (torch.bfloat16, (n, self.rank))}
        return parts

    @property
    def comfy_quant(self) -> Tensor:
        """The JSON that says how to decode, uint8, padded with blanks to a multiple of 8 bytes."""
        fields = {"format": FORMAT, "packing": self.packing, "group_size": GROUP_SIZE, "shape": self.shape}
        text = json.dumps(fields if self.terms == 1 else fields | {"terms": self.terms})
        return torch.frombuffer(bytearray(text.ljust(-(-len(text) // 8) * 8).encode()), dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        parts = self.tensors.values()
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in parts) + self.comfy_quant.numel()


def planes32(packed: Tensor, layer: LayerPlan) -> Tensor:
    """A layer's packed trits as planes32, uint8 [terms * ceil(K/128), N, 32]."""
    if layer.packing == "planes32":
        return packed
    n, k = layer.shape
    trits = torch.empty(packed_shape(layer.shape, "planes32", layer.terms), dtype=torch.uint8)
    for start in range(0, n, ROWS):
        rows = slice(start, start + ROWS)
        trits[:, rows] = pack_planes32(unpack_base3(packed[rows], k), layer.terms)
    return trits
