"""Offline data-free conversion of FLUX checkpoints to 1.58-bit weights; run it with `python -m quantizer`."""
