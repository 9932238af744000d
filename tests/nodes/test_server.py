"""The pack in a real headless ComfyUI server, driven over its API as a browser drives it."""

import json
import re
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from safetensors.torch import save_file
from ternary_flux.benchmarks import comfyui
from ternary_flux.tests.nodes import adapters, tiny

pytestmark = pytest.mark.server

PACK = "comfyui-ternary-flux"
NODE = "TernaryFluxLoader"
STEPS = 3


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    models = base / "models"
    for folder in ("diffusion_models", "vae"):
        (models / folder).mkdir(parents=True)
    folder = models / "diffusion_models"
    path = tiny.write(folder / "tiny.safetensors")
    (folder / "truncated.safetensors").write_bytes(path.read_bytes()[:-1000])
    save_file({"lora_unet_single_blocks_0_linear1.lora_up.weight": torch.zeros(2)}, folder / "style.safetensors")
    (folder / "notes.txt").write_text("not a model")
    comfyui.make_importable()
    from comfy.taesd.taesd import TAESD

    save_file(TAESD(latent_channels=16).state_dict(), models / "vae" / "tiny-vae.safetensors")
    (models / "loras").mkdir()
    wider = {name: (2 * n, 2 * k) for name, (n, k) in adapters.BFL.items()}
    save_file(adapters.bfl_lora(1, shapes=wider), models / "loras" / "wide.safetensors")
    (folder / "flux").mkdir()
    shutil.copy(path, folder / "flux")
    helpers = {name: Path(__file__).with_name(name) for name in ("conditioning_pack.py", "name_pack.py")}
    with comfyui.Server(base, {PACK: comfyui.ROOT, **helpers}) as running:
        yield running


