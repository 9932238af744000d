"""The node "Quantize FLUX to Ternary", which runs the command `convert` in a process of its own."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..quantizer.files.architecture import canonical
from ..quantizer.files.atomic import write_json
from ..quantizer.files.checkpoint import fingerprint, open_checkpoint
from ..quantizer.files.container import save
from ..quantizer.files.identity import identify
from ..quantizer.pictures import SIZES
from ..quantizer.pictures.conditioning import create_conditioning
from ..quantizer.pictures.encode import PROMPTS, encode
from ..quantizer.pictures.sampler import latent_shape, parse_sizes
from . import files
from .compat import accepted, core
from .conversion import Display, convert
from .loader import explain

comfy = core()

FOLDER = "diffusion_models"
_made = files.Watch()


class QuantizeFlux(io.ComfyNode):
    """Makes a ternary file of a dense FLUX: round, calibrate and distill within a budget of minutes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        combo, text, number, decimal = (
            accepted(kind, advanced=True) for kind in (io.Combo.Input, io.String.Input, io.Int.Input, io.Float.Input)
        )
        return io.Schema(
            node_id="TernaryFluxQuantize",
            display_name="Quantize FLUX to Ternary",
            category="model",
            description="Converts a dense FLUX to 1.58-bit weights with its own pictures: no data is needed but "
            "prompts. It takes hours for FLUX.1 [dev] on a GPU. Cancel at any time; running again goes on.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files.AnyName(files.dense_names()),
                    tooltip="The dense FLUX in models/diffusion_models, where no model is connected.",
                ),
                io.String.Input(
                    "name",
                    default="flux-1.58bit",
                    tooltip="Of the file that is made in models/diffusion_models. A file that is there is not "
                    "replaced; run again with the same inputs, it is used as it is.",
                ),
                io.Float.Input(
                    "minutes",
                    default=240.0,
                    min=0.1,
                    max=100000.0,
                    step=1.0,
                    tooltip="Time for all of it. More time gives better pictures.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="For clip: a prompt in each line; empty for this pack's own list of 2,560.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    lazy=True,
                    tooltip="A dense FLUX with what LoRAs do to it, in the place of file.",
                ),
                io.Clip.Input(
                    "clip", optional=True, lazy=True, tooltip="The text encoders of the model: encodes the prompts."
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    lazy=True,
                    tooltip="Encoded prompts, in the place of clip and prompts.",
                ),
                io.Vae.Input(
                    "vae", optional=True, lazy=True, tooltip="Decodes the previews; without it they are rough colours."
                ),
                io.String.Input(
                    "conditioning_file",
                    default="",
                    optional=True,
                    tooltip="Encoded prompts in a file that `embed` wrote, in ComfyUI's input folder.",
                    **text,
                ),
                io.String.Input(
                    "size",
                    default=SIZES,
                    optional=True,
                    tooltip="Sizes of the pictures that it learns from, in pixels, as 1024x1024,832x1216.",
                    **text,
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=512,
                    optional=True,
                    tooltip="Of low-rank factors beside the ternary weights: better pictures, a larger file.",
                    **number,
                ),
                io.Float.Input(
                    "growth",
                    default=0.0,
                    min=0.0,
                    max=0.95,
                    step=0.05,
                    optional=True,
                    tooltip="Part by which the file may grow for more bits in the most sensitive layers.",
                    **decimal,
                ),
                io.Combo.Input(
                    "codes",
                    options=["auto", "train", "freeze"],
                    default="auto",
                    optional=True,
                    tooltip="Whether the ternary codes are trained too.\nauto: where memory allows it.\n"
                    "train: yes.\nfreeze: only scales and what is dense.",
                    **combo,
                ),
                io.Combo.Input(
                    "packing",
                    options=["planes32", "base3"],
                    default="planes32",
                    optional=True,
                    tooltip="planes32: 2 bits a weight, loads without conversion.\nbase3: 1.6 bits, for sharing.",
                    **combo,
                ),
                io.Int.Input(
                    "sampler_steps",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    tooltip="Of the original's pictures; 0: the model's own.",
                    **number,
                ),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, optional=True, tooltip="Of noise.", **number),
            ],
            outputs=[
                io.Combo.Output("file", tooltip="The ternary file's name, for Load Ternary FLUX."),
                io.String.Output("report", tooltip="How good each stage became."),
            ],
            is_output_node=True,
            **accepted(
                io.Schema,
                search_aliases=["convert", "compress", "1.58-bit", "quantization", "bitnet", "distill", "calibrate"],
                has_intermediate_output=True,
            ),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None):
        """Of the name alone: ComfyUI shows what is said here at every input that it was asked about."""
        return True if name is None else files.name_problem(name) or True

    @classmethod
    def check_lazy_status(cls, file: str, size: str = SIZES, **inputs) -> list[str]:
        """Refuse what can be refused before anything that is connected is loaded or computed."""
        sizes = parse_sizes(size)
        if "model" not in inputs:
            arch = open_checkpoint(_dense(file)).architecture
            for pair in sizes:
                latent_shape(arch, pair)
        return [name for name in ("model", "clip", "conditioning", "vae") if name in inputs and inputs[name] is None]

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, conditioning_file: str | None = "", **_) -> str:
        """Runs again where a file was replaced, or what was made of it is gone."""
        conditioning = conditioning_file == "" or files.state(conditioning_file, _in_input_folder)
        return f"{files.state(file)} {conditioning} {_made.changes()}"

    @classmethod
    def execute(
        cls,
        file: str,
        name: str,
        minutes: float,
        prompts: str = "",
        model=None,
        clip=None,
        conditioning=None,
        vae=None,
        conditioning_file: str = "",
        **options,
    ) -> io.NodeOutput:
        if problem := files.name_problem(name):
            raise ValueError(problem)
        show = Display(cls.hidden.unique_id if cls.hidden else None, vae)
        target, work = _target(name), None
        base = Path(folder_paths.get_output_directory()) / "quantize"
        base.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if model is None:
                source = _dense(file)
            else:
                show.text("writing the model")
                source = stack.enter_context(_written(model, base / f"{target.stem}.safetensors"))
            arguments = _options(minutes, **options)
            words = _words(prompts, clip, conditioning, conditioning_file)
            encoders = _encoders(clip) if isinstance(words, list) else []
            request = _digest(fingerprint(open_checkpoint(source)), arguments, words, encoders)
            work = base / f"{target.stem}-{request}"
            if target.exists():
                return _done(target, request, work, show)
            record = base / f"{target.stem}.json"
            work.mkdir(exist_ok=True)
            stack.callback(_remove_empty, work, record)
            encoded = _conditioning(work, words, clip, conditioning, conditioning_file, show)
            comfy.unload_all_models()  # the process needs the memory
            # A conversion that ends after ComfyUI did is known by this.
            write_json(record, {"request": request, "report": []})
            command = [source, "--output", target, "--conditioning", encoded, "--work", work / "run", *arguments]
            lines = convert([str(part) for part in command], show, work / "run" / "pictures")
        write_json(record, {"request": request, "report": lines})
        shutil.rmtree(work)
        return _result(target, lines)


