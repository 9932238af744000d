"""Ternary weights from weights alone."""
