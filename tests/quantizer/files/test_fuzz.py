"""Damaged and hostile files: whatever is in them, readers give one clear error or a model, soon and in little memory.

Each case is made from its number alone, so that one that fails can be made again.
"""

import json
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ternary_flux.ops.scales import MAX_MULTIPLIER
from ternary_flux.quantizer.console import message
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.identity import identify
from ternary_flux.quantizer.files.pack import pack
from ternary_flux.quantizer.files.sources.source import open_source
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.files.verify import verify
from ternary_flux.quantizer.pictures import conditioning
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests.quantizer import synthetic
from ternary_flux.tests.quantizer.files.sources import foreign

CASES = 40  # of each kind of damage to each kind of file
GROWTH = 300 << 20  # bytes that reading a file of a few MB may take beyond what was there
NUMBERS = (0, -1, 1, 2, 127, 128, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 64, 0.5, 1e300, True, None, "7", [], {}, [[]])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("fuzz")
    dense = synthetic.write(folder / "dense.safetensors")
    round_checkpoint(dense, folder / "planes32.safetensors")
    pack(folder / "planes32.safetensors", folder / "base3.safetensors", "base3")
    foreign.write_gguf(synthetic.tensors(), folder / "dense.gguf", "Q8_0")
    context, pooled = torch.randn(2, 5, synthetic.FLUX1.context_dim), torch.randn(2, synthetic.FLUX1.vec_dim)
    conditioning.write(folder / "cond.safetensors", ["one", "two"], context, pooled)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flipped(data: bytearray, rng: random.Random) -> bytes:
    """Some bits, most of them in the header."""
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        end = len(data) if rng.random() < 0.3 else min(len(data), rng.choice((16, 200, 20_000)))
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(data)


def shortened(data: bytearray, rng: random.Random) -> bytes:
    """Cut off, or with a hole."""
    at = rng.randrange(len(data) if rng.random() < 0.5 else 4000)
    return bytes(data[:at] + (b"" if rng.random() < 0.6 else data[at + rng.randrange(1, 5000) :]))


def stuffed(data: bytearray, rng: random.Random) -> bytes:
    """With bytes that are not its own in some place."""
    at = rng.randrange(len(data) if rng.random() < 0.3 else 4000)
    return bytes(data[:at]) + rng.choice((b"\0" * 300, rng.randbytes(200), b"[" * 5000, b"\xff" * 8)) + bytes(data[at:])


def restated(data: bytearray, rng: random.Random) -> bytes:
    """A safetensors header that is valid JSON and says something else."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    for _ in range(rng.choice((1, 1, 3))):
        key = rng.choice(sorted(header))
        value = header[key]
        match rng.randrange(5):
            case 0:
                header[key] = rng.choice((*NUMBERS, "x" * 100_000))
            case 1 if isinstance(value, dict) and value:
                value[rng.choice(sorted(value))] = rng.choice((*NUMBERS, "F4", "U8", "I8", [1, 2], {"a": {}}))
            case 2 if isinstance(value, dict) and isinstance(value.get("shape"), list) and value["shape"]:
                value["shape"][rng.randrange(len(value["shape"]))] = rng.choice(NUMBERS)
            case 3 if isinstance(value, dict) and isinstance(value.get("data_offsets"), list) and value["data_offsets"]:
                value["data_offsets"][rng.randrange(len(value["data_offsets"]))] = rng.choice(NUMBERS)
            case _:
                other = rng.choice((key + "x", "model.diffusion_model." + key, key.replace("0", "250000"), "", "\0"))
                header[other] = header.pop(key)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data[8 + size :])


def read(path: Path) -> None:
    """Everything that reads such a file."""
    attempts: list[Callable] = [identify_file, read_dense, read_ternary, verify, conditioning.read]
    for attempt in attempts:
        try:
            attempt(path)
        except (ValueError, OSError) as error:
            said = message(error)
            assert path.name in said and len(said) < 2100 and said.isprintable(), said


def identify_file(path: Path) -> None:
    assert len(identify(open_source(path)).sentence) < 2000


def read_dense(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names:
        assert tuple(checkpoint.tensor(name).shape) == checkpoint.shape(name)


def read_ternary(path: Path) -> None:
    file = open_ternary(path)
    for name, layer in file.layers.items():
        weight = file.weight(name)
        assert weight.shape == layer.shape and weight.dequantize().isfinite().all()
        assert weight.group is None or int(weight.group.max()) <= MAX_MULTIPLIER


NAMES = ("dense.safetensors", "planes32.safetensors", "base3.safetensors", "dense.gguf", "cond.safetensors")
DAMAGES = {damage.__name__: damage for damage in (flipped, shortened, stuffed, restated)}
# A GGUF has no JSON to restate.
KINDS = [(name, damage) for name in NAMES for damage in DAMAGES if (name, damage) != ("dense.gguf", "restated")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "damage"), KINDS)
def test_damaged_files(files, tmp_path, name, damage):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    for case in range(CASES):
        path = tmp_path / f"{case}-{name}"
        path.write_bytes(DAMAGES[damage](bytearray(files[name]), random.Random(f"{name} {case}")))
        read(path)
        path.unlink()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < GROWTH
