"""Which backend multiplies by a layer's weight: asked once per layer, at load, never per call."""

from dataclasses import dataclass
from types import ModuleType

import torch

from .backends import eager
from .backends.triton import backend as triton

BACKENDS: dict[str, ModuleType] = {backend.NAME: backend for backend in (triton, eager)}
ACTIVATIONS = ("auto", "int8", "e4m3", "full")


@dataclass(frozen=True)
class Choice:
    """A backend (module with `linear`), the activations it will use ("int8", "e4m3" or "full"), and why."""

    backend: ModuleType
    activations: str
    reason: str


def resolve(device: torch.device | str, activations: str = "auto") -> Choice:
    """The best backend on `device`. "auto" means 8 bits where a kernel makes them fast, and full precision elsewhere.

    Activations that the chosen backend does not multiply fast become int8 where it has that, and full otherwise.
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, not {activations!r}")
    device = torch.device(device)
    reasons = []
    for backend in BACKENDS.values():
        refusal = backend.unavailable(device)
        if refusal is None:
            break
        reasons.append(f"{backend.NAME}: {refusal}")
    formats = backend.formats(device)
    if activations == "auto":
        activations = formats[0]
    elif activations not in formats:
        instead = "int8" if "int8" in formats else "full"
        reasons.append(f"{backend.NAME}: no {activations} kernel for {device}, {instead} instead")
        activations = instead
    return Choice(backend, activations, "; ".join(reasons) or f"{backend.NAME} runs on {device}")
