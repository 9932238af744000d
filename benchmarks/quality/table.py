"""The tables of docs/quality.md, as Markdown, from the rows that a run writes."""

from collections.abc import Iterable, Sequence


def lines(rows: Sequence[dict]) -> list[str]:
    """A line for each model of `run`; errors at evenly spread times where the schedule's own ones are others."""
    even = any(row["velocity"]["error"] != row["velocity_at_even_times"]["error"] for row in rows)
    head = ["model", "MB", "bits per weight", "right pictures (95 % interval)", "of the original", "velocity error"]
    head += ["at even times"] * even + ["with 8-bit activations", "fine detail", "response", "PSNR, dB", "CPU seconds"]

    def cells(row: dict) -> list[str]:
        right, low, high = row["accuracy"]["overall"]
        velocity = row["velocity"]
        return [
            row["name"],
            f"{row['megabytes']:.2f}",
            f"{row['bits']:.2f}",
            f"{right:.3f} ({low:.3f} - {high:.3f})",
            f"{right / rows[0]['accuracy']['overall'][0]:.2f}",
            f"{velocity['error']:.4f}",
            *([f"{row['velocity_at_even_times']['error']:.4f}"] if even else []),
            f"{row['int8_error']:.4f}" if "int8_error" in row else "",
            f"{velocity['detail']:.2f}",
            f"{velocity['response']:.2f}",
            f"{row['psnr'][0]:.1f}" if "psnr" in row else "",
            f"{row['cpu_seconds']:.0f}",
        ]

    return _markdown(head, map(cells, rows))


def stressed_lines(rows: Sequence[dict]) -> list[str]:
    """Of `run_stressed`, by recipe: error, its multiple of the plain model's, and right pictures at each level."""
    levels, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("level", "name"))
    found = {(row["level"], row["name"]): row for row in rows}

    def cell(row: dict) -> str:
        right, error = f"{row['accuracy']['overall'][0]:.2f}", row["velocity"]["error"]
        return f"{error:.4f} ({row['to_plain']:.2f}), {right}" if error else right

    return _markdown(["model", *levels], ([name, *(cell(found[level, name]) for level in levels)] for name in names))


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    first, *others = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return [first, "|" + "---|" * len(head), *others]
