import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from ternary_flux.ops.packing import pack_base3
from ternary_flux.quantizer.files.container import FormatError, read_header
from ternary_flux.quantizer.files.layer import LayerPlan
from ternary_flux.quantizer.files.ternary import create_ternary, open_ternary
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests.builders import ternary_weight
from ternary_flux.tests.quantizer import synthetic

COLUMNS = {"": None, "bf16": torch.bfloat16, "fp32": torch.float32}


def write(path, weight, packing="planes32", **options):
    plan = LayerPlan.of(weight, packing)
    dense = {"x.bias": (torch.bfloat16, (weight.shape[0],))}
    with create_ternary(path, {"x": plan}, dense, {"note": "n"}, **options) as writer:
        writer.layer("x", weight)
        writer.dense("x.bias", torch.ones(weight.shape[0]).bfloat16())
    return path


@settings(max_examples=40)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 300),
    packing=st.sampled_from(["planes32", "base3"]),
    scales=st.sampled_from(["integer", "row", "bf16", "fp16", "fp32"]),
    rank=st.sampled_from([0, 0, 3]),
    terms=st.sampled_from([1, 2]),
    columns=st.sampled_from(list(COLUMNS)),
)
def test_round_trip(tmp_path_factory, n, k, packing, scales, rank, terms, columns):
    weight = ternary_weight(n, k, scales, rank, terms=terms, column=COLUMNS[columns])
    path = write(tmp_path_factory.mktemp("files") / "x.safetensors", weight, packing)
    file = open_ternary(path)
    assert file.layers == {"x": LayerPlan((n, k), packing, scales, rank, terms, columns)}
    assert file.shapes == {"x.weight": (n, k), "x.bias": (n,)}
    assert file.metadata == {"note": "n"}
    read = file.weight("x")
    assert read.shape == weight.shape and read.tensors.keys() == weight.tensors.keys()
    for part, tensor in weight.tensors.items():
        assert read.tensors[part].dtype == tensor.dtype and torch.equal(read.tensors[part], tensor)
    assert json.loads(file.file.bytes("x.comfy_quant").tobytes()) == {
        "format": "ternary_v1", "packing": packing, "group_size": 128, "shape": [n, k],
        **({"terms": 2} if terms == 2 else {}),
    }  # fmt: skip


def test_keys_and_dtypes_are_those_of_the_specification(tmp_path):
    stored = load_file(write(tmp_path / "x.safetensors", ternary_weight(6, 200, rank=2, column=torch.bfloat16)))
    found = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in stored.items() if key != "x.comfy_quant"}
    assert found == {
        "x.weight": (torch.uint8, (2, 6, 32)),
        "x.weight_scale": (torch.float32, (6,)),
        "x.weight_group": (torch.uint8, (2, 6)),
        "x.weight_down": (torch.bfloat16, (2, 200)),
        "x.weight_up": (torch.bfloat16, (6, 2)),
        "x.weight_column": (torch.bfloat16, (200,)),
        "x.bias": (torch.bfloat16, (6,)),
    }
    weight = ternary_weight(6, 200)
    stored = load_file(write(tmp_path / "b.safetensors", weight, "base3"))
    assert torch.equal(stored["x.weight"], pack_base3(weight.codes())) and stored["x.weight"].shape == (6, 40)


@pytest.mark.parametrize("arch", [synthetic.FLUX1, synthetic.FLUX2], ids=["FLUX.1", "FLUX.2"])
def test_a_file_with_a_prefix_as_comfyui_saves_it(tmp_path, arch):
    round_checkpoint(synthetic.write(tmp_path / "dense.safetensors", arch), tmp_path / "ternary.safetensors")
    file = open_ternary(tmp_path / "ternary.safetensors")
    assert file.architecture == arch and list(file.layers) == list(arch.linears)
    saved = {f"model.diffusion_model.{key}": tensor.clone() for key, tensor in load_file(file.path).items()}
    save_file(saved | {"vae.decoder.weight": torch.zeros(3, dtype=torch.int32)}, tmp_path / "saved.safetensors")
    again = open_ternary(tmp_path / "saved.safetensors")
    assert again.architecture == arch and again.layers == file.layers
    assert all(torch.equal(again.parameter(name), file.parameter(name)) for name in file.shapes)


def test_a_file_that_is_no_whole_flux(tmp_path):
    with pytest.raises(FormatError, match="x.safetensors: .*not a FLUX transformer"):
        _ = open_ternary(write(tmp_path / "x.safetensors", ternary_weight(4, 128))).architecture


def test_the_writer_keeps_to_its_plan(tmp_path):
    with pytest.raises(ValueError, match="x: .* was planned"):
        with create_ternary(tmp_path / "x", {"x": LayerPlan((4, 128))}, {}, {}) as writer:
            writer.layer("x", ternary_weight(4, 128, "bf16"))
    assert not list(tmp_path.iterdir())


