"""`python -m benchmarks.make_workflows`: writes the example graphs of workflows/ for the ComfyUI that is found.

Every graph is a function below, whose first line is the file's name: nodes with their inputs by name, and a note.
"""

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from ternary_flux.benchmarks import comfyui, miniature
from ternary_flux.benchmarks.miniature import scenes
from ternary_flux.benchmarks.workflow_graph import Graph, Node, Output

FOLDER = comfyui.ROOT / "workflows"
_HUGGING_FACE = "https://huggingface.co"
_COMFY = f"{_HUGGING_FACE}/Comfy-Org"
_ENCODERS = f"{_HUGGING_FACE}/comfyanonymous/flux_text_encoders/resolve/main"
# name -> (folder, address) of the files that exist for download
MODELS = {
    "flux1-dev.safetensors": ("diffusion_models", f"{_COMFY}/flux1-dev/resolve/main/flux1-dev.safetensors"),
    "t5xxl_fp16.safetensors": ("text_encoders", f"{_ENCODERS}/t5xxl_fp16.safetensors"),
    "clip_l.safetensors": ("text_encoders", f"{_ENCODERS}/clip_l.safetensors"),
    "ae.safetensors": (
        "vae", f"{_COMFY}/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
    ),
    "qwen_3_4b.safetensors": (
        "text_encoders",
        f"{_COMFY}/flux2-klein/resolve/main/split_files/text_encoders/qwen_3_4b.safetensors",
    ),
    "flux2-vae.safetensors": ("vae", f"{_COMFY}/flux2-dev/resolve/main/split_files/vae/flux2-vae.safetensors"),
}  # fmt: skip
# ternary file -> (its original's name, where that is): nobody has published the file itself
ORIGINALS = {
    "flux1-dev-1.58bit.safetensors": ("FLUX.1 [dev]", f"{_COMFY}/flux1-dev"),
    "flux1-schnell-1.58bit.safetensors": ("FLUX.1 [schnell]", f"{_COMFY}/flux1-schnell"),
    "flux1-fill-dev-1.58bit.safetensors": ("FLUX.1 Fill [dev]", f"{_COMFY}/flux1-dev"),
    "flux1-kontext-dev-1.58bit.safetensors": ("FLUX.1 Kontext [dev]", f"{_COMFY}/flux1-kontext-dev_ComfyUI"),
    "flux-2-klein-4b-1.58bit.safetensors": ("FLUX.2 [klein] 4B", f"{_COMFY}/flux2-klein"),
}
BONSAI = "bonsai-image-4b-1.58bit.safetensors"
_IMPORT = f"""in this pack's folder, with the Python that runs ComfyUI,

```
hf download prism-ml/bonsai-image-ternary-4B-mlx-2bit --include "transformer-packed-mflux/*" --local-dir bonsai
python -m quantizer import bonsai -o ../../models/diffusion_models/{BONSAI}
```
"""
MINIATURE = {miniature.TRANSFORMER.name, miniature.TERNARY.name, miniature.STOCK_AUTOENCODER}


def files_of(graph: Graph) -> list[str]:
    """The names of the files that a graph loads."""
    values = [value for node in graph.nodes for value in node.inputs.values() if isinstance(value, str)]
    return [value for value in values if value.endswith(".safetensors")]


def _note(title: str, text: str, graph: Graph) -> str:
    """The note inside a graph: what it is, and which files go where."""
    lines = []
    names = dict.fromkeys(files_of(graph))
    for name in names:
        if name in MODELS:
            folder, address = MODELS[name]
            page = address.split("/resolve/")[0]
            lines.append(f"- `models/{folder}/{name}`: [download]({address}) ([page]({page}))")
        elif name in ORIGINALS:
            original, address = ORIGINALS[name]
            lines.append(
                f"- `models/diffusion_models/{name}`: make it of [{original}]({address}), with the node Quantize FLUX "
                "to Ternary or `python -m quantizer convert`"
            )
        elif name == BONSAI:
            lines.append(f"- `models/diffusion_models/{name}`: {_IMPORT}")
        elif name not in MINIATURE:
            folder = "controlnet" if "controlnet" in name else "loras"
            lines.append(f"- `models/{folder}/{name}`: any of FLUX.1's; choose yours in the node")
    if names.keys() & MINIATURE:
        lines.append(
            "- the miniature's files: `python -m benchmarks.miniature.install` in this pack's folder puts them where "
            "they belong; then press `R` here"
        )
    return f"## {title}\n\n{text}\n\n**Files**\n\n" + "\n".join(lines) + "\n"


