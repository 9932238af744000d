"""Ternary weights and the linear layer that multiplies by them: torch and Triton only, nothing of ComfyUI."""

from .codes import group_codes
from .linear import ternary_linear
from .packing import GROUP_SIZE
from .registry import Choice, resolve
from .weight import TernaryWeight

__all__ = ["GROUP_SIZE", "Choice", "TernaryWeight", "group_codes", "resolve", "ternary_linear"]
