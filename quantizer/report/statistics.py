"""What calibration saw of every Linear, as a ternary file says it, and the table of it by kind of Linear."""

from ..files.metadata import stated
from ..files.ternary import TernaryFile

# Head, width and key of the columns of `statistics_table`.
_STATISTICS = (
    ("crest", 7, "crest"),
    ("spread", 8, "spread"),
    ("top two", 9, "largest_two"),
    ("rank", 6, "effective_rank"),
    ("kurtosis", 10, "kurtosis"),
    ("column", 8, "column_exponent"),
    ("error", 8, "output_error"),
    ("int8 noise", 12, "int8_noise"),
)


def stated_statistics(file: TernaryFile) -> dict[str, dict[str, float]]:
    """Of each layer, as the metadata has it; {} where it says nothing that can be read."""
    layers = stated(file.metadata, "ternary.statistics")
    return {
        name: {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
        for name, values in layers.items()
        if name in file.layers and isinstance(values, dict)
    }


def statistics_table(file: TernaryFile) -> list[str]:
    """Means of `stated_statistics` for every kind of Linear, and how many get full activations; [] without any."""
    kinds: dict[str, list[str]] = {}
    statistics = stated_statistics(file)
    for name in statistics:
        block, _, number_and_linear = name.partition(".")
        kinds.setdefault(f"{block.removesuffix('_blocks')} {number_and_linear.partition('.')[2]}", []).append(name)
    if not kinds:
        return []
    width = max(map(len, kinds))
    lines = [f"{'':<{width}}" + "".join(f"{head:>{size}}" for head, size, _ in _STATISTICS) + f"{'full':>6}"]
    for kind, names in kinds.items():
        found = [[statistics[name][key] for name in names if key in statistics[name]] for _, _, key in _STATISTICS]
        cells = [f"{sum(values) / len(values):.3g}" if values else "-" for values in found]
        full = sum(file.layers[name].full_precision for name in names)
        shown = "".join(f"{cell:>{size}}" for cell, (_, size, _) in zip(cells, _STATISTICS, strict=True))
        lines.append(f"{kind:<{width}}{shown}{full:>6}")
    return lines
