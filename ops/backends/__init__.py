"""Implementations of the ternary linear. Each module states NAME, `unavailable(device)` and `linear(...)`."""
