"""Which prompts are lettering or counting, and that few held-out ones show both."""

from collections import Counter

import pytest
from ternary_flux.quantizer.pictures.encode import PROMPTS
from ternary_flux.quantizer.pictures.kinds import in_turn, kind_of


@pytest.mark.parametrize(
    "prompt, kind",
    [
        ('a mug with the words "HELLO" in white letters', "lettering"),
        ("ein Schild, auf dem „Café“ steht", "lettering"),
        ("a wall with graffiti that says peace", "lettering"),
        ("exactly three black fish in a row", "counting"),
        ("7 clocks beside a lake", "counting"),
        ("a dozen eggs", "counting"),
        ("a two-storey house", "counting"),
        ("35mm photograph of someone reading a letter", "other"),
        ("a fox next to a badger, often seen in 1970", "other"),
    ],
)
def test_kinds(prompt, kind):
    assert kind_of(prompt) == kind


def test_the_packs_own_prompts_have_both():
    kinds = Counter(map(kind_of, PROMPTS.read_text(encoding="utf-8").splitlines()))
    assert 160 <= kinds["lettering"] <= 170 and 160 <= kinds["counting"] <= 200


def test_kinds_take_turns():
    prompts = ["two a", "b", '"c"', "d", "three e", "f", "four g", "h"]
    assert in_turn(range(8), prompts) == [2, 0, 1, 3, 4, 5, 7, 6]
    assert in_turn([7, 5, 3], prompts) == [7, 5, 3]
