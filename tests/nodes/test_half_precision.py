"""Every kind of LoRA in bf16 and fp16, which GPUs compute in: as near to fp32 as core's own models are."""

import pytest
import torch
from ternary_flux.tests.nodes import adapters, tiny

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=["bf16", "fp16"])
def dtype(request, comfy, monkeypatch):
    """ComfyUI as it is on a GPU that computes in this dtype."""
    management = comfy.model_management
    monkeypatch.setattr(management, "should_use_bf16", lambda *_, **__: request.param == torch.bfloat16)
    monkeypatch.setattr(management, "should_use_fp16", lambda *_, **__: request.param == torch.float16)
    monkeypatch.setattr(management, "PRIORITIZE_FP16", request.param == torch.float16)
    return request.param


def core(comfy, path, dtype, loras):
    model = comfy.sd.load_diffusion_model_state_dict(tiny.dense_twin(path), model_options={"dtype": dtype})
    model = adapters.apply(comfy, model, loras)
    comfy.model_management.load_models_gpu([model])
    return tiny.run(model, dtype=dtype)


@pytest.mark.feature("LoRA, DoRA, LoKr, LoHa, GLoRA, OFT, BOFT and differences in bf16 and fp16", "as exact as in core")
@pytest.mark.parametrize("kind", adapters.KINDS)
def test_loras_act_as_exactly_as_in_core(comfy, path, twin, dtype, kind):
    loras = [(adapters.KINDS[kind](1), 1.0)]
    exact = adapters.merged(comfy, twin, loras)
    model = adapters.apply(comfy, comfy.loader.load(str(path), "full"), loras)
    comfy.model_management.load_models_gpu([model])
    layer = model.model.diffusion_model.double_blocks[0].img_attn.qkv
    assert layer.weight.dtype == layer.bias.dtype == dtype
    error = tiny.distance(tiny.run(model, dtype=dtype), exact)
    assert error < 1.5 * tiny.distance(core(comfy, path, dtype, loras), exact)


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_a_patched_layer_is_rounded_once(comfy, path, dtype, kind):
    """The patch is computed in fp32 from the exact weight: what is left is the rounding of the result."""
    loras = [(adapters.KINDS[kind](1), 1.0)]
    model = adapters.apply(comfy, comfy.loader.load(str(path), "full"), loras)
    comfy.model_management.load_models_gpu([model])
    key = f"diffusion_model.{adapters.QKV}.weight"
    layer = model.quantized_linear(key)
    patches = model.patches[key]
    exact = comfy.lora.comfy.calculate_weight(patches, tiny.dense_twin(path)[f"{adapters.QKV}.weight"], key)
    x = torch.randn(8, tiny.HIDDEN, generator=tiny.generator(1), dtype=dtype)
    with torch.inference_mode():
        y = layer(x).double() - layer.bias.double()
    once = x.double() @ exact.to(dtype).double().t()
    truth = x.double() @ exact.double().t()
    bound = tiny.distance(once, truth) + torch.finfo(dtype).eps  # of the weight, and of the result
    assert tiny.distance(y, truth) < 1.5 * bound


@pytest.mark.parametrize("kind", ["dora", "oft"])
def test_loras_on_int8_layers(comfy, mixed, dtype, kind):
    loras = [(adapters.KINDS[kind](1), 1.0)]
    plain = tiny.run(comfy.loader.load(str(mixed), "full"), dtype=dtype)
    model = adapters.apply(comfy, comfy.loader.load(str(mixed), "full"), loras)
    comfy.model_management.load_models_gpu([model])
    assert tiny.distance(tiny.run(model, dtype=dtype), plain) > 0.02
