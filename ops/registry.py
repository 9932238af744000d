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


def resolve(
    device: torch.device | str,
    activations: str = "auto",
    backend: str = "auto",
    *,
    float_groups: bool = False,
    full_precision: bool = False,
) -> Choice:
    """How to multiply on `device`: by the best backend there, or by the one that is named.

    activations     "auto" means 8 bits where a kernel makes them fast (int8, or e4m3 where that is faster), and full
                    precision elsewhere and for weights that ask for it (`full_precision`). Activations that the backend
                    does not multiply fast become int8 where it has that, and full otherwise.
    float_groups    whether the weight has float group scales, which int8 cannot have: full takes its place.

    Raises ValueError where the named backend cannot run, with the reason.
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, not {activations!r}")
    device, reasons = torch.device(device), []
    for module in BACKENDS.values() if backend == "auto" else [BACKENDS[backend]]:
        refusal = module.unavailable(device)
        if refusal is None:
            break
        if backend != "auto":
            raise ValueError(f"the backend {backend} cannot run here: {refusal}. Choose auto")
        reasons.append(f"{module.NAME}: {refusal}")
    formats = module.formats(device)
    if activations == "auto":
        activations = "full" if full_precision else formats[0]
    elif activations not in formats:
        instead = "int8" if "int8" in formats else "full"
        reasons.append(f"{module.NAME}: no {activations} kernel for {device}, {instead} instead")
        activations = instead
    if activations == "int8" and float_groups:
        activations = "full"
        reasons.append(f"{module.NAME}: int8 needs row x integer scales, full instead")
    return Choice(module, activations, "; ".join(reasons) or f"{module.NAME} runs on {device}")