def _remove_empty(folder: Path, record: Path) -> None:
    with contextlib.suppress(OSError):  # where something was kept
        folder.rmdir()
        record.unlink()


def _done(target: Path, request: str, work: Path, show: Display) -> io.NodeOutput:
    """The result of an earlier run with the same inputs. ValueError where the file was made of others."""
    try:
        record = json.loads((work.parent / f"{target.stem}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    if record.get("request") != request:
        raise ValueError(f"{target.name} exists, and was made from other inputs: give another name, or delete it")
    shutil.rmtree(work, ignore_errors=True)
    show.text(f"{target.name} was made from these inputs already")
    return _result(target, [f"{target.name} was made from these inputs already", *record["report"]])


def _result(target: Path, lines: Sequence[str]) -> io.NodeOutput:
    report = "\n".join(lines)
    _made.add(target)
    return io.NodeOutput(target.name, report, ui=ui.PreviewText(report))


def _target(name: str) -> Path:
    name = name if name.lower().endswith(files.EXTENSIONS) else f"{name}.safetensors"
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    return next((folder for folder in folders if folder.name == FOLDER), folders[0]) / name


def _dense(name: str) -> Path:
    """The path of a dense FLUX file. Raises ValueError by the name that people know."""
    try:
        path = Path(files.find(str(name)))
        files.READ.add(path)
        identity = identify(path)
    except (OSError, ValueError) as error:
        raise ValueError(explain(error, name)) from None
    if identity.kind != "dense":
        raise ValueError(f"{name}: {identity.what}. Choose a dense FLUX.1 or FLUX.2")
    return path


@contextlib.contextmanager
def _written(model, path: Path) -> Iterator[Path]:
    """A MODEL with its patches as a file, for as long as the block runs; the ternary model's title is its name."""
    refused = ValueError("this MODEL is no dense FLUX: load a FLUX.1 or FLUX.2 with the node Load Diffusion Model")
    if not {"img_in.weight", "txt_in.weight"} <= {*map(canonical, model.model.diffusion_model.state_dict())}:
        raise refused
    comfy.load_models_gpu([model])
    tensors = model.model_state_dict_for_saving(model.model.diffusion_model, "diffusion_model.")
    save(path, tensors, overwrite=True)
    try:
        if identify(path).kind != "dense":
            raise refused
        yield path
    finally:
        path.unlink(missing_ok=True)


def _options(
    minutes: float,
    size: str = SIZES,
    rank: int = 0,
    growth: float = 0.0,
    codes: str = "auto",
    packing: str = "planes32",
    sampler_steps: int = 0,
    seed: int = 0,
) -> list[str]:
    options = ["--budget", minutes, f"--size={size}", "--rank", rank, "--codes", codes, "--packing", packing]
    options += ["--seed", seed]
    options += ["--growth", growth] if growth else []
    options += ["--sampler-steps", sampler_steps] if sampler_steps else []
    options += ["--device", comfy.get_torch_device().type]
    return [str(option) for option in options]


def _words(prompts: str, clip, conditioning, conditioning_file: str):
    """What says which prompts these are. ValueError where there are none."""
    if conditioning_file:
        return str(files.stamp(_in_input_folder(conditioning_file)))
    if conditioning is not None:
        sums = [[part.float().sum().item() for part in _parts(entry) if part is not None] for entry in conditioning]
        return str(sums)
    if clip is not None:
        return _lines(prompts)
    raise ValueError("connect clip (with prompts, or this pack's own), or conditioning, or name a conditioning_file")


def _encoders(clip) -> list:
    """What tells text encoders of one model from those of another; encodings of the same ones may differ by a bit."""
    encoders = clip.cond_stage_model
    return [type(encoders).__name__, *((name, list(value.shape)) for name, value in encoders.state_dict().items())]


def _lines(prompts: str) -> list[str]:
    lines = [line.strip() for line in prompts.split("\n") if line.strip()]
    return lines or [line for line in PROMPTS.read_text(encoding="utf-8").split("\n") if line.strip()]


def _in_input_folder(name: str) -> Path:
    folder = Path(folder_paths.get_input_directory()).resolve()
    path = (folder / name).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise ValueError(f"{name} is not in ComfyUI's input folder: put the file that `embed` wrote there")
    files.READ.add(path)
    return path


def _parts(entry) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Context [T, C] and pooled vector [V] of one entry of a CONDITIONING."""
    context, extra = entry[0], entry[1]
    pooled = extra.get("pooled_output")
    return context[0], None if pooled is None else pooled[0]


def _conditioning(work: Path, words, clip, conditioning, conditioning_file: str, show: Display) -> Path:
    """The conditioning file for the command, written into the work folder where it is not one already."""
    if conditioning_file:
        return _in_input_folder(conditioning_file)
    path = work / "prompts.safetensors"
    if path.exists():
        return path
    if conditioning is not None:
        parts = [_parts(entry) for entry in conditioning]
        names = [f"prompt {number}" for number in range(1, len(parts) + 1)]
        vector = parts[0][1]
        tokens, channels = parts[0][0].shape
        size = None if vector is None else vector.shape[0]
        with create_conditioning(path, names, context_shape=(tokens, channels), pooled_size=size) as file:
            for context, pooled in parts:
                file.add(context, pooled)
        return path
    done = 0

    def count(prompts: int) -> None:
        nonlocal done
        comfy.throw_exception_if_processing_interrupted()
        done += prompts
        show.progress("encoding prompts", done, len(words))

    encode(words, clip, path, on_progress=count)
    return path


def _digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]
