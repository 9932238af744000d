"""Ternary FLUX (1.58-bit): FLUX models with {-1, 0, +1} weights in ComfyUI."""

WEB_DIRECTORY = "web"


async def comfy_entrypoint():
    """ComfyUI's V3 hook: the extension that registers this pack's nodes."""
    from .nodes import TernaryFluxExtension

    return TernaryFluxExtension(_miniature())


def _miniature() -> list[type]:
    """The node of the miniature, where it was installed with the pack."""
    try:
        from .benchmarks.miniature_node import MiniatureTextEncode
    except ModuleNotFoundError:
        return []
    return [MiniatureTextEncode]
