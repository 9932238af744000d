"""The example workflows and the other nodes in a server: what each gives, and what it refuses."""

import json
import re
from dataclasses import replace
from itertools import chain

import pytest
from safetensors.torch import save_file
from ternary_flux.benchmarks import comfyui, make_workflows, miniature, workflow_graph
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.tests import builders
from ternary_flux.tests.nodes import adapters

pytestmark = [pytest.mark.server, pytest.mark.slow]

LANGUAGES = ("en", "zh", "ja", "ko", "de", "fr")
NODES = (
    "TernaryFluxLoader", "TernaryFluxQuantize", "TernaryFluxSave", "TernaryFluxInfo", "TernaryFluxCompare",
    "MiniatureTextEncode",
)  # fmt: skip
TERNARY = miniature.TERNARY.name
SMALL = "small-flux.safetensors"


@pytest.fixture(scope="module")
def server(graph_server):
    """With a dense model, too, that takes the miniature's prompts and is converted in less time."""
    arch = open_checkpoint(miniature.TRANSFORMER).architecture
    small = replace(arch, hidden=128, depth=1, depth_single=1)
    builders.write_flux(graph_server.base / "models" / "diffusion_models" / SMALL, small)
    return graph_server


@pytest.fixture(scope="module")
def known(server):
    return server.get_json("/object_info")


def run(server, graph: workflow_graph.Graph, **kwargs) -> dict[str, dict]:
    """Outputs by node type."""
    outputs = server.execute(graph.prompt(), **kwargs).outputs
    return {node.kind: outputs.get(str(node.number), {}) for node in graph.nodes}


def text(outputs: dict, kind: str) -> str:
    return "\n".join(outputs[kind]["text"])


@pytest.mark.parametrize("make", make_workflows.WORKFLOWS, ids=lambda make: make.__name__)
def test_a_workflow_is_what_is_written(known, make):
    name, title, graph = make_workflows.build(make, known)
    written = json.loads((make_workflows.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(graph.json(name)))
    note = written["nodes"][-1]["widgets_values"][0]
    assert note.startswith(f"## {title}\n") and "**Files**" in note
    files = set(make_workflows.files_of(graph))
    assert all(file in note for file in files - make_workflows.MINIATURE)
    stated = {m["name"]: m for node in written["nodes"] for m in node["properties"].get("models", ())}
    assert files & make_workflows.MODELS.keys() == stated.keys()
    assert all(m["url"].endswith(f"/{m['name']}") and m["directory"] for m in stated.values())


@pytest.mark.feature("Example workflows")
def test_the_miniature_paints_what_is_asked(server, known):
    """The first workflow somebody runs; 4 pictures, and the checker finds what was asked in most."""
    _, _, graph = make_workflows.build(make_workflows.miniature_text_to_image, known)
    outputs = run(server, graph)
    pictures = [picture_of(server, item) for item in outputs["SaveImage"]["images"]]
    assert len(pictures) == 4
    assert sum(bool(miniature.check(picture, "a red circle and a blue square")) for picture in pictures) >= 2
    assert "velocity error" in text(outputs, "TernaryFluxLoader")


def picture_of(server, item):
    import io

    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(server.image(item))).convert("RGB")) / 255


@pytest.mark.feature("Compare Models, Ternary FLUX Info")
def test_comparing_and_looking_inside(server, known):
    _, _, graph = make_workflows.build(make_workflows.miniature_dense_and_ternary, known)
    execution = server.execute(graph.prompt())
    by_title = {node.title: execution.outputs.get(str(node.number)) for node in graph.nodes}
    dense, ternary, difference = (
        picture_of(server, by_title[title]["images"][0]) for title in ("dense", "1.58-bit", "difference")
    )
    assert abs(abs(dense - ternary) - difference).max() < 0.01  # pictures of 8 bits
    report = next(execution.outputs[str(n.number)] for n in graph.nodes if n.kind == "TernaryFluxCompare")["text"][0]
    error = float(re.search(r"velocity error ([\d.]+) \(mean of 20", report)[1])
    assert 0 < error < 0.5
    said = next(execution.outputs[str(n.number)] for n in graph.nodes if n.kind == "TernaryFluxInfo")["text"][0]
    assert "bits per weight" in said and "backend eager" in said
    assert picture_of(server, by_title["error of each layer"]["images"][0]).std() > 0.05


