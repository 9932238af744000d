"""Every packaging of a FLUX gives the same ternary file as the same numbers under BFL's names."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from ternary_flux.quantizer.files.checkpoint import fingerprint, open_checkpoint
from ternary_flux.quantizer.files.container import FormatError, TensorFile
from ternary_flux.quantizer.files.summary import summarize
from ternary_flux.quantizer.imports.locate import locate as locate_ternary
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests.quantizer import synthetic
from ternary_flux.tests.quantizer.files.sources import foreign

ARCHES = {
    "FLUX.1": replace(synthetic.FLUX1, depth_single=1),
    "FLUX.2": replace(synthetic.FLUX2, guidance=False),
}
WIDE = replace(ARCHES["FLUX.1"], hidden=256)  # GGUF's K types have blocks of 256
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
PREFIX = "model.diffusion_model."


def prefixed(state, prefix=PREFIX):
    return {prefix + name: tensor for name, tensor in state.items()}


def companions(prefixes=True):
    """What an all-in-one checkpoint has beside the transformer."""
    text, vae = ("text_encoders.t5xxl.transformer.", "vae.") if prefixes else ("", "")
    return {
        f"{text}encoder.block.0.layer.0.SelfAttention.k.weight": torch.ones(4, 4).to(E4M3),
        f"{text}encoder.block.0.layer.0.SelfAttention.k.scale_weight": torch.ones(()),
        f"{text}scaled_fp8" if prefixes else "text_scaled_fp8": torch.zeros(0, dtype=E4M3),
        f"{vae}decoder.conv_in.weight": torch.full((2,), torch.nan),
        "model_ema.decay": torch.tensor(3),
    }


def write_bf16(state, path):
    save_file(prefixed(state) | companions(), path)
    return state


def write_all_in_one_without_prefixes(state, path):
    save_file(state | companions(False), path)
    return state


def write_diffusers_file(state, path):
    save_file(foreign.diffusers(state), path)
    return state


def plain_fp8(dtype):
    def write(state, path):
        stored, worth = foreign.fp8(state, dtype)
        save_file(prefixed(stored) | companions(), path)
        return worth

    return write


def write_old_scaled_fp8(state, path):
    stored, worth = foreign.scaled(state, E4M3, "scale_weight")
    inputs = {name.replace("scale_weight", "scale_input"): torch.ones(()) for name in stored if "scale_weight" in name}
    save_file(prefixed(stored | inputs | {"scaled_fp8": torch.zeros(2, dtype=E4M3)}), path)
    return worth


def scaled_fp8(dtype, name):
    def write(state, path):
        stored, worth = foreign.scaled(state, dtype, "weight_scale")
        save_file(foreign.with_json(stored, state, {"format": name, "full_precision_matrix_mult": True}), path)
        return worth

    return write


def fp8_of_the_header(prefix):
    def write(state, path):
        stored, worth = foreign.scaled(state, E4M3, "weight_scale")
        layers = {k.removesuffix(".weight"): {"format": "float8_e4m3fn"} for k, t in state.items() if is_matrix(k, t)}
        said = json.dumps({"format_version": "1.0", "layers": {prefix + k: v for k, v in layers.items()}})
        save_file(prefixed(stored), path, {"_quantization_metadata": said})
        return worth

    return write


is_matrix = foreign.is_matrix


def write_fp8_bytes(state, path):
    """fp8 kept as plain bytes, which the JSON says what they are."""
    stored, worth = foreign.scaled(state, E4M3, "weight_scale")
    stored = {name: t.view(torch.uint8) if t.dtype == E4M3 else t for name, t in stored.items()}
    save_file(foreign.with_json(stored, state, {"format": "float8_e4m3fn"}), path)
    return worth


def write_int8(state, path):
    stored, worth = foreign.scaled(state, torch.int8, "weight_scale")
    save_file(foreign.with_json(stored, state, {"format": "int8_tensorwise"}), path)
    return worth


def write_scaled_fp8_diffusers(state, path):
    """Each of q, k and v has its own scale."""
    stored, worth = foreign.scaled(foreign.diffusers(state), E4M3, "weight_scale")
    save_file(stored, path)
    return worth


FILES = {
    "bf16 all-in-one": write_bf16,
    "all-in-one without prefixes": write_all_in_one_without_prefixes,
    "diffusers file": write_diffusers_file,
    "fp8 e4m3": plain_fp8(E4M3),
    "fp8 e5m2": plain_fp8(E5M2),
    "scaled_fp8": write_old_scaled_fp8,
    "comfy_quant e4m3": scaled_fp8(E4M3, "float8_e4m3fn"),
    "comfy_quant e5m2": scaled_fp8(E5M2, "float8_e5m2"),
    "fp8 of the header": fp8_of_the_header(""),
    "fp8 of the header with prefix": fp8_of_the_header(PREFIX),
    "fp8 as bytes": write_fp8_bytes,
    "int8_tensorwise": write_int8,
}
GGUFS = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.fixture(params=ARCHES, scope="module")
def arch(request):
    return ARCHES[request.param]


def same_as_its_twin(source, worth, folder):
    """Round both and compare every tensor of the results."""
    dtype = next(iter(worth.values())).dtype
    dtype = dtype if all(tensor.dtype == dtype for tensor in worth.values()) else torch.float32
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in worth.items()}, folder / "twin.safetensors")
    summary = round_checkpoint(source, folder / "ternary.safetensors")
    round_checkpoint(folder / "twin.safetensors", folder / "expected.safetensors")
    given, expected = TensorFile(folder / "ternary.safetensors"), TensorFile(folder / "expected.safetensors")
    assert given.entries.keys() == expected.entries.keys()
    for key in expected.entries:
        assert torch.equal(given.tensor(key), expected.tensor(key)), key
    checkpoint, twin = open_checkpoint(source), open_checkpoint(folder / "twin.safetensors")
    for name in twin.names:
        assert torch.equal(checkpoint.tensor(name).float(), twin.tensor(name).float()), name
    assert fingerprint(checkpoint) == fingerprint(twin)
    return summary, given.metadata


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_files(tmp_path, arch, kind):
    path = tmp_path / "model.safetensors"
    worth = FILES[kind](synthetic.tensors(arch), path)
    summary, metadata = same_as_its_twin(path, worth, tmp_path)
    lossy = "fp8" in kind or "int8" in kind or "e4m3" in kind or "e5m2" in kind
    assert bool(summary.lossy) == lossy and metadata.get("ternary.source_encoding", "") == summary.lossy
    assert metadata["ternary.source"] == "model.safetensors"
    text = "\n".join(summarize(path))
    assert f"this is FLUX.{arch.version}" in text and ("rounded to" in text) == lossy
    assert ("left out" in text) == (summary.ignored > 0) == ("all-in-one" in kind or kind in ("fp8 e4m3", "fp8 e5m2"))


def test_scaled_parts_of_diffusers(tmp_path, arch):
    """q, k and v with scales of their own; the twin is put together here."""
    state = foreign.diffusers(synthetic.tensors(arch))
    stored, worth = foreign.scaled(state, E4M3, "weight_scale")
    save_file(stored, tmp_path / "model.safetensors")
    save_file({name: t.float() for name, t in worth.items()}, tmp_path / "twin.safetensors")
    given, expected = open_checkpoint(tmp_path / "model.safetensors"), open_checkpoint(tmp_path / "twin.safetensors")
    assert given.names == expected.names and given.lossy == "fp8 (e4m3) with scales" and not expected.lossy
    for name in expected.names:
        assert torch.equal(given.tensor(name).float(), expected.tensor(name)), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", GGUFS)
def test_gguf(tmp_path, kind):
    path = tmp_path / "model.gguf"
    worth = foreign.write_gguf(synthetic.tensors(WIDE), path, kind)
    summary, metadata = same_as_its_twin(path, worth, tmp_path)
    assert summary.lossy == ("" if kind in ("F32", "F16", "BF16") else f"GGUF {kind}")
    assert summary.ignored == 0 and metadata["ternary.source"] == "model.gguf"
    assert any("every value is finite" in line for line in summarize(path))


def test_a_gguf_of_flux2_with_a_prefix(tmp_path):
    worth = foreign.write_gguf(prefixed(synthetic.tensors(ARCHES["FLUX.2"])), tmp_path / "model.gguf", "Q8_0")
    worth = {name.removeprefix(PREFIX): tensor for name, tensor in worth.items()}
    same_as_its_twin(tmp_path / "model.gguf", worth, tmp_path)


def test_folders_of_diffusers(tmp_path, arch):
    state = synthetic.tensors(arch)
    folder = foreign.pipeline(
        foreign.diffusers(state), tmp_path / "FLUX.9-mine", "Flux2" if arch.version == 2 else "Flux"
    )
    _, metadata = same_as_its_twin(folder, state, tmp_path)
    assert metadata["ternary.source"] == "FLUX.9-mine" and metadata["modelspec.title"].startswith("FLUX.9-mine (")
    transformer = folder / "transformer"
    index = transformer / "diffusion_pytorch_model.safetensors.index.json"
    shard = transformer / "diffusion_pytorch_model-00002-of-00003.safetensors"
    expected = fingerprint(open_checkpoint(folder))
    for path in (transformer, index, shard, folder / "model_index.json", transformer / "config.json"):
        assert fingerprint(open_checkpoint(path)) == expected
    index.unlink()
    assert fingerprint(open_checkpoint(shard)) == fingerprint(open_checkpoint(transformer)) == expected


def test_a_folder_with_one_file(tmp_path):
    (tmp_path / "model").mkdir()
    synthetic.write(tmp_path / "model" / "flux.safetensors")
    assert open_checkpoint(tmp_path / "model").name == "model"
    save_file(foreign.diffusers(synthetic.tensors()), tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    assert set(open_checkpoint(tmp_path / "model").names) == synthetic.FLUX1.shapes.keys()


def test_the_hubs_cache(tmp_path):
    foreign.pipeline(foreign.diffusers(synthetic.tensors()), tmp_path / "models--x--y" / "snapshots" / "a1b2", "Flux")
    model = tmp_path / "models--x--y"
    assert open_checkpoint(model).name == "models--x--y"
    synthetic.write((model / "snapshots" / "c3d4").with_suffix(".safetensors"))  # no folder, so no snapshot
    foreign.pipeline(foreign.diffusers(synthetic.tensors()), model / "snapshots" / "e5f6", "Flux")
    refused(model, "2 snapshots of a model; give one of them: .*a1b2, .*e5f6")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("e5f6\n")
    assert {path.parents[1].name for path in open_checkpoint(model).files} == {"e5f6"}
    assert {path.parents[1].name for path in locate_ternary(model)} == {"e5f6"}


def test_what_macos_lays_beside_files_is_not_read(tmp_path):
    foreign.pipeline(foreign.diffusers(synthetic.tensors()), tmp_path / "flux", "Flux")
    expected = open_checkpoint(tmp_path / "flux").files
    for path in [path for path in (tmp_path / "flux").rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7" + bytes(60))
    assert open_checkpoint(tmp_path / "flux").files == expected == locate_ternary(tmp_path / "flux")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "._flux.safetensors").write_bytes(b"\0\5\x16\7")
    one = synthetic.write(tmp_path / "one" / "flux.safetensors")
    assert open_checkpoint(tmp_path / "one").files == (one,)


def test_a_single_file_in_the_folder_of_a_pipeline(tmp_path):
    """As Black Forest Labs' repositories are without their folder transformer."""
    one = synthetic.write(tmp_path / "flux1-dev.safetensors")
    (tmp_path / "model_index.json").write_text("\ufeff" + json.dumps({"_class_name": "FluxPipeline"}), "utf-8")
    assert open_checkpoint(tmp_path).files == (one,)
    save_file({"decoder.conv_in.weight": torch.zeros(2)}, tmp_path / "ae.safetensors")
    refused(tmp_path, r"give one of the files in it: ae.safetensors, flux1-dev.safetensors")


