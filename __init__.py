"""Ternary FLUX (1.58-bit): FLUX models with {-1, 0, +1} weights in ComfyUI."""

WEB_DIRECTORY = "web"


async def comfy_entrypoint():
    """ComfyUI's V3 hook: the extension that registers this pack's nodes."""
    from .nodes import TernaryFluxExtension

    return TernaryFluxExtension()