JSON = {"format": "ternary_v1", "packing": "planes32", "group_size": 128, "shape": [6, 200]}


def text(value) -> torch.Tensor:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def damage(key, value):
    return lambda state: state.__setitem__(key, value(state[key]) if callable(value) else value)


def poke(index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


Q, W = "x.comfy_quant", "x.weight"
S, G, D, U, C = (f"x.weight_{part}" for part in ("scale", "group", "down", "up", "column"))
DAMAGES = {
    "JSON": (damage(Q, text(b"{")), Q, "the JSON cannot be read"),
    "JSON bytes": (damage(Q, text(b"\xff\xfe")), Q, "the JSON cannot be read"),
    "JSON list": (damage(Q, text([1])), Q, "the JSON is no object"),
    "JSON dtype": (damage(Q, torch.zeros(4)), Q, "dtype F32 where uint8 JSON is expected"),
    "newer": (damage(Q, text(JSON | {"format": "ternary_v2"})), Q, "format 'ternary_v2'.*update this pack"),
    "other format": (damage(Q, text(JSON | {"format": "float8_e4m3fn"})), Q, "ComfyUI's own loader"),
    "no format": (damage(Q, text({})), Q, "format None"),
    "full precision": (damage(Q, text(JSON | {"full_precision_matrix_mult": 1})), Q, "is 1, not true or false"),
    "packing": (damage(Q, text(JSON | {"packing": "p"})), Q, "packing 'p'; known: planes32, base3"),
    "group size": (damage(Q, text(JSON | {"group_size": 64})), Q, "group size 64"),
    "shape": (damage(Q, text(JSON | {"shape": [6]})), Q, r"shape \[6\] is not"),
    "shape of 0": (damage(Q, text(JSON | {"shape": [6, 0]})), Q, r"shape \[6, 0\] is not"),
    "no terms": (damage(Q, text(JSON | {"terms": 0})), Q, "0 terms, and this version reads 1 and 2; update"),
    "three terms": (damage(Q, text(JSON | {"terms": 3})), Q, "3 terms"),
    "terms as float": (damage(Q, text(JSON | {"terms": 2.0})), Q, "2.0 terms"),
    "terms as truth": (damage(Q, text(JSON | {"terms": True})), Q, "True terms"),
    "unknown field": (damage(Q, text(JSON | {"basis": "hadamard"})), Q, "the field 'basis' is unknown.*update this"),
    "unknown part": (damage("x.weight_bias", torch.ones(6)), "x.weight_bias", "knows no such part.*update this pack"),
    "column dtype": (damage(C, lambda t: t.half()), C, r"F16 \[200\] where F32 \[200\]"),
    "column shape": (damage(C, lambda t: t[:199].clone()), C, r"BF16 \[199\] where BF16 \[200\]"),
    "column NaN": (damage(C, poke(7, float("nan"))), C, "a scale is not finite"),
    "terms that are not there": (damage(Q, text(JSON | {"terms": 2})), W, r"U8 \[2, 6, 32\] where U8 \[4, 6, 32\]"),
    "other shape": (damage(Q, text(JSON | {"shape": [6, 300]})), W, r"U8 \[2, 6, 32\] where U8 \[3, 6, 32\]"),
    "no JSON": (lambda state: state.pop(Q), "", "this is no FLUX transformer"),
    "no weight": (lambda state: state.pop(W), W, "the tensor is missing"),
    "no scale": (lambda state: state.pop(S), S, "the tensor is missing"),
    "no down": (lambda state: state.pop(D), U, "is expected|does not belong"),
    "no up": (lambda state: state.pop(U), U, "is missing beside"),
    "weight dtype": (damage(W, lambda t: t.view(torch.int8)), W, "I8 .* where U8"),
    "weight shape": (damage(W, lambda t: t[:, :5].clone()), W, r"U8 \[2, 5, 32\] where U8 \[2, 6, 32\]"),
    "scale dtype": (damage(S, lambda t: t.double()), S, "scales of dtype F64"),
    "scale half": (damage(S, lambda t: t.half()), S, r"F16 \[6\] where F32 \[6\]"),
    "scale shape": (damage(S, lambda t: t[:5].clone()), S, r"F32 \[5\] where F32 \[6\]"),
    "group beside group scales": (damage(S, torch.ones(2, 6)), G, "does not belong beside"),
    "group shape": (damage(G, lambda t: t.t().contiguous()), G, r"U8 \[6, 2\] where U8 \[2, 6\]"),
    "rank": (damage(U, lambda t: t[:, :1].clone()), U, r"BF16 \[6, 1\] where BF16 \[6, 2\]"),
    "low rank dtype": (damage(D, lambda t: t.float()), D, "F32 .* where BF16"),
    "dense dtype": (damage("x.bias", torch.ones(6, dtype=torch.int32)), "x.bias", "a dense tensor of dtype I32"),
    "packed without JSON": (damage("y.weight", torch.ones(2, 6, 32).byte()), "y.weight", "without y.comfy_quant"),
    "code 10": (damage(W, poke((1, 2, 3), 0b00100000)), W, "byte 259 holds no valid planes32 code"),
    "padding": (damage(W, poke((1, 2, 31), 0b00000001)), W, "the padding after the last input is not zero"),
    "multiplier 0": (damage(G, poke((0, 0), 0)), G, "multipliers 0.."),
    "multiplier 128": (damage(G, poke((1, 5), 128)), G, r"multipliers \d+..128"),
    "NaN": (damage(S, poke(2, float("nan"))), S, "a scale is not finite"),
    "infinity": (damage(S, poke(0, float("inf"))), S, "a scale is not finite"),
}


@pytest.mark.parametrize("change, key, message", DAMAGES.values(), ids=DAMAGES)
def test_damaged_files(tmp_path, change, key, message):
    state = load_file(write(tmp_path / "x.safetensors", ternary_weight(6, 200, rank=2, column=torch.bfloat16)))
    if key == "y.weight":
        state[key] = None
    change(state)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(FormatError, match=message) as error:
        open_ternary(tmp_path / "bad.safetensors")
    assert str(error.value).startswith(f"{tmp_path / 'bad.safetensors'}: {key}")


def test_damaged_base3(tmp_path):
    state = load_file(write(tmp_path / "x.safetensors", ternary_weight(6, 198), "base3"))
    for index, value, message in (((4, 7), 243, "byte 167 holds no valid base3"), ((0, 39), 0, "padding")):
        save_file(state | {W: poke(index, value)(state[W])}, tmp_path / "bad.safetensors")
        with pytest.raises(FormatError, match=f"x.weight: .*{message}"):
            open_ternary(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("packing, row", [("planes32", r"\[4, 6, 32\]"), ("base3", r"\[6, 80\]")])
def test_damaged_terms(tmp_path, packing, row):
    state = load_file(write(tmp_path / "x.safetensors", ternary_weight(6, 198, terms=2), packing))
    # the last byte of the first term, where only padding is damaged
    byte, value = ((1, 2, 31), 0b00000001) if packing == "planes32" else ((2, 39), 0)
    # a reader that ignores terms sees the file as the same JSON without them
    silent = text(JSON | {"packing": packing, "shape": [6, 198]})
    for key, damaged, message in (
        (W, poke(byte, value)(state[W]), "the padding after the last input"),
        (Q, silent, rf"x.weight: U8 {row} where"),
        (G, state[G][:2].clone(), r"U8 \[2, 6\] where U8 \[4, 6\]"),
    ):
        save_file(state | {key: damaged}, tmp_path / "bad.safetensors")
        with pytest.raises(FormatError, match=message):
            open_ternary(tmp_path / "bad.safetensors")


def test_damage_late_in_a_large_tensor_is_found_and_can_be_skipped(tmp_path):
    state = load_file(write(tmp_path / "x.safetensors", ternary_weight(3000, 1024)))
    state[W].view(-1)[-3] = 0b10
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(FormatError, match="byte 767997 "):
        open_ternary(tmp_path / "bad.safetensors")
    assert open_ternary(tmp_path / "bad.safetensors", check_codes=False).layers


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_truncated_files(tmp_path, share):
    path = write(tmp_path / "x.safetensors", ternary_weight(60, 500))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(FormatError, match="x.safetensors: .*truncated"):
        open_ternary(path)


def test_the_header_is_plain_safetensors(tmp_path):
    path = write(tmp_path / "x.safetensors", ternary_weight(6, 200), header_room=50)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (8 + length) % 64 == 0
    assert read_header(path).metadata == {"note": "n"}


def test_fingerprints_tell_files_apart(tmp_path):
    """By checksums, and without them by what the tensors hold; the date does not count."""
    file = open_ternary(write(tmp_path / "a.safetensors", ternary_weight(16, 128)))
    tensors = {key: file.file.tensor(key).clone() for key in file.file.entries}
    metadata = dict(file.metadata) | {"modelspec.date": "2026-01-01"}
    for name in ("b", "c"):
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata | {"modelspec.date": name})
    scale = next(key for key in tensors if key.endswith("weight_scale"))
    save_file(tensors | {scale: tensors[scale] * 2}, tmp_path / "d.safetensors", metadata)
    prints = [open_ternary(tmp_path / f"{name}.safetensors").fingerprint for name in "bcd"]
    assert prints[0] == prints[1] != prints[2]
