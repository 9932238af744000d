"""FLUX.1 and FLUX.2 forwards that can be differentiated: out of place, plain torch, Black Forest Labs' parameter names.

The mathematics is that of https://github.com/black-forest-labs/flux and flux2, with ComfyUI's conventions for latents,
position ids, the order of text and image tokens, and norm epsilons, so that outputs equal ComfyUI's. A forward is
`prepare`, then every block on `Tokens`, then `finish`.

ComfyUI's own forward works in place, so no gradient goes through it, and the quantizer runs where ComfyUI is not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files.architecture import TIME_CHANNELS, Architecture

LinearFactory = Callable[[int, int, bool], nn.Module]

EPSILON = 1e-6  # of the layer norms


class Inputs(NamedTuple):
    """The arguments of a FLUX forward: `model(*inputs)`."""

    latent: Tensor  # [B, in_channels, H, W]
    t: Tensor  # [B], 0 (picture) .. 1 (noise)
    context: Tensor  # [B, T, context_dim]
    pooled: Tensor | None = None  # [B, vec_dim]; None: zeros, as in ComfyUI
    guidance: Tensor | None = None  # [B]; None: no guidance embedding

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Inputs":
        """On a device; with a dtype, latent, context and pooled vector in it, times and guidance in fp32."""
        dtypes = (None,) * 5 if dtype is None else (dtype, torch.float32, dtype, dtype, torch.float32)
        return Inputs(*(x if x is None else x.to(device, kind) for x, kind in zip(self, dtypes, strict=True)))

    def rows(self, rows: slice | Tensor) -> "Inputs":
        """Some of the batch."""
        return Inputs(*(x if x is None else x[rows] for x in self))

    def swapped(self) -> "Inputs":
        """The same states with the prompt of their neighbour in the batch."""
        pooled = None if self.pooled is None else self.pooled.roll(1, 0)
        return self._replace(context=self.context.roll(1, 0), pooled=pooled)


class Conditions(NamedTuple):
    """What a batch of pictures is to show: the last three of `Inputs`."""

    context: Tensor
    pooled: Tensor | None
    guidance: Tensor | None


@dataclass(frozen=True)
class Tokens:
    """What flows from block to block."""

    img: Tensor  # [B, I, hidden] image tokens
    txt: Tensor  # [B, T, hidden] text tokens
    vec: Tensor  # [B, hidden] time, guidance and pooled text
    pe: Tensor  # complex64 [T + I, head_dim / 2]: unit numbers of the rope angles, text first
    modulation: tuple[tuple[Tensor, ...], ...] | None  # FLUX.2: 6 for image, 6 for text, 3 single: [B, 1, hidden]
    grid: tuple[int, int]  # token rows and columns of the image

    @property
    def count(self) -> int:
        """Image and text tokens of all states."""
        return len(self.img) * (self.img.shape[1] + self.txt.shape[1])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Tokens":
        """Elsewhere and in another dtype; positions stay as they are."""
        modulation = self.modulation
        if modulation is not None:
            modulation = tuple(tuple(x.to(device, dtype) for x in stream) for stream in modulation)
        moved = {name: getattr(self, name).to(device, dtype) for name in ("img", "txt", "vec")}
        return replace(self, **moved, pe=self.pe.to(device), modulation=modulation)


class Flux(nn.Module):
    """A FLUX transformer with BFL's parameter names; `linear(inputs, outputs, bias)` makes the blocks' Linears."""

    def __init__(self, arch: Architecture, linear: LinearFactory = nn.Linear):
        super().__init__()
        self.arch = arch
        hidden, patch = arch.hidden, arch.patch_size**2
        self.img_in = nn.Linear(arch.in_channels * patch, hidden, arch.bias)
        self.txt_in = nn.Linear(arch.context_dim, hidden, arch.bias)
        self.time_in = Embedder(TIME_CHANNELS, hidden, arch.bias)
        self.guidance_in = Embedder(TIME_CHANNELS, hidden, arch.bias) if arch.guidance else None
        self.vector_in = Embedder(arch.vec_dim, hidden, True) if arch.vec_dim is not None else None
        if arch.version == 2:
            self.double_stream_modulation_img = Modulation(hidden, 6, nn.Linear, bias=False)
            self.double_stream_modulation_txt = Modulation(hidden, 6, nn.Linear, bias=False)
            self.single_stream_modulation = Modulation(hidden, 3, nn.Linear, bias=False)
        self.double_blocks = nn.ModuleList(DoubleBlock(arch, linear) for _ in range(arch.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(arch, linear) for _ in range(arch.depth_single))
        self.final_layer = FinalLayer(hidden, arch.out_channels * patch, arch.bias)

    def forward(
        self, latent: Tensor, t: Tensor, context: Tensor, pooled: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """Velocity [B, out_channels, H, W]; see `Inputs`. H and W must be multiples of the patch size."""
        tokens = self.prepare(latent, t, context, pooled, guidance)
        for block in self.blocks:
            tokens = block(tokens)
        return self.finish(tokens)

    @property
    def blocks(self) -> list[nn.Module]:
        """Double then single blocks: each maps Tokens to Tokens."""
        return [*self.double_blocks, *self.single_blocks]

    def prepare(
        self, latent: Tensor, t: Tensor, context: Tensor, pooled: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tokens:
        """Everything before the first block; arguments as in `forward`."""
        arch, patch = self.arch, self.arch.patch_size
        b, c, h, w = latent.shape
        if c != arch.in_channels or h % patch or w % patch:
            raise ValueError(
                f"latent has shape {[b, c, h, w]}; "
                f"{arch.name} takes {arch.in_channels} channels and sides in multiples of {patch}"
            )
        patches = latent.reshape(b, c, h // patch, patch, w // patch, patch)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)
        img, txt = self.img_in(patches), self.txt_in(context)

        vec = self.vector(t, pooled, guidance, img.dtype)
        return self.tokens(img, txt, vec, (h // patch, w // patch))

    def vector(
        self, t: Tensor, pooled: Tensor | None, guidance: Tensor | None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """What modulates every block, [B, hidden]: the embeddings of time, guidance and pooled text."""
        vec = self.time_in(timestep_embedding(t, dtype))
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance, dtype))
        if self.vector_in is not None:
            pooled = vec.new_zeros(len(t), self.arch.vec_dim) if pooled is None else pooled.to(dtype)
            vec = vec + self.vector_in(pooled)
        return vec

    def tokens(self, img: Tensor, txt: Tensor, vec: Tensor, grid: tuple[int, int]) -> Tokens:
        """The tokens with what goes with them: positions, and FLUX.2's modulation."""
        arch, modulation = self.arch, None
        if arch.version == 2:
            streams = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
            modulation = tuple(getattr(self, stream)(vec) for stream in streams)
        pe = rope(arch.version, arch.axes_dim, arch.theta, txt.shape[1], grid, img.device)
        return Tokens(img, txt, vec, pe, modulation, grid)

    def finish(self, tokens: Tokens) -> Tensor:
        """Velocity from the tokens after the last block."""
        arch, patch = self.arch, self.arch.patch_size
        rows, columns = tokens.grid
        out = self.final_layer(tokens.img, tokens.vec).reshape(-1, rows, columns, arch.out_channels, patch, patch)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(-1, arch.out_channels, rows * patch, columns * patch)


