import json
import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from ternary_flux.quantizer.cli import run
from ternary_flux.quantizer.files.container import FormatError, TensorFile, create, read_header
from ternary_flux.quantizer.files.export import export_checkpoint
from ternary_flux.quantizer.files.verify import HEADER, verify
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests.quantizer import synthetic


@pytest.fixture(scope="module")
def ternary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    round_checkpoint(synthetic.write(folder / "dense.safetensors"), folder / "t.safetensors", packing="base3")
    return folder / "t.safetensors"


def flipped(path, target, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    target.write_bytes(content)
    return target


def test_every_writer_leaves_checksums(ternary, tmp_path):
    export_checkpoint(ternary, tmp_path / "dense.safetensors")
    done = []
    for path in (ternary, tmp_path / "dense.safetensors"):
        assert verify(path, done.append) == []
    assert sum(done) == sum(e.nbytes for p in (ternary, path) for e in read_header(p).entries.values())


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_flipped_bit_names_its_tensor(ternary, tmp_path, place):
    for key, entry in read_header(ternary).entries.items():
        position = entry.start if place == "first" else entry.stop - 1
        assert verify(flipped(ternary, tmp_path / "bad.safetensors", position)) == [key]


def test_a_changed_header_is_named(ternary, tmp_path):
    content = ternary.read_bytes()
    assert content.count(b'"modelspec.license":"none"') == 1
    changed = tmp_path / "bad.safetensors"
    changed.write_bytes(content.replace(b'"modelspec.license":"none"', b'"modelspec.license":"free"'))
    assert verify(changed) == [HEADER]


def test_tensors_that_change_names_are_named(ternary, tmp_path):
    content, names = ternary.read_bytes(), [f"double_blocks.0.{stream}_attn.qkv.bias" for stream in ("img", "txt")]
    first, second = (f'"{name}":{{'.encode() for name in names)
    swapped = content.replace(first, b"(first)").replace(second, first).replace(b"(first)", second)
    (tmp_path / "bad.safetensors").write_bytes(swapped)
    assert sorted(verify(tmp_path / "bad.safetensors")) == names


def test_any_damaged_byte_is_found(ternary, tmp_path):
    size = ternary.stat().st_size
    for position in torch.randint(0, size, (40,)).tolist() + [0, 9, size - 1]:
        path = flipped(ternary, tmp_path / "bad.safetensors", position)
        try:
            found = verify(path)
        except FormatError:
            continue
        # blanks behind the JSON may become other white space
        assert found or load_file(path).keys() == load_file(ternary).keys() and b"\t" not in path.read_bytes()


def test_files_without_checksums_say_so(ternary, tmp_path):
    save_file(load_file(ternary), tmp_path / "old.safetensors", read_header(ternary).metadata)
    with pytest.raises(FormatError, match="old.safetensors: the file has no checksums.*older version.*`pack`"):
        verify(tmp_path / "old.safetensors")
    synthetic.write(tmp_path / "dense.safetensors")
    with pytest.raises(FormatError, match="no checksums.*`inspect` checks that it can be read$"):  # `pack` cannot
        verify(tmp_path / "dense.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", '{"header":1,"tensors":{}}', '{"header":"xy","tensors":{}}', "null"])
def test_checksums_that_are_none(tmp_path, text):
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors", {"ternary.crc32": text})
    with pytest.raises(FormatError, match="checksums cannot be read"):
        verify(tmp_path / "x.safetensors")


def test_checksums_are_of_the_bytes_and_not_handed_on(tmp_path):
    with create(tmp_path / "x", {"a": (torch.uint8, (9,)), "none": (torch.float32, (0,))}, {"note": "n"}) as writer:
        writer.write("a", torch.tensor(list(b"123456789"), dtype=torch.uint8))
    (length,) = struct.unpack("<Q", (tmp_path / "x").read_bytes()[:8])
    metadata = json.loads((tmp_path / "x").read_bytes()[8 : 8 + length])["__metadata__"]
    assert json.loads(metadata["ternary.crc32"])["tensors"] == {"a": "cbf43926", "none": "00000000"}
    assert TensorFile(tmp_path / "x").header.metadata == {"note": "n"}


def test_the_command(ternary, tmp_path, capsys):
    assert run(["verify", str(ternary)]) == 0
    assert f"{ternary}: OK (" in capsys.readouterr().out
    bad = flipped(ternary, tmp_path / "bad.safetensors", ternary.stat().st_size - 1)
    assert run(["verify", str(bad)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert "bad.safetensors: damaged" in said[0] and said[1:] == [f"  {list(read_header(bad).entries)[-1]}"]
    save_file(load_file(ternary), tmp_path / "old.safetensors")
    assert run(["verify", str(tmp_path / "old.safetensors")]) == 2
    assert "no checksums" in capsys.readouterr().err
    for path, said in ((ternary, "of every tensor"), (tmp_path / "old.safetensors", "none")):
        assert run(["inspect", str(path)]) == 0
        assert re.search(rf"checksums +{said}", capsys.readouterr().out)
