import json
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from ternary_flux.quantizer.files.atomic import atomic_file
from ternary_flux.quantizer.files.container import (
    DTYPES,
    FormatError,
    TensorFile,
    checksums_of,
    create,
    read_header,
)
from ternary_flux.quantizer.files.verify import verify


def plan(tensors):
    return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}


def raw(path, header: dict | bytes, data: bytes = b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), start=0, stop=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@settings(max_examples=25)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(sorted(DTYPES)), min_size=6, max_size=6),
    header_room=st.integers(0, 100),
)
def test_round_trip(tmp_path_factory, shapes, dtypes, header_room):
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": torch.randint(0, 2, shape, generator=generator).to(DTYPES[dtype])
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    with create(path, plan(tensors), {"a": "b"}, header_room=header_room) as writer:
        for key in reversed(tensors):
            writer.write(key, tensors[key])
        writer.metadata["a"] = "c" * (1 + header_room)
    file, theirs = TensorFile(path), load_file(path)
    assert file.header.metadata == {"a": "c" * (1 + header_room)}
    for key, tensor in tensors.items():
        for read in (file.tensor(key), theirs[key]):
            assert read.dtype == tensor.dtype and read.shape == tensor.shape
            assert torch.equal(read.contiguous().view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_reads_files_of_the_safetensors_library(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.tensor(3)}
    save_file(tensors, tmp_path / "x.safetensors", {"k": "v"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.header.metadata == {"k": "v"}
    assert all(torch.equal(file.tensor(key), tensor) for key, tensor in tensors.items())


def test_large_tensors_start_at_multiples_of_64(tmp_path):
    tensors = {"odd": torch.zeros(3, dtype=torch.uint8), "scale": torch.zeros(6), "trits": torch.zeros(2, 4, 32).byte()}
    with create(tmp_path / "x", plan(tensors), {}) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
    entries = read_header(tmp_path / "x").entries
    assert entries["trits"].start % 64 == 0 and entries["scale"].start % 8 == 0


def test_metadata_of_bytes_that_are_no_text(tmp_path):
    """Names of files may be such; other readers of the format must read what quotes them."""
    with create(tmp_path / "x", {"a": (torch.uint8, (1,))}, {"source": "flux\udcff\ud800"}) as writer:
        writer.write("a", torch.zeros(1, dtype=torch.uint8))
    with safe_open(tmp_path / "x", "pt") as theirs:
        assert theirs.metadata()["source"] == "flux\\udcff\\ud800" == TensorFile(tmp_path / "x").metadata["source"]
    assert verify(tmp_path / "x") == []


def test_headers_that_would_not_be_read_are_not_written(tmp_path):
    with (
        pytest.raises(ValueError, match="x: the header would have .*of which 'thumbnail' is the largest"),
        create(tmp_path / "x", {}, {"thumbnail": "a" * (1 << 24), "title": "b"}),
    ):
        pass
    assert not list(tmp_path.iterdir())
    prompts = "图" * 2_000_000  # three bytes each, as UTF-8 has it
    with create(tmp_path / "x", {}, {"prompts": prompts}):
        pass
    assert TensorFile(tmp_path / "x").metadata["prompts"] == prompts and verify(tmp_path / "x") == []


def test_a_tensor_in_pieces(tmp_path):
    with create(tmp_path / "x", {"a": (torch.uint8, (4,))}, {}) as writer:
        writer.write_bytes("a", b"cd", 2)  # waits for those before it, as the halves that diffusers swaps
        writer.write_bytes("a", b"ab")
        with pytest.raises(ValueError, match="a: byte 1 was written already"):
            writer.write_bytes("a", b"c", 1)
    file = TensorFile(tmp_path / "x")
    assert file.bytes("a").tobytes() == b"abcd"
    assert checksums_of(file.header).tensors["a"] == zlib.crc32(b"abcd")


def test_mistakes_of_the_writer_leave_nothing(tmp_path):
    def write(write_tensors, header_room=0):
        with create(
            tmp_path / "x", {"a": (torch.float32, (2,)), "b": (torch.uint8, (1,))}, {}, header_room=header_room
        ) as writer:
            write_tensors(writer)

    with pytest.raises(ValueError, match="a: 0 of 8 bytes"):
        write(lambda writer: writer.write("b", torch.zeros(1, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"a: .*planned"):
        write(lambda writer: writer.write("a", torch.zeros(3)))
    with pytest.raises(ValueError, match=r"a: .*planned"):
        write(lambda writer: writer.write("a", np.zeros(2)))

    def talk(writer):
        writer.write("a", torch.zeros(2))
        writer.write("b", torch.zeros(1, dtype=torch.uint8))
        writer.metadata["long"] = "x" * 200

    with pytest.raises(ValueError, match="metadata outgrew its room"):
        write(talk)
    assert not list(tmp_path.iterdir())
    write(talk, header_room=300)


BAD = {
    "hole": ({"a": entry(), "b": entry(start=12, stop=20)}, 20, "b: the tensor overlaps another or leaves a hole"),
    "overlap": ({"a": entry(), "b": entry(start=4, stop=12)}, 12, "b: the tensor overlaps another or leaves a hole"),
    "first byte": ({"a": entry(start=4, stop=12)}, 12, "a: the tensor overlaps another or leaves a hole"),
    "truncated": ({"a": entry(), "b": entry(start=8, stop=16)}, 15, "b: the file is truncated"),
    "too long": ({"a": entry()}, 9, "1 bytes follow the last tensor"),
    "wrong size": ({"a": entry(stop=12)}, 12, r"a: 12 bytes do not hold F32 \[2\]"),
    "dtype": ({"a": entry("F31")}, 8, "a: unknown dtype F31"),
    "shape": ({"a": entry(shape=(-2,))}, 8, r"a: invalid shape \[-2\]"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "a: the header's entry is not"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "__metadata__: .*not a map of strings"),
    "JSON": (b'{"a": ', 0, "the header is not valid JSON"),
    "UTF-8": (b'{"\xff"}', 0, "the header is not valid JSON"),
    "twice": (b'{"a": 1, "a": 2}', 0, "a key occurs twice"),
}


@pytest.mark.parametrize("header, size, message", BAD.values(), ids=BAD)
def test_bad_headers(tmp_path, header, size, message):
    path = raw(tmp_path / "bad.safetensors", header, bytes(size))
    with pytest.raises(FormatError, match=f"bad.safetensors: {message}.*; download or convert (the file|it) again"):
        TensorFile(path)


OTHER_FILES = {
    "empty": (b"", "truncated"),
    "GGUF": (b"GGUF" + bytes(60), "a GGUF file"),
    "zip": (b"PK\x03\x04" + bytes(60), "a PyTorch checkpoint"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "HTML": (b"<!DOCTYPE html><html></html>", "a web page"),
    "text": (b"[project]\nname = 'x'\n", "no safetensors file"),
    "short header": (struct.pack("<Q", 999) + b'{"a": ', "truncated within its header"),
}


@pytest.mark.parametrize("content, message", OTHER_FILES.values(), ids=OTHER_FILES)
def test_other_files(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_header(tmp_path / "x.safetensors")


def test_a_header_length_that_looks_like_a_pickle(tmp_path):
    header = json.dumps({"a": entry()}).encode().ljust(0x280)
    assert read_header(raw(tmp_path / "x", header, bytes(8))).entries.keys() == {"a"}


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(OSError, match="is a folder"):
        read_header(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none")


def test_atomic_file(tmp_path):
    path = tmp_path / "x"
    with atomic_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(FileExistsError, match="--force"), atomic_file(path) as file:
        pass
    with pytest.raises(KeyboardInterrupt), atomic_file(path, overwrite=True) as file:
        file.write(b"two")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"one"
    with atomic_file(path, overwrite=True) as file:
        file.write(b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_targets_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="does not exist"), atomic_file(tmp_path / "no" / "x"):
        pass
    with pytest.raises(OSError, match="is a folder"), atomic_file(tmp_path):
        pass
    with pytest.raises(OSError, match="GB free"), atomic_file(tmp_path / "x", size=1 << 60):
        pass
