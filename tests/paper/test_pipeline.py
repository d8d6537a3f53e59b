"""The pipeline's own rules: parameters, notebooks, stages and environment files agree with each other."""

import json
import math
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import yaml

import i2f
from i2f import claims, data, pipeline
from i2f.attacks import GENERAL, METHODS
from i2f.paper import books, estimates, ledger, publishing, tables, verify

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


RUNS = PARAMS["runs"]


def parameters_of(entry):
    return books.parameters(ROOT / "notebooks" / f"{entry['notebook']}.ipynb")


@pytest.mark.parametrize("key", RUNS)
def test_a_run_names_every_parameter_of_its_notebook(key):
    """So that each can be changed by `dvc exp run -S`; papermill only warns of others."""
    entry = RUNS[key]
    assert set(entry["parameters"]) == set(parameters_of(entry)) - {"out"}
    for name, value in entry["parameters"].items():
        assert not (isinstance(value, str) and re.fullmatch(r"[\d.]+e[-+]?\d+", value)), f"{name}: write {value} out"
    assert entry["experiment"].startswith(key.split("-")[0])
    assert (ROOT / "i2f" / "paper" / "experiments" / f"{entry['experiment']}.py").exists()
    assert (ROOT / "i2f" / "paper" / "figures" / f"{entry['experiment']}.py").exists()


@pytest.mark.parametrize("notebook", sorted({entry["notebook"] for entry in RUNS.values()}))
def test_a_notebooks_own_parameters_are_those_of_its_first_run(notebook):
    first = next(entry for entry in RUNS.values() if entry["notebook"] == notebook)
    assert {**first["parameters"], "out": ""} == parameters_of(first)


