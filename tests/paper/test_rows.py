"""The row store: what is written comes back to the last bit, and what is not whole is refused by name."""

import hashlib
import json
import math

import numpy as np
import pandas as pd
import pytest
import solvers
import torch
from hypothesis import given
from hypothesis import strategies as st

from i2f.paper import cells, data, sweep, tables
from i2f.paper.rows import Store, declaration

NUMBERS = [{"number": n} for n in (3, 1, 2)]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


def settings(**more):
    return sweep.Settings(jobs=1, progress="off", store=Store(**more))


@pytest.fixture
def folder(tmp_path):
    """A folder of published tables: powers, paths and long."""
    mine = settings()
    sweep.run(solvers.powers, NUMBERS, mine)
    sweep.run(solvers.paths, NUMBERS, mine)
    sweep.run(solvers.long, [{**p, "steps": 5} for p in NUMBERS], mine)
    tables.save(tmp_path / "run", mine.store.asked)
    return tmp_path / "run"


@given(SCALARS | st.lists(SCALARS) | st.dictionaries(st.text(), SCALARS))
def test_a_cell_comes_back_as_it_was(value):
    back = cells.decoded(cells.encoded(value))
    assert json.dumps(back) == json.dumps(value)  # NaN and -0.0 too
    assert type(back) is type(value)
    assert cells.encoded(value) != ""


@pytest.mark.parametrize("value", [np.float64(0.1), np.bool_(True), np.int64(3), (1, 2.5), range(2)])
def test_numpy_and_tuples_are_plain(value):
    assert cells.plain(value) == (list(value) if isinstance(value, (tuple, range)) else value.item())


def key(problem, solve=solvers.powers):
    return declaration(solve).key(problem)


def test_a_key_is_of_values_and_of_nothing_else():
    assert key({"number": 1, "power": 2}) == key({"power": 2, "number": 1})  # not of the order
    assert key({"number": 1}) == key({"number": 1.0, "power": 2})  # defaults are filled in, 1 is 1.0
    assert key({"number": None}) != key({"number": math.nan})
    assert key({"number": 1}) != key({"number": True})
    assert key({"number": 0.1}) != key({"number": math.nextafter(0.1, 1)})
    assert key({"number": 1}) != key({"number": 1}, solvers.slow)
    assert key({"number": [1, 2]}) == key({"number": (1, 2.0)})
    assert key({"number": 1, "more": None}) != key({"number": 1})


def test_a_key_follows_the_data_and_not_their_folder(monkeypatch):
    mine = {"number": 1, "dataset": "mnist"}
    before = key(mine)
    assert before != key({**mine, "dataset": "cifar10"})
    monkeypatch.setattr(data, "digest", lambda name, root=None: "of the full set" if root else "of others")
    assert before != key(mine)
    assert key({**mine, "root": "/here"}) == key({**mine, "root": "/there"}) != key(mine)


def test_a_key_follows_the_solvers_version():
    before = key({"number": 1})
    newer = declaration(solvers.powers)._replace(version=2)
    assert newer.key({"number": 1}) != before


def test_tensors_are_no_problems():
    with pytest.raises(TypeError, match=r"weights is a Tensor: .* its recipe"):
        key({"number": 1, "weights": torch.zeros(2)})


def test_what_is_saved_is_read(folder):
    known = settings(published=[folder], solve=False)
    for solve, problems in ((solvers.powers, NUMBERS), (solvers.long, [{**p, "steps": 5} for p in NUMBERS])):
        pd.testing.assert_frame_equal(sweep.run(solve, problems, known), sweep.run(solve, problems, settings()))
    table = sweep.run(solvers.paths, NUMBERS, known)
    assert list(table.number) == [3, 3, 3, 1, 1, 1, 2, 2, 2]
    assert list(table.step) == [1, 2, 3] * 3
    assert table.picture[2].dtype == np.float32
    assert (table.picture[2] == 3).all()
    assert table.picture.isna().sum() == 6


def test_saving_again_gives_the_same_bytes(folder, tmp_path):
    known = settings(published=[folder], solve=False)
    sweep.run(solvers.powers, NUMBERS, known)
    sweep.run(solvers.paths, NUMBERS, known)
    sweep.run(solvers.long, [{**p, "steps": 5} for p in NUMBERS], known)
    digest = tables.save(tmp_path / "again", known.store.asked)
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "again").iterdir()}
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    assert digest == tables.digest(folder)


def test_a_chunk_holds_arrays_and_several_rows(tmp_path):
    first = sweep.run(solvers.paths, NUMBERS, settings(chunks=tmp_path))
    again = sweep.run(solvers.paths, NUMBERS, settings(chunks=tmp_path, solve=False))
    pd.testing.assert_frame_equal(first.drop(columns="picture"), again.drop(columns="picture"))
    assert all((a == b).all() for a, b in zip(first.picture.dropna(), again.picture.dropna(), strict=True))