PROMPT = "a red fox and a blue teapot on a mossy stone bridge, morning fog, film photograph, 35 mm"


def _flux1(g: Graph, file: str, text: str = PROMPT, guidance: float | None = 3.5):
    """Loader, text encoders and VAE of a FLUX.1, with its positive and negative conditioning."""
    model = g.add("TernaryFluxLoader", file=file)
    clip = g.add("DualCLIPLoader", clip_name1="t5xxl_fp16.safetensors", clip_name2="clip_l.safetensors", type="flux")
    vae = g.add("VAELoader", vae_name="ae.safetensors")
    positive = prompt = g.add("CLIPTextEncode", clip=clip, text=text)
    negative = g.add("ConditioningZeroOut", conditioning=prompt)
    if guidance is not None:
        positive = g.add("FluxGuidance", conditioning=prompt, guidance=guidance)
    return model, clip, vae, positive[0], negative[0]


def _sample(g: Graph, model, positive, negative, latent, steps=25, title=None, seed=158, denoise=1.0) -> Node:
    return g.add(
        "KSampler", title, model=model, seed=seed, steps=steps, cfg=1.0, sampler_name="euler", scheduler="simple",
        positive=positive, negative=negative, latent_image=latent, denoise=denoise,
    )  # fmt: skip


def _save(g: Graph, samples, vae, name: str) -> None:
    g.add("SaveImage", images=g.add("VAEDecode", samples=samples, vae=vae), filename_prefix=name)


def _square(g: Graph, side: int = 1024, count: int = 1) -> Node:
    return g.add("EmptySD3LatentImage", width=side, height=side, batch_size=count)


def miniature_text_to_image(g: Graph) -> tuple[str, str]:
    """Miniature FLUX in 1.58 bits, text to image"""
    model = g.add("TernaryFluxLoader", file=miniature.TERNARY.name)
    prompt = g.add("MiniatureTextEncode", prompt="a red circle and a blue square")
    vae = g.add("VAELoader", vae_name=miniature.STOCK_AUTOENCODER)
    samples = _sample(g, model, prompt, prompt, _square(g, 64, 4), 20)
    _save(g, samples, vae, "miniature")
    return (
        "The first picture: a FLUX of 9 million parameters in 1.58 bits, on any computer",
        "Press Run. The miniature was trained by this project; it knows shapes, "
        "colours, numbers and places: *three green crosses*, *a ring above a square*.",
    )


def miniature_dense_and_ternary(g: Graph) -> tuple[str, str]:
    """Miniature FLUX, dense beside 1.58 bits"""
    dense = g.add("UNETLoader", unet_name=miniature.TRANSFORMER.name, weight_dtype="default")
    ternary = g.add("TernaryFluxLoader", file=miniature.TERNARY.name)
    prompt = g.add("MiniatureTextEncode", prompt="a red circle and a blue square")
    vae = g.add("VAELoader", vae_name=miniature.STOCK_AUTOENCODER)
    compared = g.add(
        "TernaryFluxCompare", model=dense, other=ternary, positive=prompt, negative=prompt, vae=vae,
        latent_image=_square(g, 64, 4), seed=158,
    )  # fmt: skip
    info = g.add("TernaryFluxInfo", model=ternary, file=miniature.TERNARY.name)
    for title, image in (
        ("dense", compared["image"]), ("1.58-bit", compared["other_image"]), ("difference", compared["difference"]),
        ("velocity error", compared["error_curve"]), ("error of each layer", info["error_map"]),
    ):  # fmt: skip
        g.add("PreviewImage", title, images=image)
    return (
        "Dense and 1.58-bit miniature from the same noise, and how far they are apart",
        "Compare Models samples both, and measures the ternary model's velocity at each step of the dense one's path. "
        "Ternary FLUX Info shows which layers lost most.",
    )