def test_every_notebook_that_takes_parameters_is_run():
    with_parameters = {n.stem for n in NOTEBOOKS if papermill.inspect_notebook(str(n))}
    assert {entry["notebook"] for entry in RUNS.values()} == with_parameters


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_whole(notebook):
    """A notebook without outputs would pass nbval without saying anything."""
    cells = [c for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert sum(any("image/png" in o.get("data", {}) for o in c.outputs) for c in cells) >= 1
    compared = {kind for c in cells for o in c.outputs for kind in o.get("data", {})}
    assert compared & {"text/html", "text/markdown"}, "no table and no answer is compared"
    assert not any(o.get("name") == "stderr" for c in cells for o in c.outputs)
    assert sum(len(c.source.splitlines()) for c in cells) <= 90, "what is worth testing belongs into the package"


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_output_is_compared(notebook):
    for cell in nbformat.read(notebook, as_version=4).cells:
        assert set(cell.metadata.get("tags", [])) <= {"parameters"}


def test_stages_depend_on_folders():
    """No second list of notebooks or modules: what a stage needs is found in a folder."""
    deps = [dep for stage in (STAGES["source"], STAGES["run"]["do"]) for dep in stage["deps"]]
    files = {dep for dep in deps if Path(dep).suffix}
    assert files == {"i2f/paper/books.py", "runs/source/${item.notebook}.ipynb"}
    assert {"notebooks", "results", "data", "i2f"} < set(deps)
    assert (ROOT / "dvc.lock").stat().st_size < 60_000


def test_nothing_of_a_run_can_be_pushed_into_the_bundled_remote():
    for name, stage in ((name, stage.get("do", stage)) for name, stage in STAGES.items()):
        for out in [*stage.get("outs", []), *stage.get("metrics", [])]:
            (options,) = out.values() if isinstance(out, dict) else ({},)
            assert options.get("push") is False or options.get("cache") is False, f"{name}: add push: false"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A project of its own: one notebook, and params.yaml with one run of it."""
    (tmp_path / "notebooks").mkdir()
    cells = [
        nbformat.v4.new_code_cell("from i2f import pipeline", outputs=[], execution_count=4),
        nbformat.v4.new_code_cell("size = 1\nnames = ['a']\nout = ''", metadata={"tags": ["parameters"]}),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "01_one.ipynb")
    two = {"notebook": "01_one", "experiment": "one", "parameters": {"size": 2, "names": ["b"]}}
    runs = {"one": two | {"parameters": {"size": 1, "names": ["a"]}}, "two": two}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"runs": runs}, sort_keys=False))
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    monkeypatch.setattr(pipeline, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(books, "NOTEBOOKS", tmp_path / "notebooks")
    return tmp_path


def test_unknown_parameter_stops_a_run_before_it_starts(elsewhere):
    text = (elsewhere / "params.yaml").read_text()
    (elsewhere / "params.yaml").write_text(text.replace("size:", "sizee:"))
    with pytest.raises(ValueError, match=r"parameter of 01_one.ipynb='sizee' is unknown: did you mean 'size'"):
        pipeline.run("one")
    with pytest.raises(ValueError, match="run='onee' is unknown: did you mean 'one'"):
        pipeline.run("onee")
    with pytest.raises(ValueError, match="run='tow' is unknown: did you mean 'two'"):
        pipeline.solve("tow")
    assert not (elsewhere / "runs").exists()


def test_a_notebook_shows_its_own_run_first_and_the_others_after(elsewhere):
    mine = {"size": 1, "names": ["a"], "out": "", "unrelated": object()}
    first, second = pipeline.study("01_one", mine)
    assert (first.key, first.config) == ("one", {"size": 1, "names": ["a"]})
    assert (second.key, second.config) == ("two", {"size": 2, "names": ["b"]})
    assert first.settings.store is not second.settings.store  # each notes what it asked for
    assert [run.key for run in pipeline.study("01_one", mine | {"size": 2, "names": ["b"]})] == ["two", "one"]


def test_parameters_that_are_no_runs_own_come_first_without_a_name(elsewhere):
    found = pipeline.study("01_one", {"size": 7, "names": ["a"], "out": ""})
    assert [run.key for run in found] == ["", "one", "two"]
    assert found[0].config["size"] == 7


@pytest.mark.parametrize("name", sorted({entry["notebook"] for entry in RUNS.values()}))
def test_a_reader_may_change_a_parameter(name):
    """The notebook then shows the reader's run, which is no published one, and reads the published rows."""
    changed = books.parameters(ROOT / "notebooks" / f"{name}.ipynb")
    first = next(key for key, value in changed.items() if isinstance(value, int))
    names = changed | {first: changed[first] + 1, "pipeline": pipeline}
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    (line,) = (line for cell in cells for line in cell.source.splitlines() if "pipeline.study" in line)
    exec(line, names)
    run = names["run"] if "run" in names else names["runs"][0]
    assert (run.key, run.config[first]) == ("", changed[first] + 1)
    assert run.settings.store.published == [ROOT / "results" / key for key in RUNS if RUNS[key]["notebook"] == name]


def test_sources_do_not_see_outputs(elsewhere):
    pipeline.source()
    source, path = elsewhere / "runs" / "source" / "01_one.ipynb", elsewhere / "notebooks" / "01_one.ipynb"
    before = source.read_bytes()
    book = nbformat.read(path, as_version=4)
    book.cells[0].outputs = [nbformat.v4.new_output("stream", text="x")]
    book.cells[0].execution_count = 9
    nbformat.write(book, path)
    pipeline.source()
    assert source.read_bytes() == before
    book.cells[0].source += "  # changed"
    nbformat.write(book, path)
    pipeline.source()
    assert source.read_bytes() != before


def test_outputs_go_to_the_notebook_they_are_of(elsewhere):
    path = elsewhere / "notebooks" / "01_one.ipynb"
    executed = nbformat.read(path, as_version=4)
    executed.cells[0].outputs = [nbformat.v4.new_output("stream", text="x")]
    injected = nbformat.v4.new_code_cell("size = 2", metadata={"tags": ["injected-parameters"]})
    executed.cells.insert(2, injected)
    books.store(path, books.cleaned(executed))
    stored = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in stored] == [1, 2]
    assert stored[0].outputs[0].text == "x"
    executed.cells[0].source += "  # changed"
    with pytest.raises(ValueError, match=r"01_one.ipynb has changed since it was executed"):
        books.store(path, executed)