def test_a_model_equals_itself(server, known):
    g = workflow_graph.Graph(known)
    model = g.add("TernaryFluxLoader", file=TERNARY)
    prompt = g.add("MiniatureTextEncode", prompt="a ring")
    compared = g.add(
        "TernaryFluxCompare", model=model, other=model, positive=prompt, negative=prompt, steps=2,
        latent_image=g.add("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        vae=g.add("VAELoader", vae_name=miniature.STOCK_AUTOENCODER),
    )  # fmt: skip
    g.add("PreviewImage", images=compared["difference"])
    outputs = run(server, g)
    assert "velocity error 0.0000" in text(outputs, "TernaryFluxCompare")
    assert picture_of(server, outputs["PreviewImage"]["images"][0]).max() == 0


@pytest.mark.feature("Save Ternary FLUX", "LoRAs become low-rank factors")
def test_saving_keeps_a_lora_as_factors(server, known):
    arch = open_ternary(miniature.TERNARY).architecture
    name = "double_blocks.0.img_attn.proj"
    shapes = {name: arch.linear_shapes[name]}
    folder = server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    save_file(adapters.bfl_lora(1, shapes=shapes), folder / "small.safetensors")
    server.get_json("/object_info")
    g = workflow_graph.Graph(known)
    model = g.add("TernaryFluxLoader", file=TERNARY)
    lora = g.add("LoraLoaderModelOnly", model=model, lora_name="small.safetensors", strength_model=0.5)
    saved = g.add("TernaryFluxSave", model=lora, filename_prefix="kept", packing="planes32")
    g.add("TernaryFluxInfo", file=saved["file"])
    outputs = run(server, g)
    path = next((server.base / "output" / "diffusion_models").glob("kept_*.safetensors"))
    before, after = open_ternary(miniature.TERNARY), open_ternary(path)
    assert after.layers[name].rank > before.layers[name].rank
    assert {plan.packing for plan in after.layers.values()} == {"planes32"}
    assert after.metadata.items() >= before.metadata.items()
    assert path.name in text(outputs, "TernaryFluxInfo")
    assert path.name in text(outputs, "TernaryFluxSave")
    again = workflow_graph.Graph(server.get_json("/object_info"))
    again.add("TernaryFluxInfo", file=path.name)
    assert "low rank" in text(run(server, again), "TernaryFluxInfo")
    run(server, g)
    *_, latest = sorted(path.parent.glob("kept_*"))
    run(server, g)  # from the cache
    assert sorted(path.parent.glob("kept_*"))[-1] == latest
    latest.unlink()
    run(server, g)
    assert latest.exists()


def test_dense_models_are_refused(server, known):
    g = workflow_graph.Graph(known)
    dense = g.add("UNETLoader", unet_name=miniature.TRANSFORMER.name, weight_dtype="default")
    g.add("TernaryFluxSave", model=dense)
    with pytest.raises(comfyui.WorkflowError, match="this MODEL is not ternary: save it with the node Save Model"):
        server.execute(g.prompt())


def quantizing(known, name, minutes=0.1, **inputs) -> workflow_graph.Graph:
    g = workflow_graph.Graph(known)
    prompts = g.add("MiniatureTextEncode", prompt="\n".join(miniature.prompts("train", "binding", 8)))
    inputs = {"file": SMALL, "conditioning": prompts} | inputs
    g.add("TernaryFluxQuantize", name=name, minutes=minutes, size="64x64", codes="freeze", sampler_steps=4, **inputs)
    return g


@pytest.mark.feature("Quantize FLUX to Ternary: progress, cancel, going on")
def test_quantizing_in_the_graph(server, known):
    """Cancelled at the first pictures, gone on with, done; then it is not done again, and other inputs do not replace
    it.
    """
    events = []

    def cancel(kind, data):
        events.append((kind, data))
        if kind == "progress" and data["node"] == "2":
            server.post_json("/interrupt", {})

    g = quantizing(known, "made-here")
    with pytest.raises(comfyui.WorkflowError) as stopped:
        server.execute(g.prompt(), on_event=cancel)
    assert stopped.value.details["node_type"] == "TernaryFluxQuantize"
    target = server.base / "models" / "diffusion_models" / "made-here.safetensors"
    assert not target.exists()
    (work,) = (server.base / "output" / "quantize").glob("made-here-*")
    kept = set((work / "run").rglob("*.safetensors"))

    outputs = run(server, g)
    report = text(outputs, "TernaryFluxQuantize")
    assert "What to expect:" in report and "velocity error" in report
    assert open_ternary(target).architecture.hidden == 128
    assert not work.exists() and kept is not None
    options = server.get_json("/object_info/TernaryFluxLoader")["TernaryFluxLoader"]["input"]["required"]["file"]
    assert target.name in str(options)

    stamp = target.stat()
    again = quantizing(server.get_json("/object_info"), "made-here")
    server.post_json("/free", {"unload_models": True, "free_memory": True})
    assert "already" in text(run(server, again), "TernaryFluxQuantize")
    assert target.stat().st_mtime_ns == stamp.st_mtime_ns
    with pytest.raises(comfyui.WorkflowError, match="made-here.safetensors exists, and was made from other inputs"):
        server.execute(quantizing(known, "made-here", minutes=0.2).prompt())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"file": TERNARY}, f"{TERNARY}: this is a ternary FLUX. Choose a dense FLUX"),
        ({"conditioning_file": "../secret.safetensors"}, "is not in ComfyUI's input folder"),
        ({"name": "../x"}, "give the name of a file, without a folder"),
        ({"size": "63x64"}, "63x64"),
        ({"size": "large"}, "sizes 'large' are not of the form"),
    ],
)
def test_what_quantizing_refuses(server, known, inputs, message):
    values = {"name": "refused"} | inputs
    name = values.pop("name")
    if "size" in values:
        graph = quantizing(known, name)
        graph.nodes[-1].inputs["size"] = values["size"]
    else:
        graph = quantizing(known, name, **values)
    events = []
    with pytest.raises(comfyui.WorkflowError, match=re.escape(message)) as refused:
        server.execute(graph.prompt(), on_event=lambda *event: events.append(event))
    prompts = str(graph.nodes[0].number)
    assert "conditioning_file" in inputs or not any(data.get("node") == prompts for _, data in events)
    if "name" in inputs:
        (error,) = refused.value.details["node_errors"][str(graph.nodes[-1].number)]["errors"]
        assert error["extra_info"]["input_name"] == "name"