def miniature_quantize(g: Graph) -> tuple[str, str]:
    """Miniature FLUX, quantized in the graph"""
    each = 16
    columns = [scenes.prompts("train", category, each) for category in scenes.CATEGORIES]
    captions = "\n".join(text for row in zip(*columns, strict=True) for text in row)
    prompts = g.add("MiniatureTextEncode", "captions to learn from", prompt=captions)
    vae = g.add("VAELoader", vae_name=miniature.STOCK_AUTOENCODER)
    quantized = g.add(
        "TernaryFluxQuantize", file=miniature.TRANSFORMER.name, name="miniature-made-here", minutes=2.0, size="64x64",
        conditioning=prompts, vae=vae, sampler_steps=20,
    )  # fmt: skip
    model = g.add("TernaryFluxLoader", file=quantized["file"])
    prompt = g.add("MiniatureTextEncode", prompt="a red circle and a blue square")
    _save(g, _sample(g, model, prompt, prompt, _square(g, 64, 4), 20), vae, "miniature-made-here")
    return (
        "Quantize the miniature in the graph within two minutes, and sample with the result",
        "The node converts the dense miniature with its own pictures of the captions, then the loader takes the file "
        "that it made. Cancel at any time: running again goes on. More minutes give better pictures.",
    )


def flux1_dev_text_to_image(g: Graph) -> tuple[str, str]:
    """FLUX.1 dev in 1.58 bits, text to image"""
    model, _, vae, positive, negative = _flux1(g, "flux1-dev-1.58bit.safetensors")
    _save(g, _sample(g, model, positive, negative, _square(g)), vae, "ternary-flux")
    return "Text to image with FLUX.1 [dev] in 1.58 bits", "The loader's MODEL goes wherever a FLUX model goes."


def flux1_dev_lora(g: Graph) -> tuple[str, str]:
    """FLUX.1 dev in 1.58 bits, with a LoRA"""
    model, _, vae, positive, negative = _flux1(g, "flux1-dev-1.58bit.safetensors")
    lora = g.add("LoraLoaderModelOnly", model=model, lora_name="flux-lora.safetensors", strength_model=0.8)
    _save(g, _sample(g, lora, positive, negative, _square(g)), vae, "ternary-flux-lora")
    return (
        "A LoRA on FLUX.1 [dev] in 1.58 bits",
        "The stock LoRA node works as it does on a dense model: the LoRA runs beside the ternary weights and is never "
        "rounded into them, and changing its strength costs nothing.",
    )


def flux1_dev_dense_and_ternary(g: Graph) -> tuple[str, str]:
    """FLUX.1 dev, dense beside 1.58 bits"""
    model, _, vae, positive, negative = _flux1(g, "flux1-dev-1.58bit.safetensors")
    dense = g.add("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default")
    compared = g.add(
        "TernaryFluxCompare", model=dense, other=model, positive=positive, negative=negative, vae=vae,
        latent_image=_square(g), seed=158, steps=25,
    )  # fmt: skip
    for title, image in (
        ("dense", compared["image"]), ("1.58-bit", compared["other_image"]), ("difference", compared["difference"]),
        ("velocity error", compared["error_curve"]),
    ):  # fmt: skip
        g.add("PreviewImage", title, images=image)
    return (
        "FLUX.1 [dev], dense and in 1.58 bits, from the same noise",
        "Compare Models samples both and measures the ternary model's velocity at each step of the dense one's path: "
        "three times the work of one picture.",
    )


