"""The experiment on texts: its numbers by hand, its claims on made-up tables."""

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("transformers", reason="texts need pip install 'i2f[text]'")

from i2f import language as networks
from i2f import perturb, text
from i2f.core.jacobian import GradientJacobian
from i2f.paper import rows, texts
from i2f.paper.experiments import language
from i2f.paper.figures import language as draw
from i2f.paper.results import Results
from i2f.paper.sweep import Settings
from i2f.text import tokens as reading

pytestmark = pytest.mark.usefixtures("few_draws")
LEVELS = {texts.READING: [0.0, 0.01, 0.3], texts.SHARED: [0.1], texts.REFINED: [1e-3]}
THRESHOLDS = {"share": 0.9, "cut": 0.1, "accuracy": 0.05, "order": 0.7, "low": 1e-2, "high": 0.5}
THRESHOLDS |= {"kept": 0.9, "fallen": 0.5, "middle": 0.03}
QUIET = Settings(jobs=1, progress="off")


def problems(networks, levels, **more):
    steps = {"refining_steps": 8, "searching_steps": 8, "tag_steps": 8}
    return language.problems({"networks": networks, "levels": levels, "weight_seed": 1} | steps | more)


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    return tmp_path_factory.mktemp("chunks")


@pytest.fixture(scope="module")
def table(chunks):
    tasks = problems({"bert-tiny": 1}, LEVELS)
    return language.run(tasks, Settings(jobs=1, progress="off", store=rows.Store(chunks=chunks))).tables["problems"]


def test_problems_are_those_that_an_attacker_can_have():
    levels = {name: [0.0, 0.1] for name in texts.ATTACKERS}
    tasks = problems({"bert-tiny": 3, "gpt2-tiny causal": 2, "minilm": 2}, levels, few={texts.TAG: 1})
    count = pd.DataFrame(tasks).groupby(["network", "task", "attacker"]).size().to_dict()
    assert count == {
        **{("bert-tiny", "classification", a): 6 for a in texts.ATTACKERS if a != texts.TAG},
        ("bert-tiny", "classification", texts.TAG): 2,
        **{("gpt2-tiny", "causal", a): 4 for a in (texts.READING, texts.REFINED)},
        **{("minilm", "classification", a): 4 for a in texts.READS},
    }
    with pytest.raises(ValueError, match=r"attacker='readers'.*'reading'"):
        problems({"bert-tiny": 1}, {"readers": [0.0]})


def test_rows_survive_the_store(table, chunks, tmp_path):
    tasks, known = problems({"bert-tiny": 1}, LEVELS), rows.Store(chunks=chunks, solve=False)
    rows.save(tmp_path, (language.run(tasks, Settings(store=known)), known.asked)[1])
    read = language.run(tasks, Settings(store=rows.Store([tmp_path], solve=False)))
    pd.testing.assert_frame_equal(read.tables["problems"], table)


@pytest.mark.parametrize("changed", [{"corpus": "another"}, {"weights_version": "another"}])
def test_other_texts_or_files_are_other_problems(changed):
    (task,) = problems({"minilm": 1}, {texts.READING: [0.0]})
    declared = rows.declaration(texts.solve)
    assert declared.key(task | changed) != declared.key(task)


def test_a_row_is_what_j_says_of_its_noise(table):
    row = table[table.attacker == texts.REFINED].iloc[0]
    model = networks.build("bert-tiny", seed=1).double()
    pairs, y = text.load(n=1)
    tokens = networks.encode("bert-tiny", pairs)[0]
    J = GradientJacobian(model, model.embed(tokens), y)
    assert row.variance == pytest.approx((1e-3 * float(J.gradient.norm())) ** 2 / J.shape[1])
    delta = perturb.gaussian(J.gradient, row.variance, seed=0)
    moved = torch.linalg.pinv(J.dense().T, rtol=1e-8) @ delta  # (J Jᵀ)⁺ J δ
    assert row["rank"] == tokens.shape[1] * 31
    assert row.predicted_rmse == pytest.approx(float(moved.norm()) / row["rank"] ** 0.5, rel=1e-6)
    top = float(torch.linalg.matrix_norm(J.dense(), 2)) ** 2
    assert row.bound_norm == pytest.approx(float(J.matvec(delta).norm()) / top, rel=1e-6)
    assert row.damped_rmse < row.predicted_rmse
    assert row.rmse == pytest.approx(row.predicted_rmse, rel=0.02)
    assert row.all_found


def test_reading_ends_where_noise_begins(table):
    read = table[table.attacker == texts.READING].set_index("relative")
    assert read.accuracy[0.0] == read.bleu[0.0] == read.rougeL[0.0] == 1
    assert read.rmse[0.0] == read.feature_mse[0.0] == 0
    assert read.accuracy[0.3] < 0.5
    assert read.found[0.0] == read.truth[0.0]
    shared = table[table.attacker == texts.SHARED].iloc[0]
    assert shared.embedding_gradient == "shared"
    assert shared.named == 1
    assert shared.named_wrongly == 0
    assert set(shared.found.split()) <= set(shared.truth.split())


