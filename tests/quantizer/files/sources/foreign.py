"""FLUX in the packagings that people have, written by hand: from BFL's tensors to files, independent of the readers."""

import json
import re
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]


def diffusers(state: State) -> State:
    """BFL's tensors under diffusers' names: q, k and v apart, scale and shift swapped."""
    out = {}
    hidden = state["img_in.weight"].shape[0]
    two = "single_stream_modulation.lin.weight" in state
    for name, tensor in state.items():
        block = re.match(r"(double|single)_blocks\.(\d+)\.(.+)\.(weight|bias|scale)$", name)
        if not block:
            out |= _outside(name, tensor, two)
            continue
        kind, number, module, end = block.groups()
        start = f"{'' if kind == 'double' else 'single_'}transformer_blocks.{number}."
        if end == "scale":
            stream = "added_" if module.startswith("txt") else ""
            out[f"{start}attn.norm_{stream}{'q' if 'query' in module else 'k'}.weight"] = tensor
        elif module.endswith("qkv"):
            heads = ("add_q_proj", "add_k_proj", "add_v_proj") if module.startswith("txt") else ("to_q", "to_k", "to_v")
            out |= {f"{start}attn.{head}.{end}": t for head, t in zip(heads, tensor.chunk(3), strict=True)}
        elif module == "linear1" and not two:
            parts = tensor.split([hidden, hidden, hidden, tensor.shape[0] - 3 * hidden])
            names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            out |= {f"{start}{part}.{end}": t for part, t in zip(names, parts, strict=True)}
        else:
            context = "_context" if module.startswith("txt") else ""
            theirs = {
                "attn.proj": "attn.to_add_out" if context else "attn.to_out.0",
                "mod.lin": f"norm1{context}.linear",
                "mlp.0": f"ff{context}.linear_in" if two else f"ff{context}.net.0.proj",
                "mlp.2": f"ff{context}.linear_out" if two else f"ff{context}.net.2",
                "linear1": "attn.to_qkv_mlp_proj",
                "linear2": "attn.to_out" if two else "proj_out",
                "modulation.lin": "norm.linear",
            }[re.sub(r"^(img|txt)_", "", module)]
            out[f"{start}{theirs}.{end}"] = tensor
    return {key: tensor.contiguous().clone() for key, tensor in out.items()}


def _outside(name: str, tensor: torch.Tensor, two: bool) -> State:
    if name.startswith("final_layer.adaLN_modulation.1"):
        shift, scale = tensor.chunk(2)
        return {name.replace("final_layer.adaLN_modulation.1", "norm_out.linear"): torch.cat((scale, shift))}
    embedder = re.match(r"(time|guidance|vector)_in\.(in|out)_layer\.(weight|bias)$", name)
    if embedder:
        what, layer, end = embedder.groups()
        what = {"time": "timestep", "guidance": "guidance", "vector": "text"}[what]
        home = "time_guidance_embed" if two else "time_text_embed"
        return {f"{home}.{what}_embedder.linear_{1 if layer == 'in' else 2}.{end}": tensor}
    names = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    module, end = name.rsplit(".", 1)
    theirs = names.get(module, module.replace("modulation_img.lin", "modulation_img.linear"))
    theirs = re.sub(r"modulation(_txt)?\.lin$", r"modulation\1.linear", theirs)
    return {f"{theirs}.{end}": tensor}


def shards(state: State, folder: Path, count: int = 3, stem: str = "diffusion_pytorch_model") -> list[Path]:
    """A folder of parts with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = sorted(state)
    where = {key: f"{stem}-{i * count // len(keys) + 1:05}-of-{count:05}.safetensors" for i, key in enumerate(keys)}
    for name in sorted(set(where.values())):
        save_file({key: state[key] for key in keys if where[key] == name}, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": where}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return [folder / name for name in sorted(set(where.values()))]


def pipeline(state: State, folder: Path, name: str) -> Path:
    """A whole pipeline of diffusers: the transformer in parts, and folders of other models."""
    shards(state, folder / "transformer")
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": f"{name}Transformer2DModel"}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": f"{name}Pipeline"}))
    (folder / "vae").mkdir()
    save_file({"decoder.conv_in.weight": torch.zeros(2)}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    """Whether quantizers take it: the matrices within blocks."""
    return tensor.ndim == 2 and "_blocks." in name


def fp8(state: State, dtype: torch.dtype) -> tuple[State, State]:
    """Every tensor cast to fp8, and what they are worth."""
    stored = {name: tensor.to(dtype) for name, tensor in state.items()}
    return stored, {name: tensor.float() for name, tensor in stored.items()}


def scaled(state: State, dtype: torch.dtype, suffix: str) -> tuple[State, State]:
    """The blocks' matrices in fp8 or int8 with a scale, and what everything is worth."""
    stored, worth = dict(state), dict(state)
    top = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    for name, tensor in state.items():
        if not is_matrix(name, tensor):
            continue
        if dtype == torch.int8:
            scale = (tensor.float().abs().amax(1, keepdim=True) / top).clamp_min(1e-12)
            codes = (tensor.float() / scale).round().to(dtype)
        else:
            scale = tensor.float().abs().amax() / top
            codes = (tensor.float() / scale).to(dtype)
        stored[name] = codes
        stored[f"{name.removesuffix('weight')}{suffix}"] = scale
        worth[name] = codes.float() * scale
    return stored, worth


def json_tensor(value: dict) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def with_json(stored: State, state: State, value: dict) -> State:
    """Every quantized Linear's JSON as a tensor beside it."""
    layers = [name.removesuffix(".weight") for name, tensor in state.items() if is_matrix(name, tensor)]
    return stored | {f"{layer}.comfy_quant": json_tensor(value) for layer in layers}


def write_gguf(state: State, path: Path, kind: str, arch: str = "flux") -> State:
    """A GGUF as ComfyUI's converters write it: matrices of blocks quantized, the rest in F32; what it is worth."""
    number = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[number][0]
    writer, worth = gguf.GGUFWriter(path, arch), {}
    for name, tensor in state.items():
        values = tensor.float().numpy()
        if is_matrix(name, tensor) and values.shape[1] % block == 0:
            data = _quantized(values, number)
            writer.add_tensor(name, data, raw_dtype=number)
            worth[name] = torch.from_numpy(np.array(gguf.dequantize(data, number)))
        else:
            writer.add_tensor(name, values)
            worth[name] = tensor.float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return worth


def _quantized(values: np.ndarray, number: "gguf.GGMLQuantizationType") -> np.ndarray:
    """Blocks of a type; for the K types, which the library only decodes, random codes with small factors."""
    try:
        return gguf.quantize(values, number)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[number]
        blocks = np.random.default_rng(0).integers(0, 256, (values.size // block, size), dtype=np.uint8)
        factor = np.array([0.01], np.float16).view(np.uint8)
        for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(number.name, (0, 2)):
            blocks[:, at : at + 2] = factor
        return blocks.reshape(values.shape[0], -1)
