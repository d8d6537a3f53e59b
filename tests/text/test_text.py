"""Texts come as they were, from the bundle and from GLUE's files; scores are what they say."""

import pytest

from i2f import cli, text
from i2f.text import corpus


def test_the_bundle_is_short_balanced_and_labelled():
    pairs, y = text.load()
    assert len(pairs) == len(set(pairs)) == len(y) == 64
    assert int(y.sum()) == 32
    assert all(len(half.split()) >= 3 for pair in pairs for half in pair)
    some, labels = text.load(n=2, offset=3)
    assert some == pairs[3:5]
    assert labels.tolist() == y[3:5].tolist()


@pytest.mark.parametrize("folder", ["", "RTE"])
def test_glues_own_files(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    rows = 'index\tsentence1\tsentence2\tlabel\n0\tHe said "no".\tHe spoke.\tentailment\n'
    (tmp_path / folder / "dev.tsv").write_text(rows, encoding="utf-8")
    assert text.load(root=tmp_path)[0] == [('He said "no".', "He spoke.")]
    with pytest.raises(FileNotFoundError, match=r"train\.tsv"):
        text.load(root=tmp_path, split="train")
    (tmp_path / folder / "dev.tsv").write_text(rows.replace("entailment", "entails"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"label='entails'.*'entailment'"):
        text.load(root=tmp_path)


@pytest.mark.parametrize(("n", "offset"), [(65, 0), (1, 64), (0, 0), (1, -1)])
def test_a_range_outside_the_set(n, offset):
    with pytest.raises(ValueError, match=rf"n={n} texts from offset={offset}.*64"):
        text.load(n=n, offset=offset)


def test_an_altered_bundle_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="dvc pull"):
        text.verify()
    (tmp_path / text.FILE).write_text("index\tsentence1")
    with pytest.raises(OSError, match="altered"):
        text.load()
    assert cli.main(["data", "verify"]) == 1


def test_accuracy_counts_places():
    assert text.accuracy([1, 5, 6, 2], [1, 6, 6, 2]) == 0.75
    assert text.accuracy([1, 5, 6, 2], [1, 6, 6, 2], special=[1, 2]) == 0.5
    with pytest.raises(ValueError, match="same length"):
        text.accuracy([1], [1, 2])
    with pytest.raises(ValueError, match="nothing to find"):
        text.accuracy([1], [1], special=[1])


def test_overlap_by_hand():
    pytest.importorskip("rouge_score", reason="needs pip install 'i2f[text]'")
    found = text.overlap("the dog sat here", "the dog sat there")
    assert found["rouge1"] == pytest.approx(3 / 4)
    assert found["rouge2"] == pytest.approx(2 / 3)
    assert found["rougeL"] == pytest.approx(3 / 4)
    assert text.overlap("dog the", "the dog")["rougeL"] == pytest.approx(1 / 2)
    assert text.overlap("the dog sat there", "the dog sat there")["bleu"] == pytest.approx(1)
    assert text.overlap("", "the dog")["rouge1"] == 0
    with pytest.raises(ValueError, match="truth is empty"):
        text.overlap("word", " ")


def test_without_the_extra_the_command_is_named():
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'i2f\[text\]'"):
        text.extra("a_package_that_nobody_has")
