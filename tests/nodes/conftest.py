"""Fixtures on the real ComfyUI, in process on the CPU."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from ternary_flux.benchmarks import comfyui
from ternary_flux.tests.nodes import adapters, tiny
from ternary_flux.tests.nodes import graph_server as graph


@pytest.fixture(scope="session")
def comfy() -> SimpleNamespace:
    """ComfyUI's modules and this pack's node modules."""
    comfyui.make_importable()
    import comfy.hooks
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd
    import comfy.utils
    import folder_paths
    from ternary_flux.nodes import compat, files, layout, linear, loader, lora, patcher

    return SimpleNamespace(
        hooks=comfy.hooks,
        model_management=comfy.model_management,
        model_patcher=comfy.model_patcher,
        sd=comfy.sd,
        utils=comfy.utils,
        folder_paths=folder_paths,
        compat=compat,
        files=files,
        layout=layout,
        linear=linear,
        loader=loader,
        lora=lora,
        patcher=patcher,
    )


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    """A tiny ternary FLUX file; every second Linear has column scales."""
    return tiny.write(tmp_path_factory.mktemp("models") / "tiny-ternary.safetensors", columns="half")


@pytest.fixture(scope="session")
def twin(comfy, path):
    """Makes the dense fp32 twin of the tiny model, loaded by ComfyUI's own loader."""
    state = tiny.dense_twin(path)

    def make():
        return comfy.sd.load_diffusion_model_state_dict(dict(state), model_options={"dtype": torch.float32})

    return make


@pytest.fixture(scope="session")
def reference(twin):
    """The dense twin's velocity."""
    return tiny.run(twin())


@pytest.fixture(scope="session")
def mixed(path, tmp_path_factory):
    """The tiny file with one Linear in ComfyUI's int8 format, as the quantizer's mixed profile writes it."""
    state = dict(load_file(path))
    weight = tiny.dense_twin(path)[f"{adapters.QKV}.weight"]
    del state[f"{adapters.QKV}.weight_group"], state[f"{adapters.QKV}.weight_column"]
    scale = weight.abs().amax(1, keepdim=True) / 127
    state[f"{adapters.QKV}.weight"] = (weight / scale).round().to(torch.int8)
    state[f"{adapters.QKV}.weight_scale"] = scale
    configuration = json.dumps({"format": "int8_tensorwise"}).encode()
    state[f"{adapters.QKV}.comfy_quant"] = torch.tensor(list(configuration), dtype=torch.uint8)
    file = tmp_path_factory.mktemp("mixed") / "mixed.safetensors"
    save_file(state, file)
    return file


@pytest.fixture(scope="session")
def graph_server(tmp_path_factory):
    """A server with the pack and the miniature's files."""
    with graph.start(tmp_path_factory.mktemp("graph")) as running:
        yield running
