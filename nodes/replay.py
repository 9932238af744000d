"""The path of a sampler: what it asked a model and what the model answered, and another model asked the same."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .compat import core

comfy = core()


class Question(NamedTuple):
    """One evaluation of a model by a sampler, on the CPU."""

    x: Tensor  # [B, C, H, W], the noisy latents
    sigma: Tensor  # [B]
    denoised: Tensor  # [B, C, H, W], the answer


class Recorded:
    """A sampler that keeps what its model was asked and what it answered."""

    def __init__(self, sampler, path: list[Question]):
        self.sampler, self.path = sampler, path

    def __getattr__(self, name: str):
        return getattr(self.sampler, name)

    def sample(self, model_wrap, *args, **kwargs):
        function = self.sampler.sampler_function
        path = self.path

        def recorded(model, *args, **kwargs):
            return function(_Recorder(model, path), *args, **kwargs)

        return comfy.KSAMPLER(recorded, self.sampler.extra_options, self.sampler.inpaint_options).sample(
            model_wrap, *args, **kwargs
        )


class _Recorder:
    """The model that a sampler calls."""

    def __init__(self, model, path: list[Question]):
        self.model, self.path = model, path

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs) -> Tensor:
        denoised = self.model(x, sigma, **kwargs)
        self.path.append(Question(x.cpu(), sigma.cpu(), denoised.cpu()))
        return denoised


def replayer(path: list[Question], meet: Callable[[Question, Tensor], object]):
    """A "sampler" that asks its model what another one was asked, and hands each question to `meet` with the answer."""
    return comfy.KSAMPLER(_replay, {"path": path, "meet": meet})


@torch.no_grad()
def _replay(model, x, sigmas, extra_args=None, callback=None, disable=None, path=(), meet=None):
    for number, question in enumerate(path):
        asked = Question(*(tensor.to(x.device) for tensor in question))
        denoised = model(asked.x, asked.sigma, **(extra_args or {}))
        meet(asked, denoised)
        if callback is not None:
            state = {"x": asked.x, "i": number, "sigma": asked.sigma, "sigma_hat": asked.sigma, "denoised": denoised}
            callback(state)
    return x