def change(path, old, new, count=1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


def asked(folder, solve=solvers.powers):
    return sweep.run(solve, NUMBERS, settings(published=[folder], solve=False))


@pytest.mark.parametrize("table", ["problems", "paths", "long"])
def test_one_altered_number_in_a_table_is_refused(folder, table):
    solve = {"problems": solvers.powers, "paths": solvers.paths, "long": solvers.long}[table]
    lines = (folder / f"{table}.csv").read_text().splitlines()
    cells = lines[2].split(",")
    cells[-1] = "7.25"
    (folder / f"{table}.csv").write_text("\n".join([*lines[:2], ",".join(cells), *lines[3:]]) + "\n")
    with pytest.raises(ValueError, match=f"{table}.csv: .*altered; restore it from git"):
        asked(folder, solve)


def test_one_altered_pixel_is_refused(folder):
    path = folder / "long.npz"
    arrays = dict(np.load(path))
    next(iter(arrays.values()))[0] += 1
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"long.csv: its 3 rows are not the 3 that were written: the file is cut off"):
        Store([folder]).find(declaration(solvers.long), "")


def test_arrays_have_the_same_bytes_whatever_wrote_them():
    """NumPy's own archives differ between Python 3.11.2 and 3.11.7, and compressed ones between zlib and zlib-ng."""
    arrays = {"0/kept": np.arange(3), "1/kept": np.array([0.5, math.nan], dtype=np.float32)}
    assert hashlib.sha256(tables._npz(arrays)).hexdigest()[:16] == "90761f5a4e9c6612"


def test_a_table_that_is_cut_off(folder):
    path = folder / "problems.csv"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"problems.csv: line \d has \d cells where 7 are named: the file is cut off"):
        asked(folder)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(ValueError, match="its 2 rows are not the 3 that were written"):
        asked(folder)
    path.write_text("")
    with pytest.raises(ValueError, match="column 'power' is missing"):
        asked(folder)


def test_a_missing_column(folder):
    change(folder / "problems.csv", "number", "figure")
    with pytest.raises(ValueError, match="the column 'number' is missing: restore it from git"):
        asked(folder)


def test_a_problem_that_stands_there_twice(folder):
    path, about = folder / "problems.csv", folder / tables.PROVENANCE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[1]]))
    known = json.loads(about.read_text())
    checksum = tables.hashlib.sha256(path.read_bytes()).hexdigest()
    known["tables"]["problems"] |= {"rows": 4, "sha256": checksum}
    known["tables"]["problems"]["origins"][0]["problems"] = 4
    about.write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"the problem \{'power': 2, 'number': 3\} stands there twice"):
        asked(folder)


def test_another_schema_version(folder):
    change(folder / tables.PROVENANCE, '"schema": 1', '"schema": 9')
    with pytest.raises(ValueError, match=r"provenance.json has schema version 9, and this code reads 1"):
        asked(folder)


def test_provenance_that_is_cut_off(folder):
    path = folder / tables.PROVENANCE
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"provenance.json is cut off or altered"):
        asked(folder)


def test_a_chunk_that_is_cut_off_or_of_another_schema(tmp_path):
    sweep.run(solvers.powers, NUMBERS, settings(chunks=tmp_path))
    path = next(tmp_path.iterdir()) / tables.PROVENANCE
    change(path, '"schema": 1', '"schema": 2')
    with pytest.raises(ValueError, match="has schema version 2"):
        sweep.run(solvers.powers, NUMBERS, settings(chunks=tmp_path))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"is cut off or altered .* or delete it if it is a chunk"):
        sweep.run(solvers.powers, NUMBERS, settings(chunks=tmp_path))


def test_a_full_disk_leaves_no_half_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "write", lambda path, content: cells.write(path, content) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sweep.run(solvers.powers, NUMBERS, settings(chunks=tmp_path))
    assert not list(tmp_path.iterdir())


def test_rows_of_another_version_are_not_known(folder):
    change(folder / tables.PROVENANCE, '"version": 1', '"version": 0')
    with pytest.raises(LookupError, match="3 of 3 problems of the table 'problems' have no published row"):
        asked(folder)


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(self, content):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cells.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        cells.write(tmp_path / "table.csv", b"1")
    assert not list(tmp_path.iterdir())


def test_rows_know_where_they_come_from(folder):
    (about,) = tables.provenance(folder)["problems"]["origins"]
    assert about["problems"] == 3
    assert {"commit", "python", "torch", "numpy", "scipy", "machine"} < set(about)