def test_a_whole_file_beside_an_index_of_parts_that_are_gone(tmp_path):
    foreign.shards(foreign.diffusers(synthetic.tensors()), tmp_path)
    for part in tmp_path.glob("*-of-*.safetensors"):
        part.unlink()
    refused(tmp_path, "missing in")
    save_file(foreign.diffusers(synthetic.tensors()), tmp_path / "diffusion_pytorch_model.safetensors")
    assert set(open_checkpoint(tmp_path).names) == synthetic.FLUX1.shapes.keys()


def test_names_that_wrappers_of_torch_leave(tmp_path):
    state = synthetic.tensors()
    wrapped = {name.replace("_blocks.0.", "_blocks.0._orig_mod."): tensor for name, tensor in state.items()}
    wrapped = {name.replace(".img_mlp.", "._fsdp_wrapped_module.img_mlp."): tensor for name, tensor in wrapped.items()}
    save_file(wrapped, tmp_path / "wrapped.safetensors")
    checkpoint = open_checkpoint(tmp_path / "wrapped.safetensors")
    assert wrapped.keys() != state.keys() == set(checkpoint.names)
    assert all(torch.equal(checkpoint.tensor(name).bfloat16(), tensor) for name, tensor in state.items())


def test_a_variant_with_its_own_index(tmp_path):
    state = synthetic.tensors()
    foreign.shards(foreign.diffusers(state), tmp_path, stem="diffusion_pytorch_model.bf16")
    path = tmp_path / "diffusion_pytorch_model.bf16.safetensors.index.json"
    path.rename(tmp_path / "diffusion_pytorch_model.safetensors.index.bf16.json")
    assert set(open_checkpoint(tmp_path).names) == state.keys()


