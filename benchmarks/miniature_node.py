"""The node "Miniature Text Encode": the text encoder of the FLUX miniatures, for their example workflows."""

import logging

import torch
from comfy_api.latest import io, ui

_MASKED = -1e4  # added to attention's logits: nothing is left of it in any dtype
_PADDED = 512  # tokens that ComfyUI pads FLUX.2's contexts to
_GRID = (4, 4)  # image tokens of a 64-pixel picture


class MiniatureTextEncode(io.ComfyNode):
    """Prompts to conditioning, through tables of 29 words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiniatureTextEncode",
            display_name="Miniature Text Encode",
            category="model/conditioning",
            description="Encodes prompts for the FLUX miniature, which knows shapes, colours, numbers and places.",
            search_aliases=["prompt", "flux miniature"],
            inputs=[
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a red circle and a blue square",
                    tooltip="For example: a ring; three crosses; a red circle; a ring above a square; "
                    "a red circle and a blue square. Each line is a prompt of its own, for Quantize FLUX to Ternary.",
                ),
                io.Combo.Input(
                    "flux",
                    options=["FLUX.1", "FLUX.2"],
                    default="FLUX.1",
                    optional=True,
                    tooltip="Which miniature the prompts are for.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="For KSampler, with the FLUX miniature as the model.")],
        )

    @classmethod
    def execute(cls, prompt: str, flux: str = "FLUX.1") -> io.NodeOutput:
        from .miniature import encode_prompts
        from .miniature.text import LENGTH, WORDS, tokenize

        prompts = [line.strip() for line in prompt.splitlines() if line.strip()] or [""]
        known, unknown = zip(*map(tokenize, prompts), strict=True)
        words = ", ".join(dict.fromkeys(word for line in unknown for word in line))
        note = "Every word is known."
        if words:
            note = f"Not known and left out: {words}. Known words: {', '.join(WORDS[1:])}."
            logging.warning("Miniature Text Encode: %s", note)
        if any(not line and missing for line, missing in zip(known, unknown, strict=True)):
            raise ValueError(note)
        if any(len(line) > LENGTH for line in known):
            note += f" Only the first {LENGTH} words count."
        contexts, pooled = encode_prompts(prompts)
        if flux == "FLUX.2":
            conditioning = [[_padded(context[None]), _without_padding(context.shape[0])] for context in contexts]
        else:
            pairs = zip(contexts, pooled, strict=True)
            conditioning = [[context[None], {"pooled_output": vector[None]}] for context, vector in pairs]
        return io.NodeOutput(conditioning, ui=ui.PreviewText(note))


def _padded(context: torch.Tensor) -> torch.Tensor:
    """As long as ComfyUI makes it, with the zeros behind the words, so that their positions stay as in training."""
    return torch.nn.functional.pad(context, (0, 0, 0, _PADDED - context.shape[1]))


def _without_padding(words: int) -> dict:
    """What keeps attention off the zeros, which the miniature never saw: ComfyUI's mask of text and image tokens."""
    rows, columns = _GRID
    mask = torch.zeros(1, *2 * (_PADDED + rows * columns,))
    mask[:, :, words:_PADDED] = _MASKED
    return {"attention_mask": mask, "attention_mask_img_shape": _GRID}
