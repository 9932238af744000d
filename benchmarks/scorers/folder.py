"""What scorers have in common: the pictures of a comparison's folder, and the file that their scores go to."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

Score = Callable[[str, Sequence[Path]], Sequence[float]]  # (prompt, its pictures) -> a number for each, more is better


def main(name: str, load: Callable[[], Score]) -> None:
    """Score every picture of the folder on the command line, and write `scores-NAME.json` there: {file: score}."""
    parser = argparse.ArgumentParser(description=f"Score the pictures of a comparison with {name}.")
    parser.add_argument("folder", type=Path, help="the output of `python -m quantizer compare`")
    folder = parser.parse_args().folder
    try:
        rows = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"{folder}: no finished comparison lies there ({error})")
    files: dict[str, list[str]] = {}
    for row in rows:
        models = (row[model] for model in ("original", "ternary", "again"))
        files.setdefault(row["prompt"], []).extend(model["file"] for model in models if model)
    score, scores = load(), {}
    for number, (prompt, of) in enumerate(files.items(), 1):
        scores |= zip(of, map(float, score(prompt, [folder / file for file in of])), strict=True)
        print(f"\r{number} of {len(files)} prompts", end="", file=sys.stderr, flush=True)
    target = folder / f"scores-{name}.json"
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(scores, indent=1), encoding="utf-8")
    os.replace(partial, target)
    print(f"\n{target}: {len(scores)} pictures; give the same `compare` again")
