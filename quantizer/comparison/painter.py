"""Models as ComfyUI runs them: its own loading, sampler and VAE, with a noise that is the same for all of them."""

import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files.checkpoint import Checkpoint
from ..pictures.conditioning import Conditioning

# What a FLUX is painted with in ComfyUI's own templates.
_SAMPLER, _SCHEDULER = "euler", "simple"


class Painter:
    """A model and a VAE of ComfyUI, and the settings of its sampler.

    shape      of a latent [C, H, W]
    guidance   for models with a guidance embedding; None: ComfyUI's 3.5
    """

    def __init__(
        self, model, vae, conditioning: Conditioning, shape: tuple[int, int, int], steps: int, guidance: float | None
    ):
        import comfy.samplers

        self.model, self.vae, self.conditioning, self.guidance = model, vae, conditioning, guidance
        self.sampler = comfy.samplers.sampler_object(_SAMPLER)
        self.sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), _SCHEDULER, steps)
        self.empty = torch.zeros(1, *shape)

    @torch.inference_mode()
    def paint(self, prompt: int, seed: int) -> tuple[np.ndarray, list]:
        """A picture uint8 [H, W, 3], as KSampler and "Save Image" make it of this seed, and the path to it."""
        from ...nodes.replay import Question, Recorded

        path: list[Question] = []
        latent = self._sample(Recorded(self.sampler, path), prompt, seed)
        pixels = self.vae.decode(latent)[0].float().cpu().numpy()
        return np.clip(255.0 * pixels, 0, 255).astype(np.uint8), path

    @torch.inference_mode()
    def velocities(self, prompt: int, path: list) -> Tensor:
        """Velocities fp32 [S, C, H, W] of the model under a prompt at the states of a path."""
        from ...nodes.replay import replayer

        found: list[Tensor] = []
        self._sample(replayer(path, lambda asked, denoised: found.append(_velocity(asked, denoised))), prompt, 0)
        return torch.cat(found)

    def _sample(self, sampler, prompt: int, seed: int) -> Tensor:
        import comfy.sample

        context, pooled = self.conditioning.batch([prompt])
        more = {} if pooled is None else {"pooled_output": pooled}
        positive = [[context, more | ({} if self.guidance is None else {"guidance": self.guidance})]]
        noise = comfy.sample.prepare_noise(self.empty, seed)
        return comfy.sample.sample_custom(
            self.model, noise, 1.0, sampler, self.sigmas, positive, positive, self.empty, disable_pbar=True, seed=seed
        )


def _velocity(asked, denoised: Tensor) -> Tensor:
    sigma = asked.sigma.float().view(-1, 1, 1, 1)
    return ((asked.x.float() - denoised.float()) / sigma).cpu()


def states_of(path: Sequence) -> dict[str, Tensor]:
    """A path as tensors: states `x` fp32 [S, C, H, W], their noise levels `sigma` [S], `velocity` [S, C, H, W]."""
    x, sigma = (torch.cat([question[part] for question in path]).float() for part in (0, 1))
    return {"x": x, "sigma": sigma, "velocity": torch.cat([_velocity(q, q.denoised) for q in path])}


def path_of(states: dict[str, Tensor]) -> list:
    """The path that `states_of` was given."""
    from ...nodes.replay import Question

    x, sigma = states["x"], states["sigma"]
    denoised = x - sigma.view(-1, 1, 1, 1) * states["velocity"]
    return [Question(x[i : i + 1], sigma[i : i + 1], denoised[i : i + 1]) for i in range(len(x))]


@torch.inference_mode()
def load_original(checkpoint: Checkpoint):
    """A dense FLUX, in any form that the quantizer reads, as ComfyUI's MODEL.

    ValueError where ComfyUI does not know the model.
    """
    import comfy.sd

    state = {}
    for name in checkpoint.names:
        value = checkpoint.tensor(name)
        state[name] = value.bfloat16() if checkpoint.lossy and value.dtype == torch.float32 else value
    model = comfy.sd.load_diffusion_model_state_dict(state, metadata={})
    if model is None:
        raise ValueError(f"{checkpoint.path}: this ComfyUI does not know {checkpoint.architecture.name}; update it")
    return model


@torch.inference_mode()
def load_ternary(path: Path):
    """A ternary FLUX as the node "Load Ternary FLUX" gives it. ValueError where this ComfyUI is too old for it."""
    from ...nodes import compat

    if problem := compat.problem():
        raise ValueError(problem)
    from ...nodes.loader import load

    return load(str(path))


def with_other_attention(model) -> tuple[object, str, str]:
    """The same model with another implementation of attention, and the names of its own and of the other one."""
    from comfy.ldm.modules import attention

    own = attention.optimized_attention
    other = attention.attention_sub_quad if own is not attention.attention_sub_quad else attention.attention_pytorch
    model = model.clone()
    options = model.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = lambda _, *args, **kwargs: other(*args, **kwargs)
    return model, *(function.__name__.removeprefix("attention_") for function in (own, other))


def release() -> None:
    """Free the memory of models that are not referred to any more."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()
