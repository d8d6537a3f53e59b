"""The site's pages: their code runs, and every test that they name is there."""

import json
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


@pytest.mark.parametrize(("name", "told"), [("02_eigenvectors", True), ("04_lower_bound", False)])
def test_the_site_says_where_else_a_notebook_of_start_runs(monkeypatch, name, told):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    sources = pytest.importorskip("sources")
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    alone, known = [text], [text]
    monkeypatch.delenv("I2F_REPOSITORY", raising=False)
    sources.written(None, f"notebooks/{name}", alone)
    monkeypatch.setenv("I2F_REPOSITORY", "someone/something")
    sources.written(None, f"notebooks/{name}", known)
    assert "someone/something" not in alone[0]
    second = json.loads(known[0])["cells"][1]["source"]
    assert (f"gh/someone/something/HEAD?labpath=notebooks%2F{name}.ipynb" in second) == told
    assert ("git+https://github.com/someone/something" in second) == told
