"""The miniature's scenes, checker, text encoder and training loop, and pictures of the trained weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from ternary_flux.benchmarks import miniature
from ternary_flux.benchmarks.miniature import autoencoder, scenes, text
from ternary_flux.benchmarks.miniature.train_transformer import Painter, train
from ternary_flux.benchmarks.miniature.trainer import Trainer
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.pictures import conditioning

TINY = Architecture(1, 128, 1, 1, 16, 16, context_dim=text.CHANNELS, vec_dim=text.CHANNELS, guidance=False)


def accuracy(images, captions):
    return np.mean([miniature.check(i, c).correct for i, c in zip(images, captions, strict=True)])


def rendered(captions, seed=0, size=64):
    rng = np.random.default_rng(seed)
    return scenes.render([scenes.draw(scenes.parse(caption), rng) for caption in captions], size)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("category", scenes.CATEGORIES)
def test_checker_accepts_ground_truth_and_rejects_other_captions(category, split):
    captions = miniature.prompts(split, category, 60, seed=3)
    images = rendered(captions)
    assert accuracy(images, captions) >= 0.99
    others = miniature.prompts("train", category, 60, seed=4)
    pairs = [(image, other) for image, own, other in zip(images, captions, others, strict=True) if own != other]
    # Two captions of `two` mean the same picture; a position's opposite has its objects swapped.
    assert np.mean([miniature.check(i, other).correct for i, other in pairs]) <= (0.15 if category == "two" else 0.05)


def test_checker_at_twice_the_size():
    captions = [c for category in scenes.CATEGORIES for c in miniature.prompts("train", category, 10)]
    assert all(miniature.check(image, c) for image, c in zip(rendered(captions, size=128), captions, strict=True))


@pytest.mark.parametrize("category", scenes.CATEGORIES)
def test_captions_are_read_back(category):
    everything = scenes.all_prompts(category)
    assert [scenes.parse(prompt.text) for prompt in everything] == everything
    assert len({prompt.text for prompt in everything}) == len(everything)


def test_caption_outside_the_grammar():
    with pytest.raises(ValueError, match="'a dog' .*shapes are|'a dog': shapes are"):
        scenes.parse("a dog")
    with pytest.raises(ValueError, match="not a caption"):
        scenes.parse("red")


def test_training_has_no_held_out_combination():
    drawn = list(scenes.training_scenes(3000, seed=11))
    assert {scene.prompt.category for scene in drawn} == set(scenes.CATEGORIES)
    assert not any(scene.prompt.held_out for scene in drawn)
    pairs = [pair for scene in drawn for pair in zip(scene.colours, scene.shapes, strict=True)]
    shown = {(scenes.COLOURS[colour], scenes.SHAPES[shape]) for colour, shape in pairs}
    assert len(shown) == 32 and not shown & scenes.HELD_OUT_COLOURS
    seen = {scene.prompt.text for scene in drawn}
    for category in scenes.CATEGORIES[1:]:
        held_out = miniature.prompts("held_out", category, 100)
        assert not seen & set(held_out) and all(scenes.parse(caption).held_out for caption in held_out)


def test_scenes_are_deterministic():
    first, second = (scenes.render(list(scenes.training_scenes(8, seed=5))) for _ in range(2))
    assert np.array_equal(first, second)


def test_prompts_cover_their_pool_before_they_repeat():
    assert len(set(miniature.prompts("train", "position", 64))) == 64
    assert miniature.prompts("train", "binding", 5, seed=1) != miniature.prompts("train", "binding", 5, seed=2)


def test_text_encoder_names_unknown_words():
    known, unknown = text.tokenize("A photo of a RED dog, left of 2 circles!")
    assert [text.WORDS[i] for i in known] == ["a", "red", "left", "of", "two", "circles"]
    assert unknown == ["dog"]
    assert text.tokens(["", "a ring " * 20]).shape == (2, text.LENGTH)


@pytest.mark.slow
def test_autoencoder_round_trip():
    captions = [c for category in scenes.CATEGORIES for c in miniature.prompts("train", category, 25)]
    images = rendered(captions)
    latents = miniature.load_autoencoder().encode(torch.from_numpy(images).movedim(3, 1))
    assert latents.shape == (len(captions), *miniature.LATENT_SHAPE)
    assert 0.8 < latents.std() < 1.2
    decoded = miniature.decode(latents)
    assert accuracy(decoded, captions) >= 0.985


@pytest.mark.slow
def test_trained_weights_paint_held_out_captions():
    captions = [c for category in scenes.CATEGORIES for c in miniature.prompts("held_out", category, 4)]
    noise = torch.randn(len(captions), *miniature.LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    latents = miniature.sample(miniature.load_transformer(), *miniature.encode_prompts(captions), noise)
    assert accuracy(miniature.decode(latents), captions) >= 0.8


def test_weights_are_small_and_complete():
    files = (miniature.TRANSFORMER, miniature.AUTOENCODER, miniature.TEXT_ENCODER)
    assert sum(file.stat().st_size for file in files) <= 19.5e6
    assert {value.dtype for value in load_file(miniature.TRANSFORMER).values()} == {torch.bfloat16}


def test_conditioning_file(tmp_path):
    captions = miniature.write_conditioning(tmp_path / "prompts.safetensors", 20)
    read = conditioning.read(tmp_path / "prompts.safetensors")
    assert list(read.prompts) == captions and not any(scenes.parse(caption).held_out for caption in captions)
    context, pooled = miniature.encode_prompts(captions)
    torch.testing.assert_close(read.batch([3])[0], context[3:4], atol=0.02, rtol=0.01)
    torch.testing.assert_close(read.batch([3])[1], pooled[3:4], atol=0.02, rtol=0.01)


@pytest.mark.slow
def test_transformer_training_resumes_bit_for_bit(tmp_path):
    states = []
    for name, stops in (("once", [6]), ("twice", [3, 6])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "autoencoder.safetensors").write_bytes(miniature.AUTOENCODER.read_bytes())
        for stop in stops:
            sizes = {"pictures": 48, "batch": 16, "evaluate_every": 3, "checked": 0}
            run = train(folder, folder, 6, arch=TINY, stop=stop, compiled=False, **sizes)
        states.append(run.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_trainer_with_muon_resumes_bit_for_bit(tmp_path):
    def trained(stop, checkpoint):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        trainer = Trainer(model, 10, 1e-2, warmup=2, muon=[model[0].weight])
        trainer.resume(checkpoint)
        while trainer.step < stop:
            trainer.advance(lambda g: model(torch.randn(2, 4, 8, 8, generator=g)).square().mean())
        trainer.save(checkpoint)
        return torch.cat([p.flatten() for p in (*model.parameters(), *trainer.ema.values())])

    trained(4, tmp_path / "twice.pt")
    assert torch.equal(trained(10, tmp_path / "once.pt"), trained(10, tmp_path / "twice.pt"))


def test_transformer_starts_with_zero_velocity():
    painter = Painter(TINY)
    out = painter(torch.randn(2, *miniature.LATENT_SHAPE), torch.rand(2), text.tokens(["a ring", "two crosses"]))
    assert not out.any()


def test_narrow_decoder_is_padded_with_zeros():
    state = autoencoder.Autoencoder(8).state_dict()
    stock = autoencoder.stock_state(state)
    assert stock["taesd_decoder.3.conv.0.weight"].shape == (64, 64, 3, 3)
    padded = stock["taesd_decoder.3.conv.0.weight"]
    assert not padded[8:].any() and not padded[:, 8:].any()
