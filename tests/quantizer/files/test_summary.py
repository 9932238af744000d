import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from ternary_flux.quantizer.calibration.sensitivity import write_mixed
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.container import FormatError
from ternary_flux.quantizer.files.summary import sizes, summarize
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests.quantizer import synthetic


@pytest.mark.parametrize("packing", ["planes32", "base3"])
@pytest.mark.parametrize("arch", [synthetic.FLUX1, synthetic.FLUX2], ids=["FLUX.1", "FLUX.2"])
def test_a_ternary_file(tmp_path, arch, packing):
    source = synthetic.write(tmp_path / "dense.safetensors", arch)
    path = tmp_path / "ternary.safetensors"
    summary = round_checkpoint(source, path, packing=packing)
    text = "\n".join(summarize(path, layers=True))
    size = sizes(open_ternary(path))
    total = sum(torch.Size(shape).numel() for shape in arch.shapes.values())
    assert size.bf16_bytes == 2 * total
    assert size.ternary_weights + size.dense_weights == total and size.ternary_weights == summary.weights
    assert size.bytes <= path.stat().st_size < size.bytes + 65_536
    assert f"FLUX.{arch.version}" in text and packing in text and "row x integer group" in text
    assert f"{size.ratio:.2f} times smaller" in text and f"{size.bits_per_weight:.3f} bits per weight" in text
    assert all(name in text for name in arch.linears)
    assert f"mean {summary.mean_error:.4f}" in text and "dense.safetensors" in text and "least-squares" in text


def test_bits_per_weight_of_a_real_layer(tmp_path):
    round_checkpoint(synthetic.write(tmp_path / "dense.safetensors"), tmp_path / "t.safetensors")
    file = open_ternary(tmp_path / "t.safetensors")
    n, k = file.layers["single_blocks.0.linear2"].shape
    plan = file.layers["single_blocks.0.linear2"]
    assert plan.nbytes == n * k / 4 + 4 * n + n * k / 128 + 2 * k + plan.comfy_quant.numel()


def test_mixed_files(tmp_path):
    """8-bit Linears count as weights and their scales do not; Linears of two terms are named."""
    round_checkpoint(synthetic.write(tmp_path / "dense.safetensors"), tmp_path / "t.safetensors")
    name = "single_blocks.0.linear2"
    file, source = open_ternary(tmp_path / "t.safetensors"), open_checkpoint(tmp_path / "dense.safetensors")
    other = "single_blocks.0.linear1"
    write_mixed(tmp_path / "mixed.safetensors", file, source, {name: "int8", other: "two-terms"})
    before, after = sizes(file), sizes(open_ternary(tmp_path / "mixed.safetensors"))
    n, k = synthetic.FLUX1.linear_shapes[name]
    assert after.bf16_bytes == before.bf16_bytes and after.dense_weights == before.dense_weights + n * k
    text = "\n".join(summarize(tmp_path / "mixed.safetensors", layers=True))
    assert "1 of these are Linears in int8_tensorwise" in text and "1 of these are Linears of two ternary terms" in text
    assert re.search(rf"{other} .* 4\.\d+ bits in 2 terms  error 0\.17", text)


def test_a_dense_file_says_what_ternary_would_save(tmp_path):
    source = synthetic.write(tmp_path / "dense.safetensors", dtype=torch.float16)
    text = "\n".join(summarize(source))
    assert "this is FLUX.1, not ternary" in text and "F16" in text
    round_checkpoint(source, tmp_path / "t.safetensors")
    promised = re.search(r"as ternary +(.*), ([\d.]+) times", text)
    assert float(promised[2]) == pytest.approx(sizes(open_ternary(tmp_path / "t.safetensors")).ratio, abs=0.01)


def test_other_files(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"lora_unet_double_blocks_0.lora_up.weight": torch.zeros(2, 2)}, path)
    assert "a LoRA" in summarize(path)[0]
    save_file({"encoder.weight": torch.zeros(2)}, path)
    text = "\n".join(summarize(path))
    assert "no FLUX transformer" in text and "encoder.weight" in text
    state = synthetic.tensors()
    del state["final_layer.linear.weight"]
    save_file(state, path)
    assert "final_layer.linear.weight is missing" in "\n".join(summarize(path))


def test_metadata_that_comfyui_dropped_or_somebody_edited(tmp_path):
    round_checkpoint(synthetic.write(tmp_path / "dense.safetensors"), tmp_path / "t.safetensors")
    state = {key: tensor.clone() for key, tensor in load_file(tmp_path / "t.safetensors").items()}
    for metadata in (None, {"ternary.weight_errors": "[1"}, {"ternary.weight_errors": '["a"]'}):
        save_file(state, tmp_path / "saved.safetensors", metadata)
        assert "ternary FLUX" in summarize(tmp_path / "saved.safetensors")[0]


def test_a_damaged_file_is_an_error(tmp_path):
    round_checkpoint(synthetic.write(tmp_path / "dense.safetensors"), tmp_path / "t.safetensors")
    content = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "t.safetensors").write_bytes(content[:-1])
    with pytest.raises(FormatError, match="truncated"):
        summarize(tmp_path / "t.safetensors")
