"""`make demo`: the miniature FLUX, dense and ternary, painting the same prompts from the same noise in a real ComfyUI.

Converts the miniature twice, from its weights alone with `round` and in a few minutes with `convert`, runs
workflow.json through a headless server for every model and prompt, judges every picture with the exact checker, and
writes demo.png and demo.json. A second run uses the converted file of the first.
"""

import argparse
import contextlib
import copy
import io
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from ternary_flux.benchmarks import comfyui, miniature
from ternary_flux.quantizer.files.summary import sizes
from ternary_flux.quantizer.files.ternary import open_ternary

HERE = Path(__file__).resolve().parent
PACK = HERE.parents[1]
BATCH = 4  # pictures of a prompt
SEED = 1_580
PICTURES, STATES, STEPS = 512, 512, 550  # of the conversion: what three minutes pay for on two cores


@dataclass
class Row:
    """One model's line of the table."""

    name: str
    file: Path
    megabytes: float
    ratio: float  # how many times smaller than the dense file
    bits: float  # stored bits per weight of the block Linears
    accuracy: float = 0.0
    pictures: int = 0
    seconds: float = 0.0  # per picture, from queueing to the saved file


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=PACK / "output", help="folder of demo.png (default: output)")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of each category (default: 4)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training; 0: only round (default: %(default)s)")
    parser.add_argument("--converted", type=Path, help="show this ternary file instead of converting")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    print("1/4  rounding the miniature to ternary from its weights alone")
    rounded = args.output / "flux-miniature-rounded.safetensors"
    quantizer("round", miniature.TRANSFORMER, "-o", rounded, "--force")
    rows = [row("FLUX miniature, bf16", miniature.TRANSFORMER), row("1.58-bit, rounded only", rounded)]
    if args.converted or args.steps:
        rows.append(row("1.58-bit, converted", args.converted or convert(args.output, args.steps)))

    print("3/4  starting ComfyUI (20 s)")
    prompts = [
        prompt for category in miniature.CATEGORIES for prompt in miniature.prompts("held_out", category, args.prompts)
    ]
    with server(args.output / "comfyui", rows) as host:
        print(f"4/4  painting {len(prompts) * BATCH} pictures with each model")
        pictures = [[sample(host, row, prompt, seed) for seed, prompt in enumerate(prompts, SEED)] for row in rows]

    for row_, column in zip(rows, pictures, strict=True):
        judged = [(picture, prompt) for prompt, batch in zip(prompts, column, strict=True) for picture in batch]
        verdicts = [miniature.check(picture, prompt) for picture, prompt in judged]
        row_.accuracy, row_.pictures = sum(map(bool, verdicts)) / len(verdicts), len(verdicts)
        row_.seconds /= len(verdicts)
    shown = range(0, len(prompts), args.prompts)
    sheet(rows, [prompts[i] for i in shown], [[column[i][0] for i in shown] for column in pictures]).save(
        args.output / "demo.png"
    )
    results = [asdict(row_) | {"file": row_.file.name} for row_ in rows]
    (args.output / "demo.json").write_text(json.dumps(results, indent=1))
    print(f"\n{table(rows)}\n\n{args.output / 'demo.png'} written; {time.perf_counter() - started:.0f} s in all")


def quantizer(*arguments: object) -> None:
    """Run a command of the quantizer; where it stops with a message, so does the demo."""
    process = subprocess.Popen([sys.executable, "-m", "quantizer", *map(str, arguments)], cwd=PACK)
    while process.returncode is None:
        with contextlib.suppress(KeyboardInterrupt):  # it goes to the command too, which saves what it has and ends
            process.wait()
    if process.returncode:
        sys.exit(process.returncode)


def convert(folder: Path, steps: int) -> Path:
    """The miniature converted, in amounts that are the same on every machine; kept, and made again where it changed."""
    output = folder / f"flux-miniature-{steps}-steps.safetensors"
    if output.exists() and output.stat().st_mtime > miniature.TRANSFORMER.stat().st_mtime:
        print(f"2/4  using {output} of an earlier run")
        return output
    print("2/4  converting the miniature with its own pictures (3 minutes on two cores)")
    conditioning, work = folder / "conditioning.safetensors", output.with_suffix(".work")
    miniature.write_conditioning(conditioning, overwrite=True)
    fixed = ["--conditioning", conditioning, "--size", "64x64", "--sampler-steps", 20, "--device", "cpu"]
    fixed += ["--pictures", PICTURES, "--calibration-states", STATES, "--steps", steps]
    fixed += ["--packing", "base3", "--work", work, "--force"]
    quantizer("convert", miniature.TRANSFORMER, "-o", output, *fixed)
    shutil.rmtree(work)
    return output


