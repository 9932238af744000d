"""Ternary models made elsewhere, brought in bit for bit."""
