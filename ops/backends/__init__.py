"""Implementations of the ternary linear: modules with NAME, `unavailable`, `formats` and `linear`."""
