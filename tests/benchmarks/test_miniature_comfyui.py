"""The miniatures in the real ComfyUI with stock loaders: detection, autoencoder, sampling; the text encoder's node."""

import pytest
import torch
from safetensors.torch import load_file
from ternary_flux.benchmarks import comfyui, miniature
from ternary_flux.benchmarks.miniature import autoencoder, scenes
from ternary_flux.quantizer.pictures.sampler import default_shift

CAPTIONS = ["a red circle and a blue square", "three green crosses"]


@pytest.fixture(scope="module")
def comfy():
    comfyui.make_importable()
    import comfy.sample
    import comfy.sd
    import comfy.utils

    return comfy


@pytest.fixture(scope="module")
def vae(comfy, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "miniature-vae.safetensors"
    miniature.write_stock_autoencoder(path)
    state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    vae = comfy.sd.VAE(sd=state, metadata=metadata)
    vae.throw_exception_if_invalid()
    return vae


@pytest.fixture(scope="module")
def model(comfy):
    options = {"dtype": torch.float32}
    return comfy.sd.load_diffusion_model(str(miniature.TRANSFORMER), model_options=options)


@pytest.fixture(scope="module")
def node(comfy):
    from ternary_flux.benchmarks.miniature_node import MiniatureTextEncode

    return MiniatureTextEncode


@pytest.mark.slow
def test_stock_autoencoder_is_the_same_function(comfy, vae):
    latent_format = comfy.latent_formats.Flux()
    images = torch.from_numpy(scenes.render(list(scenes.training_scenes(4, seed=2))))
    latents = miniature.load_autoencoder().encode(images.movedim(3, 1))
    torch.testing.assert_close(latent_format.process_in(vae.encode(images)), latents, atol=2e-4, rtol=1e-4)
    decoded = vae.decode(latent_format.process_out(latents))
    torch.testing.assert_close(decoded, torch.from_numpy(miniature.decode(latents)), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_stock_loader_and_sampler_paint_the_same(comfy, model):
    assert type(model.model.model_config).__name__ == "FluxSchnell"
    context, pooled = miniature.encode_prompts(CAPTIONS)
    noise = torch.randn(2, *miniature.LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    positive = [[context, {"pooled_output": pooled}]]
    empty = torch.zeros_like(noise)
    theirs = comfy.sample.sample(model, noise, 8, 1.0, "euler", "simple", positive, positive, empty, seed=0)
    ours = miniature.sample(miniature.load_transformer(), context, pooled, noise, 8)
    torch.testing.assert_close(comfy.latent_formats.Flux().process_in(theirs), ours, atol=2e-3, rtol=1e-3)


@pytest.mark.slow
def test_flux2_is_the_same_function_in_comfyui(comfy, node):
    """Stock loader and sampler, with the node's mask over the tokens that ComfyUI pads FLUX.2's contexts with."""
    path = miniature.FLUX2 / miniature.TRANSFORMER.name
    model = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
    assert type(model.model.model_config).__name__ == "Flux2"
    noise = torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(0))
    positive = node.execute(CAPTIONS[0], "FLUX.2").result[0]
    assert positive[0][0].shape == (1, 512, 128)
    empty = torch.zeros_like(noise)
    theirs = comfy.sample.sample(model, noise, 4, 1.0, "euler", "simple", positive, positive, empty, seed=0)
    flux = miniature.load_transformer(path)
    ours = miniature.sample(flux, *miniature.encode_prompts(CAPTIONS[:1]), noise, 4, default_shift(flux.arch))
    torch.testing.assert_close(theirs, ours, atol=4e-3, rtol=2e-3)
    vae = comfy.sd.VAE(
        sd=autoencoder.stock_state(load_file(miniature.FLUX2 / miniature.AUTOENCODER.name)),
        metadata={"tae_latent_channels": 128},
    )
    vae.throw_exception_if_invalid()
    torch.testing.assert_close(vae.decode(ours), torch.from_numpy(miniature.decode(ours)), atol=1e-4, rtol=0)
    images = torch.from_numpy(scenes.render(list(scenes.training_scenes(2, seed=2))))
    latents = miniature.load_autoencoder(miniature.FLUX2 / miniature.AUTOENCODER.name).encode(images.movedim(3, 1))
    torch.testing.assert_close(vae.encode(images), latents, atol=2e-4, rtol=1e-4)


def test_node_encodes_prompts(node):
    output = node.execute("a red circle and a blue square")
    ((context, extra),) = output.result[0]
    ours = miniature.encode_prompts(["a red circle and a blue square"])
    assert torch.equal(context, ours[0]) and torch.equal(extra["pooled_output"], ours[1])
    assert "Every word is known" in str(output.ui.as_dict())


def test_node_names_unknown_words(node):
    output = node.execute("a photo of a red circle and a dog")
    assert "left out: dog" in str(output.ui.as_dict())
    with pytest.raises(ValueError, match="elephants.*Known words: a, and, two"):
        node.execute("elephants")
    assert node.execute("").result[0][0][0].shape == (1, 8, 128)


def test_node_schema(node):
    schema = node.GET_SCHEMA()
    assert schema.node_id == "MiniatureTextEncode" and [i.id for i in schema.inputs] == ["prompt", "flux"]
