"""Which FLUX a checkpoint is, from its key -> shape map alone.

Names are Black Forest Labs' (`double_blocks.0.img_attn.qkv.weight`), without any prefix. A family's fixed numbers
(rope axes, theta, MLP ratio) are the ones ComfyUI assumes for it, so what is accepted here is what ComfyUI will build.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

TIME_CHANNELS = 256
_SIZES = ("txt_in.weight", "vector_in.in_layer.weight")  # whose inputs are a model's own


@dataclass(frozen=True)
class Architecture:
    """A FLUX transformer's configuration; `in_channels` and `out_channels` count latent channels before patchify."""

    version: int
    hidden: int
    depth: int
    depth_single: int
    in_channels: int
    out_channels: int
    context_dim: int
    vec_dim: int | None
    guidance: bool

    @property
    def name(self) -> str:
        """The published model with this shape, as far as shapes tell (dev, Krea and Kontext share theirs)."""
        if self.version == 2:
            known = {(6144, 8, 48): "FLUX.2-dev", (3072, 5, 20): "FLUX.2-klein-4B", (4096, 8, 24): "FLUX.2-klein-9B"}
            return known.get((self.hidden, self.depth, self.depth_single), "FLUX.2")
        if (self.hidden, self.depth, self.depth_single) != (3072, 19, 38):
            return "FLUX.1"
        if not self.guidance:
            return "FLUX.1 without guidance (schnell or de-distilled)"
        known = {96: "FLUX.1-Fill", 32: "FLUX.1-Canny/Depth", 16: "FLUX.1-dev"}
        return known.get(self.in_channels, "FLUX.1")

    @property
    def family(self) -> str:
        """The name as far as it is a name: "FLUX.1" where the shape leaves it open which one it is."""
        return self.name.partition(" ")[0]

    @property
    def axes_dim(self) -> tuple[int, ...]:
        return (16, 56, 56) if self.version == 1 else (32, 32, 32, 32)

    @property
    def theta(self) -> int:
        return 10_000 if self.version == 1 else 2_000

    @property
    def head_dim(self) -> int:
        return sum(self.axes_dim)

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim

    @property
    def patch_size(self) -> int:
        return 2 if self.version == 1 else 1

    @property
    def pixels_per_latent(self) -> int:
        """Picture pixels along one side of one latent pixel."""
        return 8 if self.version == 1 else 16

    @property
    def mlp_hidden(self) -> int:
        return self.hidden * (4 if self.version == 1 else 3)

    @property
    def mlp_in(self) -> int:
        """Outputs of the first MLP Linear: FLUX.2 gates with a second half of the same size."""
        return self.mlp_hidden * self.version

    @property
    def bias(self) -> bool:
        return self.version == 1

    @property
    def block_names(self) -> tuple[str, ...]:
        """`double_blocks.0` ... `single_blocks.N`, in forward order."""
        doubles = (f"double_blocks.{i}" for i in range(self.depth))
        singles = (f"single_blocks.{i}" for i in range(self.depth_single))
        return (*doubles, *singles)

    def block_linears(self, block: str) -> dict[str, tuple[int, int]]:
        """Name within the block -> (outputs, inputs) of its Linears, in forward order."""
        h, mlp_in, mlp = self.hidden, self.mlp_in, self.mlp_hidden
        if block.startswith("single_blocks."):
            modulation = {"modulation.lin": (3 * h, h)} if self.version == 1 else {}
            return modulation | {"linear1": (3 * h + mlp_in, h), "linear2": (h, h + mlp)}
        modulation = {"img_mod.lin": (6 * h, h), "txt_mod.lin": (6 * h, h)} if self.version == 1 else {}
        return modulation | {
            "img_attn.qkv": (3 * h, h),
            "txt_attn.qkv": (3 * h, h),
            "img_attn.proj": (h, h),
            "img_mlp.0": (mlp_in, h),
            "img_mlp.2": (h, mlp),
            "txt_attn.proj": (h, h),
            "txt_mlp.0": (mlp_in, h),
            "txt_mlp.2": (h, mlp),
        }

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Full name -> (outputs, inputs) of every Linear that becomes ternary, in forward order."""
        return {f"{b}.{n}": shape for b in self.block_names for n, shape in self.block_linears(b).items()}

    @property
    def linears(self) -> tuple[str, ...]:
        """The Linears that become ternary, in forward order: all in blocks, not FLUX.2's three global modulations."""
        return tuple(self.linear_shapes)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter of the model and its shape."""
        return dict(self.parameters())

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        def linear(name: str, outputs: int, inputs: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
            yield f"{name}.weight", (outputs, inputs)
            if bias:
                yield f"{name}.bias", (outputs,)

        h, patch = self.hidden, self.patch_size**2
        yield from linear("img_in", h, self.in_channels * patch, self.bias)
        yield from linear("txt_in", h, self.context_dim, self.bias)
        embedders = {"time_in": TIME_CHANNELS}
        if self.guidance:
            embedders["guidance_in"] = TIME_CHANNELS
        if self.vec_dim is not None:
            embedders["vector_in"] = self.vec_dim
        for name, inputs in embedders.items():
            bias = self.bias or name == "vector_in"
            yield from linear(f"{name}.in_layer", h, inputs, bias)
            yield from linear(f"{name}.out_layer", h, h, bias)
        if self.version == 2:
            for name, chunks in (
                ("double_stream_modulation_img", 6),
                ("double_stream_modulation_txt", 6),
                ("single_stream_modulation", 3),
            ):
                yield from linear(f"{name}.lin", chunks * h, h, False)
        for block in self.block_names:
            for name, (outputs, inputs) in self.block_linears(block).items():
                yield from linear(f"{block}.{name}", outputs, inputs, self.bias)
        for block in self.block_names:
            for norm in ("img_attn.norm.", "txt_attn.norm.") if block.startswith("double") else ("norm.",):
                yield f"{block}.{norm}query_norm.scale", (self.head_dim,)
                yield f"{block}.{norm}key_norm.scale", (self.head_dim,)
        yield from linear("final_layer.linear", self.out_channels * patch, h, self.bias)
        yield from linear("final_layer.adaLN_modulation.1", 2 * h, h, self.bias)


_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of torch


def canonical(name: str) -> str:
    """BFL's name of a parameter: ComfyUI holds and saves the `scale` of query and key norms as `weight`, and training
    tools leave names of their wrappers within.
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return f"{name.removesuffix('weight')}scale" if name.endswith(("query_norm.weight", "key_norm.weight")) else name


