"""The recipes that docs/numbers.md gives, each tried in a fresh clone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from i2f.paper import tables
from i2f.paper.books import ROOT

pytestmark = pytest.mark.slow
PAGE = (ROOT / "docs" / "numbers.md").read_text()
BLOCK = re.search(r"# One source of numbers.*?```sh\n(.*?)```", PAGE, re.DOTALL)[1]
RECIPES = [re.sub(r" +#.*", "", line) for line in BLOCK.splitlines()]
KEY = re.search(r"run@([\w-]+)", BLOCK)[1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone of what is committed, with the data of the bundled remote."""
    folder = tmp_path_factory.mktemp("recipes") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    sh(folder, "git config user.name reader && git config user.email reader@example.org && dvc pull --quiet data.dvc")
    return folder


def sh(folder: Path, command: str) -> str:
    """Carry out a command line with the clone's own package, as if no `make` had called the tests; what it said."""
    own = {"PYTHONPATH": str(folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "I2F_MISSING": ""}
    own |= {"DVC_NO_ANALYTICS": "1", "JUPYTER_PLATFORM_DIRS": "1", "I2F_JOBS": "1"}
    own |= {"PYTHONDONTWRITEBYTECODE": ""}  # the clone is the tests' own: nothing in it need be compiled twice
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=outer | own, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def made(folder: Path, target: str) -> str:
    """What `make TARGET` would carry out, once the environment stands."""
    return sh(folder, f"make --dry-run --old-file=.venv/.ready {target.removeprefix('make ')}")


def test_the_readme_gives_these():
    assert [recipe.split(KEY)[0] for recipe in RECIPES] == [
        "dvc repro run@",
        "dvc exp run -S runs.",
        "make solve RUN=",
        "make publish RUN=",
    ]


def test_one_run_on_the_published_rows(clone):
    """Nothing is solved, the tables come out byte for byte, and git sees no change: neither the lock nor results/."""
    sh(clone, RECIPES[0])
    executed, published = clone / "runs" / "executed" / KEY, clone / "results" / KEY
    for path in [*published.glob("*.csv"), *published.glob("*.npz"), published / "claims.json"]:
        assert (executed / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (clone / "runs" / "rows").exists()
    assert sh(clone, "git status --porcelain") == ""


def test_one_parameter_changed_and_published(clone):
    """Only the new row is solved, whether to be looked at or to be published; what was published stays as it was."""
    before = (clone / "results" / KEY / "survey.csv").read_text().splitlines()
    sh(clone, RECIPES[1])
    (chunk,) = (clone / "runs" / "rows").iterdir()
    (about,) = tables.provenance(chunk).values()
    assert about["rows"] == 1
    lines = (clone / "runs" / "executed" / KEY / "survey.csv").read_text().splitlines()
    assert len(lines) == len(before) + 1
    assert set(before) < set(lines)
    name, value = re.search(r"parameters\.(\w+)=(\S+)", RECIPES[1]).groups()
    params = (clone / "params.yaml").read_text()
    assert f"      {name}: {value}\n" in params  # `dvc exp run` leaves the changed parameter
    pending = clone / "results" / KEY / "pending"
    earlier = set(pending.glob("*"))  # of a longer run, that is committed as it comes
    sh(clone, made(clone, RECIPES[2]))
    assert len(set(pending.iterdir()) - earlier) == 1
    (clone / "notebooks" / "00_index.ipynb").unlink()  # of the two that follow every run, one is executed
    notebook = next((clone / "notebooks").glob("01_*.ipynb"))
    notebook.write_text(re.sub(rf"{name} = \d+", f"{name} = {value}", notebook.read_text()))
    sh(clone, made(clone, RECIPES[3]).splitlines()[0])
    assert (clone / "results" / KEY / "survey.csv").read_text().splitlines() == lines
    assert not pending.exists()
    changed = {line.split()[-1] for line in sh(clone, "git status --porcelain").splitlines()}
    assert {f"results/{KEY}/survey.csv", "results/claims.json", "README.md", "params.yaml"} - changed <= {
        "README.md",
        "results/claims.json",
    }
    assert not any(
        path.startswith("results/") and KEY not in path and path != "results/claims.json" for path in changed
    )
