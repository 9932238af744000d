"""On a GPU: every kernel against float64, the nodes in a real ComfyUI, and the quantizer beside the same run on the CPU.

python -m benchmarks.speed.gpu_checks kernels|nodes|quantizer      prints a line a case, and one JSON line at the end
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from ternary_flux.ops import TernaryWeight, ternary_linear
from torch import Tensor

CUDA = torch.device("cuda")
SHAPES = [(1, 384, 1100), (7, 3072, 3072), (16, 18432, 3072), (33, 200, 300), (64, 3072, 12288), (65, 3072, 3072),
          (300, 1000, 4096), (1025, 3072, 15360), (4608, 3072, 3072)]  # fmt: skip
FORMS = [("row", 0, 1), ("integer", 0, 1), ("float", 0, 1), ("integer", 16, 1), ("integer", 0, 2), ("row", 5, 2)]
BOUNDS = {"full": 1e-2, "int8": 2e-3, "e4m3": 1e-2}


def random_weight(n: int, k: int, scales: str, rank: int, planes: int) -> TernaryWeight:
    groups = planes * -(-k // 128)
    codes = torch.randint(-1, 2, (n, planes * k), dtype=torch.int8, device=CUDA)
    row, group = torch.rand(n, device=CUDA) * 0.01 + 1e-3, None
    if scales == "integer":
        group = torch.randint(1, 128, (groups, n), dtype=torch.uint8, device=CUDA)
    if scales == "float":
        row = (torch.rand(groups, n, device=CUDA) * 0.01 + 1e-3).to(torch.bfloat16)
    down = (torch.randn(rank, k, device=CUDA) * 0.1).bfloat16() if rank else None
    up = (torch.randn(n, rank, device=CUDA) * 0.1).bfloat16() if rank else None
    return TernaryWeight.from_codes(codes, row, group, down, up, planes)


def quantized(x: Tensor, activations: str) -> Tensor:
    """The activations that an 8-bit kernel sees, float64."""
    from ternary_flux.ops.backends.triton.quantize_rows import quantize_rows

    dtype = torch.int8 if activations == "int8" else torch.float8_e4m3fn
    codes, scale = quantize_rows(x, -(-x.shape[1] // 128) * 128, dtype)
    return codes[:, : x.shape[1]].double() * scale.double()[:, None]


def kernels() -> list[dict]:
    """Relative error against float64 of the product the kernel was asked for (its own quantized activations)."""
    from ternary_flux.ops.backends.triton import backend as triton
    from ternary_flux.ops.backends.triton import configs

    print(f"triton: {triton.unavailable(CUDA) or 'available'}; {configs.chip(CUDA)}", flush=True)
    rows = []
    for (m, n, k), (scales, rank, planes) in itertools.product(SHAPES, FORMS):
        weight = random_weight(n, k, scales, rank, planes)
        low_rank = 0.0 if weight.up is None else weight.up.double() @ weight.down.double()
        ternary = replace(weight, down=None, up=None).dequantize(torch.float32).double()
        for dtype, activations in itertools.product((torch.bfloat16, torch.float16), triton.formats(CUDA)):
            if activations == "int8" and scales == "float":
                continue
            x, bias = torch.randn(m, k, device=CUDA).to(dtype), torch.randn(n, device=CUDA).to(dtype)
            row = {"m": m, "n": n, "k": k, "scales": scales, "rank": rank, "terms": planes}
            row |= {"dtype": str(dtype).removeprefix("torch."), "activations": activations}
            try:
                y = ternary_linear(x, weight, bias, activations, "triton")
                seen = x.double() if activations == "full" else quantized(x, activations)
                expected = seen @ ternary.t() + bias.double()
                if rank:
                    expected += x.double() @ low_rank.t()
                row["error"] = float((y.double() - expected).norm() / expected.norm())
                again = ternary_linear(x, weight, bias, activations, "triton")
                row["repeats"] = bool(torch.equal(y, again))
            except Exception as error:  # one broken kernel must not hide the others
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            bound = BOUNDS[activations] * (2 if rank else 1)
            row["right"] = "failed" not in row and row["error"] < bound and row["repeats"]
            if not row["right"]:
                print(json.dumps(row), flush=True)
            rows.append(row)
    wrong = sum(not row["right"] for row in rows)
    print(f"kernels: {len(rows)} cases, {wrong} wrong", flush=True)
    return rows


def nodes(dynamic: bool = False) -> list[dict]:
    """The velocity of tiny random FLUX models on the GPU, as distance from the dense twin computed in the same dtype."""
    from ternary_flux.benchmarks.speed import transformer

    transformer.comfyui()
    if dynamic:  # what ComfyUI's main.py does before anything else
        import comfy_aimdo.control

        comfy_aimdo.control.init()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd
    from ternary_flux.nodes import loader
    from ternary_flux.tests.nodes import adapters, tiny

    if dynamic:
        devices = ((d.index, 0) for d in comfy.model_management.get_all_torch_devices())
        if not comfy_aimdo.control.init_devices(devices):
            raise RuntimeError("comfy-aimdo does not work here")
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True

    def run(model, load=True) -> Tensor:
        if load:
            comfy.model_management.load_models_gpu([model])
        dtype = model.model.get_dtype_inference()
        inputs = [torch.randn(*shape, generator=tiny.generator(i)).to(CUDA, dtype)
                  for i, shape in enumerate([(1, 16, 16, 16), (1, 8, 128), (1, 64)])]  # fmt: skip
        latent, context, pooled = inputs
        t, guidance = (torch.tensor([value], device=CUDA, dtype=dtype) for value in (0.5, 3.5))
        with torch.inference_mode():
            return model.model.diffusion_model(latent, t, context, pooled, guidance).float().clone()

    rows = []

    def case(name: str, error_of) -> None:
        try:
            found = error_of()
        except Exception as error:
            import traceback

            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        rows.append({"case": name, **found})
        print(json.dumps(rows[-1]), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        path = tiny.write(Path(folder) / "tiny.safetensors")
        variants = {"plain": {}, "rank 8": {"rank": 8}, "float groups": {"float_groups": True},
                    "base3": {"packing": "base3"}, "two terms": {"planes": 2}}  # fmt: skip
        for name, variant in variants.items():
            file = tiny.write(Path(folder) / "variant.safetensors", **variant)
            dense = run(comfy.sd.load_diffusion_model_state_dict(tiny.dense_twin(file)))
            for activations in ("full", "int8", "auto"):

                def error(file=file, dense=dense, activations=activations):
                    model = loader.load(str(file), activations)
                    found = tiny.distance(run(model), dense)
                    return {"patcher": type(model).__name__, "distance": found}

                case(f"{name}, {activations}", error)
        for name, loras in adapters.COMBINATIONS.items():

            def effect(loras=loras):
                twin = comfy.sd.load_diffusion_model_state_dict(tiny.dense_twin(path))
                plain = run(twin)
                merged = run(adapters.apply(comfy_names, twin, loras))
                model = loader.load(str(path), "full")
                before = run(model)
                patched = run(adapters.apply(comfy_names, model, loras))
                size = float((merged - plain).norm() / plain.norm())
                comfy.model_management.unload_all_models()
                again = run(model)
                return {
                    "effect": size,
                    "distance": tiny.distance(patched, merged),
                    "same_after": tiny.distance(again, before),
                }

            from types import SimpleNamespace

            comfy_names = SimpleNamespace(sd=comfy.sd)
            case(f"LoRA: {name}", effect)

        def compiled():
            model = loader.load(str(path), "full", disable_dynamic=True)
            expected = run(model)
            model.model.diffusion_model = torch.compile(model.model.diffusion_model)
            return {"patcher": type(model).__name__, "distance": tiny.distance(run(model), expected)}

        case("torch.compile", compiled)

        def partial():
            model = loader.load(str(path), "full", disable_dynamic=True)
            expected = run(model)
            freed = model.partially_unload(torch.device("cpu"), 400_000)
            found = tiny.distance(run(model, load=False), expected)
            return {"patcher": type(model).__name__, "freed": freed, "distance": found}

        case("partial unload", partial)
    return rows


def quantizer() -> list[dict]:
    """The miniature rounded, calibrated and distilled with the same amounts on the CPU and on the GPU."""
    from ternary_flux.benchmarks import quality
    from ternary_flux.benchmarks.quality_scores import Stage
    from ternary_flux.quantizer.distill import Settings
    from ternary_flux.quantizer.format import open_ternary
    from ternary_flux.quantizer.pipeline import distill_file

    scale = quality.Scale(prompts=2, seeds=1, pictures=96, states=1152, steps=100, calibration_states=512)
    rows, codes = [], {}
    for name in (CUDA.type, "cpu"):
        device = torch.device(name)
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            stage = Stage.load(quality.WEIGHTS, scale.prompts, scale.seeds, device)
            shop = quality.workshop(scale, work, stage, device, quality.WEIGHTS)
            marks = [("start", time.perf_counter())]
            shop.pool, shop.swapped  # noqa: B018
            marks.append(("pictures and velocities", time.perf_counter()))
            calibrated = work / "calibrated.safetensors"
            quality.calibrated(scale, shop, calibrated)
            marks.append(("calibrate", time.perf_counter()))
            row = {"device": name, "calibrated": shop.quality(calibrated).error}
            codes[name] = {
                layer: open_ternary(calibrated).weight(layer).codes() for layer in open_ternary(calibrated).layers
            }
            for trained in (False, True):
                marks.append(("", time.perf_counter()))
                target = work / f"distilled-{trained}.safetensors"
                settings = Settings(steps=scale.steps, batch=32, evaluate_every=50)
                distill_file(shop, calibrated, target, settings, codes=trained, checkpoint=work / f"{trained}.state")
                label = "distill, codes" if trained else "distill, scales"
                marks.append((label, time.perf_counter()))
                row[label] = shop.quality(target).error
            row["seconds"] = {label: b - a for (_, a), (label, b) in itertools.pairwise(marks) if label}
            rows.append(row)
            print(json.dumps(row), flush=True)
    same = [float((codes["cpu"][layer] == codes[CUDA.type][layer]).float().mean()) for layer in codes["cpu"]]
    rows.append({"codes equal on both devices": sum(same) / len(same), "least in a layer": min(same)})
    print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.gpu_checks", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kernels", "nodes", "nodes-dynamic", "quantizer"))
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device")
    torch.manual_seed(0)
    found = {"kernels": kernels, "nodes": nodes, "nodes-dynamic": lambda: nodes(True), "quantizer": quantizer}[
        options.what
    ]()
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
