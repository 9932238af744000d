"""Fixtures on the real ComfyUI, in process on the CPU."""

from types import SimpleNamespace

import pytest
import torch
from ternary_flux.benchmarks import comfyui
from ternary_flux.tests.nodes import tiny


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
    from ternary_flux.nodes import compat, layout, linear, loader, lora, patcher

    return SimpleNamespace(
        hooks=comfy.hooks,
        model_management=comfy.model_management,
        model_patcher=comfy.model_patcher,
        sd=comfy.sd,
        utils=comfy.utils,
        folder_paths=folder_paths,
        compat=compat,
        layout=layout,
        linear=linear,
        loader=loader,
        lora=lora,
        patcher=patcher,
    )


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    """A tiny ternary FLUX file."""
    return tiny.write(tmp_path_factory.mktemp("models") / "tiny-ternary.safetensors")


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
