"""`embed` with ComfyUI's own tokenizers and text encoder classes: T5-XXL and CLIP-L with few channels."""

import pytest
import torch
from ternary_flux.quantizer.cli import run
from ternary_flux.quantizer.pictures import conditioning
from ternary_flux.tests.quantizer.pictures import narrow

PROMPTS = ["a red fox", "two blue cubes on a table", " ".join(["many"] * 300)]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    with narrow.encoders(tmp_path_factory.mktemp("text_encoders")) as paths:
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
