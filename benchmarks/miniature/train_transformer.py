"""Trains the miniatures' transformers, and FLUX.1's text encoder: rectified flow on the latents of rendered scenes."""

import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...quantizer.files.architecture import Architecture
from ...quantizer.model.flux import Flux
from ...quantizer.pictures.sampler import default_shift, latent_shape
from . import autoencoder, scenes
from .checker import check
from .sampling import sample
from .text import CHANNELS, TextEncoder, tokens
from .trainer import Trainer

ARCHITECTURES = {
    1: Architecture(
        version=1, hidden=256, depth=2, depth_single=4, in_channels=16, out_channels=16,
        context_dim=CHANNELS, vec_dim=CHANNELS, guidance=False,
    ),
    # As many single blocks for a double one as in FLUX.2 [klein].
    2: Architecture(
        version=2, hidden=256, depth=1, depth_single=4, in_channels=128, out_channels=128,
        context_dim=CHANNELS, vec_dim=None, guidance=False,
    ),
}  # fmt: skip

# Mean and deviation of the logit of t. Objects are large and stand out from a flat background, so that what they are
# and where is decided at high noise; the usual mean of 0 puts only 14 % of the steps beyond t = 0.75. FLUX.2's sampler
# stays there for longer still, and other schedules visit what it leaves out.
NOISINESS = {1: (1.0, 1.0), 2: (1.0, 1.4)}

# FLUX.1 is guidance-distilled: it paints guided pictures without a second, unconditional forward. The last part of the
# training does the same with model guidance (https://arxiv.org/abs/2502.12154): the target is moved away from what the
# model itself predicts without the caption. At its fixed point this equals classifier-free guidance of 1 / (1 - PUSH).
DROPPED = 0.1  # share of captions left out, so that there is an unconditional prediction
GUIDED_FROM = 0.55  # of the steps
PUSH = 0.6


class Painter(nn.Module):
    """The transformer and the text encoder, which FLUX.2's miniature has of FLUX.1's and does not train."""

    def __init__(self, arch: Architecture = ARCHITECTURES[1]):
        super().__init__()
        self.flux = Flux(arch)
        self.text = TextEncoder(arch.context_dim)
        for name, parameter in self.flux.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            # Blocks start as the identity and the velocity as zero (adaLN-zero, https://arxiv.org/abs/2212.09748).
            if any(part in name for part in ("_mod.", "modulation", "final_layer.")):
                nn.init.zeros_(parameter)
        self.text.requires_grad_(arch.version == 1)

    def forward(self, latents: Tensor, t: Tensor, words: Tensor) -> Tensor:
        return self.flux(latents, t, *self.text(words))


