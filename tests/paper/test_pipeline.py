"""The pipeline's own rules: parameters, notebooks, stages and environment files agree with each other."""

import json
import math
import re
import shutil
import tomllib
from importlib.util import find_spec
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import yaml

from i2f import claims, data, pipeline, statistics
from i2f.attacks import METHODS
from i2f.paper import books, ledger, publishing

ROOT = Path(__file__).resolve().parents[2]
LEAKAGE = ROOT / "notebooks" / "01_leakage.ipynb"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


PROFILES = [ROOT, *sorted(folder for folder in (ROOT / "profiles").iterdir())]
RUNS = [
    pytest.param(folder, key, entry, id=f"{folder.name}-{key}")
    for folder in PROFILES
    for key, entry in yaml.safe_load((folder / "params.yaml").read_text())["runs"].items()
]


def test_every_profile_runs_the_same_stages():
    assert {p.name for p in PROFILES} == {ROOT.name, "smoke", "paper"}
    for folder in PROFILES:
        assert (folder / "dvc.yaml").read_text() == (ROOT / "dvc.yaml").read_text()
        root = yaml.safe_load((folder / "params.yaml").read_text())["root"]
        assert (folder / root).resolve() == ROOT


@pytest.mark.parametrize(("folder", "key", "entry"), RUNS)
def test_params_are_parameters_of_the_notebook(folder, key, entry):
    notebook = ROOT / "notebooks" / f"{entry['notebook']}.ipynb"
    known = papermill.inspect_notebook(str(notebook))
    for name, value in entry["parameters"].items():
        assert name in known, f"{key}.{name} is no parameter of {notebook.name}: papermill would only warn"
        assert not (isinstance(value, str) and re.fullmatch(r"[\d.]+e[-+]?\d+", value)), f"{name}: write {value} out"
    assert entry["experiment"].startswith(key.split("-")[0])
    assert (ROOT / "i2f" / "paper" / "experiments" / f"{entry['experiment']}.py").exists()
    assert (ROOT / "i2f" / "paper" / "figures" / f"{entry['experiment']}.py").exists()


