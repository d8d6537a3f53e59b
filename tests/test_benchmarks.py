"""The benchmarks run, at a size that takes seconds; what they measure is for `make bench`."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from conftest import build_tiny

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """A function: name -> that benchmark's module, imported anew, writing into a folder of the test's own."""

    def load(name):
        monkeypatch.syspath_prepend(str(FOLDER))
        for stale in [path.stem for path in FOLDER.glob("*.py")]:
            monkeypatch.delitem(sys.modules, stale, raising=False)
        module = import_module(name)
        for one in (module, sys.modules["common"]):
            monkeypatch.setattr(one, "HERE", tmp_path)
        return module

    return load


@pytest.fixture
def attacks(script):
    return script("attacks")


def test_speed_orders_what_it_reaches(attacks):
    table = attacks.speed(("mnist",), {"gauss-newton": 20, "dgl": 30, "idlg": 3, "gs": 3, "dlg": 2})
    assert list(table.method) == list(attacks.GENERAL)
    ours = table.set_index("method").loc["gauss-newton"]
    seconds = [ours[f"seconds to {goal:g}"] for goal in attacks.GOALS]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert seconds[-1] <= ours.seconds
    assert ours.best_mse <= 1e-10
    (row,) = attacks.ratios(table).to_dict("records")
    assert row["dgl mse"] >= row["dgl best mse"]
    assert row["budget"] > 0
    assert row["way"] > 0


def test_knowledge_and_batches_are_rows(attacks):
    pruned = attacks._knowledge("pruned 0.5, mask", 0)
    assert pruned["mse"] <= 1e-8
    assert pruned["rank"] == 784
    linear = attacks._knowledge("linear model", 0)
    assert linear["largest_difference"] <= 1e-10


def test_kinks_are_rows(attacks):
    row = attacks._kinks("lenet with ReLU", 0, 3)
    assert row["never worse"]
    assert row["objective"] < row["objective at start"]
    _, resnet = attacks._kinked("resnet18")
    assert sum(p.numel() for p in resnet.parameters()) == 11_181_642
    assert "".join(type(m).__name__ for m in attacks._kinked("lenet with ReLU")[1]).count("ReLU") == 4


def test_success_is_a_row(attacks):
    row = attacks._success("mnist", "default", 0, 0)
    assert row["success"] == (row["mse"] <= 1e-8)


def test_long_parts_go_on_where_they_were_cut_off(attacks):
    task, row = ("mnist", "default", 0, 0), {"success": "kept from before"}
    attacks.Partial("success", resume=False).keep(task, row)
    assert attacks._parallel(attacks._success, [task], "success", resume=True) == [row]
    assert attacks.Partial("success", resume=False).found == {}


RELEASED = """
import torch
class GradientReconstructor:
    def __init__(self, model, truth, mean_std, config, num_images):
        self.steps = config["max_iterations"]
    def reconstruct(self, gradient, labels, img_shape):
        assert [g.shape for g in gradient][-1] == (10,)
        open("left behind", "w").close()
        return torch.full((1, *img_shape), float(self.steps)), {}
"""
BREACHING = """
import torch
from types import SimpleNamespace as S
def get_attack_config(name):
    tv = S(scale=0.2)
    return S(name=name, optim=S(max_iterations=24000), regularization=S(total_variation=tv))
class attacks:
    def prepare_attack(model, loss, config, setup):
        assert config.regularization.total_variation.scale == 0
        class Attacker:
            def reconstruct(self, server, shared, secrets, dryrun):
                shape = server[0]["metadata"].shape
                return {"data": torch.full((1, *shape), float(config.optim.max_iterations))}, {}
        return Attacker()
"""


@pytest.fixture
def clone(tmp_path):
    """A folder with what either implementation's clone has."""
    (tmp_path / "breaching").mkdir()
    (tmp_path / "myreconstruction.py").write_text(RELEASED)
    (tmp_path / "breaching" / "__init__.py").write_text(BREACHING)
    return tmp_path


def test_another_implementation_is_timed_from_its_clone(attacks, clone):
    (row,) = attacks.others.compare("released", clone, steps=3, repetitions=1).to_dict("records")
    assert 7 < row["mse"] < 9.1  # a picture of threes
    assert row["ratio"] == row["seconds"] / row["our seconds"]
    assert row["our steps"] == 3
    assert row["gauss-newton ratio"] == row["seconds"] / row["gauss-newton seconds"]
    assert not (clone / "left behind").exists()


