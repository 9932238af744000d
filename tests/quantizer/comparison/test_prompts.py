"""The forms that prompts are read from."""

import json

import pytest
from ternary_flux.quantizer.comparison.prompts import read_prompts
from ternary_flux.tests import builders
from ternary_flux.tests.quantizer import synthetic


def test_the_forms_of_prompts(tmp_path):
    lines, genevals = tmp_path / "prompts.txt", tmp_path / "evaluation_metadata.jsonl"
    lines.write_text("a red fox\n\n  two cubes \n", encoding="utf-8")
    assert read_prompts(lines) == [{"prompt": "a red fox"}, {"prompt": "two cubes"}]
    rows = [
        {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "two clocks"},
        {"prompt": "a cow"},
    ]
    genevals.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_prompts(genevals) == rows and read_prompts(genevals, 1) == rows[:1]
    encoded = builders.write_conditioning(tmp_path / "cond.safetensors", synthetic.FLUX1, 2)
    assert read_prompts(encoded) == [{"prompt": "prompt 0"}, {"prompt": "prompt 1"}]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", " \n\n", "a.txt: there are no prompts"),
        ("a.jsonl", '{"prompt": "x"}\n{"tag": "y"}\n', "a.jsonl: line 2 is no JSON object"),
        ("a.jsonl", '{"prompt": "x"}\n\n[' + "\n", "a.jsonl: line 3"),
        ("a.jsonl", '{"prompt": " "}', "line 1"),
    ],
)
def test_what_is_no_list_of_prompts(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)
