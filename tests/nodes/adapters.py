"""Random LoRAs of every kind for the tiny FLUX, and what ComfyUI makes of them on a dense model."""

import torch
from ternary_flux.tests.nodes import tiny

H = tiny.HIDDEN
QKV = "double_blocks.0.img_attn.qkv"

DIFFUSERS = {
    "transformer_blocks.0.attn.to_q": (H, H),
    "transformer_blocks.0.attn.to_k": (H, H),
    "transformer_blocks.0.attn.to_v": (H, H),
    "transformer_blocks.0.attn.to_out.0": (H, H),
    "transformer_blocks.0.norm1.linear": (6 * H, H),
    "transformer_blocks.0.ff.net.2": (H, 4 * H),
    "single_transformer_blocks.0.attn.to_q": (H, H),
    "single_transformer_blocks.0.proj_mlp": (4 * H, H),
    "single_transformer_blocks.0.proj_out": (H, 5 * H),
}
BFL = {
    "double_blocks.0.img_attn.qkv": (3 * H, H),
    "double_blocks.0.txt_mlp.0": (4 * H, H),
    "single_blocks.0.linear2": (H, 5 * H),
    "single_blocks.0.modulation.lin": (3 * H, H),
}


def diffusers_lora(seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    g = tiny.generator(seed)
    tensors = {}
    for name, (n, k) in DIFFUSERS.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, k, generator=g) * 0.05
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(n, rank, generator=g) * 0.05
    return tensors


def bfl_lora(seed: int, rank: int = 8, alpha: float = 4.0, **extra) -> dict[str, torch.Tensor]:
    g = tiny.generator(seed)
    tensors = {}
    for name, (n, k) in BFL.items():
        name = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, k, generator=g) * 0.05
        tensors[f"{name}.lora_up.weight"] = torch.randn(n, rank, generator=g) * 0.05
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        tensors |= {f"{name}.{key}": make(n, k, g) for key, make in extra.items()}
    return tensors


def dora(seed: int) -> dict[str, torch.Tensor]:
    return bfl_lora(seed, dora_scale=lambda n, k, g: torch.rand(n, 1, generator=g) + 0.5)


def lokr(seed: int) -> dict[str, torch.Tensor]:
    g = tiny.generator(seed)
    tensors = {}
    for name, (n, k) in BFL.items():
        name = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{name}.lokr_w1"] = torch.randn(4, 4, generator=g) * 0.05
        tensors[f"{name}.lokr_w2"] = torch.randn(n // 4, k // 4, generator=g) * 0.05
    return tensors


def difference(seed: int) -> dict[str, torch.Tensor]:
    g = tiny.generator(seed)
    return {f"diffusion_model.{name}.diff": torch.randn(shape, generator=g) * 0.01 for name, shape in BFL.items()}


def bias_difference(seed: int) -> dict[str, torch.Tensor]:
    g = tiny.generator(seed)
    return {f"diffusion_model.{name}.diff_b": torch.randn(n, generator=g) * 0.1 for name, (n, _) in BFL.items()}


def apply(comfy, model, loras):
    for lora, strength in loras:
        model, _ = comfy.sd.load_lora_for_models(model, None, dict(lora), strength, 0.0)
    return model


def merged(comfy, twin, loras) -> torch.Tensor:
    """What core computes with the LoRAs merged into the dense twin."""
    model = apply(comfy, twin(), loras)
    comfy.model_management.load_models_gpu([model])
    return tiny.run(model)


COMBINATIONS = {
    "diffusers keys": [(diffusers_lora(1), 1.0)],
    "bfl keys, alpha": [(bfl_lora(2), 1.0)],
    "negative": [(diffusers_lora(1), -0.7)],
    "stacked": [(diffusers_lora(1), -0.7), (bfl_lora(2), 1.3), (diffusers_lora(3, rank=2), 0.5)],
    "zero": [(bfl_lora(2), 0.0)],
    "dora": [(dora(4), 0.8)],
    "dora and lora": [(bfl_lora(2), 1.0), (dora(4), 0.8)],
    "lokr": [(lokr(5), 1.0)],
    "difference": [(difference(6), 1.0), (diffusers_lora(1), 1.0)],
    "bias": [(bias_difference(7), 1.0), (diffusers_lora(1), 1.0)],
}
