"""The nodes on a GPU, in a real ComfyUI: velocities of tiny random FLUX models beside their dense twins.

    python tests/nodes/on_gpu.py [--dynamic] [--out FILE]      a JSON line for each case; --dynamic: with dynamic VRAM

The suite runs on CPUs; `python -m benchmarks.speed.gpu` runs this file. Twin and ternary model compute in the dtype
that ComfyUI chooses for the card, so a distance of some 0.005 is bf16's; int8 activations add theirs.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import _pack  # noqa: E402

_pack.load()

from ternary_flux.benchmarks import comfyui  # noqa: E402
from ternary_flux.tests.nodes import adapters, tiny  # noqa: E402

CUDA = torch.device("cuda")
VARIANTS = {
    "plain": {},
    "rank 8": {"rank": 8},
    "float groups": {"float_groups": True},
    "base3": {"packing": "base3"},
    "two terms": {"terms": 2},
}
BOUND = 0.02  # of the distance; bf16's own is 0.003 to 0.007 here


def start(dynamic: bool) -> SimpleNamespace:
    """ComfyUI on the GPU, as its main.py sets it up."""
    sys.path.insert(0, str(comfyui.find()))
    if dynamic:
        import comfy_aimdo.control

        comfy_aimdo.control.init()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd

    if dynamic:
        devices = ((device.index, 0) for device in comfy.model_management.get_all_torch_devices())
        if not comfy_aimdo.control.init_devices(devices):
            raise RuntimeError("comfy-aimdo does not work here")
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
    from ternary_flux.nodes import loader

    return SimpleNamespace(sd=comfy.sd, model_management=comfy.model_management, loader=loader)


def run(comfy, model, load: bool = True) -> torch.Tensor:
    """The velocity for fixed random inputs, in the model's own dtype."""
    if load:
        comfy.model_management.load_models_gpu([model])
    dtype = model.model.get_dtype_inference()
    shapes = (1, 16, 16, 16), (1, 8, 128), (1, 64)
    latent, context, pooled = (torch.randn(shape, generator=tiny.generator(i)) for i, shape in enumerate(shapes))
    inputs = latent, torch.tensor([0.5]), context, pooled, torch.tensor([3.5])
    with torch.inference_mode():
        return model.model.diffusion_model(*(tensor.to(CUDA, dtype) for tensor in inputs)).float().clone()


def cases(comfy, folder: Path) -> dict[str, Callable[[], dict]]:
    """Name -> what measures it."""
    path = tiny.write(folder / "tiny.safetensors")

    def twin(file: Path = path):
        return comfy.sd.load_diffusion_model_state_dict(tiny.dense_twin(file))

    def form(variant: dict, activations: str) -> dict:
        file = tiny.write(folder / "variant.safetensors", **variant)
        model = comfy.loader.load(str(file), activations)
        distance = tiny.distance(run(comfy, model), run(comfy, twin(file)))
        return {"patcher": type(model).__name__, "distance": distance}

    def lora(loras) -> dict:
        plain, merged = run(comfy, twin()), run(comfy, adapters.apply(comfy, twin(), loras))
        model = comfy.loader.load(str(path), "full")
        before, patched = run(comfy, model), run(comfy, adapters.apply(comfy, model, loras))
        comfy.model_management.unload_all_models()
        after = tiny.distance(run(comfy, model), before)
        return {"effect": tiny.distance(merged, plain), "distance": tiny.distance(patched, merged), "left over": after}

    def partly_unloaded() -> dict:
        model = comfy.loader.load(str(path), "full", disable_dynamic=True)
        expected = run(comfy, model)
        freed = model.partially_unload(torch.device("cpu"), 400_000)
        return {"freed": freed, "distance": tiny.distance(run(comfy, model, load=False), expected)}

    def compiled(model) -> dict:
        expected = run(comfy, model)
        model.model.diffusion_model = torch.compile(model.model.diffusion_model)
        return {"distance": tiny.distance(run(comfy, model), expected)}

    def compiled_beside_dense() -> dict:
        dense = compiled(twin())["distance"]  # torch's compiler moves ComfyUI's own FLUX too
        return compiled(comfy.loader.load(str(path), "full", disable_dynamic=True)) | {"dense model": dense}

    return {
        f"{name}, {activations}": (lambda v=variant, a=activations: form(v, a))
        for name, variant in VARIANTS.items()
        for activations in ("full", "int8", "auto")
    } | {
        **{f"LoRA: {name}": (lambda loras=loras: lora(loras)) for name, loras in adapters.COMBINATIONS.items()},
        "partly unloaded": partly_unloaded,
        "compiled": compiled_beside_dense,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/nodes/on_gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--dynamic", action="store_true", help="with dynamic VRAM")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device")
    comfy, rows = start(options.dynamic), []
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in cases(comfy, Path(folder)).items():
            try:
                found = measure()
            except Exception as error:  # one broken case must not hide the others
                found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            right = "failed" not in found and found["distance"] < BOUND + 2 * found.get("dense model", 0)
            rows.append({"case": name, **found, "right": right})
            print(json.dumps(rows[-1]), flush=True)
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
