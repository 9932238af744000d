"""Measurements of speed and quality; each module runs with `python -m benchmarks.NAME` from the pack's folder."""

if __name__ == "benchmarks":
    import _pack

    _pack.load()
