"""What pyproject.toml cannot say: a wheel carries the bundled images and texts, to work without the repository, and the
parameters, notebooks and rows of the track *start*, which are also run where there is none (Colab).

The images and texts come from the DVC remote inside the repository, whose files are named by their MD5: no checkout is
needed.
"""

import json
import re
import shutil
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def bundled() -> dict[str, Path]:
    """Name of each bundled file -> where its bytes are."""
    listing = next(line.split()[-1] for line in (ROOT / "data.dvc").read_text().splitlines() if "md5:" in line)
    store = ROOT / ".dvcstore" / "files" / "md5"
    entries = json.loads((store / listing[:2] / listing[2:]).read_text())
    return {entry["relpath"]: store / entry["md5"][:2] / entry["md5"][2:] for entry in entries}


def companion() -> list[Path]:
    """What the notebooks of the track *start* need of the repository; their tables, not their figures."""
    start = tomllib.loads((ROOT / "i2f" / "paper" / "ledger.toml").read_text(encoding="utf-8"))["tracks"]["start"]
    pairs = re.findall(r"^  (\S+):\n    notebook: (\S+)$", (ROOT / "params.yaml").read_text(encoding="utf-8"), re.M)
    found = [ROOT / "params.yaml", *(ROOT / "notebooks" / f"{name}.ipynb" for name in start)]
    for folder in (ROOT / "results" / key for key, notebook in pairs if notebook in start):
        found += [path for path in sorted(folder.iterdir()) if path.suffix in (".csv", ".npz", ".json")]
    return found


class BuildWithBundle(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "i2f"
        files = {f"bundle/{name}": source for name, source in {**bundled(), "DATA.md": ROOT / "DATA.md"}.items()}
        files |= {f"companion/{path.relative_to(ROOT)}": path for path in companion()}
        for name, source in files.items():
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, package / name)


setup(cmdclass={"build_py": BuildWithBundle})