def test_the_pass_reads_every_byte_of_all_parts_once(tmp_path):
    state = synthetic.tensors()
    paths = foreign.shards(foreign.diffusers(state), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    pieces = list(checkpoint.pieces(size=4000))
    assert b"".join(piece.data for piece in pieces) == b"".join(path.read_bytes() for path in paths)
    whole = {name: torch.full(tuple(tensor.shape), torch.nan) for name, tensor in state.items()}
    for piece in pieces:
        if piece.name:
            whole[piece.name][piece.start : piece.start + piece.rows] = piece.values().float()
    assert all(torch.equal(whole[name], tensor.float()) for name, tensor in state.items())


def refused(path, message):
    with pytest.raises((FormatError, OSError), match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


def test_folders_that_are_no_flux(tmp_path):
    refused(tmp_path, "holds no weights")
    (tmp_path / "a.bin").write_bytes(b"PK\3\4")
    refused(tmp_path, r"PyTorch pickles \(a.bin\)")
    synthetic.write(tmp_path / "one.safetensors")
    synthetic.write(tmp_path / "two.safetensors")
    refused(tmp_path, r"2 files of weights \(one.safetensors, two.safetensors\); give one of them")
    (tmp_path / "config.json").write_text('{"_class_name": "QwenImageTransformer2DModel"}')
    refused(tmp_path, "weights of QwenImageTransformer2DModel")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    refused(tmp_path, r"diffusers pipeline \(StableDiffusionXLPipeline\) without a folder transformer")
    refused(tmp_path / "missing", "No such file")


def test_missing_parts_are_named(tmp_path):
    first, second, _ = foreign.shards(foreign.diffusers(synthetic.tensors()), tmp_path)
    second.unlink()
    for path in (tmp_path / "diffusion_pytorch_model.safetensors.index.json", first):
        refused(path, f"in 3 parts, and {second.name} is missing")
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    refused(first, f"in 3 parts, and {second.name} is missing")


@pytest.mark.parametrize(
    "value", ["[" * 5000, "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b"}}', "\xff"]
)
def test_damaged_indices(tmp_path, value):
    path = tmp_path / "x.safetensors.index.json"
    path.write_bytes(value.encode("latin-1"))
    refused(path, "JSON|names no files|not beside it")


def test_a_scale_for_blocks_is_refused(tmp_path):
    stored, _ = foreign.scaled(synthetic.tensors(), E4M3, "weight_scale")
    key = "single_blocks.0.linear2.weight_scale"
    stored[key] = torch.ones(2, 5)
    save_file(stored, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=f"{key}: .*no scale of a tensor or of its rows"):
        round_checkpoint(tmp_path / "x.safetensors", tmp_path / "out.safetensors")


def test_without_the_gguf_package(tmp_path, monkeypatch):
    foreign.write_gguf(synthetic.tensors(WIDE), tmp_path / "model.gguf", "Q4_K")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FormatError, match="pip install gguf"):
        round_checkpoint(tmp_path / "model.gguf", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_change_inside_the_blocks_is_another_model(tmp_path):
    """What a merged LoRA does: a change of low rank in a Linear of a block, or in a parameter alone."""
    state = synthetic.tensors(ARCHES["FLUX.1"])
    save_file(state, tmp_path / "model.safetensors")
    found = {fingerprint(open_checkpoint(tmp_path / "model.safetensors"))}
    changed = (
        "double_blocks.0.img_attn.qkv.weight",
        "single_blocks.0.linear2.weight",
        "double_blocks.0.txt_mlp.0.bias",
    )
    for number, name in enumerate(changed):
        other = state | {name: state[name] + 0.1 * torch.ones_like(state[name])}
        save_file(other, tmp_path / f"{number}.safetensors")
        found.add(fingerprint(open_checkpoint(tmp_path / f"{number}.safetensors")))
    assert len(found) == 1 + len(changed)
