"""A model's velocities beside the original's along the original's path: error, response to prompts, fine detail."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..pictures.detail import detail, predicted

# Of one path, each [S] by its states: sums over the numbers of a velocity, or of the picture that it leads to.
Sums = Mapping[str, Sequence[float]]


def sums(states: Mapping[str, Tensor], velocity: Tensor, swapped: Tensor | None) -> dict[str, list[float]]:
    """What `by_sigma` adds up, for one path.

    states     `x` [S, C, H, W], `sigma` [S], the original's `velocity` [S, C, H, W] and `swapped`, under another prompt
    velocity   the model's, [S, C, H, W]; `swapped` is None where there is no other prompt
    """
    x, sigma, theirs = states["x"], states["sigma"], states["velocity"]
    found = {
        "sigma": sigma,
        "error": _square(velocity - theirs),
        "power": _square(theirs),
        "detail": detail(predicted(x, velocity, sigma)),
        "original detail": detail(predicted(x, theirs, sigma)),
    }
    if swapped is not None:
        found["change"] = _square(velocity - swapped)
        found["original change"] = _square(theirs - states["swapped"])
    return {name: value.tolist() for name, value in found.items()}


def _square(x: Tensor) -> Tensor:
    return x.square().sum((1, 2, 3))


def by_sigma(paths: Sequence[Sums]) -> list[dict[str, float | None]]:
    """For each state of paths through the same noise levels, over all of them: `error`, the squared velocity error
    relative to the original's square; `response`, the length of what another prompt changes, relative to the original's
    (None for a single prompt); `detail`, the ratio of fine detail in the predicted pictures.
    """
    rows = []
    for step, sigma in enumerate(paths[0]["sigma"]):

        def total(name: str, step=step) -> float:
            return sum(path[name][step] for path in paths)

        response = None
        if "change" in paths[0]:
            response = (total("change") / max(total("original change"), 1e-30)) ** 0.5
        row = {"sigma": sigma, "error": total("error") / max(total("power"), 1e-30), "response": response}
        rows.append(row | {"detail": total("detail") / max(total("original detail"), 1e-30)})
    return rows


def error(path: Sums) -> float:
    """The velocity error of one path, over all of its states."""
    return sum(path["error"]) / max(sum(path["power"]), 1e-30)
