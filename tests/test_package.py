"""The wheel works where the repository is not: its data, the README's ten lines, an audit, the command line."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import i2f

pytestmark = pytest.mark.slow
ROOT = Path(i2f.__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package out of a wheel, and nothing else of the project; how to run Python on it, each time in
    a new process."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():  # not the checkout itself, whose data/ and build/ a clone does not have
        if name.startswith(("i2f/", ".dvcstore/", "notebooks/", "results/")) or "/" not in name:
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    build = ["uv", "build", "--wheel", "--no-build-isolation", "--offline", "--quiet", "-o", str(folder)]
    subprocess.run([*build, "--python", sys.executable, str(folder / "source")], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    (folder / "elsewhere").mkdir()

    environment = os.environ | {"PYTHONPATH": str(folder / "site")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-P", "-c", SERVER]
    with subprocess.Popen(command, cwd=folder / "elsewhere", env=environment, **pipes) as server:

        def run(code, *arguments):
            print(json.dumps([code, arguments, str(folder)]), file=server.stdin, flush=True)
            status = int(server.stdout.readline())
            assert status == 0, (folder / "err").read_text(encoding="utf-8")
            return (folder / "out").read_text(encoding="utf-8")

        run.wheel = wheel
        yield run


SERVER = """
import json, os, sys, traceback
import matplotlib.pyplot, torch  # seconds, which no process that is forked off spends again; nothing of the wheel

for line in sys.stdin:
    code, arguments, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv, status = ["-c", *arguments], 1
        try:
            exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as ended:
            status = int(ended.code not in (None, 0))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
CLI = "import sys; from i2f.cli import main; sys.exit(main(sys.argv[1:]))"


def test_it_is_the_wheel_that_runs(installed):
    where = installed("import i2f; print(i2f.__file__, i2f.data.FOLDER)")
    assert where.count(str(installed.wheel.parent / "site")) == 2


def test_it_carries_its_data_and_their_terms(installed):
    names = {Path(name).name for name in zipfile.ZipFile(installed.wheel).namelist() if "/bundle/" in name}
    assert names >= {"mnist-train.npz", "entailment.tsv", "DATA.md"}
    assert installed(CLI, "data", "verify") == "the bundle is complete and unaltered\n"


def test_the_ten_lines_run(installed):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "i2f.invert(" in block)
    assert installed(lines).startswith("RMSE per pixel: at least ")


def test_the_notebooks_of_start_run_on_the_rows_that_it_carries(installed):
    """The second one, whose figure of the paper needs the stored pictures, as it would run on a machine of others."""
    carried = [Path(name) for name in zipfile.ZipFile(installed.wheel).namelist() if "/companion/" in name]
    books = sorted(path.stem for path in carried if path.suffix == ".ipynb")
    assert books == ["01_leakage", "02_eigenvectors", "03_influence_vs_attack"]
    cells = json.loads((ROOT / "notebooks" / "02_eigenvectors.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    lines = ["import os", "os.environ['I2F_MISSING'] = 'refuse'", *code, "print(run.key)"]
    assert installed("\n".join(lines)).strip().endswith("eigenvectors")


def test_an_audit_writes_its_report(installed, tmp_path):
    report = tmp_path / "report.html"
    network = ["--model", "lenet", "--init", "uniform", "--seed", "1", "--data", "mnist:1"]
    installed(CLI, "audit", *network, "--defense", "gaussian:1e-4", "--report", str(report))
    assert "<html" in report.read_text(encoding="utf-8")


def test_an_attack_is_one_file_and_few_lines(installed):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert float(installed(block)) < 1
    method, registered = block.split("def sign")[1].split("METHODS[")
    assert len((method + registered.split("\n")[0]).strip().splitlines()) <= 10


def test_the_command_line_says_its_version(installed):
    assert installed(CLI, "--version") == f"i2f {i2f.__version__}\n"


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == i2f.__version__
