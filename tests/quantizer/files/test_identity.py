"""What a file is: one sentence with a remedy, whoever asks."""

import json
import os
import resource
import shlex
import shutil
import struct
import subprocess
import time
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from ternary_flux.quantizer import cli
from ternary_flux.quantizer.files.advice import model_name, quoted
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.container import FormatError
from ternary_flux.quantizer.files.identity import find_prefix, identify
from ternary_flux.quantizer.files.summary import summarize
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests.quantizer import synthetic
from ternary_flux.tests.quantizer.files.sources import foreign

LINEAR = "single_blocks.0.linear2"
THEIRS = "single_transformer_blocks.0.attn.to_q"


def tensors(*keys):
    return {key: torch.zeros(2, 2) for key in keys}


def flux(change):
    """A whole FLUX with `change` in the place of one Linear's tensors."""
    state = synthetic.tensors()
    weight = state.pop(f"{LINEAR}.weight")
    return state | change(weight)


def packed(more):
    """4 bits in bytes, and what lies beside them."""
    return lambda weight: {
        f"{LINEAR}.weight": torch.zeros(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8),
        **{f"{LINEAR}.{name}": tensor for name, tensor in more.items()},
    }


def stated(**value):
    return lambda weight: {
        f"{LINEAR}.weight": weight.to(torch.int8),
        f"{LINEAR}.weight_scale": torch.ones(weight.shape[0], 1),
        f"{LINEAR}.comfy_quant": foreign.json_tensor(value),
    }