def flux1_schnell_text_to_image(g: Graph) -> tuple[str, str]:
    """FLUX.1 schnell in 1.58 bits, four steps"""
    model, _, vae, positive, negative = _flux1(g, "flux1-schnell-1.58bit.safetensors", guidance=None)
    _save(g, _sample(g, model, positive, negative, _square(g), 4), vae, "ternary-schnell")
    return "Text to image in four steps with FLUX.1 [schnell] in 1.58 bits", "Four steps, no guidance."


def flux1_dev_image_to_image(g: Graph) -> tuple[str, str]:
    """FLUX.1 dev in 1.58 bits, image to image"""
    model, _, vae, positive, negative = _flux1(g, "flux1-dev-1.58bit.safetensors")
    image = g.add("ImageScaleToTotalPixels", image=g.add("LoadImage", image="example.png"), upscale_method="lanczos")
    latent = g.add("VAEEncode", pixels=image, vae=vae)
    _save(g, _sample(g, model, positive, negative, latent, denoise=0.8), vae, "ternary-image-to-image")
    return (
        "Image to image with FLUX.1 [dev] in 1.58 bits",
        "A smaller denoise keeps more of the picture that is loaded.",
    )


def flux1_fill_inpaint(g: Graph) -> tuple[str, str]:
    """FLUX.1 Fill in 1.58 bits, inpainting"""
    model, _, vae, positive, negative = _flux1(g, "flux1-fill-dev-1.58bit.safetensors", guidance=30.0)
    image = g.add("LoadImage", image="example.png")
    masked = g.add(
        "InpaintModelConditioning", positive=positive, negative=negative, vae=vae, pixels=image["IMAGE"],
        mask=image["MASK"], noise_mask=True,
    )  # fmt: skip
    samples = _sample(g, model, masked[0], masked[1], masked[2], 20)
    _save(g, samples, vae, "ternary-fill")
    return (
        "Inpainting with FLUX.1 Fill [dev] in 1.58 bits",
        "Open the picture in the mask editor (right click) and paint over what is to be replaced; the prompt says by "
        "what.",
    )


def flux1_kontext_edit(g: Graph) -> tuple[str, str]:
    """FLUX.1 Kontext in 1.58 bits, editing a picture"""
    text = "make it a watercolour painting, keep the composition"
    model, clip, vae, *_ = _flux1(g, "flux1-kontext-dev-1.58bit.safetensors", text, guidance=None)
    prompt, negative = (node[0] for node in g.nodes[-2:])
    image = g.add("FluxKontextImageScale", image=g.add("LoadImage", image="example.png"))
    latent = g.add("VAEEncode", pixels=image, vae=vae)
    reference = g.add("ReferenceLatent", conditioning=prompt, latent=latent)
    positive = g.add("FluxGuidance", conditioning=reference, guidance=2.5)
    _save(g, _sample(g, model, positive, negative, latent, 20), vae, "ternary-kontext")
    return (
        "Editing a picture by instruction with FLUX.1 Kontext [dev] in 1.58 bits",
        "The prompt says what to change; the picture goes in as a reference.",
    )


def flux1_dev_controlnet(g: Graph) -> tuple[str, str]:
    """FLUX.1 dev in 1.58 bits, with a ControlNet"""
    model, _, vae, positive, negative = _flux1(g, "flux1-dev-1.58bit.safetensors")
    image = g.add("ImageScaleToTotalPixels", image=g.add("LoadImage", image="example.png"), upscale_method="lanczos")
    edges = g.add("Canny", image=image, low_threshold=0.2, high_threshold=0.5)
    net = g.add("ControlNetLoader", control_net_name="flux-controlnet-canny.safetensors")
    controlled = g.add(
        "ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=net, image=edges, vae=vae,
        strength=0.6, start_percent=0.0, end_percent=0.8,
    )  # fmt: skip
    samples = _sample(g, model, controlled[0], controlled[1], _square(g))
    _save(g, samples, vae, "ternary-controlnet")
    return (
        "A ControlNet on FLUX.1 [dev] in 1.58 bits",
        "The ControlNet stays dense; it steers the ternary model as it steers the dense one. For a union ControlNet "
        "put Set Union ControlNet Type behind its loader.",
    )


