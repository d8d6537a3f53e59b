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

CONFIG = {"low": 1e-4, "high": 1e-2, "levels": [0.01, 0.3], "swept": 1, "refined": 1, "weight_seeds": 5}
CONFIG |= {"gauss_newton_steps": 8}
THRESHOLDS = {"share": 0.9, "same_low": -0.05, "same_high": 0.05, "low": 1e-4, "high": 1e-2, "fallen": 0.5}
QUIET = Settings(jobs=1, progress="off")


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    return tmp_path_factory.mktemp("chunks")


def small():
    tasks = language.problems(CONFIG | {"networks": {"bert-tiny": 1}})
    return [*tasks, language.problem("bert-tiny", 0, texts.SHARED, 1, relative=0.1)]


@pytest.fixture(scope="module")
def table(chunks):
    return language.run(small(), Settings(jobs=1, progress="off", store=rows.Store(chunks=chunks))).tables["problems"]


def test_every_text_is_read_and_few_are_swept_and_refined():
    networks = {"bert-tiny": 7, "gpt2-tiny causal": 2, "minilm": 2}
    tasks = language.problems(CONFIG | {"networks": networks, "swept": 2})
    count = pd.DataFrame(tasks).groupby(["network", "task", "attacker"]).size().to_dict()
    assert count == {
        ("bert-tiny", "classification", texts.READING): 7 * 3 + 2 * 2,
        ("bert-tiny", "classification", texts.REFINED): 7 + 1,
        ("gpt2-tiny", "causal", texts.READING): 2 * 5,
        ("minilm", "classification", texts.READING): 2 * 5,
    }
    assert {p["text"]: p["weight_seed"] for p in tasks} == dict(zip(range(7), [1, 2, 3, 4, 5, 1, 2], strict=True))
    assert [p["bound"] for p in tasks if p["attacker"] == texts.REFINED] == [1e-4, 1e-2, *[1e-4] * 6]
    with pytest.raises(ValueError, match=r"attacker='readers'.*'reading'"):
        language.problem("bert-tiny", 0, "readers", 1, relative=0.0)


def test_rows_survive_the_store(table, chunks, tmp_path):
    tasks, known = small(), rows.Store(chunks=chunks, solve=False)
    rows.save(tmp_path, (language.run(tasks, Settings(store=known)), known.asked)[1])
    read = language.run(tasks, Settings(store=rows.Store([tmp_path], solve=False)))
    pd.testing.assert_frame_equal(read.tables["problems"], table)


@pytest.mark.parametrize("changed", [{"corpus": "another"}, {"weights_version": "another"}])
def test_other_texts_or_files_are_other_problems(changed):
    task = language.problem("minilm", 0, texts.READING, 1, relative=0.0)
    declared = rows.declaration(texts.solve)
    assert declared.key(task | changed) != declared.key(task)


def test_a_row_is_what_j_says_of_its_noise(table):
    row = table[(table.attacker == texts.READING) & (table.relative == 0.01)].iloc[0]
    model = networks.build("bert-tiny", seed=1).double()
    pairs, y = text.load(n=1)
    tokens = networks.encode("bert-tiny", pairs)[0]
    J = GradientJacobian(model, model.embed(tokens), y)
    assert row.variance == pytest.approx((0.01 * float(J.gradient.norm())) ** 2 / J.shape[1])
    delta = perturb.gaussian(J.gradient, row.variance, seed=0)
    moved = torch.linalg.pinv(J.dense().T, rtol=1e-8) @ delta  # (J Jᵀ)⁺ J δ
    assert row["rank"] == tokens.shape[1] * 31
    assert row.predicted_rmse == pytest.approx(float(moved.norm()) / row["rank"] ** 0.5, rel=1e-6)
    top = float(torch.linalg.matrix_norm(J.dense(), 2)) ** 2
    assert row.bound_norm == pytest.approx(float(J.matvec(delta).norm()) / top, rel=1e-6)
    assert row.damped_rmse < row.predicted_rmse
    assert np.isnan(row.bound)