ONE = torch.ones(1)
# what a file is -> its tensors, the kind, what the sentence says, and a part of its remedy
KINDS = {
    "LoRA of XLabs": (tensors("double_blocks.0.processor.proj_lora1.down.weight"), "lora", "LoRA", "Load LoRA"),
    "LoRA of a processor": (tensors("transformer.x_embedder.lora.down.weight"), "lora", "LoRA", "Load LoRA"),
    "LoRA of old diffusers": (tensors("single_blocks.0.attn.to_q_lora.up.weight"), "lora", "LoRA", "Load LoRA"),
    "LoRA of a text encoder": (tensors("lora_te1_text_model_encoder.alpha"), "lora", "LoRA", "Load LoRA"),
    "differences": (
        tensors("diffusion_model.img_in.diff", "diffusion_model.img_in.diff_b"),
        "lora",
        "LoRA",
        "Load LoRA",
    ),
    "GLoRA": (
        tensors("diffusion_model.img_in.a1.weight", "diffusion_model.img_in.b2.weight"),
        "lora",
        "LoRA",
        "Load LoRA",
    ),
    "LoRA of kohya": (
        tensors("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"),
        "lora",
        "a LoRA",
        "Load LoRA",
    ),
    "LoRA of diffusers": (tensors(f"transformer.{THEIRS}.lora_A.weight"), "lora", "a LoRA", "models/loras"),
    "LoKr": (tensors("lycoris_x.lokr_w1"), "lora", "a LoRA", "Load LoRA"),
    "control LoRA": (
        tensors("img_in.lora_A.weight", "double_blocks.0.img_attn.norm.key_norm.scale"),
        "lora",
        "a control LoRA",
        "Load LoRA",
    ),
    "VAE": (tensors("decoder.conv_in.weight", "encoder.conv_in.weight"), "vae", "a VAE", "Load VAE"),
    "TAESD": (tensors("taesd_decoder.1.weight"), "vae", "a VAE", "models/vae"),
    "T5": (tensors("encoder.block.0.layer.0.SelfAttention.k.weight"), "text encoder", "a text encoder", "Load CLIP"),
    "CLIP": (tensors("text_model.embeddings.position_embedding.weight"), "text encoder", "a text encoder", "Load CLIP"),
    "Qwen3": (tensors("model.layers.0.self_attn.q_proj.weight"), "text encoder", "a text encoder", "text_encoders"),
    "Chroma": (
        tensors("img_in.weight", "double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.norms.0.scale"),
        "model",
        "this is Chroma",
        "Load Diffusion Model",
    ),
    "Ovis-Image": (
        tensors("img_in.weight", "double_blocks.0.img_mlp.gate_proj.weight"),
        "model",
        "Ovis-Image",
        "Load Diffusion Model",
    ),
    "HunyuanVideo": (
        tensors("img_in.weight", "double_blocks.0.img_attn_qkv.weight", "txt_in.individual_token_refiner.x"),
        "model",
        "HunyuanVideo",
        "Load Diffusion Model",
    ),
    "Qwen-Image": (
        tensors("img_in.weight", "txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"),
        "model",
        "Qwen-Image",
        "Load Diffusion Model",
    ),
    "Stable Diffusion": (
        tensors("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"),
        "model",
        "Stable Diffusion",
        "Load Checkpoint",
    ),
    "SD3": (tensors("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "model", "Diffusion 3", "Load"),
    "Z-Image": (tensors("cap_embedder.0.weight", "noise_refiner.0.x"), "model", "Z-Image", "Load Diffusion Model"),
    "ControlNet": (
        tensors("x_embedder.weight", f"{THEIRS}.weight", "controlnet_blocks.0.weight"),
        "model",
        "a ControlNet of FLUX",
        "Load ControlNet",
    ),
    "Redux": (tensors("redux_up.weight"), "model", "Redux", "Load Style Model"),
    "NF4": (
        flux(packed({"weight.absmax": ONE, "weight.quant_state.bitsandbytes__nf4": foreign.json_tensor({})})),
        "quantized",
        "a FLUX in bitsandbytes' 4 bits",
        "Give the original",
    ),
    "bitsandbytes int8": (
        flux(lambda weight: {f"{LINEAR}.weight": weight.to(torch.int8), f"{LINEAR}.SCB": ONE}),
        "quantized",
        "a FLUX in bitsandbytes' 8 bits",
        "Give the original",
    ),
    "nunchaku": (
        tensors("x_embedder.weight", "single_transformer_blocks.0.mlp_fc1.qweight", "transformer_blocks.0.x.wscales"),
        "quantized",
        "a FLUX in SVDQuant's 4 bits",
        "ComfyUI-nunchaku",
    ),
    "NVFP4 with JSON": (
        flux(packed({"comfy_quant": foreign.json_tensor({"format": "nvfp4"}), "weight_scale": ONE})),
        "quantized",
        "a FLUX in NVFP4",
        "Give the original",
    ),
    "fused diffusers": (
        {"transformer_blocks.0.attn.to_qkv.weight": ONE, "single_transformer_blocks.0.attn.to_qkv.weight": ONE.clone()},
        "quantized",
        "a FLUX in diffusers' names with fused projections",
        "unfuse_qkv_projections",
    ),
    "PEFT": (
        {
            "double_blocks.0.img_attn.qkv.base_layer.weight": ONE,
            "double_blocks.0.img_attn.qkv.lora_A.weight": ONE.clone(),
        },
        "quantized",
        "an adapter that is not merged",
        "Merge the adapter",
    ),
    "torchao": (flux(lambda weight: {f"{LINEAR}._weight_qdata": weight}), "quantized", "torchao's format", "torchao"),
    "SDNQ": (
        flux(
            lambda weight: {
                f"{LINEAR}.weight": weight.byte(),
                f"{LINEAR}.scale": ONE,
                f"{LINEAR}.zero_point": ONE.clone(),
            }
        ),
        "quantized",
        "a FLUX",
        "Give the original",
    ),
    "NVFP4 without": (
        flux(packed({"weight_scale": ONE, "weight_scale_2": ONE.clone()})),
        "quantized",
        "a FLUX in NVFP4",
        "original",
    ),
    "convrot": (
        flux(stated(format="int8_tensorwise", convrot=True, convrot_groupsize=256)),
        "quantized",
        "rotated basis (ConvRot)",
        "Give the original",
    ),
    "convrot in params": (
        flux(stated(format="int8_tensorwise", params={"convrot": True})),
        "quantized",
        "rotated basis (ConvRot)",
        "Give the original",
    ),
    "unknown format": (flux(stated(format="fp7_magic")), "quantized", "a FLUX in fp7_magic", "Give the original"),
    "OrbitQuant": (
        tensors("x_embedder.weight", f"{THEIRS}.packed_weight_indices", f"{THEIRS}.row_norms"),
        "quantized",
        "a FLUX in OrbitQuant's rotated codes",
        "Give the original",
    ),
    "integers": (
        flux(lambda weight: {f"{LINEAR}.weight": weight.to(torch.int8)}),
        "quantized",
        f"1 tensors in I8 ({LINEAR}.weight is the first)",
        "Give the original",
    ),
    "incomplete": (flux(lambda weight: {}), "incomplete", f"{LINEAR}.weight is missing", "Download it again"),
    "misshapen": (
        flux(lambda weight: {f"{LINEAR}.weight": weight[1:]}),
        "incomplete",
        f"{LINEAR}.weight has shape",
        "Download it again",
    ),
    "something": (tensors("a.b", "c"), "other", "no FLUX transformer that is known here (its first keys: ", "Give"),
}


def said_by_everyone(path, capsys):
    """The sentence of `identify`, after it was found to be that of every command."""
    sentence = identify(path).sentence
    assert summarize(path)[0] == f"{path}: {sentence}"
    for ask in (open_checkpoint, open_ternary):
        with pytest.raises(FormatError) as error:
            ask(path)
        assert str(error.value) == f"{path}: {sentence}"
    assert cli.run(["round", str(path), "-o", str(path.with_name("out.safetensors"))]) == 2
    assert " ".join(sentence.split()) in capsys.readouterr().err
    return sentence


@pytest.mark.parametrize("name", KINDS)
def test_kinds(tmp_path, capsys, name):
    state, kind, what, remedy = KINDS[name]
    path = tmp_path / "a file.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    sentence = said_by_everyone(path, capsys)
    assert identify(path).kind == kind and sentence.startswith("this is ")
    assert what in sentence and remedy in sentence
    assert "python -m quantizer" not in sentence  # no command would run on it


@pytest.mark.parametrize(
    "arch, what",
    [("qwen3", "a text encoder"), ("sdxl", "a GGUF of another model (sdxl)"), ("flux", "no FLUX transformer")],
)
def test_ggufs(tmp_path, capsys, arch, what):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", arch)
    key = "blk.0.attn_q.weight" if arch == "qwen3" else "a.weight"
    writer.add_tensor(key, torch.zeros(2, 2).numpy())
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert what in said_by_everyone(tmp_path / "x.gguf", capsys)


@pytest.mark.parametrize(
    "content, what",
    [
        (b"PK\3\4" + b"0" * 40, "zip of pickles"),
        (b"\x80\2}q\0." + b"0" * 40, "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>" + b" " * 40, "web page"),
        (b"GGUF" + b"\1\0\0\0" + b"0" * 40, "GGUF of version 1"),
        (b"GGUF" + b"\3\0\0\0", "truncated within its header"),
        (b"", "truncated"),
    ],
)
def test_no_safetensors(tmp_path, content, what):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for ask in (identify, open_checkpoint, open_ternary, summarize):
        with pytest.raises(FormatError, match=what):
            ask(path)


def test_a_dense_flux_is_offered_a_command_that_parses(tmp_path):
    folder = tmp_path / "my 'models' $x"
    folder.mkdir()
    path = synthetic.write(folder / "flux dev.safetensors")
    sentence = identify(path).sentence
    words = shlex.split(sentence[sentence.index("python -m quantizer") :])
    assert words[:4] == ["python", "-m", "quantizer", "convert"] and words[4] == str(path)
    assert cli.parse(words[3:]).output == folder / "flux dev-1.58bit.safetensors"
    assert "Load it with the node Load Diffusion Model" in sentence


def test_the_command_for_a_ternary_file_runs(tmp_path):
    round_checkpoint(synthetic.write(tmp_path / "dense.safetensors"), tmp_path / "it is.safetensors")
    sentence = identify(tmp_path / "it is.safetensors").sentence
    assert cli.run(shlex.split(sentence[sentence.index("python -m quantizer") :])[3:]) == 0
    assert (tmp_path / "it is-dense.safetensors").is_file()


@pytest.mark.parametrize("key", ["W_q", "biases"])
def test_a_packed_model_is_offered_its_import(tmp_path, key):
    """A folder as it is downloaded, the folder and the file of its transformer."""
    folder = tmp_path / "bonsai" / "transformer-packed"
    folder.mkdir(parents=True)
    save_file(tensors("x_embedder.weight", f"{THEIRS}.{key}"), folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(FormatError, match="packing of its own.*quantizer import ") as error:
        identify(folder.parent)
    assert cli.parse(shlex.split(str(error.value).partition("python -m quantizer ")[2])).source == folder.parent
    for path in (folder, folder / "diffusion_pytorch_model.safetensors"):
        assert cli.parse(shlex.split(identify(path).sentence.partition("python -m quantizer ")[2])).source == path


def test_names_for_what_is_made_of_a_path(tmp_path):
    folder = tmp_path / "FLUX.1-dev" / "transformer"
    folder.mkdir(parents=True)
    part, index = "diffusion_pytorch_model-00001-of-00003.safetensors", "diffusion_pytorch_model.safetensors.index.json"
    for path in (folder.parent, folder, folder / part, folder / index, folder.parent / "model_index.json"):
        assert model_name(path) == "FLUX.1-dev"
    assert model_name(tmp_path / "flux1-dev-Q4_0.gguf") == "flux1-dev-Q4_0"


def test_paths_are_quoted(tmp_path):
    assert quoted(tmp_path / "a b") == f'"{tmp_path / "a b"}"'
    assert shlex.split(quoted(tmp_path / '$a"b`')) == [str(tmp_path / '$a"b`')]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not there")
@pytest.mark.parametrize("name", [b"a\nb", b"\x1b[31m 'red'", b"back\\slash\t", b"\xff\xfe", "é \u200f".encode()])
def test_names_that_a_terminal_does_not_show(name):
    text = quoted(Path(os.fsdecode(name)))
    assert text.isprintable()
    assert subprocess.run(["bash", "-c", f"printf %s {text}"], capture_output=True, check=True).stdout == name


def test_flux1_without_guidance_is_not_called_schnell(tmp_path):
    from ternary_flux.tests.quantizer.files.test_architecture import MODELS

    arch = MODELS["FLUX.1 without guidance (schnell or de-distilled)"]
    assert arch.family == "FLUX.1" and MODELS["FLUX.1-dev"].family == "FLUX.1-dev"


# Other parts of a file -----------------------------------------------------------------------------------------------

EXTRAS = {
    "ema.img_in.weight": torch.full((1,), torch.nan),
    "model_ema.double_blocks.0.x": torch.ones(1),
    "optimizer.state.0.exp_avg": torch.full((3,), torch.inf),
    "double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, 2),
    "step": torch.tensor(3),
    "single_blocks.0.linear1.num_batches_tracked": torch.tensor(5),
    "vae.decoder.conv_in.weight": torch.ones(2),
    "text_model.x.weight": torch.ones(2).to(torch.float8_e4m3fn),
    "distilled_guidance_layer.x": torch.ones(1),
    "t5.absmax.quant_state.bitsandbytes__nf4": torch.ones(1),
}


def test_only_a_whole_models_own_keys_count(tmp_path):
    source = synthetic.write(tmp_path / "dense.safetensors", extra=EXTRAS)
    identity = identify(source)
    assert identity.kind == "dense" and identity.ignored == len(EXTRAS)
    assert round_checkpoint(source, tmp_path / "out.safetensors").ignored == len(EXTRAS)
    file = open_ternary(tmp_path / "out.safetensors")
    assert not file.ignored and not any(key in file.file.entries for key in EXTRAS)
    assert f"{len(EXTRAS)} other tensors" in "\n".join(summarize(source))


def test_other_parts_of_a_ternary_file_are_left_alone(tmp_path):
    round_checkpoint(synthetic.write(tmp_path / "dense.safetensors"), tmp_path / "t.safetensors")
    file = open_ternary(tmp_path / "t.safetensors")
    state = {key: file.file.tensor(key).clone() for key in file.file.entries}
    extras = {key: tensor for key, tensor in EXTRAS.items() if not key.endswith("num_batches_tracked")}  # a part of it?
    save_file(state | extras, tmp_path / "more.safetensors")
    more = open_ternary(tmp_path / "more.safetensors")
    assert more.ignored == len(extras) and more.keys == state.keys() and more.dense.keys() == file.dense.keys()
    assert more.layers.keys() == file.layers.keys()
    assert f"{len(extras)} other tensors" in "\n".join(summarize(tmp_path / "more.safetensors"))


def test_find_prefix():
    assert find_prefix(["img_in.weight", "double_blocks.0.x"]) == ""
    assert (
        find_prefix(["ema.img_in.weight", "ema.double_blocks.0.x", "x", "m.double_blocks.0.y", "m.img_in.weight"])
        == "m."
    )
    assert find_prefix(["a.img_in.weight", "a.double_blocks.0.x", "b.img_in.weight"]) == "a."
    assert find_prefix(["x"]) is None


# Values that are not finite ------------------------------------------------------------------------------------------


def damage(state, key, value=torch.nan):
    state = {name: tensor.clone() for name, tensor in state.items()}
    state[key].view(-1)[-1] = value
    return state


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("key", ["img_in.bias", f"{LINEAR}.weight", "final_layer.linear.weight"])
def test_dense_values_that_are_not_finite(tmp_path, key, dtype, value):
    save_file(damage(synthetic.tensors(dtype=dtype), key, value), tmp_path / "x.safetensors")
    for ask in (summarize, lambda path: round_checkpoint(path, tmp_path / "out.safetensors")):
        with pytest.raises(FormatError, match=f"{key}: .*not finite"):
            ask(tmp_path / "x.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_values_that_bf16_cannot_hold(tmp_path):
    state = synthetic.tensors(dtype=torch.float32)
    save_file(damage(state, "img_in.bias", torch.finfo(torch.float32).max), tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="img_in.bias: .*not finite"):
        round_checkpoint(tmp_path / "x.safetensors", tmp_path / "out.safetensors")


def test_scales_and_blocks_that_are_not_finite(tmp_path):
    stored, _ = foreign.scaled(synthetic.tensors(), torch.float8_e4m3fn, "weight_scale")
    save_file(damage(stored, f"{LINEAR}.weight_scale"), tmp_path / "x.safetensors")
    foreign.write_gguf(synthetic.tensors(), tmp_path / "x.gguf", "Q8_0")
    content = bytearray((tmp_path / "x.gguf").read_bytes())
    file = open_checkpoint(tmp_path / "x.gguf").source.files[0]
    content[file.entries[f"{LINEAR}.weight"].start : file.entries[f"{LINEAR}.weight"].start + 2] = b"\xff\x7f"
    (tmp_path / "x.gguf").write_bytes(content)
    for name, key in (("x.safetensors", f"{LINEAR}.weight_scale"), ("x.gguf", f"{LINEAR}.weight")):
        for ask in (summarize, lambda path: round_checkpoint(path, tmp_path / "out.safetensors")):
            with pytest.raises(FormatError, match=f"{key}: .*not finite"):
                ask(tmp_path / name)


@pytest.mark.parametrize("key", ["img_in.bias", f"{LINEAR}.bias", "time_in.in_layer.weight"])
def test_dense_values_of_a_ternary_file(tmp_path, key):
    round_checkpoint(synthetic.write(tmp_path / "dense.safetensors"), tmp_path / "t.safetensors")
    file = open_ternary(tmp_path / "t.safetensors").file
    save_file(damage({name: file.tensor(name) for name in file.entries}, key), tmp_path / "x.safetensors")
    for ask in (open_ternary, summarize):
        with pytest.raises(FormatError, match=f"{key}: .*not finite"):
            ask(tmp_path / "x.safetensors")


# Hostile headers: work by the size of the file, not by what it says --------------------------------------------------


def header(path, entries, metadata=None):
    """A safetensors file of this header, and as many bytes as its last tensor ends at."""
    text = json.dumps({"__metadata__": metadata or {}, **entries}).encode() if isinstance(entries, dict) else entries
    stop = max((entry["data_offsets"][1] for entry in entries.values()), default=0) if isinstance(entries, dict) else 0
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(stop))


def entry(shape, start, stop, dtype="BF16"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def empty(*keys):
    return dict.fromkeys(keys, entry([0], 0, 0))


STEM = {"img_in.weight": [128, 64], "txt_in.weight": [128, 64], "vector_in.in_layer.weight": [128, 32]}


def stem():
    """The tensors that say which FLUX it is, with their bytes."""
    entries, position = {}, 0
    for key, (rows, columns) in STEM.items():
        entries[key] = entry([rows, columns], position, position + 2 * rows * columns)
        position += 2 * rows * columns
    return entries, position


def after_stem(keys):
    entries, stop = stem()
    return entries | dict.fromkeys(keys, entry([0], stop, stop))


HOSTILE = {
    "block 250000": lambda: after_stem(["double_blocks.0.x", "double_blocks.250000.img_attn.qkv.weight"]),
    "block of many digits": lambda: after_stem(["double_blocks.0.x", f"double_blocks.{'9' * 5000}.x"]),
    "20,000 prefixes": lambda: empty(
        *(f"p{i}.{end}" for i in range(20_000) for end in ("img_in.weight", "double_blocks.0.x"))
    ),
    "30,000 layers": lambda: after_stem(f"double_blocks.{i}.img_attn.qkv.comfy_quant" for i in range(30_000)),
    "30,000 blocks": lambda: after_stem(f"double_blocks.{i}.img_attn.qkv.weight" for i in range(30_000)),
    "60,000 tensors": lambda: empty(*(f"t{i}" for i in range(60_000))),
    "huge shape": lambda: after_stem(["double_blocks.0.x"]) | {"y": entry([1 << 40, 1 << 40], 0, 0)},
    "long shape": lambda: {"y": entry([9] * 200_000, 0, 0)},
    "huge number": lambda: b'{"y":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}',
    "deep JSON": lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep array": lambda: b'{"__metadata__":' + b"[" * 1_000_000,
    "many objects": lambda: b'{"a":[' + b"{}," * 3_000_000 + b"{}]}",
    "deep metadata": lambda: b'{"__metadata__":{"_quantization_metadata":"' + b"[" * 100_000 + b'"}}',
    "long name": lambda: {"n" * 1_000_000: entry([0], 0, 0)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(tmp_path, name):
    """Bounded by a second of computing, and 200 MB; the limit here leaves room for slow machines."""
    path = tmp_path / "x.safetensors"
    header(path, HOSTILE[name]())
    for ask in (summarize, open_ternary):
        started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            ask(path)
            assert ask is summarize
        except FormatError as error:
            assert str(path) in str(error)
        assert time.process_time() - started < 10
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_a_header_of_100_mb(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_000) + b'{"')
        file.truncate(8 + 100_000_000)
    with pytest.raises(FormatError, match="a header of 100,000,000 bytes is not read"):
        identify(path)


@pytest.mark.parametrize(
    "fields",
    [
        struct.pack("<IQQ", 3, 1 << 60, 0),
        struct.pack("<IQQ", 3, 0, 1 << 60),
        struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 60),
        struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 8, 1 << 60),
        struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 4, 1 << 60),
        struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 9, 1 << 60),
        struct.pack("<IQQQ", 3, 1, 0, 1) + b"a" + struct.pack("<I", 1 << 30),
        struct.pack("<IQQQ", 3, 1, 0, 1) + b"a" + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0),
        struct.pack("<IQQQ", 3, 1, 0, 1) + b"a" + struct.pack("<IQIQ", 1, 8, 99, 0),
        struct.pack("<IQQQ", 3, 1, 0, 1) + b"a" + struct.pack("<IQIQ", 1, 8, 12, 0),
    ],
)
def test_hostile_ggufs(tmp_path, fields):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + fields)
    with pytest.raises(FormatError, match="x.gguf: "):
        identify(tmp_path / "x.gguf")