def detect(shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """The architecture whose parameters have these shapes; unknown extra keys are ignored.

    `shapes` has BFL or ComfyUI names without prefix, and logical (unpacked) shapes. Raises ValueError naming the first
    key that is missing or has another shape than this family's. Takes time by the number of keys, whatever they say.
    """
    shapes = {canonical(name): tuple(shape) for name, shape in shapes.items()}
    version = 2 if "double_stream_modulation_img.lin.weight" in shapes else 1
    for name in ("img_in.weight", "txt_in.weight", *(["vector_in.in_layer.weight"] if version == 1 else [])):
        if len(shapes.get(name, ())) != 2:
            raise ValueError(
                f"This is not a FLUX transformer: {name} is missing or not a matrix. "
                "Give the diffusion model's own file in BFL or ComfyUI naming, not a text encoder or a VAE."
            )
    patch = 4 if version == 1 else 1
    hidden, inputs = shapes["img_in.weight"]
    if not hidden or hidden % 128 or not inputs or inputs % patch:
        raise ValueError(
            f"img_in.weight has shape {[hidden, inputs]}: FLUX.{version} has outputs in multiples of 128 "
            f"and inputs in multiples of {patch}"
        )
    channels = 16 if version == 1 else 128
    if inputs // patch < channels:
        raise ValueError(
            f"img_in.weight has shape {[hidden, inputs]}: FLUX.{version} has {channels} latent channels and more, "
            f"not {inputs // patch}"
        )
    if empty := next((name for name, shape in shapes.items() if name in _SIZES and 0 in shape), None):
        raise ValueError(f"{empty} has shape {list(shapes[empty])} and holds nothing")
    arch = Architecture(
        version=version,
        hidden=hidden,
        depth=_count(shapes, "double_blocks."),
        depth_single=_count(shapes, "single_blocks."),
        in_channels=inputs // patch,
        out_channels=channels,
        context_dim=shapes["txt_in.weight"][1],
        vec_dim=shapes["vector_in.in_layer.weight"][1] if version == 1 else None,
        guidance="guidance_in.in_layer.weight" in shapes,
    )
    if not arch.depth:
        raise ValueError("This is not a FLUX transformer: it has no double_blocks.0")
    for name, shape in arch.parameters():  # ends at the first that is missing, however many there are said to be
        if name not in shapes:
            raise ValueError(f"{name} is missing from this FLUX.{version} checkpoint (expected shape {list(shape)})")
        if shapes[name] != shape:
            raise ValueError(f"{name} has shape {list(shapes[name])}; FLUX.{version} of this size has {list(shape)}")
    return arch


def _count(shapes: Mapping[str, tuple[int, ...]], kind: str) -> int:
    """The number of blocks, 0 to N - 1. Raises ValueError where one is missing."""
    indices = {name[len(kind) :].split(".", 1)[0] for name in shapes if name.startswith(kind)}
    numbers = {int(index) for index in indices if index.isdecimal() and len(index) < 10}
    missing = next((number for number in range(len(numbers)) if number not in numbers), None)
    if missing is not None:
        raise ValueError(f"{kind}{missing} is missing, and {kind}{max(numbers)} is there")
    return len(numbers)
