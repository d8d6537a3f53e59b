"""The site's pages: their code runs, and every test that they name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_recipes_run(number, capsys):
    exec(compile(BLOCKS[number], f"recipe {number}", "exec"), {"__name__": "recipe"})
    assert capsys.readouterr().out


def test_the_tests_that_the_mathematics_names_are_there():
    page = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in tests] == []
