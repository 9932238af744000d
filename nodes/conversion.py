"""The command `convert` in a process of its own: what it says, its progress and its pictures, shown by a node."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..quantizer.files.container import TensorFile
from .compat import core, send_text

comfy = core()

COMMAND = Path(__file__).resolve().parents[1] / "quantizer"
_FLUX_CHANNELS = 16
_POLL_SECONDS = 0.2
_STOP_SECONDS = 120  # for a step that must not be left half done


def convert(arguments: Sequence[str], show: "Display", pictures: Path) -> list[str]:
    """Run `convert`; returns the lines that it said. Cancelling stops it at a step from which it goes on later.

    Raises RuntimeError with the command's own message.
    """
    events: queue.Queue[str | None] = queue.Queue()
    process = subprocess.Popen(
        [sys.executable, str(COMMAND), "convert", *arguments, "--progress", "json", "--stop-at-eof"],
        stdin=subprocess.PIPE,  # ends when it is closed, or this process does, whatever ends it
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        cwd=COMMAND.parent,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        start_new_session=os.name != "nt",
    )
    errors: list[str] = []

    def read() -> None:
        for line in process.stdout:
            events.put(line)
        events.put(None)

    readers = [threading.Thread(target=read), threading.Thread(target=lambda: errors.extend(process.stderr))]
    for reader in readers:
        reader.daemon = True
        reader.start()
    said: list[str] = []
    try:
        while (line := _next(events)) is not None:
            if line:
                _show(json.loads(line), show, said, pictures)
            comfy.throw_exception_if_processing_interrupted()
        process.wait()
        readers[1].join()
    finally:
        if process.poll() is None:
            show.text("stopping after this step")
        _stop(process)
    if process.returncode:
        message = next((line.strip() for line in reversed(errors) if line.strip()), "it ended without a message")
        raise RuntimeError(message.removeprefix("convert: "))
    return said


def _next(events: "queue.Queue[str | None]") -> str | None:
    try:
        return events.get(timeout=_POLL_SECONDS)
    except queue.Empty:
        return ""


def _show(event: dict, show: "Display", said: list[str], pictures: Path) -> None:
    if "message" in event:
        said.append(event["message"])
        show.text(event["message"].strip())
    else:
        show.progress(event["stage"], event["done"], event["total"], pictures)


def _stop(process: subprocess.Popen) -> None:
    process.stdin.close()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Display:
    """What the node shows while it runs."""

    def __init__(self, node_id: str | None, vae=None):
        self.node_id, self.vae = node_id, vae
        self.bar = comfy.ProgressBar(1)
        self.shown: Path | None = None
        self.line = ""

    def text(self, text: str) -> None:
        self.line = text
        send_text(text, self.node_id)

    def progress(self, stage: str, done: int, total: int, pictures: Path | None = None) -> None:
        if total:
            self.bar.update_absolute(done, total, self._preview(pictures) if stage == "pictures" else None)
        count = f"{stage}: {done} of {total}" if total else f"{stage}: {done}"
        send_text(f"{count}\n{self.line}", self.node_id)

    def _preview(self, folder: Path | None):
        """The newest picture as ComfyUI sends it to the page; None where there is no new one."""
        found = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime) if folder else []
        if not found or found[-1] == self.shown:
            return None
        self.shown = found[-1]
        try:
            return "JPEG", picture(TensorFile(self.shown).tensor("latent"), self.vae), 512
        except (OSError, ValueError, RuntimeError):
            return None


def picture(latent: torch.Tensor, vae=None) -> Image.Image:
    """A latent [C, H, W] of FLUX's own space as a picture: decoded, or its colours alone."""
    latents = comfy.Flux() if latent.shape[0] == _FLUX_CHANNELS else comfy.Flux2()
    if vae is not None:
        pixels = vae.decode(latents.process_out(latent[None].float()))[0]
    else:
        factors, bias = torch.tensor(latents.latent_rgb_factors), torch.tensor(latents.latent_rgb_factors_bias)
        if (reshape := getattr(latents, "latent_rgb_factors_reshape", None)) is not None:
            latent = reshape(latent[None].float())[0]
        pixels = (latent.float().movedim(0, -1) @ factors + bias + 1) / 2
    array = (pixels.clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy()
    return Image.fromarray(array)
