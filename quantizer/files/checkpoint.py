"""Dense FLUX checkpoints: recognised from their keys, read tensor by tensor or streamed once from start to end."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .architecture import Architecture, canonical, detect
from .container import DTYPES, Entry, FormatError, TensorFile

DENSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LORA_MARKS = (".lora_A", ".lora_B", ".lora_up", ".lora_down", "lora_unet_", ".hada_w", ".lokr_w", ".dora_scale")
_QUANTIZED_MARKS = (".comfy_quant", "scaled_fp8", ".scale_weight", ".weight_scale", ".input_scale", ".qweight")


def find_prefix(keys: Iterable[str]) -> str:
    """What precedes the FLUX names in a file: "", "model.diffusion_model." or another; "" where there is no FLUX."""
    keys = set(keys)
    prefixes = [key.removesuffix("img_in.weight") for key in keys if key.endswith("img_in.weight")]
    prefixes = [prefix for prefix in prefixes if any(key.startswith(prefix + "double_blocks.0.") for key in keys)]
    return min(prefixes, key=len, default="")


def file_kind(file: TensorFile) -> str:
    """What a file is, by its keys: "ternary", "quantized" (in another format), "flux" (dense), "lora", "vae",
    "text encoder" or "other".
    """
    keys = file.entries
    prefix = find_prefix(keys)
    if any(mark in key for key in keys for mark in _LORA_MARKS):
        return "lora"
    model = [key for key in keys if key.startswith(prefix)]
    if f"{prefix}img_in.weight" not in keys:
        if any(key.startswith(("decoder.", "first_stage_model.", "vae.", "taesd_")) for key in keys):
            return "vae"
        text = any(".self_attn." in key or ".SelfAttention." in key or "text_model." in key for key in keys)
        return "text encoder" if text else "other"
    if any(key.endswith(".comfy_quant") and b'"ternary_v' in file.bytes(key)[:4096].tobytes() for key in model):
        return "ternary"
    if any(mark in key for key in model for mark in _QUANTIZED_MARKS):
        return "quantized"
    return "flux"


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a tensor's bytes, or (`name` None) bytes that belong to no tensor of the model."""

    name: str | None
    start: int  # the first row
    rows: int
    data: bytearray


@dataclass(frozen=True)
class Checkpoint:
    """A dense FLUX checkpoint. Names are BFL's, without the file's prefix; other parts of the file are left out."""

    file: TensorFile
    architecture: Architecture
    names: dict[str, str]  # BFL name -> key in the file, in file order

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def metadata(self) -> dict[str, str]:
        return self.file.header.metadata

    def entry(self, name: str) -> Entry:
        return self.file.entries[self.names[name]]

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.entry(name).dtype]

    def tensor(self, name: str) -> Tensor:
        """A tensor in the file's dtype, memory-mapped and read-only."""
        return self.file.tensor(self.names[name])

    def check_unchanged(self) -> None:
        """Raises FormatError where the file was written to, or replaced, since it was opened."""
        self.file.check_unchanged()

    def sha256(self) -> str:
        """Of the whole file, in one pass over it."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while data := file.read(1 << 22):
                digest.update(data)
        return digest.hexdigest()

    def pieces(self, size: int = 1 << 22) -> Iterator[Piece]:
        """Every byte of the file once and in order, in pieces of whole rows and about `size` bytes."""
        position = 0
        with open(self.path, "rb") as file:
            for name, key in self.names.items():
                entry = self.file.entries[key]
                yield from _read(file, None, entry.start - position, 1, size)
                rows = entry.shape[0] if entry.shape else 1
                yield from _read(file, name, rows, entry.nbytes // max(rows, 1), size)
                position = entry.stop
            yield from _read(file, None, self.file.header.size - position, 1, size)


def _read(file, name: str | None, rows: int, row_bytes: int, size: int) -> Iterator[Piece]:
    step = max(1, size // max(row_bytes, 1))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        data = bytearray(count * row_bytes)
        if file.readinto(data) != len(data):
            raise FormatError(file.name, "the file became shorter while it was read")
        yield Piece(name, start, count, data)


def open_checkpoint(source: str | os.PathLike | TensorFile) -> Checkpoint:
    """Open a dense FLUX.1 or FLUX.2 checkpoint (safetensors; BFL names with or without a prefix; bf16, fp16 or fp32).

    `source`: its path, or the file where it is open already. Raises FormatError, naming what the file is instead where
    that can be told.
    """
    file = source if isinstance(source, TensorFile) else TensorFile(source)
    path, entries = file.path, file.entries
    refusals = {
        "ternary": "this file is ternary already; give the dense checkpoint that it was made from "
        "(`export` writes a dense copy of this one)",
        "quantized": "this checkpoint is quantized already (fp8, int8 or similar); give the original, 16 or 32 bit",
        "lora": "this is a LoRA, not a checkpoint; convert the base model and load the LoRA with ComfyUI's LoRA nodes",
    }
    if refusal := refusals.get(file_kind(file)):
        raise FormatError(path, refusal)
    prefix = find_prefix(entries)
    names = {canonical(key.removeprefix(prefix)): key for key in entries if key.startswith(prefix)}
    try:
        architecture = detect({name: entries[key].shape for name, key in names.items()})
    except ValueError as error:
        raise FormatError(path, str(error)) from None
    for key in names.values():
        dtype = entries[key].dtype
        if DTYPES.get(dtype) not in DENSE_DTYPES:
            raise FormatError(path, f"the tensor is {dtype}; a checkpoint in bf16, fp16 or fp32 is needed", key)
    return Checkpoint(file, architecture, names)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells checkpoints apart without reading all of them: the header and the dense tensors at both ends."""
    entries = sorted((name, list(checkpoint.entry(name).shape)) for name in checkpoint.names)
    ends = (checkpoint.tensor(name).float() for name in ("img_in.weight", "final_layer.linear.weight"))
    return digest(json.dumps(entries).encode(), *(end.numpy().tobytes() for end in ends))


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
