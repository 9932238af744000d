"""A ComfyUI node pack with one node: the miniature's text encoder. Link this folder into `custom_nodes`."""

import importlib
import importlib.util
import logging
from pathlib import Path

from comfy_api.latest import ComfyExtension, io, ui

ROOT = Path(__file__).resolve().parents[3]


def _miniature():
    """The package `ternary_flux.benchmarks.miniature`, from the folder that this one is linked from."""
    spec = importlib.util.spec_from_file_location("ternary_flux_pack", ROOT / "_pack.py")
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    pack.load()
    return importlib.import_module("ternary_flux.benchmarks.miniature")


class MiniatureTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiniatureTextEncode",
            display_name="Miniature Text Encode",
            category="conditioning",
            description="Encodes a prompt for the FLUX miniature, which knows shapes, colours, numbers and places.",
            search_aliases=["prompt", "flux miniature"],
            inputs=[
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a red circle and a blue square",
                    tooltip="For example: a ring; three crosses; a red circle; a ring above a square; "
                    "a red circle and a blue square.",
                )
            ],
            outputs=[io.Conditioning.Output(tooltip="For KSampler, with the FLUX miniature as the model.")],
        )

    @classmethod
    def execute(cls, prompt: str) -> io.NodeOutput:
        miniature = _miniature()
        from ternary_flux.benchmarks.miniature.text import LENGTH, WORDS, tokenize

        known, unknown = tokenize(prompt)
        note = "Every word is known."
        if unknown:
            note = f"Not known and left out: {', '.join(unknown)}. Known words: {', '.join(WORDS[1:])}."
            logging.warning("Miniature Text Encode: %s", note)
        if unknown and not known:
            raise ValueError(note)
        if len(known) > LENGTH:
            note += f" Only the first {LENGTH} words count."
        context, pooled = miniature.encode_prompts([prompt])
        return io.NodeOutput([[context, {"pooled_output": pooled}]], ui=ui.PreviewText(note))


class MiniatureExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [MiniatureTextEncode]


async def comfy_entrypoint() -> MiniatureExtension:
    return MiniatureExtension()