class Embedder(nn.Module):
    def __init__(self, inputs: int, hidden: int, bias: bool):
        super().__init__()
        self.in_layer = nn.Linear(inputs, hidden, bias)
        self.out_layer = nn.Linear(hidden, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """[B, hidden] -> `chunks` tensors [B, 1, hidden]: shift, scale and gate, once or twice."""

    def __init__(self, hidden: int, chunks: int, linear: LinearFactory, bias: bool = True):
        super().__init__()
        self.chunks = chunks
        self.lin = linear(hidden, chunks * hidden, bias)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec)[:, None]).chunk(self.chunks, dim=-1)


class HeadNorm(nn.Module):
    """RMS norm of each head. The epsilon is the dtype's own, as ComfyUI's."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.register_load_state_dict_pre_hook(_accept_weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale.to(x.dtype))  # of one dtype: the fused kernel


def _accept_weight(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    if prefix + "weight" in state_dict:
        state_dict[prefix + "scale"] = state_dict.pop(prefix + "weight")


class QKNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.query_norm = HeadNorm(dim)
        self.key_norm = HeadNorm(dim)

    def heads(self, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normed query and key, and value, each [B, heads, L, head_dim], of a fused [B, L, 3 * hidden]."""
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return self.query_norm(q), self.key_norm(k), v


class StreamAttention(nn.Module):
    """One stream's part of the joint attention of a double block."""

    def __init__(self, arch: Architecture, linear: LinearFactory):
        super().__init__()
        self.qkv = linear(arch.hidden, 3 * arch.hidden, arch.bias)
        self.norm = QKNorm(arch.head_dim)
        self.proj = linear(arch.hidden, arch.hidden, arch.bias)


class SiluGate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def activation(version: int) -> nn.Module:
    return nn.GELU(approximate="tanh") if version == 1 else SiluGate()


@dataclass(frozen=True)
class Tier:
    """Linears of a block that do not depend on each other.

    role  "modulate": their input is SiLU of the modulation vector; "inner": within a branch; "add": their outputs are
          multiplied by a gate and added to the tokens
    """

    linears: tuple[str, ...]
    role: str


