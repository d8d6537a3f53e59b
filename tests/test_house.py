"""The tree of the package: rooms in layers, no circles, a cheap front door, experiments of one shape."""

import ast
import inspect
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import i2f

ROOT = Path(i2f.__file__).parent
LAYERS = (
    ("_torch",),
    ("_fast",),
    ("core",),
    ("attacks",),
    ("audit", "text"),
    ("paper",),
    ("cli",),
)  # from the ground up
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FILES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
EXPERIMENTS = [name for name in FILES if name.startswith("i2f.paper.experiments.") and not name.endswith(".problems")]
ENVIRONMENT = {"i2f.paper.pipeline", "i2f.cli"}  # the only readers of environment variables


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {member if member in FILES else node.module for member in members}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {module for module in found if module in FILES and module not in ("i2f", name)}


def room(name: str) -> str:
    return name.split(".")[1]


def functions(name: str):
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


def test_the_root_holds_rooms_and_the_command_lines_entry():
    assert {path.name for path in ROOT.iterdir() if path.name != "__pycache__"} == {
        "__init__.py",
        "cli.py",
        "py.typed",
        "_torch",
        "_fast",
        "core",
        "attacks",
        "audit",
        "text",
        "paper",
    }


@pytest.mark.parametrize("name", [name for name in FILES if name != "i2f"])
def test_imports_go_down(name):
    """A room imports from those below it; of two on one level, neither imports from the other."""
    for module in imports(name):
        below = LEVEL[room(module)] < LEVEL[room(name)]
        assert below or room(module) == room(name), f"{name} imports {module}"


def test_no_circle_of_imports():
    order = list(TopologicalSorter({name: imports(name) for name in FILES}).static_order())
    assert len(order) == len(FILES)


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_hidden(name):
    """No import for type checkers alone; environment variables are read in one place."""
    source = FILES[name].read_text(encoding="utf-8")
    assert "TYPE_CHECKING" not in source
    reads = [word for word in ("environ.get", "getenv") if word in source]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):  # a variable may be set for a kernel
            reads += [word for word in (ast.unparse(node.value),) if word.endswith("environ")]
    assert not reads or name in ENVIRONMENT, f"{name} reads the environment"


def test_importing_the_package_loads_no_pytorch():
    code = "import sys, i2f; print(sorted({'torch', 'numpy', 'pandas', 'matplotlib'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_leads_somewhere():
    for name in i2f.__all__:
        assert getattr(i2f, name) is not None
    assert inspect.isfunction(i2f.influence)  # no submodule of that name hides it
    with pytest.raises(AttributeError, match="no attribute 'inluence'"):
        i2f.inluence  # noqa: B018


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_are_of_one_shape(name):
    module = import_module(name)
    shapes = {"problems": ["config"], "run": ["problems", "settings"], "judge": ["tables", "thresholds"]}
    for function, expected in shapes.items():
        assert list(inspect.signature(getattr(module, function)).parameters)[: len(expected)] == expected, function
    assert FILES[name].with_suffix(".toml").exists()
    assert f"i2f.paper.figures.{name.rsplit('.', 1)[1]}" in FILES


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_are_short(name):
    """A file fits a reader's patience, a function their screen; the public attack and audit list their keywords."""
    if room(f"{name}.") in ("_torch", "_fast", "core", "attacks"):
        assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 250
    for function in functions(name):
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        count = len(arguments) - any(a.arg in ("self", "cls") for a in arguments[:1])
        assert function.end_lineno - function.lineno < 60 or function.name == "invert", function.name
        assert count <= 8 or function.name in ("invert", "invert_many", "audit"), function.name