def workflow(file="tiny.safetensors", activations="auto", loader=NODE) -> dict:
    """API form: load, sample, decode, save."""
    inputs = {"file": file, "activations": activations}
    if loader == "UNETLoader":
        inputs = {"unet_name": file, "weight_dtype": "default"}
    nodes = {
        "model": (loader, inputs),
        "vae": ("VAELoader", {"vae_name": "tiny-vae.safetensors"}),
        "positive": ("TestRandomConditioning", {"seed": 1, "context_dim": 128, "vec_dim": 64}),
        "negative": ("TestRandomConditioning", {"seed": 2, "context_dim": 128, "vec_dim": 64}),
        "latent": ("EmptySD3LatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "sampler": (
            "KSampler",
            {
                "model": ["model", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["latent", 0],
                "seed": 5,
                "steps": STEPS,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        ),
        "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["vae", 0]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "test"}),
    }
    return {name: {"class_type": node, "inputs": inputs} for name, (node, inputs) in nodes.items()}


def test_the_node_is_listed_with_its_inputs(server):
    node = server.get_json(f"/object_info/{NODE}")[NODE]
    assert node["display_name"] == "Load Ternary FLUX"
    assert node["category"] == "model/loaders"
    assert node["output"] == ["MODEL"]
    required = node["input"]["required"]
    kind, file = required["file"]
    names = file["options"] if kind == "COMBO" else kind
    assert set(names) >= {"tiny.safetensors", "flux/tiny.safetensors", "truncated.safetensors", "style.safetensors"}
    assert "notes.txt" not in names
    assert names.index("tiny.safetensors") < names.index("style.safetensors")  # those that Run accepts come first
    kind, activations = required["activations"]
    assert (activations["options"] if kind == "COMBO" else kind) == ["auto", "int8", "full"]
    assert activations["advanced"] and "W1.58A8" in activations["tooltip"]
    kind, backend = node["input"]["optional"]["backend"]
    assert (backend["options"] if kind == "COMBO" else kind) == ["auto", "triton", "eager"]
    assert backend["advanced"] and "PyTorch" in backend["tooltip"]
    assert {"1.58-bit", "load diffusion model", "low vram"} <= set(node["search_aliases"])


def test_help_and_translations_are_served(server):
    page = server.get(f"/extensions/{PACK}/docs/{NODE}.md").decode()
    assert page.startswith("# Load Ternary FLUX")
    node = server.get_json(f"/object_info/{NODE}")[NODE]
    inputs = node["input"]["required"] | node["input"]["optional"]
    assert all(f"**{name}**" in page for name in inputs)
    translations = server.get_json("/i18n")
    english = translations["en"]["nodeDefs"][NODE]
    assert english["description"] == node["description"]
    for name, (_, options) in inputs.items():
        assert english["inputs"][name]["tooltip"] == options["tooltip"]
    for language in ("en", "zh", "ja", "ko", "de", "fr"):
        translated = translations[language]["nodeDefs"][NODE]
        assert translated.keys() == english.keys() and translated["inputs"].keys() == inputs.keys()
        for name, texts in translated["inputs"].items():
            assert texts["name"] and texts["tooltip"]
            choices = [line.split(":")[0] for line in english["inputs"][name]["tooltip"].splitlines()[1:]]
            assert all(choice in texts["tooltip"] for choice in choices)


@pytest.mark.feature("Progress and previews while sampling")
def test_a_picture_is_sampled_with_progress(server):
    execution = server.execute(workflow())
    steps = [data["value"] for kind, data in execution.events if kind == "progress" and data["node"] == "sampler"]
    # ComfyUI leaves out steps that follow each other too quickly.
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    assert any(kind == "progress" and data["node"] == "model" for kind, data in execution.events)
    (image,) = execution.outputs["save"]["images"]
    assert server.image(image).startswith(b"\x89PNG")
    (status,) = execution.outputs["model"]["text"]
    assert status.splitlines()[0] == "tiny.safetensors"
    assert "FLUX.1" in status and "13 ternary layers" in status and "bits per weight" in status and "eager" in status


def test_a_converted_again_file_is_loaded_again(server):
    server.execute(workflow())
    cached = server.execute(workflow())
    assert "model" in cached_nodes(cached)
    assert cached.outputs["model"]["text"]  # shown again although the node did not run
    tiny.write(server.base / "models" / "diffusion_models" / "tiny.safetensors", seed=3)
    assert "model" not in cached_nodes(server.execute(workflow()))


def test_unloading_and_running_again(server):
    """The button Unload Models, which the server handles outside inference mode."""
    for seed in (11, 12, 13):
        graph = workflow()
        graph["sampler"]["inputs"]["seed"] = seed
        server.execute(graph)
        server.post_json("/free", {"unload_models": True, "free_memory": seed == 12})


@pytest.mark.feature("Cancel while sampling, then Run")
def test_cancelling_and_running_again(server):
    graph = workflow()
    graph["sampler"]["inputs"] |= {"steps": 2000, "seed": 21}

    def cancel(kind, data):
        if kind == "progress" and data["node"] == "sampler":
            server.post_json("/interrupt", {})

    with pytest.raises(comfyui.WorkflowError) as stopped:
        server.execute(graph, on_event=cancel)
    assert stopped.value.details["node_id"] == "sampler"
    assert server.execute(workflow()).outputs["save"]["images"]


@pytest.mark.feature("File names from another node, and with the other separator of folders")
@pytest.mark.parametrize("name", ["flux/tiny.safetensors", "flux\\tiny.safetensors"])
@pytest.mark.parametrize("linked", [False, True])
def test_names_from_other_systems_and_other_nodes(server, name, linked):
    graph = workflow(name)
    if linked:
        graph["name"] = {"class_type": "TestAnyName", "inputs": {"value": name}}
        graph["model"]["inputs"]["file"] = ["name", 0]
    assert server.execute(graph).outputs["save"]["images"]


@pytest.mark.feature("A file that was replaced is loaded again", "also where its name comes from another node")
def test_a_replaced_file_is_loaded_again_by_a_linked_name(server):
    graph = workflow()
    graph["name"] = {"class_type": "TestAnyName", "inputs": {"value": "replaced.safetensors"}}
    graph["model"]["inputs"]["file"] = ["name", 0]
    path = server.base / "models" / "diffusion_models" / "replaced.safetensors"
    for seed in (1, 2):
        tiny.write(path, seed=seed)
        assert "model" not in cached_nodes(server.execute(graph))
        assert "model" in cached_nodes(server.execute(graph))
        path.unlink()


def test_a_linked_name_is_checked_when_it_runs(server):
    graph = workflow()
    graph["name"] = {"class_type": "TestAnyName", "inputs": {"value": "style.safetensors"}}
    graph["model"]["inputs"]["file"] = ["name", 0]
    with pytest.raises(comfyui.WorkflowError) as failed:
        server.execute(graph)
    assert failed.value.details["exception_message"].startswith("style.safetensors: this is a LoRA")


def test_a_saved_model_is_offered_and_runs(server):
    graph = workflow()
    graph["lora"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["model", 0], "lora_name": "wide.safetensors", "strength_model": 1.0},
    }
    inputs = {"model": ["lora", 0], "filename_prefix": "diffusion_models/saved"}
    server.execute(graph | {"store": {"class_type": "ModelSave", "inputs": inputs}})
    lines = [line for line in server.log().splitlines() if "do not fit" in line]
    assert len(lines) == 1 and "4 of 4 layers do not fit: made for another model" in lines[0]
    kind, options = server.get_json(f"/object_info/{NODE}")[NODE]["input"]["required"]["file"]
    names = options["options"] if kind == "COMBO" else kind
    (saved,) = [name for name in names if name.startswith("saved")]
    assert names.index(saved) < names.index("style.safetensors")
    assert server.execute(workflow(saved)).outputs["save"]["images"]


def cached_nodes(execution: comfyui.Execution) -> set[str]:
    return {node for kind, data in execution.events if kind == "execution_cached" for node in data["nodes"]}


@pytest.mark.feature("Wrong and damaged files", "refused before anything runs, with what to do")
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("truncated.safetensors", "truncated.safetensors: .*the file is truncated"),
        ("style.safetensors", "this is a LoRA. Move it to models/loras"),
        ("gone.safetensors", "gone.safetensors is not in models/diffusion_models"),
        ("../../../etc/passwd", "is not in models/diffusion_models"),
    ],
)
def test_bad_files_are_refused_when_queued(server, file, message):
    with pytest.raises(comfyui.WorkflowError, match=message) as refused:
        server.execute(workflow(file))
    (error,) = refused.value.details["node_errors"]["model"]["errors"]
    assert error["type"] == "custom_validation_failed"
    assert error["extra_info"]["input_name"] == "file"