def made_up(count=5, **replaced):
    levels = {name: [0.001, 0.03, 1.0] for name in (texts.READING, texts.SHARED, texts.REFINED)}
    levels |= {texts.SEARCH: [0.0], texts.TAG: [0.0]}
    levels[texts.READING] = [0.0, *levels[texts.READING]]
    rows = []
    for task in problems({"bert-tiny": count}, levels):
        size = task["relative"] * (1 + task["text"] / 10)
        left = 1 - min(size, 1)
        rows.append(
            task
            | {
                "predicted_rmse": 0.01 * size,
                "rmse": 0.0101 * size,
                "bound_norm": size,
                "spread": 0.1,
                "rougeL": left,
                "accuracy": left,
                "feature_mse": size**2,
                "all_found": size == 0,
                "named": 1.0,
                "named_wrongly": 0,
                "converged": True,
                "failed": False,
                "reason": "",
            }
        )
    return pd.DataFrame(rows).assign(**replaced)


def verdicts(table):
    found = language.judge({"problems": table}, THRESHOLDS)
    return {c.id.removeprefix("language-bert-tiny-"): c for c in found}


def test_claims():
    found = verdicts(made_up())
    names = ("read", "searched", "tag", "accuracy", "features", "order", "texts", "flat", "fallen", "shared")
    few = {"texts": "inconclusive"}  # five texts have no order that means anything
    assert {name: c.verdict for name, c in found.items()} == dict.fromkeys(names, "holds") | few
    assert found["accuracy"].value == pytest.approx(0.01)
    assert found["flat"].n == 5


def test_eight_texts_have_an_order():
    table = made_up(count=8)
    (found,) = (c for name, c in verdicts(table[table.attacker == texts.READING]).items() if name == "texts")
    assert found.verdict == "holds"
    assert found.value == pytest.approx(1)


@pytest.mark.parametrize(
    ("replaced", "name", "verdict"),
    [
        ({"all_found": False}, "read", "fails"),
        ({"rmse": 0.01}, "accuracy", "fails"),
        ({"rougeL": 0.2}, "flat", "fails"),
        ({"rougeL": 0.8}, "fallen", "fails"),
        ({"named": 0.1}, "shared", "fails"),
    ],
)
def test_claims_can_fail(replaced, name, verdict):
    assert verdicts(made_up(**replaced))[name].verdict == verdict


def test_a_search_that_failed_found_nothing():
    table = made_up().astype({"all_found": object})
    table.loc[table.attacker == texts.SEARCH, ["all_found", "failed"]] = [np.nan, True]
    assert verdicts(table)["searched"].verdict == "fails"


def test_an_attack_that_failed_read_nothing_and_proves_no_protection():
    table = made_up()
    failed = (table.attacker == texts.REFINED) & (table.relative < 1)
    found = verdicts(table.assign(failed=failed))
    assert found["flat"].value == 0  # its best iterate before it diverged is no text that was read
    assert found["accuracy"].value == np.inf
    failed = (table.attacker == texts.REFINED) & (table.relative == 1) & (table.text == 0)
    found = verdicts(table.assign(failed=failed, rougeL=0.8))
    assert found["fallen"].value == pytest.approx(0.8)
    assert found["fallen"].n == 4


def test_texts_that_tie_do_not_cap_the_order():
    """Nothing is lost at two of three levels: Spearman's correlation is 0.84 at most."""
    table = made_up().assign(rougeL=lambda t: (t.relative < 1) * 1.0, feature_mse=lambda t: (t.relative >= 1) * 1.0)
    found = verdicts(table)
    assert found["order"].value == found["features"].value == pytest.approx(1)
    assert found["order"].verdict == "holds"


def test_no_two_texts_share_the_noise_of_the_embeddings_gradient(monkeypatch):
    seen = []
    monkeypatch.setattr(texts, "token_set", lambda rows, variance: seen.append(rows) or original(rows, variance))
    original = reading.token_set
    tasks = problems({"bert-tiny": 2}, {texts.SHARED: [0.1]})
    table = language.run(tasks, QUIET).tables["problems"]
    for text_number, (sent, variance) in enumerate(zip(map(texts._sent, tasks), table.variance, strict=True)):
        rows = networks.embedding_gradient(sent.model, sent.tokens, sent.y)
        noise = (seen[text_number] - rows).flatten()
        assert float(noise.square().mean()) == pytest.approx(variance, rel=0.1)
        for seed in (text_number, text_number + 1):  # the gradient's own noise, of this text and of the next
            other = perturb.gaussian(rows.flatten(), 1.0, seed=seed)
            assert abs(np.corrcoef(noise, other)[0, 1]) < 5 / len(noise) ** 0.5


def test_the_figures_draw_what_there_is(table):
    drawn = draw.published(Results({"problems": table}), {})
    left, middle, right = drawn["overview.svg"].axes
    assert len(left.collections) == 1
    assert len(middle.lines) == 2  # read, refined
    assert all(line.get_ydata().min() > 0 for line in right.lines)
    words = {t.get_text() for t in drawn["words.svg"].axes[0].texts}
    assert {"nurse", "letter", "read  0", "refined  0.001"} <= words
    assert all(token.isascii() or "□" in token for token in words)
