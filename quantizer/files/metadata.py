"""The header metadata of ternary files: what a person wants to know about where a file came from. Strings only."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from ..version import version
from .architecture import Architecture
from .layer import FORMAT
from .sources.locate import SUFFIXES

UNKNOWN_SHA256 = "0" * 64
TITLE = " (ternary, 1.58-bit)"  # the end of a ternary file's title


def build(
    architecture: Architecture,
    source: Path,
    source_metadata: Mapping[str, str],
    *,
    method: str,
    settings: Mapping[str, object],
    errors: Mapping[str, float],
    sha256: str = UNKNOWN_SHA256,
    lossy: str = "",
) -> dict[str, str]:
    """The metadata of a ternary file made from `source`.

    errors: ternary Linear -> relative error of its weight, ||W - W'|| / ||W||. sha256: of the source file, or of all of
    its files after one another. lossy: what the source's weights were rounded to before. The source's own modelspec
    fields (author, licence, ...) are kept, because they hold for the converted model too.
    """
    title = source_metadata.get("modelspec.title", source.stem if source.suffix.lower() in SUFFIXES else source.name)
    kept = {key: value for key, value in source_metadata.items() if key.startswith("modelspec.")}
    for key in ("modelspec.hash_sha256", "modelspec.thumbnail"):  # of the source alone; the latter may be megabytes
        kept.pop(key, None)
    before = {"ternary.source_encoding": lossy} if lossy else {}
    implementation = "flux2" if architecture.version == 2 else "flux"
    return (
        kept
        | before
        | {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": kept.get("modelspec.architecture", architecture.family.lower()),
            "modelspec.implementation": f"https://github.com/black-forest-labs/{implementation}",
            "modelspec.title": f"{title}{TITLE}",
            "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "ternary.format": FORMAT,
            "ternary.quantizer": f"comfyui-ternary-flux {version()}",
            "ternary.base_model": architecture.name,
            "ternary.source": source.name,
            "ternary.source_sha256": sha256,
            "ternary.method": method,
            "ternary.settings": json.dumps(dict(settings)),
            "ternary.weight_errors": json.dumps({name: round(error, 4) for name, error in errors.items()}),
        }
    )


def stated(metadata: Mapping[str, str], key: str) -> dict:
    """A JSON object of a file's metadata; {} where there is none that can be read."""
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def statistics(layers: Mapping[str, Mapping[str, float | None]]) -> dict[str, str]:
    """What calibration saw of each ternary Linear: Linear -> quantity -> value, to three significant digits."""
    rounded = {
        name: {key: None if value is None else float(f"{value:.3g}") for key, value in values.items()}
        for name, values in layers.items()
    }
    return {"ternary.statistics": json.dumps(rounded)}


def header_room(architecture: Architecture) -> int:
    """Bytes to keep in the header for errors that are only known at the end."""
    return 16 * len(architecture.linears)


def after_distillation(start: Mapping[str, str], done: Mapping[str, object]) -> dict[str, str]:
    """The metadata of the file that a distillation started from, with what was `done` added to its settings."""
    stages = stated(start, "ternary.settings") | {"distill": dict(done)}
    return dict(start) | {"ternary.method": "distill", "ternary.settings": json.dumps(stages)}