def test_noise_of_a_given_bound_has_it(table):
    """It is the same draw as noise of a given norm, and what is computed of it is proportional."""
    read = table[table.attacker == texts.READING]
    given, norms = read[read.bound.notna()], read[read.bound.isna() & (read.relative > 0)]
    assert list(given.bound) == [1e-4, 1e-2]
    assert given.bound_norm.to_numpy() == pytest.approx(given.bound.to_numpy(), rel=1e-9)
    for column in ("relative", "predicted_rmse"):
        ratio = pd.concat([given, norms])[column] / pd.concat([given, norms]).bound_norm
        assert ratio.to_numpy() == pytest.approx(ratio.iloc[0], rel=1e-6)
    refined = table[table.attacker == texts.REFINED].set_index("bound")
    assert refined.rmse[1e-4] == pytest.approx(refined.predicted_rmse[1e-4], rel=0.02)
    assert refined.all_found[1e-4]


def test_reading_ends_where_noise_begins(table):
    read = table[(table.attacker == texts.READING) & table.bound.isna()].set_index("relative")
    assert read.accuracy[0.0] == read.bleu[0.0] == read.rougeL[0.0] == 1
    assert read.rmse[0.0] == read.feature_mse[0.0] == 0
    assert read.accuracy[0.3] < 0.5
    assert read.found[0.0] == read.truth[0.0]
    shared = table[table.attacker == texts.SHARED].iloc[0]
    assert shared.embedding_gradient == "shared"
    assert shared.named == 1
    assert shared.named_wrongly == 0
    assert set(shared.found.split()) <= set(shared.truth.split())


def made_up(count=64, refined=8, at=(1.0, 1.0, 0.1)) -> pd.DataFrame:
    """ROUGE-L by reading without noise, at `low` and at `high`: `at`, with a little scatter in the last two."""
    rows = []
    for task in language.problems(CONFIG | {"networks": {"bert-tiny": count}, "refined": refined, "swept": 2}):
        bound = task.get("bound", task.get("relative"))
        level = {0.0: 0, 1e-4: 1, 1e-2: 2}.get(bound)
        score = 0.5 if level is None else at[level] - (0.02 * (task["text"] % 2) if level else 0.0)
        row = {"bound_norm": bound, "relative": bound, "rougeL": score, "all_found": score == 1, "converged": True}
        rows.append(task | row | {"failed": False, "reason": ""})
    return pd.DataFrame(rows)


def judged(table):
    found = language.judge({"problems": table}, THRESHOLDS)
    assert {c.number for c in found} == {30}
    return {c.id.removeprefix("language-").replace("-bert-tiny", ""): c for c in found}


ALL = ("read", "flat", "flat-refined", "fallen")


def test_claims():
    found = judged(made_up())
    assert {name: c.verdict for name, c in found.items()} == dict.fromkeys(ALL, "holds")
    assert [c.n for c in found.values()] == [64] * 4
    refined = "Gauss–Newton" in found["flat-refined"].attacker, "Gauss–Newton" in found["flat"].attacker
    assert refined == (True, False)
    assert found["flat"].value == pytest.approx(-0.01)
    assert found["fallen"].value == pytest.approx(0.09)
    assert "refined by Gauss–Newton, 8 texts: 0.09" in found["fallen"].note
    alone = judged(made_up(refined=0).query("attacker == 'reading'"))
    assert "not refined" in alone["fallen"].note
    assert list(alone) == ["read", "flat", "fallen"]


@pytest.mark.parametrize(
    ("at", "failing"), [((0.5, 0.5, 0.1), "read"), ((1.0, 0.8, 0.1), "flat flat-refined"), ((1.0, 1.0, 0.9), "fallen")]
)
def test_claims_can_fail(at, failing):
    verdicts = {name: c.verdict for name, c in judged(made_up(at=at)).items()}
    assert verdicts == dict.fromkeys(ALL, "holds") | dict.fromkeys(failing.split(), "fails")


def test_each_attacker_is_judged_by_its_own_words():
    table = made_up()
    low = table.bound == 1e-4
    found = judged(table.assign(rougeL=table.rougeL.mask(low & (table.attacker == texts.READING), 0.3)))
    assert (found["flat"].verdict, found["flat-refined"].verdict) == ("fails", "holds")
    ended = ~low | (table.attacker == texts.READING) | (table.text > 8)
    assert judged(table.assign(converged=ended))["flat-refined"].verdict == "inconclusive"


