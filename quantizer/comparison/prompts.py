"""The prompts of a comparison: lines of text, GenEval's JSON lines, or a conditioning file of `embed`."""

import json
import os
from pathlib import Path

from ..files.inputs import read_text
from ..pictures import conditioning

_WANTED = "a text file with a prompt in each line, GenEval's .jsonl, or a .safetensors of `embed`"


def is_encoded(path: str | os.PathLike) -> bool:
    """Whether the prompts come with their encodings."""
    return Path(path).suffix.lower() in (".safetensors", ".sft")


def read_prompts(path: str | os.PathLike, count: int | None = None) -> list[dict]:
    """The first `count` prompts, each as GenEval's metadata {"prompt": text, ...}. ValueError, naming file and line."""
    if is_encoded(path):
        rows = [{"prompt": prompt} for prompt in conditioning.read(path).prompts]
    else:
        lines = enumerate(read_text(path, _WANTED).split("\n"), 1)
        parse = (
            _parse if Path(path).suffix.lower() in (".jsonl", ".json") else lambda path, number, line: {"prompt": line}
        )
        rows = [parse(path, number, line.strip()) for number, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{path}: there are no prompts; give {_WANTED}")
    return rows[:count]


def _parse(path: str | os.PathLike, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f'{path}: line {number} is no JSON object with a "prompt"; give {_WANTED}')
    return row
