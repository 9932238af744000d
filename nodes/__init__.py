"""What appears in ComfyUI: the nodes, and the glue between ComfyUI and the ternary weights."""

import logging
from collections.abc import Sequence

from comfy_api.latest import ComfyExtension, io

from ..quantizer.version import version
from . import compat


class TernaryFluxExtension(ComfyExtension):
    """The pack's nodes; where ComfyUI is too old for them, one node that says what to update."""

    def __init__(self, others: Sequence[type[io.ComfyNode]] = ()):
        self.others = others  # nodes beside those of this folder

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        if problem := compat.problem():
            logging.error(problem)
            return [_unsupported(problem)]
        from .compare import CompareModels
        from .info import TernaryFluxInfo
        from .loader import LoadTernaryFlux
        from .quantize import QuantizeFlux
        from .save import SaveTernaryFlux

        logging.info(f"Ternary FLUX {version()}: `python -m quantizer doctor` says which backend this machine uses")
        return [LoadTernaryFlux, QuantizeFlux, SaveTernaryFlux, TernaryFluxInfo, CompareModels, *self.others]


def _unsupported(problem: str) -> type[io.ComfyNode]:
    class TernaryFluxUnsupported(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id="TernaryFluxLoader",
                display_name="Load Ternary FLUX (update ComfyUI)",
                category="model/loaders",
                description=problem,
                inputs=[],
                outputs=[io.Model.Output()],
            )

        @classmethod
        def execute(cls, **inputs) -> io.NodeOutput:
            raise RuntimeError(problem)

    return TernaryFluxUnsupported
