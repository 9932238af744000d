"""Triton kernels, one operator a file, and the table of tiles they run with. See docs/kernels.md."""
