"""Whether a patch fits a weight: a LoRA made for another model has layers that do not.

Core tries, logs an error for each layer and goes on. Here such patches are left out where they are added, so that
nothing that reads the patch lists later (loading, sampling, hooks, merging, saving) meets them.
"""

import math

from .compat import core

comfy = core()


def fits(value, offset, shape: tuple[int, ...]) -> bool:
    """Whether the value of a patch (an adapter, tuple or list of core's) can change a weight of `shape`.

    offset  (dim, start, length) of the rows or columns that are changed, or None
    """
    if offset is not None:
        dim, start, length = offset
        if start + length > shape[dim]:
            return False
        shape = (*shape[:dim], length, *shape[dim + 1 :])
    if isinstance(value, comfy.WeightAdapterBase):
        return _adapter_fits(value, shape)
    if isinstance(value, list):  # another model's weight, with that model's own patches
        return tuple(value[0][0].shape) == shape
    kind, tensors = value if len(value) == 2 else ("diff", value)
    if tensors[0] is None:  # a factor for the model's own weight
        return True
    given = tuple(tensors[0].shape)
    if kind == "diff" and len(tensors) > 1 and tensors[1].get("pad_weight"):
        return len(given) == len(shape) and all(a >= b for a, b in zip(given, shape, strict=True))
    return given == shape


def _adapter_fits(adapter, shape: tuple[int, ...]) -> bool:
    if (resized := adapter.calculate_shape("")) is not None:
        if len(resized) != len(shape) or any(a < b for a, b in zip(resized, shape, strict=True)):
            return False
        shape = tuple(resized)
    given = _difference_shape(adapter)
    if given is None:
        return True
    outputs, inputs = given
    if outputs != shape[0] or (inputs is not None and inputs != math.prod(shape[1:])):
        return False
    scale = _dora_scale(adapter)
    return scale is None or scale.numel() in (1, shape[0], math.prod(shape[1:]))


def _difference_shape(adapter) -> tuple[int, int | None] | None:
    """(outputs, inputs) of the change that an adapter makes, inputs None where any do; None for kinds not known."""
    weights = adapter.weights
    match adapter.name:
        case "lora" if weights[3] is None:
            return _product(weights[0], weights[1])
        case "loha" if weights[5] is None:
            first, second = _product(weights[0], weights[1]), _product(weights[3], weights[4])
            return first if first == second else (-1, -1)
        case "lokr" if weights[7] is None:
            first = _flat(weights[0]) if weights[0] is not None else _product(weights[3], weights[4])
            second = _flat(weights[1]) if weights[1] is not None else _product(weights[5], weights[6])
            return first[0] * second[0], first[1] * second[1]
        case "glora":
            a1, a2, b1, b2 = map(_flat, weights[:4])
            return (b1[0], b2[1]) if a1[1] == a2[0] == b1[1] == b2[0] else (b2[0], b1[1])
        case "oft":
            return math.prod(weights[0].shape[:2]), None
        case "boft":
            return math.prod(weights[0].shape[1:3]), None
    return None


def _flat(tensor) -> tuple[int, int]:
    return tensor.shape[0], math.prod(tensor.shape[1:])


def _product(left, right) -> tuple[int, int]:
    """Shape of left @ right, (-1, -1) where their ranks differ."""
    (outputs, rank), (other, inputs) = _flat(left), _flat(right)
    return (outputs, inputs) if rank == other else (-1, -1)


def _dora_scale(adapter):
    place = {"lora": 4, "loha": 7, "lokr": 8, "glora": 5, "oft": 3, "boft": 3}[adapter.name]
    return adapter.weights[place]


def changes_nothing(value, strength: float, strength_model: float) -> bool:
    """Whether a patch leaves every weight as it is: strength 0, or a merge with all of the first model."""
    if strength != 0 or strength_model != 1:
        return False
    if isinstance(value, comfy.WeightAdapterBase):
        return value.calculate_shape("") is None
    return not (isinstance(value, tuple) and len(value) == 2 and (value[0] == "set" or len(value[1]) > 1))