def test_cleaning_removes_what_differs_between_runs():
    cell = nbformat.v4.new_code_cell("1", metadata={"tags": ["parameters"], "papermill": {"duration": 1.0}})
    cell.outputs = [nbformat.v4.new_output("stream", name=name, text="x") for name in ("stderr", "stdout")]
    html = pd.DataFrame({"a": [1]}).style.to_html()
    cell.outputs.append(nbformat.v4.new_output("display_data", data={"text/html": html, "text/plain": "<S at 0x7f88>"}))
    book = books.cleaned(nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {"start_time": "now"}}))
    assert [o.get("name") for o in book.cells[0].outputs] == ["stdout", None]
    assert re.search(r"\bT_[0-9a-f]{5}", html)
    assert not re.search(r"\bT_[0-9a-f]{5}", book.cells[0].outputs[1]["data"]["text/html"])
    assert "0x" not in book.cells[0].outputs[1]["data"]["text/plain"]
    assert book.cells[0].metadata == {"tags": ["parameters"]}
    assert "papermill" not in book.metadata
    assert book.cells[0].id == "cell-00"


def test_published_claims_are_claims():
    published = claims.load(ROOT / "results" / "claims.json")
    assert len({c.id for c in published}) == len(published)
    assert {key for key in PARAMS["runs"] if any(c.id.startswith(f"{key}-") for c in published)} == set(PARAMS["runs"])
    assert all(any(c.id.startswith(f"{key}-") for key in PARAMS["runs"]) for c in published)
    for claim in published:
        assert claim.verdict in claims.VERDICTS
        assert claim.low <= claim.value <= claim.high or math.isnan(claim.value)
        assert claim.attacker
        assert claim.n >= 1 or claim.verdict == "not run"


def test_collected_claims_are_those_of_every_result():
    apart = [c for key in PARAMS["runs"] for c in claims.load(ROOT / "results" / key / "claims.json")]
    assert list(map(str, apart)) == list(map(str, claims.load(ROOT / "results" / "claims.json")))


def test_every_result_is_of_a_run():
    assert {p.name for p in (ROOT / "results").iterdir() if p.is_dir()} == set(PARAMS["runs"])


def test_readme_says_what_was_found():
    shown, page = ledger.findings(), (ROOT / "README.md").read_text()
    assert f"{publishing.OPEN}\n\n{shown}\n\n{publishing.CLOSE}" in page
    assert len([line for line in shown.splitlines() if line.startswith("- ")]) == 9
    assert len(page.encode()) <= 12_000
    assert len(page.splitlines()) <= 130
    decided = {c.id for c in claims.load(ROOT / "results" / "claims.json") if c.verdict in ("holds", "fails")}
    named = {name for part in ledger.MAP["findings"] for name in re.findall(r"{([^:}]+)", "".join(part["says"]))}
    assert named <= decided


def test_the_paper_part_by_part_follows_from_the_claims():
    for name, text in ledger.pages().items():
        assert (ROOT / name).read_text() == text, f"{name}: write it anew (make publish)"
    shown = ledger.paper()
    assert all(claim.statement in shown for claim in ledger.load().get("paper", []))


def test_every_number_is_one_experiments_and_no_verdict_rests_on_few_units():
    whose = {}
    for name, found in ledger.load().items():
        for claim in filter(lambda claim: claim.number, found):
            mine = name, claim.id.split("-")[0]
            assert whose.setdefault(claim.number, mine) == mine, claim.id
            assert claim.n >= estimates.LEAST or claim.verdict in ("not run", "inconclusive"), claim.id


@pytest.mark.parametrize("key", RUNS)
def test_what_is_published_follows_from_its_tables(key):
    """Tables are whole; figures name the tables that they were drawn from."""
    folder = ROOT / "results" / key
    published = tables.provenance(folder)
    assert published
    for name, about in published.items():
        assert tables.read(folder / f"{name}.csv", about)
        assert not any(origin["commit"].endswith("+") for origin in about["origins"]), "solved by uncommitted code"
    digest = tables.digest(folder)
    drawn = [*folder.glob("*.svg"), *folder.glob("*.png")]
    assert drawn
    for figure in drawn:
        assert digest.encode() in figure.read_bytes(), figure.name


