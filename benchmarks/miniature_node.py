"""The node "Miniature Text Encode": the text encoder of the FLUX miniature, for its example workflows."""

import logging

from comfy_api.latest import io, ui


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
                )
            ],
            outputs=[io.Conditioning.Output(tooltip="For KSampler, with the FLUX miniature as the model.")],
        )

    @classmethod
    def execute(cls, prompt: str) -> io.NodeOutput:
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
        conditioning = [
            [context[None], {"pooled_output": vector[None]}] for context, vector in zip(contexts, pooled, strict=True)
        ]
        return io.NodeOutput(conditioning, ui=ui.PreviewText(note))
