"""Measurements of speed and quality; run them from the pack's folder, as `python -m benchmarks.speed.kernels`."""

if __name__ == "benchmarks":
    import _pack

    _pack.load()
