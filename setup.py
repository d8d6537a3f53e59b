"""What pyproject.toml cannot say: a wheel carries the bundled images and texts, to work without the repository.

They come from the DVC remote inside the repository, whose files are named by their MD5: no checkout is needed.
"""

import json
import shutil
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


class BuildWithBundle(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "i2f" / "bundle"
            target.mkdir(parents=True, exist_ok=True)
            for name, source in {**bundled(), "DATA.md": ROOT / "DATA.md"}.items():
                shutil.copyfile(source, target / name)


setup(cmdclass={"build_py": BuildWithBundle})