def test_the_second_implementation_is_called_as_its_own_code_asks(attacks, clone, monkeypatch):
    """What its process does, in this one."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("MPLBACKEND", "agg")
    answer = clone / "answer.json"
    with torch.random.fork_rng(devices=[]):
        attacks.others._answer("breaching", str(clone), "3", "0", str(torch.get_num_threads()), str(answer))
    del sys.modules["breaching"]
    found = json.loads(answer.read_text())
    assert 7 < found["mse"] < 9.1
    assert found["seconds"] > 0


def test_what_is_no_clone_is_named(attacks, tmp_path):
    with pytest.raises(SystemExit, match=r"--released .* has no myreconstruction.py; give the folder of a clone"):
        attacks.others.compare("released", tmp_path, steps=1)
    (tmp_path / "myreconstruction.py").write_text("import a_package_that_is_not_here")
    with pytest.raises(SystemExit, match=r"does not run in this environment: ModuleNotFoundError: .*a_package_that"):
        attacks.others.compare("released", tmp_path, steps=1)


def test_jacobian_is_compared(attacks, monkeypatch):
    import jacobian

    monkeypatch.setattr(jacobian, "SQUARE", 64)
    monkeypatch.setattr(jacobian, "TRIES", 1)
    row = jacobian.compare("mnist", torch.float64, repetitions=1, chunks=(128,))
    assert row["relative difference"] <= 1e-10
    assert row["lowest"] == row["highest"] == row["ratio"]
    assert 3 < row["GFLOP"] < 6


def test_together_and_recognisable_are_tables(attacks):
    table = attacks.together(problems=2, steps=2, repetitions=1)
    assert list(table.dtype) == ["torch.float32", "torch.float64"]
    assert (table.ratio > 0).all()
    table = attacks.recognisable(images=1, steps={"dgl": 2, "gs": 2, "dlg": 1})
    assert list(table.method) == ["dgl", "gs", "dlg"]
    assert not table.met.any()


def test_dense_attack_finds_what_ours_finds(attacks):
    J = attacks.i2f.GradientJacobian(*build_tiny("conv"))
    x, steps = attacks._dense_attack(J, torch.full_like(J.x, 0.5), steps=15)
    assert float(((x - J.x) ** 2).mean()) <= 1e-20
    assert steps <= 10


def test_the_page_of_costs_shows_the_committed_tables(attacks):
    import common
    import pandas as pd

    table = common.speed_table(pd.read_csv(FOLDER / "attacks.csv"))
    rivals = common.rivals_table(pd.read_csv(FOLDER / "others.csv"), pd.read_csv(FOLDER / "ratios.csv"))
    assert f"{table}\n\n{rivals}" in (FOLDER.parent / "docs" / "costs.md").read_text()
    assert all(f"`{method}`" in table for method in attacks.GENERAL)
    assert len(rivals.splitlines()) == 2 + 3 + 2 * 2


@pytest.fixture
def deep(script, monkeypatch):
    """The benchmark of deep networks, on one small network."""
    deep = script("deep")
    monkeypatch.setattr(deep, "REPETITIONS", 1)
    monkeypatch.setitem(
        deep.NETWORKS, "small", ("mnist", {"name": "cnn2x8", "activation": "softplus", "init": "kaiming"})
    )
    return deep


def test_both_sides_find_the_same_eigenvalue(deep):
    ours, theirs = deep.bound("small"), deep.arpack("small")
    assert ours["lambda_max"] == pytest.approx(theirs["lambda_max"], rel=2e-2)
    assert (ours["d_x"], ours["d_theta"]) == (theirs["d_x"], theirs["d_theta"])
    assert 0 < ours["products"] < theirs["products"]


def test_products_are_timed_and_weighed(deep):
    row = deep.products("small")
    assert row["pair / gradient"] == pytest.approx((row["J v, s"] + row["Jᵀ v, s"]) / row["gradient, s"])
    assert row["foreseen, GB"] > 0


def test_exact_influence_by_blocks_is_influence(deep, monkeypatch):
    monkeypatch.setattr(deep, "SMALL", ["small"])
    row = deep.influence("small")
    model, x, y = deep.setting("small")
    J = deep.i2f.GradientJacobian(model.double(), x.double(), y)
    variance = (deep.RELATIVE * float(J.gradient.norm())) ** 2 / J.shape[1]
    delta = deep.perturb.gaussian(J.gradient.float(), variance, seed=0).double()
    assert row["exact"] == pytest.approx(deep.i2f.influence(J, delta).rmse, rel=1e-3)
    damped = deep.i2f.influence(J, delta, variance / deep.PIXEL_VARIANCE).rmse
    assert row["damped, dense"] == pytest.approx(damped, rel=1e-3)
    assert row["damped"] == pytest.approx(damped, rel=0.05)
    assert row["I_lb"] < row["damped"] < row["exact"]
    assert row["rank"] == 784
    monkeypatch.setattr(deep, "SMALL", [])
    assert "exact" not in deep.influence("small")


def test_rates_and_photographs_are_rows(deep, monkeypatch):
    row = deep.rate("lenet", "gauss-newton", 2, 20)
    assert row["recovered"] == 1
    assert row["attacks / s"] == pytest.approx(2 / row["seconds"])
    assert deep.rate("lenet", "dgl", 3, 5)["recovered"] == 0
    monkeypatch.setitem(deep.NETWORKS, "efficientnet_lite0", deep.NETWORKS["small"])
    row = deep.photos(1, 3)
    assert row["steps"] == 3
    assert 0 < row["bound_rmse"] < row["rmse"]


@pytest.mark.parametrize("way", ["plain", "homotopy", "adam first", "tv"])
def test_inversions_are_rows(deep, monkeypatch, way):
    invert = deep.i2f.invert
    monkeypatch.setattr(
        deep.i2f, "invert", lambda *args, **more: invert(*args, **(more | {"steps": min(more["steps"], 3)}))
    )
    row = deep.inversion("small", 0, way, 4)
    assert row["mse"] >= 0
    assert row["evaluations"] > 3
    assert 0 < row["relative_residual"] < 1


def test_a_part_goes_on_where_it_was(deep, monkeypatch, tmp_path):
    monkeypatch.setitem(deep.TASKS, "inversion", [("small", 0, "plain", 1), ("small", 1, "plain", 1)])
    partial = deep.Partial("deep_inversion", False)
    partial.keep(("small", 0, "plain", 1), [{"mse": -1.0}])
    table = deep.run("inversion", 1, resume=True)
    assert list(table.image) == [0, 1]
    assert table.mse[0] == -1
    assert table.mse[1] > 0
    assert (tmp_path / "deep_inversion.csv").exists()
    assert not partial.path.exists()


def test_pages_show_the_committed_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("pages", "common"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import pages

    for (page, marker), table in pages.tables().items():
        assert f"{marker}\n\n{table}\n\n{pages.CLOSE}" in (FOLDER.parent / page).read_text(), marker
    million = pages.million_table()
    assert "{{" not in (FOLDER.parent / "docs" / "scaling.md").read_text()
    for row in million.splitlines()[2:]:
        *_, cores, seconds, days, hours = (cell.strip() for cell in row.strip("|").split("|"))
        work = float(seconds.replace(",", "")) * int(cores) * 1e6
        assert float(days.replace(",", "")) == pytest.approx(work / 86_400, rel=0.1)
        assert float(hours.replace(",", "")) == pytest.approx(work / 3.6e6, rel=0.1)


def test_texts_are_rows_and_go_on(script, tmp_path):
    pytest.importorskip("transformers", reason="texts need pip install 'i2f[text]'")
    texts = script("texts")
    known = {"all_found": True, "accuracy": 1.0, "rougeL": 1.0, "starts": 1, "seconds": 1e6}
    texts.Partial("texts", False).keep(("bert-tiny", "reading", 0), known | dict.fromkeys(("steps", "evaluations")))
    table = texts.run(1, True, [("bert-tiny", "reading", 2), ("gpt2-tiny causal", "reading", 1)])
    assert table.seconds[0] > 1e5 > table.seconds[1]  # one of two texts was known
    assert table["found whole"].tolist() == [2, 1]
    assert table.tokens.tolist() == [1.0, 1.0]
    assert (tmp_path / "texts.csv").exists()


def test_a_search_starts_again_until_its_gradient_is_matched(script, monkeypatch):
    """The best of its starts counts, and what all of them cost; nobody looks at the text to decide."""
    pytest.importorskip("transformers", reason="texts need pip install 'i2f[text]'")
    texts = script("texts")
    seeds, residuals = [], [0.3, 0.1, 1e-9, 0.0]

    def solve(tasks):
        seeds.append(tasks[0]["start_seed"])
        residual = residuals[len(seeds) - 1]
        return [{"relative_residual": residual, "all_found": residual < 1e-6, "steps": 10, "evaluations": 100}]

    monkeypatch.setattr(texts.texts, "solve", solve)
    monkeypatch.setattr(texts, "STARTS", 5)
    row = texts.attack("bert-tiny", texts.texts.SEARCH, 3)
    assert seeds == [3, 1003, 2003]
    assert (row["all_found"], row["starts"], row["steps"], row["evaluations"]) == (True, 3, 30, 300)
    seeds.clear()
    residuals[:] = [0.3, 0.1, 0.2, 0.4, 0.5]
    row = texts.attack("bert-tiny", texts.texts.SEARCH, 3)
    assert (row["all_found"], row["starts"]) == (False, 5)
    assert len(seeds) == 5


def test_trainings_are_rows_and_go_on(script, monkeypatch, tmp_path):
    trainings = script("trainings")
    monkeypatch.setattr(trainings, "SEEDS", 1)
    monkeypatch.setitem(trainings.PARTS, "frontier", {"none": [0], "designed": [0.1, 0.2]})
    monkeypatch.setitem(trainings.PARTS, "joint", {"plain": [0]})
    for part, known, width in (
        (
            "frontier",
            {
                (m, v, s): [{"privacy": v} if s < 0 else {"accuracy": 1 - v}]
                for m, v in (("none", 0.0), ("designed", 0.1), ("designed", 0.2))
                for s in (-1, 0)
            },
            3,
        ),
        ("joint", {("plain", 0.0, 0): [{"accuracy": 0.9, "image": image} for image in range(2)]}, 2),
    ):
        partial = trainings.Partial(f"trainings_{part}", False)
        for task, rows in known.items():
            partial.keep(task, rows)
        table = trainings.run(part, 1, resume=True)
        assert len(table) == width
        assert (tmp_path / f"trainings_{part}.csv").exists()
        assert not partial.path.exists()
        if part == "frontier":
            assert table.privacy.tolist() == table.value.tolist()
            assert table.accuracy.tolist() == [1.0, 0.9, 0.8]


def test_a_training_of_each_part_runs(script, monkeypatch):
    trainings = script("trainings")
    monkeypatch.setattr(trainings, "REFERENCE", 1)
    monkeypatch.setattr(trainings, "TRAINING", trainings.TRAINING | {"digits": 20, "held_out": 10, "epochs": 1})
    monkeypatch.setattr(trainings, "ATTACKS", trainings.ATTACKS | {"images": 1, "attacked": 1, "steps": 2})
    assert trainings.frontier("designed", 0.1, -1)[0]["privacy"] == pytest.approx(0.075, abs=0.02)
    assert 0 <= trainings.frontier("designed", 0.1, 0)[0]["accuracy"] <= 1
    (row,) = trainings.penalised("plain", 0.0, 0)
    assert {"accuracy", "image", "expected_rmse", "converged"} <= row.keys()


def test_construction_is_compared_with_a_gradient(attacks):
    """`attacks` puts the folder on the path."""
    import construction

    whole, gradient = construction.measure(FOLDER.parent, construction.CASES[0])
    assert 0 < gradient < whole


def test_imports_are_timed_in_fresh_processes(script, monkeypatch, tmp_path, capsys):
    imports = script("imports")
    monkeypatch.setattr(imports, "CODE", {"import i2f": "import i2f", "import torch": "pass"})
    monkeypatch.setattr(imports, "ROUNDS", 1)
    imports.main()
    assert "over import torch" in (tmp_path / "imports.csv").read_text()
    assert "import i2f" in capsys.readouterr().out
