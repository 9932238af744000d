"""Quality on the miniature: `python -m benchmarks.quality`."""