def test_what_lies_at_the_margin_is_inconclusive_and_seven_texts_decide_nothing():
    assert judged(made_up(at=(1.0, 0.96, 0.1)))["flat"].verdict == "inconclusive"
    assert {c.verdict for c in judged(made_up(count=7)).values()} == {"inconclusive"}


def test_an_attack_that_failed_read_nothing_and_proves_no_protection():
    table = made_up().astype({"all_found": object})
    plain, low, high = (table.bound.isna() & (table.relative == 0)), table.bound == 1e-4, table.bound == 1e-2
    read = table.attacker == texts.READING
    found = judged(
        table.assign(failed=plain & (table.text < 10), all_found=table.all_found.mask(plain & (table.text < 10)))
    )
    assert found["read"].value == pytest.approx(54 / 64)
    found = judged(table.assign(failed=low & (table.text < 10)))
    assert max(found["flat"].value, found["flat-refined"].value) < -0.1
    lost = high & read & (table.text < 4)
    found = judged(table.assign(failed=lost, rougeL=table.rougeL.mask(lost, 0.0).mask(high & read & ~lost, 0.8)))
    assert (found["fallen"].value, found["fallen"].n) == (pytest.approx(0.8), 60)
    lost = high & read & (table.text < 10)
    assert judged(table.assign(failed=lost))["fallen"].verdict == "inconclusive"


def test_networks_that_do_not_classify_are_reported_alone():
    table = pd.concat([made_up(), made_up().assign(network="gpt2-tiny", task="causal")])
    assert len(language.judge({"problems": table}, THRESHOLDS)) == 4
    summary = language.summary(table)
    assert list(summary) == ["no noise", "I_lb = 0.0001", "I_lb = 0.01", "texts", "whole"]
    assert summary.loc[("gpt2-tiny", "causal", "reading"), "I_lb = 0.01"] == pytest.approx(0.09)


def test_no_two_texts_share_the_noise_of_the_embeddings_gradient(monkeypatch):
    seen = []
    monkeypatch.setattr(texts, "token_set", lambda rows, variance: seen.append(rows) or original(rows, variance))
    original = reading.token_set
    tasks = [language.problem("bert-tiny", text, texts.SHARED, 1, relative=0.1) for text in (0, 1)]
    table = language.run(tasks, QUIET).tables["problems"]
    for text_number, (sent, variance) in enumerate(zip(map(texts._sent, tasks), table.variance, strict=True)):
        rows = networks.embedding_gradient(sent.model, sent.tokens, sent.y)
        noise = (seen[text_number] - rows).flatten()
        assert float(noise.square().mean()) == pytest.approx(variance, rel=0.1)
        for seed in (text_number, text_number + 1):  # the gradient's own noise, of this text and of the next
            other = perturb.gaussian(rows.flatten(), 1.0, seed=seed)
            assert abs(np.corrcoef(noise, other)[0, 1]) < 5 / len(noise) ** 0.5


def test_the_figures_draw_what_there_is(table):
    drawn = draw.published(Results({"problems": table}), CONFIG)
    left, middle, right = drawn["overview.svg"].axes
    cloud, bars = left.collections
    assert len(cloud.get_offsets()) == len(bars.get_segments()) == 2  # levels, and bounds
    _, medians, low, high = left.lines
    assert list(medians.get_ydata()) == list(table[(table.attacker == texts.READING) & table.bound.notna()].rougeL)
    assert [low.get_xdata()[0], high.get_xdata()[0]] == [1e-4, 1e-2]
    assert all(line.get_ydata().min() > 0 for line in middle.lines[2:])
    assert sum(len(c.get_offsets()) for c in right.collections) == 2
    words = {t.get_text() for t in drawn["words.svg"].axes[0].texts}
    assert {"nurse", "letter", "read  0", "read  1e-04", "refined  1e-02"} <= words
    assert all(token.isascii() or "□" in token for token in words)