def test_every_notebook_that_takes_parameters_is_run():
    with_parameters = {n.stem for n in NOTEBOOKS if papermill.inspect_notebook(str(n))}
    assert {entry["notebook"] for entry in PARAMS["runs"].values()} == with_parameters


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_whole(notebook):
    """A notebook without outputs would pass nbval without saying anything."""
    cells = [c for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert sum(any("image/png" in o.get("data", {}) for o in c.outputs) for c in cells) >= 1
    compared = [c for c in cells if c.outputs and "nbval-ignore-output" not in c.metadata.get("tags", [])]
    assert any("text/html" in o.get("data", {}) for c in compared for o in c.outputs), "no table is compared"
    assert not any(o.get("name") == "stderr" for c in cells for o in c.outputs)
    assert sum(len(c.source.splitlines()) for c in cells) <= 90, "what is worth testing belongs into the package"


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_tags_are_ones_that_nbval_knows(notebook):
    known = {"parameters", "nbval-ignore-output", "nbval-skip", "raises-exception"}
    for cell in nbformat.read(notebook, as_version=4).cells:
        assert set(cell.metadata.get("tags", [])) <= known


def test_stages_depend_on_the_rooms_they_use():
    """The heavy stages name every room and module that a table is computed by: all but those apart."""
    apart = {"__init__", "books", "command", "ledger", "pipeline", "publishing", "figures", "experiments"}
    paper = {p.stem for p in (ROOT / "i2f" / "paper").iterdir() if p.name != "__pycache__"} - apart
    rooms = {p.name for p in (ROOT / "i2f").iterdir() if p.is_dir() and p.name != "__pycache__"} - {"paper"}
    named = {d.removeprefix("${root}/i2f/") for d in STAGES["run"]["do"]["deps"] if d.startswith("${root}/i2f/")}
    experiments = {"paper/experiments/problems.py", "paper/experiments/${item.experiment}.py"}
    experiments |= {"paper/experiments/${item.experiment}.toml", "paper/attackers.toml"}
    experiments |= {"paper/experiments/frontier.py", "paper/experiments/frontier.toml"}  # designed noise's second table
    assert named == rooms | {f"paper/{module}.py" for module in paper} | experiments


def test_the_code_stage_depends_on_every_notebook_that_is_run():
    notebooks = {f"${{root}}/notebooks/{entry['notebook']}.ipynb" for entry in PARAMS["runs"].values()}
    assert notebooks | {"${root}/i2f/paper/books.py"} == set(STAGES["code"]["deps"])


def test_nothing_of_a_run_can_be_pushed_into_the_bundled_remote():
    for name, stage in ((name, stage.get("do", stage)) for name, stage in STAGES.items()):
        for out in [*stage.get("outs", []), *stage.get("metrics", [])]:
            (options,) = out.values() if isinstance(out, dict) else ({},)
            assert options.get("push") is False or options.get("cache") is False, f"{name}: add push: false"


def test_unknown_parameter_stops_a_run_before_it_starts(tmp_path):
    (tmp_path / "params.yaml").write_text(
        "runs: {leakage-mnist: {notebook: 01_leakage, experiment: leakage, parameters: {imagse: 3}}}"
    )
    with pytest.raises(ValueError, match="did you mean 'image'"):
        pipeline.run("leakage-mnist", tmp_path)
    with pytest.raises(ValueError, match="did you mean 'leakage-mnist'"):
        pipeline.run("leakage-mnits", tmp_path)
    assert not (tmp_path / "runs").exists()


def test_what_is_published_is_what_was_found(tmp_path):
    """Tables rounded, figures drawn anew, nothing of an earlier run left."""
    name = "leakage-mnist"
    (tmp_path / "params.yaml").write_text(f"runs: {{{name}: {{notebook: 01_leakage, experiment: leakage}}}}")
    run, stale = tmp_path / "runs" / "executed" / name, tmp_path / "results" / name / "stale.csv"
    run.mkdir(parents=True)
    stale.parent.mkdir(parents=True)
    stale.touch()
    pd.DataFrame({"mse": [0.123456]}).to_csv(run / "summary.csv", index=False)
    paths = pd.DataFrame({"method": ["dgl", "gs"] * 2, "evaluations": [1, 1, 9, 9], "mse": [1, 1, 0.1, 0.2]})
    paths.to_csv(run / "paths.csv", index=False)
    np.savez(run / "pictures.npz", truth=np.zeros((1, 4, 4)), images=np.zeros((2, 2, 1, 4, 4)), costs=np.array([1, 5]))
    (tmp_path / "results" / "no-run").mkdir()
    publishing.publish(tmp_path, pipeline.runs(tmp_path))
    assert {p.name for p in (tmp_path / "results").iterdir()} == {name, "claims.json"}
    published = {p.name for p in stale.parent.iterdir()}
    assert published == {"overview.png", "paths.csv", "summary.csv"}
    assert pd.read_csv(stale.parent / "summary.csv").mse.item() == 0.123


def test_what_is_finished_can_be_published_before_the_rest(tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    with pytest.raises(FileNotFoundError, match="dvc repro run@leakage-mnist"):
        publishing.publish(tmp_path, pipeline.runs(tmp_path))
    run = tmp_path / "runs" / "executed" / "lower_bound-mnist"
    shutil.copytree(ROOT / "results" / "lower_bound-mnist", run)
    (run / "03_lower_bound.ipynb").touch()
    publishing.publish(tmp_path, pipeline.runs(tmp_path), finished=True)
    assert {p.name for p in (tmp_path / "results").iterdir()} == {"lower_bound-mnist", "claims.json"}
    assert claims.load(tmp_path / "results" / "claims.json") == claims.load(run / "claims.json")


def test_code_alone_does_not_see_prose_or_outputs_or_the_notebooks_own_scale(tmp_path, monkeypatch):
    key, book = "leakage-mnist", nbformat.read(LEAKAGE, as_version=4)
    (tmp_path / "params.yaml").write_text(
        f"runs: {{{key}: {{notebook: changed, experiment: leakage, parameters: {{adam_steps: 7}}}}}}"
    )
    monkeypatch.setattr(books, "NOTEBOOKS", tmp_path)

    def written() -> str:
        nbformat.write(book, tmp_path / "changed.ipynb")
        pipeline.code(tmp_path)
        return (tmp_path / "runs" / "code" / f"{key}.py").read_text()

    before = written()
    compile(before, key, "exec")
    assert "adam_steps = " not in before
    assert "lbfgs_steps = " in before
    parameters = next(c for c in book.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source = re.sub("adam_steps = .*", "adam_steps = 1", parameters.source)
    book.cells.insert(0, nbformat.v4.new_markdown_cell("more words"))
    book.cells[-1].outputs = []
    assert written() == before
    parameters.source = re.sub("lbfgs_steps = .*", "lbfgs_steps = 1", parameters.source)
    assert written() != before


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
        assert claim.n >= 1


def test_collected_claims_are_those_of_every_result():
    apart = [c for key in PARAMS["runs"] for c in claims.load(ROOT / "results" / key / "claims.json")]
    assert list(map(str, apart)) == list(map(str, claims.load(ROOT / "results" / "claims.json")))


def test_every_result_is_of_a_run():
    assert {p.name for p in (ROOT / "results").iterdir() if p.is_dir()} == set(PARAMS["runs"])


def test_readme_shows_every_claim():
    shown = ledger.markdown()
    assert f"{publishing.OPEN}\n\n{shown}\n\n{publishing.CLOSE}" in (ROOT / "README.md").read_text()
    for claim in claims.load(ROOT / "results" / "claims.json"):
        assert shown.count(f"*{claim.id}*") == 1 + (claim.id in ledger.HEADLINES)
    assert all(f"*{name}*" in shown for name in ledger.HEADLINES)
    rows = [line.replace("\\|", "") for line in shown.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {6}  # a stray bar would hide the verdict


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_published_tables_agree_with_published_claims(dataset):
    """The slope, recomputed from the rounded table, is the claim's within the rounding of three digits."""
    folder = ROOT / "results" / f"eigenvectors-{dataset}"
    table = pd.read_csv(folder / "problems.csv")
    law = table[(table.part == "law") & (table.method == "gauss-newton")]
    slope = next(c for c in claims.load(folder / "claims.json") if c.id == f"eigenvectors-{dataset}-slope")
    assert statistics.log_slope(law, "eigenvalue", "mse") == pytest.approx(slope.value, abs=0.01)
    assert len(law) >= 8


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
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
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


def test_readme_and_notebook_say_the_same_of_every_attacker():
    """One table, attack × what it knows, in both; a row for each method, with the settings of the code."""
    book = nbformat.read(ROOT / "notebooks" / "01_leakage.ipynb", as_version=4)
    prose = "\n".join(c.source for c in book.cells if c.cell_type == "markdown")
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| `[a-z-]+` \|", line)]
    assert [re.match(r"\| `([a-z-]+)`", row)[1] for row in rows] == list(METHODS)
    for row, method in zip(rows, METHODS.values(), strict=True):
        assert row in prose
        assert f"{method.steps:,} " in row or "as `dgl`" in row
        assert row.split("|")[5].strip() == ("yes" if method.box else "optional")


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "DATA.md", "docs/scaling.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target


def test_continuous_integration_calls_the_readme_test_command():
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()


def test_citation_names_paper_and_software():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert len(citation["preferred-citation"]["authors"]) == 5


def test_results_json_is_plain():
    assert json.loads((ROOT / "results" / "claims.json").read_text())