@dataclass(frozen=True)
class Part:
    """What takes a block's tokens from one addition to the next: the name of the method, and the Linears in order."""

    method: str
    tiers: tuple[Tier, ...]

    def of(self, block: nn.Module) -> Callable[[Tokens], Tokens]:
        """This part of a block."""
        return getattr(block, self.method)


class DoubleBlock(nn.Module):
    """Text and image tokens with weights of their own, and attention over both."""

    def __init__(self, arch: Architecture, linear: LinearFactory = nn.Linear):
        super().__init__()
        self.heads = arch.heads
        for stream in ("img", "txt"):
            if arch.version == 1:
                setattr(self, f"{stream}_mod", Modulation(arch.hidden, 6, linear))
            setattr(self, f"{stream}_attn", StreamAttention(arch, linear))
            first = linear(arch.hidden, arch.mlp_in, arch.bias)
            second = linear(arch.mlp_hidden, arch.hidden, arch.bias)
            setattr(self, f"{stream}_mlp", nn.Sequential(first, activation(arch.version), second))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The block's Linears in the order in which a forward meets them."""

        def both(part: str) -> tuple[str, str]:
            return f"img_{part}", f"txt_{part}"

        modulate = (Tier(both("mod.lin"), "modulate"),) if hasattr(self, "img_mod") else ()
        return (
            Part("attend", (*modulate, Tier(both("attn.qkv"), "inner"), Tier(both("attn.proj"), "add"))),
            Part("feed", (Tier(both("mlp.0"), "inner"), Tier(both("mlp.2"), "add"))),
        )

    def forward(self, tokens: Tokens) -> Tokens:
        return self.feed(self.attend(tokens))

    def stream(self, linear: str, tokens: Tokens) -> Tensor:
        """The tokens that a Linear's branch is added to."""
        return tokens.img if linear.startswith("img_") else tokens.txt

    def modulations(self, tokens: Tokens) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Of image and text: shift, scale, gate of the attention, and of the MLP."""
        if tokens.modulation is None:
            return self.img_mod(tokens.vec), self.txt_mod(tokens.vec)
        img, txt, *_ = tokens.modulation
        return img, txt

    def gates(self, tokens: Tokens) -> dict[str, Tensor]:
        """Of each Linear in a branch, the gate [B, 1, hidden] through which the branch is added to the tokens."""
        gates = {}
        for stream, (_, _, attention_gate, _, _, mlp_gate) in zip(
            ("img", "txt"), self.modulations(tokens), strict=True
        ):
            gates |= {f"{stream}_attn.qkv": attention_gate, f"{stream}_attn.proj": attention_gate}
            gates |= {f"{stream}_mlp.0": mlp_gate, f"{stream}_mlp.2": mlp_gate}
        return gates

    def attend(self, tokens: Tokens) -> Tokens:
        """The first half: attention over both streams."""
        img_mod, txt_mod = self.modulations(tokens)
        img_qkv = self.img_attn.qkv(modulate(tokens.img, *img_mod[:2]))
        txt_qkv = self.txt_attn.qkv(modulate(tokens.txt, *txt_mod[:2]))
        txt_heads = self.txt_attn.norm.heads(txt_qkv, self.heads)
        img_heads = self.img_attn.norm.heads(img_qkv, self.heads)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_heads, img_heads, strict=True))
        attended = attention(q, k, v, tokens.pe)
        txt_attended, img_attended = attended.split((tokens.txt.shape[1], tokens.img.shape[1]), dim=1)
        img = tokens.img + img_mod[2] * self.img_attn.proj(img_attended)
        txt = tokens.txt + txt_mod[2] * self.txt_attn.proj(txt_attended)
        return replace(tokens, img=img, txt=txt)

    def feed(self, tokens: Tokens) -> Tokens:
        """The second half: each stream's MLP."""
        img_mod, txt_mod = self.modulations(tokens)
        img = tokens.img + img_mod[5] * self.img_mlp(modulate(tokens.img, *img_mod[3:5]))
        txt = tokens.txt + txt_mod[5] * self.txt_mlp(modulate(tokens.txt, *txt_mod[3:5]))
        return replace(tokens, img=img, txt=txt)


