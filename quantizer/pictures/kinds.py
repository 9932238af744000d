"""Kinds of prompts on which quantized models fail first, while the mean of all still improves: lettering and counting.

Told by English words and by quotation marks; prompts in other languages are of no kind.
"""

import re
from collections.abc import Sequence

LETTERING, COUNTING, OTHER = KINDS = ("lettering", "counting", "other")
_LETTERING = re.compile(
    r'["“”„«»「」]|\b(?:the words?|letters|lettering|written|that says|which says|captioned)\b', re.I
)
_NUMBERS = "two three four five six seven eight nine ten eleven twelve dozen [2-9] 1[0-9]"
_COUNTING = re.compile(rf"\b(?:{_NUMBERS.replace(' ', '|')})\b", re.I)
_TURNS = (LETTERING, COUNTING, OTHER, OTHER)


def kind_of(prompt: str) -> str:
    """The kind of a prompt."""
    return LETTERING if _LETTERING.search(prompt) else COUNTING if _COUNTING.search(prompt) else OTHER


def in_turn(rows: Sequence[int], prompts: Sequence[str]) -> list[int]:
    """Rows of prompts in another order: kinds take turns, so that few of them show each kind there is.

    A quarter is lettering and a quarter counting for as long as there is both; the order within a kind stays.
    """
    left = {kind: [row for row in rows if kind_of(prompts[row]) == kind] for kind in KINDS}
    found: list[int] = []
    while any(left.values()):
        for kind in _TURNS:
            if left[kind]:
                found.append(left[kind].pop(0))
    return found