def latents(work: Path, vae: Path, count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Latents [count, C, h, w] and word numbers [count, 8] of training scenes; kept in a file."""
    path = work / f"latents-{size}-{count}-{seed}.safetensors"
    if not path.exists():
        encoder = autoencoder.load(load_file(vae))
        drawn = list(scenes.training_scenes(count, seed))
        encoded, started = [], time.perf_counter()
        for i in range(0, count, 128):
            images = torch.from_numpy(scenes.render(drawn[i : i + 128], size)).movedim(3, 1)
            with torch.inference_mode():
                encoded.append(encoder.encode(images))
            if i % 3200 == 0:
                print(f"encoded {i}/{count}  {time.perf_counter() - started:.0f} s", flush=True)
        words = tokens([scene.prompt.text for scene in drawn])
        save_file({"latents": torch.cat(encoded).contiguous(), "words": words}, path)
    data = load_file(path)
    return data["latents"], data["words"]


def train(
    work: Path,
    output: Path,
    steps: int,
    size: int = 64,
    device: str = "cpu",
    seed: int = 0,
    pictures: int = 24_000,
    batch: int = 64,
    arch: Architecture = ARCHITECTURES[1],
    mixed: bool = False,
    evaluate_every: int = 250,
    checked: int = 24,
    stop: int | None = None,
    compiled: bool = True,
) -> Painter:
    """Train up to `steps`, or `stop` of them, resuming from `work`. Returns the averaged model.

    Every evaluation paints `checked` captions of each category (0: none) and writes the averaged weights to `output`,
    where the autoencoder is, and for FLUX.2 the text encoder. `mixed`: products in bf16.
    """
    torch.manual_seed(seed)
    model = Painter(arch).to(device)
    if arch.version == 2:
        model.text.load_state_dict(load_file(output / "text-encoder.safetensors"))
    blocks = [*model.flux.double_blocks.named_parameters(), *model.flux.single_blocks.named_parameters()]
    modulation = ("mod.lin.weight", "modulation.lin.weight")
    matrices = [p for name, p in blocks if p.ndim == 2 and not name.endswith(modulation)]
    trainer = Trainer(model, steps, 1.5e-3, decay=0.35, average=0.99, muon=matrices, mixed=mixed, seed=seed)
    checkpoint = work / "transformer.pt"
    trainer.resume(checkpoint)
    vae = output / "autoencoder.safetensors"
    clean, words = (x.to(device) for x in latents(work, vae, pictures, size, seed + 1))
    forward = torch.compile(model) if compiled else model

    def loss(generator: torch.Generator) -> Tensor:
        # An epoch is a permutation of its own, so that the order depends on the step alone.
        epoch, position = divmod(trainer.step, pictures // batch)
        order = torch.randperm(pictures, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
        chosen = order[position * batch : (position + 1) * batch].to(device)
        noise = torch.randn(batch, *clean.shape[1:], generator=generator).to(device)
        mean, deviation = NOISINESS[arch.version]
        t = torch.sigmoid(mean + deviation * torch.randn(batch, generator=generator)).to(device)
        level = t[:, None, None, None]
        picture = clean[chosen]
        noisy, target = (1 - level) * picture + level * noise, noise - picture
        dropped = torch.rand(batch, 1, generator=generator).to(device) < DROPPED
        captions = words[chosen].masked_fill(dropped, 0)
        velocity = forward(noisy, t, captions)
        if trainer.step >= GUIDED_FROM * steps:
            with torch.no_grad():
                push = PUSH * (velocity - forward(noisy, t, torch.zeros_like(captions)))
            target = target + push.masked_fill(dropped[..., None, None], 0)
        return (velocity - target).square().mean()

    recent = []
    while trainer.step < (stop or steps):
        recent.append(trainer.advance(loss))
        if trainer.step % 50 == 0:
            print(f"step {trainer.step}/{steps}  loss {np.mean(recent):.4f}  {trainer.seconds:.0f} s", flush=True)
            recent.clear()
        if trainer.step % evaluate_every == 0 or trainer.step == steps:
            trainer.save(checkpoint)
            averaged = Painter(arch).to(device)
            averaged.load_state_dict(trainer.ema)
            write(averaged, output, trainer, size)
            if not checked:
                continue
            accuracy = evaluate(averaged.eval(), autoencoder.load(load_file(vae)).to(device), size, device, checked)
            rows = "  ".join(f"{name} {value:.2f}" for name, value in accuracy.items())
            print(f"  held out: {np.mean(list(accuracy.values())):.3f}  ({rows})", flush=True)
    averaged = Painter(arch).to(device)
    averaged.load_state_dict(trainer.ema)
    return averaged.eval()


def evaluate(
    model: Painter,
    vae: autoencoder.Autoencoder,
    size: int,
    device: str,
    count: int,
    split: str = "held_out",
    seed: int = 0,
    steps: int = 20,
) -> dict[str, float]:
    """Checker accuracy per category on `count` captions each, on the model's own schedule."""
    generator, accuracy = torch.Generator().manual_seed(seed), {}
    for category in scenes.CATEGORIES:
        captions = scenes.prompts(split, category, count, seed)
        arch = model.flux.arch
        noise = torch.randn(count, *latent_shape(arch, (size, size)), generator=generator).to(device)
        latents = sample(model.flux, *model.text.encode(captions), noise, steps, default_shift(arch))
        with torch.inference_mode():
            painted = vae.decode(latents).clamp(0, 1)
        images = painted.movedim(1, 3).cpu().numpy()
        verdicts = [check(image, caption).correct for image, caption in zip(images, captions, strict=True)]
        accuracy[category] = float(np.mean(verdicts))
    return accuracy


def write(model: Painter, output: Path, trainer: Trainer, size: int) -> None:
    """`flux-miniature.safetensors` with BFL's names and `text-encoder.safetensors`, bf16."""
    version = model.flux.arch.version
    metadata = {
        "format": "pt",
        "modelspec.title": f"FLUX.{version} miniature",
        "modelspec.architecture": f"flux-{version}",
        "modelspec.license": "Apache-2.0",
        "steps": str(trainer.step),
        "seconds": f"{trainer.seconds:.0f}",
        "size": str(size),
        "seed": str(trainer.seed),
    }
    for name, part in (("flux-miniature", model.flux), ("text-encoder", model.text)):
        state = {key: value.bfloat16().contiguous() for key, value in part.state_dict().items()}
        save_file(state, output / f"{name}.safetensors", metadata)