class SingleBlock(nn.Module):
    """All tokens in one stream, attention and MLP in parallel."""

    def __init__(self, arch: Architecture, linear: LinearFactory = nn.Linear):
        super().__init__()
        self.heads, self.split = arch.heads, (3 * arch.hidden, arch.mlp_in)
        if arch.version == 1:
            self.modulation = Modulation(arch.hidden, 3, linear)
        self.linear1 = linear(arch.hidden, 3 * arch.hidden + arch.mlp_in, arch.bias)
        self.linear2 = linear(arch.hidden + arch.mlp_hidden, arch.hidden, arch.bias)
        self.norm = QKNorm(arch.head_dim)
        self.mlp_act = activation(arch.version)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The block's Linears in the order in which a forward meets them."""
        modulate = (Tier(("modulation.lin",), "modulate"),) if hasattr(self, "modulation") else ()
        return (Part("forward", (*modulate, Tier(("linear1",), "inner"), Tier(("linear2",), "add"))),)

    def modulations(self, tokens: Tokens) -> tuple[Tensor, ...]:
        """Shift, scale and gate."""
        return self.modulation(tokens.vec) if tokens.modulation is None else tokens.modulation[2]

    def gates(self, tokens: Tokens) -> dict[str, Tensor]:
        """Of each Linear in a branch, the gate [B, 1, hidden] through which the branch is added to the tokens."""
        return dict.fromkeys(("linear1", "linear2"), self.modulations(tokens)[2])

    def stream(self, linear: str, tokens: Tokens) -> Tensor:
        """The tokens that a Linear's branch is added to."""
        return torch.cat((tokens.txt, tokens.img), dim=1)

    def forward(self, tokens: Tokens) -> Tokens:
        shift, scale, gate = self.modulations(tokens)
        x = torch.cat((tokens.txt, tokens.img), dim=1)
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split(self.split, dim=-1)
        attended = attention(*self.norm.heads(qkv, self.heads), tokens.pe)
        x = x + gate * self.linear2(torch.cat((attended, self.mlp_act(mlp)), dim=-1))
        txt, img = x.split((tokens.txt.shape[1], tokens.img.shape[1]), dim=1)
        return replace(tokens, img=img, txt=txt)


def make_block(arch: Architecture, name: str, linear: LinearFactory = nn.Linear) -> DoubleBlock | SingleBlock:
    """The block of this name (`double_blocks.0` ...)."""
    return (DoubleBlock if name.startswith("double_blocks.") else SingleBlock)(arch, linear)


class FinalLayer(nn.Module):
    def __init__(self, hidden: int, outputs: int, bias: bool):
        super().__init__()
        self.linear = nn.Linear(hidden, outputs, bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden, bias))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        return self.linear(self.inputs(x, vec))

    def inputs(self, x: Tensor, vec: Tensor) -> Tensor:
        """What the Linear gets, [B, I, hidden]."""
        return modulate(x, *self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1))

    def reach(self, x: Tensor, vec: Tensor) -> Tensor:
        """By what a small change of each channel is multiplied on its way to the Linear, [B, I, hidden], fp32."""
        _, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return (1 + scale.float()) * (x.float().var(-1, keepdim=True, unbiased=False) + EPSILON).rsqrt()


def parts_of(block: nn.Module) -> tuple[Part, ...]:
    """The parts of a block, in order."""
    return cast(DoubleBlock | SingleBlock, block).parts


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """The Linear of this name in a dense block."""
    return cast(nn.Linear, block.get_submodule(name))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, then shift + (1 + scale) x."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPSILON), 1 + scale)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """Attention with rotary positions: [B, heads, L, D] each -> [B, L, heads * D]."""
    out = F.scaled_dot_product_attention(rotate(q, pe), rotate(k, pe), v)
    return out.transpose(1, 2).flatten(2)


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate each channel pair (2i, 2i+1) of x [..., L, D] by its position's angle, in fp32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * pe).flatten(-2).to(x.dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def rope(
    version: int, axes_dim: tuple[int, ...], theta: int, text: int, grid: tuple[int, int], device: torch.device
) -> Tensor:
    """complex64 [L, D / 2]: cos + i sin of the angle, per token and channel pair; text tokens first.

    Positions are (0, row, column) for FLUX.1 image tokens and (0, row, column, 0) for FLUX.2's; text is all zeros, and
    numbered on FLUX.2's last axis.
    """
    rows, columns = grid
    ids = torch.zeros(text + rows * columns, len(axes_dim), dtype=torch.float64)
    if version == 2:
        ids[:text, 3] = torch.arange(text)
    ids[text:, 1] = torch.arange(rows).repeat_interleave(columns)
    ids[text:, 2] = torch.arange(columns).repeat(rows)
    periods = [theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim) for dim in axes_dim]
    angles = torch.cat([ids[:, i : i + 1] / period for i, period in enumerate(periods)], dim=1)
    return torch.polar(torch.ones_like(angles), angles).to(device, torch.complex64)


def timestep_embedding(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Sinusoids [B, 256] of 1000 t: cosines, then sines, periods 2 pi .. 20,000 pi. Also used for guidance."""
    half = TIME_CHANNELS // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = (1000 * t.float())[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
