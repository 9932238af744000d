"""`embed` with ComfyUI's own tokenizers and text encoder classes: T5-XXL and CLIP-L with few channels."""

import functools

import pytest
import safetensors.torch
import torch
from ternary_flux.benchmarks import comfyui
from ternary_flux.quantizer.cli import run
from ternary_flux.quantizer.pictures import conditioning

NARROW = {
    "t5xxl_model_config": {"d_model": 32, "num_heads": 2, "d_kv": 16},
    "clip_l_model_config": {
        "hidden_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
    },
}
PROMPTS = ["a red fox", "two blue cubes on a table", " ".join(["many"] * 300)]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """The two files, and ComfyUI set up to load them in their narrow sizes."""
    comfyui.make_importable()
    import comfy.sd
    import comfy.text_encoders.flux as flux
    import comfy.text_encoders.long_clipl as long_clipl

    torch.manual_seed(0)
    model = flux.flux_clip(dtype_t5=torch.float32)(dtype=torch.float32, model_options=NARROW)
    folder = tmp_path_factory.mktemp("text_encoders")
    paths = [folder / "t5xxl.safetensors", folder / "clip_l.safetensors"]
    for path, part in zip(paths, (model.t5xxl, model.clip_l), strict=True):
        state = {name: 0.1 * torch.randn(tensor.shape) for name, tensor in part.transformer.state_dict().items()}
        safetensors.torch.save_file(state, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.sd, "load_clip", functools.partial(comfy.sd.load_clip, model_options=NARROW))
        # CLIP-L's length is read from the file, and would put its full width back
        patch.setattr(long_clipl, "model_options_long_clip", lambda state, tokenizer, options: (tokenizer, options))
        yield paths


def embed(encoders, folder, *arguments):
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")
    output = folder / "cond.safetensors"
    files = [str(path) for path in encoders]
    command = ["embed", "-o", str(output), "--prompts", str(folder / "prompts.txt"), "--text-encoders", *files]
    return run([*command, *arguments]), output


def test_encodes_as_comfyui_does(encoders, tmp_path):
    import comfy.sd

    code, path = embed(encoders, tmp_path, "--count", "2")
    assert code == 0
    read = conditioning.read(path)
    assert read.prompts == tuple(PROMPTS[:2])
    assert read.context.shape == (2, 256, 32) and read.pooled.shape == (2, 48)
    clip = comfy.sd.load_clip([str(path) for path in encoders], clip_type=comfy.sd.CLIPType.FLUX)
    for row, prompt in enumerate(PROMPTS[:2]):
        context, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
        torch.testing.assert_close(read.context[row].float(), context[0].float().cpu(), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(read.pooled[row].float(), pooled[0].float().cpu(), rtol=1e-2, atol=1e-2)
    assert not torch.equal(read.context[0], read.context[1]) and not torch.equal(read.pooled[0], read.pooled[1])


@pytest.mark.slow
def test_long_prompts_lengthen_all(encoders, tmp_path):
    code, path = embed(reversed(encoders), tmp_path)
    read = conditioning.read(path)
    assert code == 0 and len(read) == 3 and read.context.shape[1] > 256


def test_mistakes(encoders, tmp_path, capsys):
    code, path = embed([encoders[0], tmp_path / "missing.safetensors"], tmp_path)
    assert code == 2 and "missing.safetensors" in capsys.readouterr().err
    code, path = embed([encoders[1]], tmp_path)
    assert code == 2 and "not the text encoders of a FLUX" in capsys.readouterr().err
    assert not path.exists()
