"""The file of encoded prompts that every later stage reads, so that none of them needs a text encoder.

A safetensors file: `context` bf16 [P, T, C], `pooled` bf16 [P, V] (FLUX.1 only), and in the metadata `prompts`, a JSON
list of P strings.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..files.architecture import Architecture
from ..files.checkpoint import digest
from ..files.container import FormatError, TensorFile, TensorWriter, create
from ..files.sources.encodings import check_finite

FORMAT = "ternary_flux_conditioning_v1"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Encoded prompts, memory-mapped: only the rows of a batch are read from the disk."""

    context: Tensor  # [P, T, C]
    pooled: Tensor | None  # [P, V]
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(
        self, indices: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor | None]:
        """Context [B, T, C] and pooled [B, V] (or None) of these prompts."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        pooled = None if self.pooled is None else self.pooled[rows].to(device, dtype)
        return self.context[rows].to(device, dtype), pooled

    def fingerprint(self) -> str:
        """Changes with the prompts and with what encoded them: two tokens of every context, and the pooled vectors."""
        sample = self.context[:, [0, self.context.shape[1] // 2]]
        parts = [tensor.float().numpy().tobytes() for tensor in (sample, self.pooled) if tensor is not None]
        return digest("\n".join(self.prompts).encode(), *parts)


def read(path: str | os.PathLike, arch: Architecture | None = None) -> Conditioning:
    """Open a conditioning file and, with `arch`, check that its sizes are the ones this model takes.

    Raises FormatError (a ValueError) that names the file, the key and the remedy; OSError where there is no such file.
    """
    file = TensorFile(path)
    found = file.header.metadata.get("format")
    if found != FORMAT:
        raise FormatError(path, f"the format is {found!r}, not {FORMAT!r}; give the output of `quantizer embed`")
    prompts = _prompts(path, file.header.metadata)
    context = _matrix(file, "context", (len(prompts), None, None))
    pooled = _matrix(file, "pooled", (len(prompts), None)) if "pooled" in file.entries else None
    if arch is not None:
        _check(path, context, pooled, arch)
    return Conditioning(context, pooled, prompts)


def _prompts(path, metadata: Mapping[str, str]) -> tuple[str, ...]:
    try:
        prompts = json.loads(metadata["prompts"])
    except (KeyError, ValueError, RecursionError):
        prompts = None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise FormatError(path, "the metadata holds no list of prompts; write the file again", "prompts")
    return tuple(prompts)


def _matrix(file: TensorFile, key: str, shape: tuple[int | None, ...]) -> Tensor:
    if key not in file.entries:
        raise FormatError(file.path, "the tensor is missing; write the file with `python -m quantizer embed`", key)
    tensor = file.tensor(key)
    fits = len(tensor.shape) == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    if not fits or 0 in tensor.shape or tensor.dtype not in _FLOATS:
        expected = [size or "any" for size in shape]
        raise FormatError(file.path, f"{tensor.dtype} {list(tensor.shape)} where floats {expected} are needed", key)
    check_finite(tensor, file.path, key)
    return tensor


def _check(path, context: Tensor, pooled: Tensor | None, arch: Architecture) -> None:
    remedy = f"encode the prompts with {arch.name}'s own text encoders"
    if context.shape[2] != arch.context_dim:
        problem = f"{context.shape[2]} channels, and the model takes {arch.context_dim}; {remedy}"
        raise FormatError(path, problem, "context")
    if arch.vec_dim is not None and (pooled is None or pooled.shape[1] != arch.vec_dim):
        found = "the tensor is missing" if pooled is None else f"{pooled.shape[1]} channels"
        raise FormatError(path, f"{found}, and the model takes {arch.vec_dim} channels; {remedy}", "pooled")


@dataclass
class ConditioningWriter:
    """Appends one encoded prompt after the other; made by `create_conditioning`."""

    file: TensorWriter
    added: dict[str, int] = field(default_factory=dict)

    def add(self, context: Tensor, pooled: Tensor | None = None) -> None:
        """The next prompt's context [T, C] and pooled vector [V]. Raises ValueError for other shapes and NaN."""
        values = {"context": context, "pooled": pooled}
        for key, entry in self.file.entries.items():
            value = values[key]
            row = self.added.get(key, 0)
            if value is None or tuple(value.shape) != entry.shape[1:]:
                shape = None if value is None else list(value.shape)
                raise ValueError(f"{self.file.path}: {key} of prompt {row + 1} is {shape}, not {list(entry.shape[1:])}")
            if not torch.isfinite(value).all():
                raise ValueError(f"{self.file.path}: {key} of prompt {row + 1} has values that are not finite")
            data = value.detach().to("cpu", torch.bfloat16).contiguous().flatten().view(torch.uint8).numpy()
            self.file.write_bytes(key, data, row * data.nbytes)
            self.added[key] = row + 1


@contextlib.contextmanager
def create_conditioning(
    path: str | os.PathLike,
    prompts: Sequence[str],
    *,
    context_shape: tuple[int, int],
    pooled_size: int | None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Iterator[ConditioningWriter]:
    """Write a conditioning file atomically: `add` every prompt, in order, within the block.

    `context_shape` is (T, C), `pooled_size` is V or None. The file appears when all prompts were added.
    """
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    plan["context"] = torch.bfloat16, (len(prompts), *context_shape)
    if pooled_size is not None:
        plan["pooled"] = (torch.bfloat16, (len(prompts), pooled_size))
    header = {"format": FORMAT, "prompts": json.dumps(list(prompts), ensure_ascii=False), **(metadata or {})}
    with create(path, plan, header, overwrite=overwrite) as file:
        yield ConditioningWriter(file)


def write(
    path: str | os.PathLike,
    prompts: Sequence[str],
    context: Tensor,
    pooled: Tensor | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write prompts encoded as `context` [P, T, C] and `pooled` [P, V]."""
    _, tokens, channels = context.shape
    size = None if pooled is None else pooled.shape[1]
    with create_conditioning(
        path, prompts, context_shape=(tokens, channels), pooled_size=size, metadata=metadata, overwrite=overwrite
    ) as file:
        for i in range(len(prompts)):
            file.add(context[i], None if pooled is None else pooled[i])