@pytest.mark.parametrize("notebook", sorted({entry["notebook"] for entry in RUNS.values()}))
def test_stored_verdicts_are_the_published_ones(notebook):
    text = "".join(
        c.source + json.dumps(c.get("outputs", []))
        for c in nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", 4).cells
    )
    found = [
        claims.load(ROOT / "results" / key / "claims.json")
        for key, entry in RUNS.items()
        if entry["notebook"] == notebook
    ]
    apart = all(json.dumps(claims.show(one).data)[1:-1] in text for one in found)
    together = json.dumps(claims.show([claim for one in found for claim in one]).data)[1:-1] in text
    assert apart or together, "store the outputs anew (make publish)"


def test_data_card_holds_every_checksum():
    card = (ROOT / "DATA.md").read_text()
    for name, checksum in data.CHECKSUMS.items():
        assert f"`{name}.npz`" in card
        assert checksum in card
    assert "(DATA.md)" in (ROOT / "README.md").read_text()


def test_conda_gives_the_same_environment():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert f"python {PROJECT['requires-python']}" in conda["dependencies"]
    (pip,) = (d["pip"] for d in conda["dependencies"] if isinstance(d, dict))
    extras = ",".join(sorted(PROJECT["optional-dependencies"]))
    assert pip == [f"-e .[{extras}]"]


def test_lock_pins_every_dependency_with_a_hash_and_no_host():
    lock = (ROOT / "requirements.lock").read_text()
    pinned = set(re.findall(r"^([a-z0-9.-]+)==", lock, re.MULTILINE))
    named = PROJECT["dependencies"] + [d for group in PROJECT["optional-dependencies"].values() for d in group]
    assert {re.match(r"[A-Za-z0-9.-]+", d)[0].lower() for d in named} <= pinned
    assert "://" not in lock
    assert all("--hash=sha256:" in block for block in re.split(r"\n(?=[a-z0-9.-]+==)", lock)[1:])


def test_analytics_are_off():
    config = (ROOT / ".dvc" / "config").read_text()
    assert "analytics = false" in config
    assert "check_update = false" in config


def test_readme_blocks_run(capsys):
    pages = (ROOT / "README.md").read_text(), (ROOT / "docs" / "texts.md").read_text()
    blocks = [block for page in pages for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
    assert len(blocks) == 2
    scopes: list[dict] = []
    for block in blocks:
        if "language" in block and find_spec("transformers") is None:
            continue
        scopes.append({})
        exec(block, scopes[-1])
    assert scopes[0]["error"] == pytest.approx(scopes[0]["predicted"].rmse, rel=0.02)
    said = capsys.readouterr().out
    assert "predicted" in said
    assert len(scopes) < len(blocks) or "a nurse reads the old letter someone is reading" in said


def test_page_and_notebook_say_the_same_of_every_attacker():
    """One table, attack × what it knows, in both; a row for each method, with the settings of the code."""
    book = nbformat.read(ROOT / "notebooks" / "01_leakage.ipynb", as_version=4)
    prose = "\n".join(c.source for c in book.cells if c.cell_type == "markdown")
    rows = [
        line for line in (ROOT / "docs" / "attackers.md").read_text().splitlines() if re.match(r"\| `[a-z-]+` \|", line)
    ]
    assert [re.match(r"\| `([a-z-]+)`", row)[1] for row in rows] == list(METHODS)
    for row, (name, method) in zip(rows, METHODS.items(), strict=True):
        assert row in prose or name not in GENERAL
        assert f"{method.steps:,} " in row or "as `dgl`" in row
        assert row.split("|")[5].strip() == ("yes" if method.box else "optional")


PAGES = [str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / "docs") for path in sorted(folder.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target


def test_continuous_integration_calls_the_readme_test_command():
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()


def test_citation_names_paper_and_software():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == i2f.__version__
    assert len(citation["preferred-citation"]["authors"]) == 5


def test_results_json_is_plain():
    assert json.loads((ROOT / "results" / "claims.json").read_text())


def test_a_sample_within_the_default_budget_has_rows_of_every_table():
    """benchmarks/rows.csv knows what the published rows cost, or `make repro` would refuse its own budget."""
    known = verify.cases()
    chosen = verify.sample(known, "a seed", 8 * 60 * verify.CORES)
    assert {case.name for case in chosen} == {case.name for case in known}
    assert len(chosen) > 2 * len({case.name for case in known})
