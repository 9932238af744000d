"""Ternary weights from what the model computes."""