STRAY = {
    "F32 with weight_scale beside it": ("weight_scale", torch.float32),
    "F32 with weight_scale_inv beside it": ("weight_scale_inv", torch.float32),
    "F8_E4M3 with weight_scale_inv beside it": ("weight_scale_inv", torch.float8_e4m3fn),
    "F8_E4M3 with scale beside it": ("scale", torch.float8_e4m3fn),
    "F32 with pre_quant_scale beside it": ("pre_quant_scale", torch.float32),
    "F32 with zero_points beside it": ("zero_points", torch.float32),
}


@pytest.mark.parametrize("what", STRAY)
def test_scales_that_would_be_left_out_are_refused(tmp_path, what):
    end, dtype = STRAY[what]
    state, layer = synthetic.tensors(), "double_blocks.0.img_mlp.0"
    state[f"{layer}.weight"] = state[f"{layer}.weight"].to(torch.float32).to(dtype)
    state[f"{layer}.{end}"] = torch.ones(1)
    save_file(state, tmp_path / "flux.safetensors")
    found = identify(tmp_path / "flux.safetensors")
    assert found.kind == "quantized" and what in found.what and layer in found.what


def test_a_ternary_model_in_parts_is_called_that(tmp_path, capsys):
    """No command that is offered for whole files would read it."""
    round_checkpoint(synthetic.write(tmp_path / "dense.safetensors"), tmp_path / "whole.safetensors")
    foreign.shards(load_file(tmp_path / "whole.safetensors"), tmp_path / "parts", 2, stem="model")
    for command in ("export", "round", "pack"):
        more = ["--packing", "base3"] if command == "pack" else []
        assert cli.run([command, str(tmp_path / "parts"), "-o", str(tmp_path / "out.safetensors"), *more]) == 2
        said = capsys.readouterr().err
        assert "this is a ternary FLUX in 2 parts" in said and "python -m quantizer" not in said


def test_a_parameter_under_two_names_is_refused(tmp_path):
    state, norm = synthetic.tensors(), "double_blocks.0.img_attn.norm.query_norm"
    state[f"{norm}.weight"] = state[f"{norm}.scale"].clone() + 1
    save_file(state, tmp_path / "flux.safetensors")
    found = identify(tmp_path / "flux.safetensors")
    assert found.kind == "incomplete" and f"{norm}.weight and {norm}.scale are the same parameter" in found.what


def test_stray_keys_do_not_hide_a_model():
    whole = [f"model.diffusion_model.{key}" for key in ("img_in.weight", "double_blocks.0.a", "double_blocks.1.a")]
    assert find_prefix([*whole, "img_in.weight", "double_blocks.0.a"]) == "model.diffusion_model."