def test_the_stock_loader_names_the_node(server):
    with pytest.raises(comfyui.WorkflowError) as failed:
        server.execute(workflow(loader="UNETLoader"))
    message = failed.value.details["exception_message"]
    assert "this FLUX model is ternary (ternary_v1): load it with the node Load Ternary FLUX" in message


def test_the_log_has_no_complaints_about_the_pack(server):
    log = server.log()
    assert "IMPORT FAILED" not in log
    assert len(re.findall(r"Ternary FLUX \d+\.\d+\.\d+: ", log)) == 1
    assert not [line for line in log.splitlines() if PACK in line and ("rror" in line or "arning" in line)]


WORKFLOWS = sorted((comfyui.ROOT / "workflows").glob("*.json"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflows_fit_this_comfyui(server, path):
    """Every node, input and link of an example exists here, and the template browser serves it with its picture."""
    graph, known = json.loads(path.read_text(encoding="utf-8")), server.get_json("/object_info")
    nodes = {node["id"]: node for node in graph["nodes"] if node["type"] != "MarkdownNote"}
    assert any(node["type"].startswith("TernaryFlux") for node in nodes.values())
    for node in nodes.values():
        declared = known[node["type"]]["input"]
        names = {**declared.get("required", {}), **declared.get("optional", {})}
        assert {entry["name"] for entry in node["inputs"]} <= set(names)
        assert set(declared.get("required", {})) <= {entry["name"] for entry in node["inputs"]}
    for link, source, output, target, slot, kind in graph["links"]:
        assert link in nodes[source]["outputs"][output]["links"] and nodes[target]["inputs"][slot]["link"] == link
        assert known[nodes[source]["type"]]["output"][output] == kind == nodes[target]["inputs"][slot]["type"]
    assert path.stem in server.get_json("/workflow_templates")[PACK]
    assert server.get(f"/api/workflow_templates/{PACK}/{quote(path.stem)}.jpg")
