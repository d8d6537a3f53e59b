"""Publishing: a run is replaced whole or not at all, whatever happens in the middle."""

import json
import shutil
import subprocess
import sys

import pytest
import solvers

from i2f.paper import publishing, sweep, tables
from i2f.paper.rows import Store


@pytest.fixture
def project(tmp_path, monkeypatch):
    """results/one, published, and runs/staged/one, which is to replace it."""
    monkeypatch.setattr(publishing, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(publishing, "RUNS", tmp_path / "runs")
    for folder, numbers in (("results/one", [1]), ("runs/staged/one", [1, 2])):
        store = Store()
        sweep.run(solvers.powers, sweep.grid(number=numbers), sweep.Settings(jobs=1, progress="off", store=store))
        tables.save(tmp_path / folder, store.asked)
    (tmp_path / "results" / "one" / "pending").mkdir()
    (tmp_path / "results" / "one" / "stale.svg").touch()
    (tmp_path / "runs" / "staged" / "one" / "01_one.ipynb").touch()
    return tmp_path


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def promote(project):
    publishing.promote(project / "runs" / "staged" / "one", project / "results" / "one")


def test_the_staged_run_replaces_the_published_one(project):
    promote(project)
    assert {p.name for p in (project / "results").iterdir()} == {"one"}
    assert {p.name for p in (project / "results" / "one").iterdir()} == {"problems.csv", "provenance.json"}
    assert tables.provenance(project / "results" / "one")["problems"]["rows"] == 2


def test_a_full_disk_leaves_what_was_published(project, monkeypatch):
    before = content(project / "results")

    def full(source, target, **_):
        target.mkdir()
        (target / "problems.csv").write_text("dat")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publishing.shutil, "copytree", full)
    with pytest.raises(OSError, match=r"one could not be published \(.*No space left.*\): results/ keeps what it had"):
        promote(project)
    assert content(project / "results") == before
    assert {p.name for p in (project / "results").iterdir()} == {"one"}


def test_a_kill_between_the_renames_is_mended(project):
    target = project / "results" / "one"
    before = content(target)
    target.rename(project / "results" / ".one.old")
    shutil.copytree(project / "runs" / "staged" / "one", project / "results" / ".one.new")
    publishing.restore(target)
    assert content(target) == before
    assert {p.name for p in (project / "results").iterdir()} == {"one"}
    publishing.restore(target)
    assert content(target) == before


def test_the_share_that_was_verified_is_kept_with_the_table(project):
    target = project / "results" / "one"
    checksum = tables.provenance(project / "runs" / "staged" / "one")["problems"]["sha256"]
    (project / "runs" / "verified.json").write_text(json.dumps({checksum: {"share": 0.5, "agreed": 1.0}}))
    promote(project)
    assert tables.provenance(target)["problems"]["verified"] == {"share": 0.5, "agreed": 1.0}
    (project / "runs" / "verified.json").unlink()
    promote(project)  # the same table again: what was known of it stays
    assert tables.provenance(target)["problems"]["verified"] == {"share": 0.5, "agreed": 1.0}


@pytest.mark.slow
def test_a_run_that_is_not_complete_is_named_and_nothing_published(tmp_path):
    """In a clone whose parameters ask for one image more than was solved."""
    from i2f.paper.books import ROOT

    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    (clone / "data").symlink_to(ROOT / "data")
    params = (clone / "params.yaml").read_text()
    one, rest = params.split("  smoothness:")
    (clone / "params.yaml").write_text(one + "  smoothness:" + rest.replace("images: 20", "images: 21", 1))
    before = content(clone / "results")
    done = subprocess.run(
        [sys.executable, "-m", "i2f.paper", "publish", "smoothness"],
        cwd=clone,
        env={**publishing.os.environ, "PYTHONPATH": str(clone), "I2F_MISSING": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "12 of 252 problems of the table 'problems' have no published row" in done.stderr
    assert content(clone / "results") == before
