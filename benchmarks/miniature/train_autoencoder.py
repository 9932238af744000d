"""Fits the miniature's encoder and trains its decoder on rendered scenes: on crops (quick), then on whole pictures."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from . import scenes
from .autoencoder import CHANNELS, PATCH, Autoencoder, fit_components, load
from .checker import check
from .trainer import Trainer

POOL = 4096
BATCH = 16  # crops of half a picture's side; a quarter as many whole pictures
CROPS = 0.7  # the part of the steps that trains on crops
NOISE = 0.07  # added to latents in training, so that the decoder tolerates the transformer's small errors


def pictures(count: int, seed: int, size: int) -> Tensor:
    """Rendered training scenes, uint8 [count, 3, size, size]."""
    drawn = list(scenes.training_scenes(count, seed))
    batches = (scenes.render(drawn[i : i + 256], size) for i in range(0, count, 256))
    rendered = np.concatenate([np.round(batch * 255).astype(np.uint8) for batch in batches])
    return torch.from_numpy(rendered).movedim(3, 1).contiguous()


def train(
    work: Path, output: Path, steps: int, size: int, device: str, *, version: int = 1, start: Path, seed: int = 0
) -> None:
    """Fit the encoder, train the decoder up to `steps` (resuming from `work`), and write averaged weights in fp16.

    FLUX.2's decoder goes on from FLUX.1's, of the file `start`: the first half of its latents are the same.
    """
    torch.manual_seed(seed)
    pool = pictures(POOL, seed, size).to(device)
    model = Autoencoder(channels=CHANNELS[version]).to(device)
    components, offset = fit_components(pool.float() / 255, CHANNELS[version])
    model.components.copy_(components)
    model.offset.copy_(offset)
    with torch.inference_mode():
        latents = model.encode(pool.float() / 255)
    last = len(model.taesd_decoder) - 1
    rate = 3e-3
    with torch.no_grad():
        if version == 2:
            rate = 1e-3
            model.taesd_decoder[1].weight.zero_()
            for name, value in load_file(start).items():
                if name.startswith("taesd_decoder."):
                    model.state_dict()[name][tuple(map(slice, value.shape))] = value.float()
        else:  # the first pictures are a light grey
            model.taesd_decoder[last].weight.mul_(0.3)
            model.taesd_decoder[last].bias.fill_(0.9)
    hidden = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith(f"taesd_decoder.{last}.")]
    trainer = Trainer(model, steps, rate, warmup=20, decay=0.7, average=0.99, muon=hidden, seed=seed)
    checkpoint = work / "autoencoder.pt"
    trainer.resume(checkpoint)
    decode = torch.compile(model.decode)

    def loss(generator: torch.Generator) -> Tensor:
        whole = trainer.step >= steps * CROPS
        pixels = PATCH * model.fold
        count, side = (BATCH // 4, size // pixels) if whole else (BATCH, size // pixels // 2)
        chosen = torch.randint(POOL, (count,), generator=generator).to(device)
        y, x = torch.randint(size // pixels - side + 1, (2,), generator=generator).tolist()
        clean = latents[chosen, :, y : y + side, x : x + side]
        images = pool[chosen, :, y * pixels : (y + side) * pixels, x * pixels : (x + side) * pixels].float() / 255
        noise = torch.randn(clean.shape, generator=generator).to(device)
        error = decode(clean + NOISE * noise) - images
        return error.abs().mean() + 10 * error.square().mean()

    recent = []
    while trainer.step < steps:
        recent.append(trainer.advance(loss))
        if trainer.step % 50 == 0 or trainer.step == steps:
            print(f"step {trainer.step}/{steps}  loss {np.mean(recent):.4f}  {trainer.seconds:.0f} s", flush=True)
            recent.clear()
        if trainer.step % 300 == 0 or trainer.step == steps:
            trainer.save(checkpoint)
            averaged = model.state_dict() | trainer.ema
            metadata = {"steps": str(trainer.step), "seconds": f"{trainer.seconds:.0f}", "seed": str(seed)}
            state = {name: value.half().contiguous() for name, value in averaged.items()}
            save_file(state, output, {"format": "pt", "modelspec.license": "Apache-2.0", **metadata})
            print("  " + evaluate(load(averaged), size, device), flush=True)


def evaluate(model: Autoencoder, size: int, device: str, count: int = 300) -> str:
    """Round-trip accuracy of the checker, as a line of text."""
    drawn = list(scenes.training_scenes(count, seed=987_654))
    images = torch.from_numpy(scenes.render(drawn, size)).movedim(3, 1).to(device)
    with torch.inference_mode():
        latents = model.encode(images)
        decoded = model.decode(latents).clamp(0, 1)
    painted = decoded.movedim(1, 3).cpu().numpy()
    correct = np.mean([check(image, scene.prompt).correct for image, scene in zip(painted, drawn, strict=True)])
    psnr = -10 * F.mse_loss(decoded, images).log10().item()
    return f"round trip: accuracy {correct:.3f}, {psnr:.1f} dB; standard deviation of latents {latents.std():.3f}"