def _flux2(g: Graph, file: str, name: str, text: str, picture: str | None = None) -> None:
    """Four steps of a FLUX.2 [klein], from noise; `picture` goes in as the reference that is edited."""
    model = g.add("TernaryFluxLoader", file=file)
    clip = g.add("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="flux2")
    vae = g.add("VAELoader", vae_name="flux2-vae.safetensors")
    prompt = g.add("CLIPTextEncode", clip=clip, text=text)
    size: dict[str, Any] = {"width": 1024, "height": 1024}
    if picture is not None:
        image = g.add(
            "ImageScaleToTotalPixels",
            image=g.add("LoadImage", image=picture),
            upscale_method="lanczos",
            resolution_steps=32,
        )
        measured = g.add("GetImageSize", image=image)
        size = {"width": measured[0], "height": measured[1]}
        latent = g.add("VAEEncode", pixels=image, vae=vae)
        prompt = g.add("ReferenceLatent", conditioning=prompt, latent=latent)
    samples = g.add(
        "SamplerCustomAdvanced",
        noise=g.add("RandomNoise", noise_seed=158),
        guider=g.add("BasicGuider", model=model, conditioning=prompt),
        sampler=g.add("KSamplerSelect", sampler_name="euler"),
        sigmas=g.add("Flux2Scheduler", steps=4, **size),
        latent_image=g.add("EmptyFlux2LatentImage", batch_size=1, **size),
    )
    _save(g, samples, vae, name)


def flux2_klein_text_to_image(g: Graph) -> tuple[str, str]:
    """FLUX.2 klein in 1.58 bits, text to image"""
    _flux2(g, "flux-2-klein-4b-1.58bit.safetensors", "ternary-flux2", PROMPT)
    return "Text to image with FLUX.2 [klein] 4B in 1.58 bits", "Four steps, no guidance."


_BONSAI = (
    "[Bonsai Image 4B](https://huggingface.co/prism-ml/bonsai-image-ternary-4B-mlx-2bit) is a ternary FLUX.2 [klein] "
    "4B by PrismML, Apache-2.0. Four steps, no guidance. "
)


def bonsai_text_to_image(g: Graph) -> tuple[str, str]:
    """Bonsai Image 4B, text to image"""
    text = "An icy bonsai tree on a wooden table by a window, rain on the glass, snowy mountains outside, photograph"
    _flux2(g, BONSAI, "bonsai", text)
    return (
        "Text to image with Bonsai Image 4B, a ternary FLUX.2",
        _BONSAI + "Width and height are multiples of 32, up to about a megapixel.",
    )


def bonsai_image_to_image(g: Graph) -> tuple[str, str]:
    """Bonsai Image 4B, image to image"""
    text = "the same scene in winter at night, snow on everything, warm light in the windows"
    _flux2(g, BONSAI, "bonsai-edit", text, "example.png")
    return (
        "Image to image with Bonsai Image 4B, a ternary FLUX.2",
        _BONSAI + "The picture is the reference that FLUX.2 edits: say in the prompt what it becomes. Bonsai was "
        "trained to make pictures from text, so edits are looser than those of the dense model.",
    )


def flux1_dev_quantize(g: Graph) -> tuple[str, str]:
    """FLUX.1 dev, quantized in the graph"""
    clip = g.add("DualCLIPLoader", clip_name1="t5xxl_fp16.safetensors", clip_name2="clip_l.safetensors", type="flux")
    quantized = g.add(
        "TernaryFluxQuantize", file="flux1-dev.safetensors", name="flux1-dev-1.58bit", minutes=240.0, clip=clip
    )
    info = g.add("TernaryFluxInfo", file=quantized["file"])
    g.add("PreviewImage", "error of each layer", images=info["error_map"])
    return (
        "Quantize FLUX.1 [dev] to 1.58 bits in the graph",
        "It takes the minutes that you give it, on a GPU. The text encoders encode this pack's own 2,560 prompts; "
        "nothing else is needed. Cancel at any time: running again goes on. Then open the template "
        "for text to image.",
    )


WORKFLOWS: tuple[Callable[[Graph], tuple[str, str]], ...] = (
    miniature_text_to_image, miniature_dense_and_ternary, miniature_quantize, flux1_dev_text_to_image, flux1_dev_lora,
    flux1_dev_dense_and_ternary, flux1_schnell_text_to_image, flux1_dev_image_to_image, flux1_fill_inpaint,
    flux1_kontext_edit, flux1_dev_controlnet, flux1_dev_quantize, flux2_klein_text_to_image, bonsai_text_to_image,
    bonsai_image_to_image,
)  # fmt: skip


PAINTED = {
    miniature_text_to_image,
    miniature_dense_and_ternary,
}  # what their cards show; by the browser tests


def build(make: Callable[[Graph], tuple[str, str]], known: Mapping[str, Any]) -> tuple[str, str, Graph]:
    """Name, title and graph of a workflow."""
    graph = Graph(known, MODELS)
    title, text = make(graph)
    graph.note = _note(title, text, graph)
    return name_of(make), title, graph


def name_of(make: Callable) -> str:
    """A workflow's file name without suffix, which the page shows as its title."""
    return make.__doc__


def thumbnail(title: str, graph: Graph) -> Image.Image:
    """What a template's card shows, legible at 220 pixels: its title, and its nodes from the loader to the picture."""
    canvas = Image.new("RGB", (440, 440), "#20242b")
    draw = ImageDraw.Draw(canvas)
    big, normal = ImageFont.load_default(34), ImageFont.load_default(25)
    y = 22
    for line in _wrapped(title, draw, big, 400):
        draw.text((22, y), line, "#ffffff", big)
        y += 40
    shown = [node.title or node.definition["display_name"] or node.kind for node in _main_line(graph)]
    rows = max(1, (410 - y) // 52)
    if len(shown) > rows:
        shown = [*shown[: rows - 1], shown[-1]]
    y = 424 - 52 * len(shown)
    for i, name in enumerate(shown):
        ternary = "Ternary" in name or "1.58" in name
        draw.rounded_rectangle((22, y, 418, y + 40), 8, "#2f6f4f" if ternary else "#3a414d")
        draw.text((36, y + 20), name, "#ffffff", normal, "lm")
        if i:
            draw.line((60, y - 12, 60, y), "#9aa4b2", 4)
        y += 52
    return canvas


def _main_line(graph: Graph) -> list[Node]:
    """From the first loader of a model or quantizer along the links to an end."""
    ours = [node for node in graph.nodes if "TernaryFlux" in node.kind]
    line = [ours[0]]
    while True:
        users = [n for n in graph.nodes if any(isinstance(v, Output) and v.node is line[-1] for v in n.inputs.values())]
        if not users:
            return line
        line.append(users[0])


def _wrapped(text: str, draw: ImageDraw.ImageDraw, font, width: int) -> list[str]:
    lines = [""]
    for word in re.split(r"\s+", text):
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def write(known: Mapping[str, Any]) -> None:
    for make in WORKFLOWS:
        name, title, graph = build(make, known)
        text = json.dumps(graph.json(name), indent=1, ensure_ascii=False) + "\n"
        (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
        if make not in PAINTED:
            thumbnail(title, graph).save(FOLDER / f"{name}.jpg", quality=90)


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        comfyui.Server(Path(folder), {"comfyui-ternary-flux": comfyui.ROOT}) as server,
    ):
        write(server.get_json("/object_info"))
    print(f"{len(WORKFLOWS)} workflows written to {FOLDER}")


if __name__ == "__main__":
    main()
