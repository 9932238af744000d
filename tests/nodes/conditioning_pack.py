"""A node for tests only, as a custom node pack of one file: conditioning without a text encoder."""

import torch
from comfy_api.latest import ComfyExtension, io


class RandomConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestRandomConditioning",
            category="_for_testing",
            inputs=[io.Int.Input("seed"), io.Int.Input("context_dim"), io.Int.Input("vec_dim")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, seed: int, context_dim: int, vec_dim: int) -> io.NodeOutput:
        g = torch.Generator().manual_seed(seed)
        context = torch.randn(1, 8, context_dim, generator=g)
        return io.NodeOutput([[context, {"pooled_output": torch.randn(1, vec_dim, generator=g)}]])


class HelperExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [RandomConditioning]


async def comfy_entrypoint() -> HelperExtension:
    return HelperExtension()
