"""Types of command-line arguments: numbers within bounds. argparse puts the argument's name before the message."""

import argparse
import math


def count(text: str) -> int:
    """A whole number from 1."""
    return _number(text, int, 1, "a whole number from 1")


def natural(text: str) -> int:
    """A whole number from 0."""
    return _number(text, int, 0, "a whole number from 0")


def positive(text: str) -> float:
    """A number above 0."""
    return _number(text, float, math.ulp(0.0), "a number above 0")


def _number(text: str, kind: type, least: float, wanted: str):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
    return value
