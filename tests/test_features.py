"""docs/features.md is what the tests say; `pytest tests/test_features.py --write-docs` writes it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import _pack

HEAD = """# What works

Features of ComfyUI on a ternary model, and of this pack's own nodes. Every row is a test of the suite, which runs
against a real ComfyUI and passes as a whole or not at all: what is listed here works. The table is made by the tests.

| feature | works | test |
|---|---|---|
"""


def rows() -> Iterator[str]:
    folder = _pack.ROOT / "tests"
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                yield from (row(mark, node, path) for mark in node.decorator_list if is_feature(mark))


def is_feature(mark: ast.expr) -> bool:
    return isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.feature"


def row(mark: ast.Call, test: ast.FunctionDef, path: Path) -> str:
    feature, *note = (ast.literal_eval(argument) for argument in mark.args)
    place = path.relative_to(_pack.ROOT).as_posix()
    return f"| {feature} | {f'yes: {note[0]}' if note else 'yes'} | [{test.name[5:].replace('_', ' ')}](../{place}) |\n"


def test_the_table_is_what_the_tests_say(docs):
    table = HEAD + "".join(sorted(rows(), key=str.lower))
    docs.keep("docs/features.md", table.encode())
    assert (_pack.ROOT / "docs" / "features.md").read_text(encoding="utf-8") == table