def test_a_refused_conversion_leaves_no_folder(server, known):
    (server.base / "input").mkdir(exist_ok=True)
    (server.base / "input" / "prompts.safetensors").write_bytes(b"no prompts")
    graph = quantizing(known, "refused-later", conditioning_file="prompts.safetensors")
    with pytest.raises(comfyui.WorkflowError, match="prompts.safetensors"):
        server.execute(graph.prompt())
    assert not list((server.base / "output" / "quantize").glob("refused-later*"))


@pytest.mark.parametrize("node", NODES)
def test_every_node_is_documented_in_every_language(server, known, node):
    """Tooltips, search words, category, help page; names and tooltips in six languages."""
    definition = known[node]
    assert definition["description"] and definition["search_aliases"]
    cores = {d["category"] for d in known.values() if not d["python_module"].startswith("custom_nodes")}
    assert definition["category"] in cores | {category.rsplit("/", 1)[0] for category in cores}
    inputs = {**definition["input"]["required"], **definition["input"].get("optional", {})}
    assert all(spec[1]["tooltip"] for spec in inputs.values())
    assert all(definition["output_tooltips"])
    page = server.get(f"/extensions/comfyui-ternary-flux/docs/{node}.md").decode()
    assert page.startswith(f"# {definition['display_name']}\n")
    assert all(f"**{name}**" in page for name in chain(inputs, definition["output_name"]))
    translations = server.get_json("/i18n")
    for language in LANGUAGES:
        texts = translations[language]["nodeDefs"][node]
        assert texts["display_name"] and texts["description"]
        assert texts["inputs"].keys() == inputs.keys()
        assert all(entry["name"] and entry["tooltip"] for entry in texts["inputs"].values())
        assert {int(number) for number in texts["outputs"]} == set(range(len(definition["output"])))
        if language == "en":
            assert texts["description"] == definition["description"]
            assert all(texts["inputs"][name]["tooltip"] == spec[1]["tooltip"] for name, spec in inputs.items())