def row(name: str, file: Path) -> Row:
    """Sizes of a dense or ternary file of the miniature."""
    if file == miniature.TRANSFORMER:
        return Row(name, file, file.stat().st_size / 1e6, 1.0, 16.0)
    measured = sizes(open_ternary(file))
    return Row(name, file, measured.bytes / 1e6, measured.ratio, measured.bits_per_weight)


def server(base: Path, rows: list[Row]) -> comfyui.Server:
    """A ComfyUI with the pack and links to the models."""
    links = {f"diffusion_models/{row.file.name}": row.file for row in rows}
    for name, file in links.items():
        link = base / "models" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())
    miniature.write_stock_autoencoder(base / "models" / "vae" / miniature.STOCK_AUTOENCODER)
    return comfyui.Server(base, {"comfyui-ternary-flux": PACK})


def sample(host: comfyui.Server, row: Row, prompt: str, seed: int) -> list[np.ndarray]:
    """One run of the workflow: BATCH pictures, float [H, W, 3] in 0..1."""
    workflow = copy.deepcopy(json.loads((HERE / "workflow.json").read_text()))
    workflow["prompt"]["inputs"]["prompt"] = prompt
    workflow["latent"]["inputs"]["batch_size"] = BATCH
    workflow["sample"]["inputs"]["seed"] = seed
    workflow["model"]["inputs"]["file"] = row.file.name
    if row.file == miniature.TRANSFORMER:
        inputs = {"unet_name": row.file.name, "weight_dtype": "default"}
        workflow["model"] = {"class_type": "UNETLoader", "inputs": inputs}
    started = time.perf_counter()
    images = host.execute(workflow).outputs["save"]["images"]
    row.seconds += time.perf_counter() - started
    return [np.asarray(Image.open(io.BytesIO(host.image(item))).convert("RGB")) / 255 for item in images]


def sheet(rows: list[Row], prompts: list[str], pictures: list[list[np.ndarray]], side: int = 192) -> Image.Image:
    """The comparison: a row for each prompt, a column for each model; the frame's colour is the checker's verdict."""
    label, gap, head = 230, 10, 78
    width, height = label + len(rows) * (side + gap) + gap, head + len(prompts) * (side + gap) + 34
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    normal, bold, small = (ImageFont.load_default(size) for size in (15, 17, 13))
    for j, row_ in enumerate(rows):
        x = label + j * (side + gap)
        draw.text((x, 10), row_.name, "black", bold)
        smaller = f", {row_.ratio:.1f}x smaller" if j else ""
        draw.text((x, 32), f"{row_.megabytes:.2f} MB{smaller}", "#444", normal)
        draw.text((x, 52), f"{row_.accuracy:.0%} as asked ({row_.pictures} pictures)", "#444", normal)
    for i, prompt in enumerate(prompts):
        y = head + i * (side + gap)
        draw.multiline_text((gap, y + side // 2 - 20), _wrap(prompt, 26), "black", normal, spacing=5)
        for j, column in enumerate(pictures):
            picture = Image.fromarray((column[i] * 255).round().astype(np.uint8)).resize(
                (side, side), Image.Resampling.LANCZOS
            )
            x = label + j * (side + gap)
            canvas.paste(picture, (x, y))
            frame = "#2a9d4a" if miniature.check(column[i], prompt) else "#d0342c"
            draw.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=frame, width=3)
    note = "Same prompt and noise in each row, 20 Euler steps in ComfyUI. Green: the checker finds what was asked."
    draw.text((gap, height - 26), note, "#444", small)
    return canvas


def _wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def table(rows: list[Row]) -> str:
    head = ("size", 10), ("smaller", 9), ("bits/weight", 13), ("accuracy", 10), ("pictures", 10), ("s/picture", 11)
    lines = [f"{'model':26}" + "".join(f"{name:>{width}}" for name, width in head)]
    for r in rows:
        ratio = f"{r.ratio:.1f}x"
        size = f"{r.name:26}{f'{r.megabytes:.2f} MB':>10}{ratio:>9}{r.bits:>13.2f}"
        lines.append(f"{size}{r.accuracy:>10.3f}{r.pictures:>10}{r.seconds:>11.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from what is done")
