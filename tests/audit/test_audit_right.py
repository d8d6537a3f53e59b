"""Audits of networks, inputs and scales that other people bring: right, or refused. References are twins: the same
network without the feature, in float64, on pixels in [0, 1]; or closed forms."""

import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import i2f
from conftest import build_crop, build_tiny
from i2f import cli, metrics
from i2f.audit import audit
from i2f.audit.command import GATE
from i2f.paper.models import Normalize

D = torch.float64
PIXELS = (0.0, 1.0)


@pytest.fixture
def digit(digits):
    return digits[0][:1], digits[1][:1]


def color():
    """(model, x, y): three channels, which a standardisation treats differently."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 4)).double().eval()
        return model, torch.rand(2, 3, 4, 4, dtype=D), torch.tensor([1, 3])


class Scaled(nn.Module):
    """A network of 0–255 pixels that computes what its twin computes of [0, 1]."""

    def __init__(self, twin):
        super().__init__()
        self.twin = twin

    def forward(self, x):
        return self.twin(x / 255)


def numbers(found):
    return [(s.judged, s.predicted, s.boxed, s.prior, s.needed, s.drawn_psnr, s.bound, s.label) for s in found]


def agree(found, wanted, rel=1e-6):
    for a, b in zip(numbers(found), numbers(wanted), strict=True):
        assert a == pytest.approx(b, rel=rel, abs=1e-12, nan_ok=True)


# The range of the data


@pytest.mark.parametrize("options", [{}, {"exact": False}, {"together": True}, {"attack": True}])
@pytest.mark.parametrize("defense", ["gaussian:1e-4", "none", "designed:0.1"])
def test_bytes_are_judged_as_the_same_image_in_unit_pixels(options, defense):
    model, x, y = color()
    wanted = audit(model, x, y, defense, **options)
    found = audit(Scaled(model).eval(), 255 * x, y, defense, range=(0, 255), **options)
    agree(found, wanted, 1e-4 if options.get("attack") or "exact" in options else 1e-6)
    assert found.range == (0.0, 255.0)


def test_standardised_data_agree_with_a_normalising_first_layer():
    model, x, y = color()
    mean, std = (0.2, 0.5, 0.4), (0.3, 0.2, 0.5)
    first = Normalize(mean, std).double()
    first.mean, first.std = (torch.tensor(v, dtype=D)[:, None, None] for v in (mean, std))
    wanted = audit(nn.Sequential(first, model), x, y, "gaussian:1e-4")
    low, high = ((end - first.mean) / first.std for end in PIXELS)
    for limits in ((low, high), (low.flatten().tolist(), high.flatten().numpy()), (low.expand(3, 4, 4), high)):
        found = audit(model, first(x), y, "gaussian:1e-4", range=limits)
        agree(found, wanted)
        torch.testing.assert_close(found.samples[0].image, x[0].float())  # shown in units of the range


@pytest.mark.parametrize(
    ("scale", "shift", "limits", "words"),
    [
        (255, 0, None, "x has values from 5.27.* to 252.562, outside the range .0, 1.: give range="),
        (1, -0.5, None, "x has values from -0.4.* outside the range .0, 1."),
        (255, 0, (0, 200), "to 25.* outside the range .0, 200."),
        (1, 0, ([0, 0, 0.5], [1, 1, 1]), "outside the range stated for each entry"),
        (1, 0, (1, 0), "range has a low that is not below its high"),
        (1, 0, (0, math.nan), "range has 1 NaN"),
        (1, 0, (0, 1, 2), "range does not fit an input of shape .3, 4, 4."),
        (1, 0, ([0, 0], [1, 1]), "range does not fit an input of shape .3, 4, 4."),
        (1, 0, 255, "range does not fit"),
        (1, 0, ("dark", "light"), "range does not fit"),
        (math.nan, 0, None, "x has 96 NaN"),
    ],
)
def test_data_outside_their_range_and_ranges_that_are_none_are_refused(scale, shift, limits, words):
    model, x, y = color()
    with pytest.raises(ValueError, match=words):
        audit(model, scale * x + shift, y, range=limits)


def test_nan_in_y_and_words_in_y_are_named():
    model, x, _ = color()
    with pytest.raises(ValueError, match="y has 1 NaN"):
        audit(model, x, torch.tensor([[0.0, 1, 0, 0], [math.nan, 0, 0, 1]]))
    with pytest.raises(TypeError, match="y is str"):
        audit(model, x, "12")
    with pytest.raises(TypeError, match="model is GradientJacobian; it must be"):
        audit(i2f.GradientJacobian(model, x, torch.tensor([1, 3])), x, torch.tensor([1, 3]))
    with pytest.raises(TypeError, match="defense is float; give its text"):
        audit(model, x, torch.tensor([1, 3]), 1e-3)


def test_rounding_at_the_ends_of_the_range_is_forgiven():
    """float32 standardisation of a white pixel lands a little outside, also when float64 holds it afterwards."""
    model, x, y = color()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0, 1
    standard = ((x.float() - 0.1307) / 0.3081).double()
    assert audit(model, standard, y, range=tuple((end - 0.1307) / 0.3081 for end in PIXELS)).samples[0].judged == 0


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Bytes(nn.Sequential):\n    def forward(self, x):\n"
        "        return super().forward(x / 255)\n\n\ndef make(kind=nn.Sequential):\n    torch.manual_seed(0)\n"
        "    return kind(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 4))\n\n\n"
        "def of_bytes():\n    return make(Bytes)\n"
    )
    _, x, y = color()
    x = (255 * x).round()
    np.savez(tmp_path / "pixels.npz", x=(x / 255).float().numpy(), y=y.numpy())
    np.savez(tmp_path / "floats.npz", x=x.float().numpy(), y=y.numpy())
    np.savez(tmp_path / "bytes.npz", x=x.to(torch.uint8).numpy(), y=np.eye(4)[y])
    np.savez(tmp_path / "standard.npz", x=(x / 255 - 0.5).float().numpy(), y=y.numpy())
    yield tmp_path
    sys.modules.pop("nets", None)


@pytest.mark.parametrize(("least", "status"), [("0.02", 0), ("0.3", GATE)])
def test_the_gate_is_the_same_for_bytes(folder, capsys, least, status):
    command = ["audit", "--defense", "gaussian:1e-4", "--min-rmse", least, "--json", "out.json", "--model"]
    judged = []
    for words in (
        ["nets:make", "--data", "pixels.npz"],
        ["nets:make", "--data", "bytes.npz"],
        ["nets:of_bytes", "--data", "floats.npz", "--range", "0", "255"],
        ["nets:of_bytes", "--data", "bytes.npz", "--range", "0,0,0", "255,255,255"],
    ):
        assert cli.main([*command, *words]) == status
        judged.append([s["judged"] for s in json.loads((folder / "out.json").read_text())["samples"]])
    for other in judged[1:]:
        assert other == pytest.approx(judged[0], rel=1e-6)
    assert cli.main([*command, "nets:of_bytes", "--data", "floats.npz"]) == 1
    assert "x has values from" in capsys.readouterr().err


@pytest.mark.parametrize("limits", [["-0.5", "0.5"], ["-0.5,-0.5,-5e-1", "0.5"]])
def test_negative_limits_on_the_command_line(folder, limits):
    command = ["audit", "--model", "nets:make", "--data", "standard.npz", "--json", "out.json"]
    assert cli.main([*command, "--range", *limits]) == 0
    low, high = json.loads((folder / "out.json").read_text())["range"]
    assert np.asarray(low).flatten().tolist() == [-0.5] * np.size(low)
    assert np.max(high) == 0.5


@pytest.mark.parametrize(("limits", "words"), [(["a", "1"], "--range 'a' is no number"), (["0,1", "1"], "range does")])
def test_malformed_limits_are_named(folder, capsys, limits, words):
    assert cli.main(["audit", "--model", "nets:make", "--data", "pixels.npz", "--range", *limits]) == 1
    assert words in capsys.readouterr().err


def test_metrics_in_units_of_a_range(digits):
    x, truth = digits[0][:3] * 0.9, digits[0][2:5]
    wanted = metrics.compare(x, truth)
    low, high = torch.tensor(-2.0), torch.full((1, 1, 1), 3.0)
    found = metrics.compare(low + 5 * x, low + 5 * truth, range=(low, high))
    assert found == pytest.approx(wanted)
    for metric in (metrics.psnr, metrics.ssim):
        torch.testing.assert_close(metric(255 * x, 255 * truth, range=(0, 255)), metric(x, truth))
        with pytest.raises(ValueError, match="truth has values from 0 to 255, outside the range"):
            metric(255 * x, 255 * truth)


# Numbers: the noise that is needed


@pytest.mark.parametrize("target", [30.0, 20.0, 15.0])
@pytest.mark.parametrize("name", ["mlp", "conv", "pair", "attention"])
def test_the_recommended_noise_meets_its_target(name, target):
    model, x, y = build_tiny(name)
    x = x.clamp(0, 1)
    for sample in audit(model, x, y, together=True, target_psnr=target):
        noisy = audit(model, x, y, f"gaussian:{sample.needed!r}", together=True).samples[sample.index]
        assert noisy.psnr == pytest.approx(target, abs=0.01)


def test_the_recommended_noise_of_lenet(lenet, digits):
    (sample,) = audit(lenet, digits[0][2:3], digits[1][2:3])
    (noisy,) = audit(lenet, digits[0][2:3], digits[1][2:3], f"gaussian:{sample.needed}")
    assert noisy.psnr == pytest.approx(15, abs=0.01)


@pytest.mark.parametrize("exact", [True, False])
def test_what_no_isotropic_noise_reaches(mlp, exact):
    """√MSE of an attacker who ignores the gradient and says 0.5 ± τ: 20 dB for τ = 0.1."""
    (sample,) = audit(*mlp, target_psnr=19.0, tau=0.1, exact=exact)
    assert math.isinf(sample.needed)
    (words,) = (words for words in sample.reservations if "no isotropic noise" in words)
    assert "reaches 19 dB" in words
    assert "0.1 (20 dB)" in words
    (sample,) = audit(*mlp, target_psnr=21.0, tau=0.1, exact=exact)
    assert 0 < sample.needed < math.inf
    page = audit(*mlp, target_psnr=19.0, tau=0.1, exact=exact).html()
    assert "∞" in page


@pytest.mark.parametrize(("network", "target"), [("crop", 25.0), ("crop", 15.0), ("lenet", 15.0)])
def test_the_recommended_noise_by_products(lenet, digit, network, target):
    model, x, y = build_crop() if network == "crop" else (lenet, *digit)
    (sample,) = audit(model, x, y, exact=False, target_psnr=target)
    (noisy,) = audit(model, x, y, f"gaussian:{sample.needed!r}", exact=False, target_psnr=target)
    assert target - 0.1 <= noisy.psnr <= target  # never less noise than asked for
    (exact,) = audit(model, x, y, f"gaussian:{sample.needed!r}")
    assert exact.prior >= 0.97 * noisy.prior  # the lower end of an interval, and a quadrature to 5%


def test_the_picture_by_products_is_the_bayes_estimate(mlp):
    """x₀ + (J Jᵀ + ε)⁻¹(J δ + ε(m − x₀)) by dense algebra."""
    model, x, y = mlp
    (found,) = audit(model, x, y, "gaussian:0.1", exact=False, tau=0.3, seed=4)
    J = i2f.GradientJacobian(model, x, y)
    delta, epsilon = i2f.perturb.gaussian(J.gradient, 0.1, 4), 0.1 / 0.09
    A = J.gram() + epsilon * torch.eye(12, dtype=D)
    wanted = x[0] + torch.linalg.solve(A, J.matvec(delta) + epsilon * (0.5 - x[0]))
    torch.testing.assert_close(found.drawn, wanted.float(), rtol=0, atol=2e-3)
    assert found.drawn_rmse == pytest.approx(float(metrics.rmse(wanted[None], x)), rel=0.02)
    assert torch.equal(audit(model, x, y, exact=False).samples[0].drawn, x[0].float())  # no noise: everything
    assert audit(model, x, y, "prune:0.5", exact=False).samples[0].drawn is None


def test_designed_noise_is_pictured_by_products(mlp):
    """Shrunk towards gray: x₀ + √c z is all that is sent."""
    model, x, y = mlp
    (exact,), (found,) = (audit(model, x, y, "designed:1e-3", exact=how, seed=2) for how in (True, False))
    torch.testing.assert_close(found.drawn, exact.drawn, rtol=0, atol=1e-3)


def test_a_bound_above_what_is_judged_is_explained(crop):
    (small,) = audit(*crop, "gaussian:1e-6")
    assert small.bound < small.judged
    assert not any("I_lb" in words for words in small.reservations)
    for exact in (True, False):
        (large,) = audit(*crop, "gaussian:1e9", exact=exact)
        assert large.bound > large.judged
        assert any("I_lb" in words and "without range and prior" in words for words in large.reservations)


# Labels


def soft_cross_entropy(output, y):
    return -(output.log_softmax(1) * y).sum(1).mean()


@pytest.mark.parametrize(
    "form",
    [
        lambda y: F.one_hot(y, 5).double(),
        lambda y: F.one_hot(y, 5).float(),
        lambda y: y[:, None],
        lambda y: y.int(),
        lambda y: y.to(torch.uint8),
        lambda y: y.tolist(),
        lambda y: y.numpy(),
    ],
)
def test_labels_in_each_form_are_read_off(mlp, form):
    model, x, y = mlp
    (plain,) = audit(model, x, y, "gaussian:1e-8")
    (sample,) = audit(model, x, form(y), "gaussian:1e-8")
    assert plain.label is sample.label is True
    assert sample.y == int(y)
    assert sample.judged == pytest.approx(plain.judged, rel=1e-6)


@pytest.mark.parametrize(
    ("y", "loss"),
    [
        (torch.tensor([[0.1, 0.6, 0.1, 0.1, 0.1]]), F.cross_entropy),
        (torch.tensor([[0.3, -1.2, 0.1, 2.0, 0.4]]), F.mse_loss),
        (torch.tensor([-1]), lambda output, y: F.soft_margin_loss(output[:, 0], y.to(output))),
        (torch.tensor([0.7]), lambda output, y: F.mse_loss(output[:, 0], y)),
    ],
)
def test_what_is_no_class_is_not_said_to_be_hidden(mlp, y, loss):
    (sample,) = audit(mlp[0], mlp[1], y, "gaussian:1e-8", loss=loss)
    assert sample.label is None
    assert sample.judged < 0.05


def test_an_ignored_image_gives_nothing_away_and_the_others_do():
    model, x, y = build_tiny("pair")
    first, second = audit(model, x, torch.tensor([1, -100]), "gaussian:1e-10", together=True)
    (alone,) = audit(model, x[:1], y[:1], "gaussian:1e-10")
    assert first.judged == pytest.approx(alone.judged, rel=1e-6)
    assert second.judged == pytest.approx(0.25)  # the prior's
    assert first.label is second.label is None
    with pytest.raises(ValueError, match="-100 alone"):
        audit(model, x[:1], torch.tensor([-100]))


# Precision


@pytest.mark.parametrize(
    ("network", "dtype", "defense"),
    [
        *(
            ("crop", dtype, defense)
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
            for defense in ("none", "gaussian:1e-6", "gaussian:1e-3", "prune:0.9")
        ),
        ("lenet", torch.bfloat16, "gaussian:1e-6"),
        ("lenet", torch.float32, "prune:0.9"),
    ],
)
def test_models_in_less_than_float64_are_judged_as_in_float64(lenet, digit, network, dtype, defense):
    model, x, y = build_crop() if network == "crop" else (lenet, *digit)
    model = model.to(dtype)
    (wanted,) = audit(copy.deepcopy(model).double(), x, y, defense)
    (found,) = audit(model, x.to(torch.float32), y, defense)
    assert found.judged == pytest.approx(wanted.judged, rel=0.01, abs=1e-9)
    assert found.verdict == wanted.verdict
    assert found.needed == pytest.approx(wanted.needed, rel=0.01)
    half = any(f"the model's {str(dtype)[6:]} weights were audited in float64" in words for words in found.reservations)
    assert half == (dtype != torch.float32)


class Single(nn.Module):
    """A network that computes in float32 whatever it is cast to: no float64 audit of it is possible."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        if x.dtype != torch.float32:
            raise RuntimeError("expected float32")
        return self.net(x)


@pytest.mark.parametrize("variance", [0, 1e-16, 1e-14, 1e-12, 1e-8])
@pytest.mark.parametrize("decay", [1, 2, 3])
def test_float32_errs_on_the_side_of_the_attacker(variance, decay):
    """A frozen first layer with singular values down to 10^(−3 decay): what float32 cannot tell from rounding, another
    may see."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).double()
        with torch.no_grad():
            u, _, v = torch.linalg.svd(twin[0].weight, full_matrices=False)
            twin[0].weight.copy_((u * torch.logspace(0, -3 * decay, 12, dtype=D)) @ v)
        twin[0].requires_grad_(False)
        twin = twin.float().double()
        x = torch.rand(1, 12, dtype=D)
    (wanted,) = audit(twin, x, torch.tensor([1]), f"gaussian:{variance}")
    (found,) = audit(Single(copy.deepcopy(twin).float()), x, torch.tensor([1]), f"gaussian:{variance}")
    assert found.judged <= 1.02 * wanted.judged + 1e-9
    assert any("computed in float32" in words for words in found.reservations)
    assert not any("computed in" in words for words in wanted.reservations)


@pytest.mark.parametrize("seed", range(8))
def test_float32_takes_an_uncertain_direction_for_visible(seed):
    """One of six singular values is 3e-7 of the others, where float32 finds it a little too large or too small."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        with torch.no_grad():
            u, _, v = torch.linalg.svd(twin[0].weight)
            twin[0].weight.copy_((u * torch.tensor([1, 1, 1, 1, 1, 3e-7], dtype=D)) @ v)
        twin[0].requires_grad_(False)
        twin, x = twin.float().double(), torch.rand(1, 6, dtype=D)
    ask = {"defense": "gaussian:1e-17", "loss": lambda output, y: F.mse_loss(output[:, 0], y.to(output))}
    (wanted,) = audit(twin, x, torch.zeros(1), **ask)
    (found,) = audit(Single(copy.deepcopy(twin).float()), x, torch.zeros(1), **ask)
    assert found.judged <= wanted.judged


# Layers that are not met, fixed batches, outputs of other kinds


class Unmet(nn.Module):
    """With a trainable layer that the loss never meets, or without."""

    def __init__(self, net, extra=True):
        super().__init__()
        self.net = net
        if extra:
            self.extra = nn.Linear(7, 9).double()

    def forward(self, x):
        return self.net(x)


class Answer(nn.Module):
    def __init__(self, net, form):
        super().__init__()
        self.net, self.form = net, form

    def forward(self, x):
        return self.form(self.net(x))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("defense", ["none", "gaussian:1e-6", "designed:0.01"])
def test_a_layer_that_the_loss_never_meets(mlp, exact, defense):
    model, x, y = mlp
    (found,) = audit(Unmet(model), x, y, defense, exact=exact)
    (wanted,) = audit(Unmet(model, extra=False), x, y, defense, exact=exact)
    assert found.judged == pytest.approx(wanted.judged, rel=1e-6)
    assert found.d_x == wanted.d_x
    assert found.label is True


class Fixed(nn.Module):
    """So many images at a time, and no other number."""

    def __init__(self, net, count=1):
        super().__init__()
        self.net, self.count = net, count

    def forward(self, x):
        return self.net(x.view(self.count, *x.shape[1:]))


class Recurrent(nn.Module):
    """An LSTM that starts from a state of its own, of one image."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)
        self.register_buffer("start", torch.zeros(1, 1, 6))

    def forward(self, x):
        out, _ = self.cell(x, (self.start, self.start))
        return self.head(out[:, -1])


def test_a_fixed_batch_size(mlp):
    model, x, y = mlp
    (found,), (wanted,) = audit(Fixed(model), x, y, "gaussian:1e-6"), audit(model, x, y, "gaussian:1e-6")
    assert found.judged == pytest.approx(wanted.judged, rel=1e-6)
    assert found.label is True
    both = build_tiny("pair")
    agree(*(audit(m, *both[1:], "gaussian:1e-6", together=True) for m in (Fixed(both[0], 2), both[0])))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Recurrent().double().eval()
    for exact in (True, False):
        (sample,) = audit(network, torch.rand(1, 3, 4, dtype=D), torch.tensor([2]), "gaussian:1e-8", exact=exact)
        assert sample.judged < 0.1
        assert sample.label is True


@pytest.mark.parametrize(
    ("form", "read"),
    [
        (lambda out: {"logits": out, "other": 1}, lambda out: out["logits"]),
        (lambda out: (out, out.sum()), lambda out: out[0]),
    ],
)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_an_output_of_another_form_that_the_loss_reads(mlp, form, read, activation):
    model, x, y = mlp
    model[1] = activation()
    (wanted,) = audit(model, x, y, "gaussian:1e-6", attack=True)
    (found,) = audit(
        Answer(model, form), x, y, "gaussian:1e-6", loss=lambda out, y: F.cross_entropy(read(out), y), attack=True
    )
    assert found.judged == pytest.approx(wanted.judged, rel=1e-4)
    assert found.label is not False
    kinked = [any("kinks" in words for words in s.reservations) for s in (found, wanted)]
    assert kinked == [activation is nn.ReLU] * 2


def test_a_kink_in_the_loss_counts(mlp):
    model, x, y = mlp
    (sample,) = audit(model, x, y, "gaussian:1e-8", loss=lambda out, y: (out - 0.1).abs().pow(3).mean())
    assert any("kinks" in words for words in sample.reservations)


def test_a_wrapped_network_with_a_range_and_under_inference_mode(mlp):
    model, x, y = mlp
    (wanted,) = audit(model, x, y, "gaussian:1e-6")
    (found,) = audit(nn.DataParallel(nn.Sequential(Scaled(model))), 255 * x, y, "gaussian:1e-6", range=(0, 255))
    assert found.judged == pytest.approx(wanted.judged, rel=1e-6)
    with torch.inference_mode():
        (found,) = audit(model, x.clone(), y.clone(), "gaussian:1e-6", attack=True)
    assert found.predicted == pytest.approx(wanted.predicted, rel=1e-9)


# The scale of the loss


@functools.cache
def at_scale_one(defense, exact):
    (sample,) = audit(*build_tiny("mlp"), defense, exact=exact, seed=1)
    return sample


@pytest.mark.parametrize(
    ("dtype", "factor"), [(D, 1e-30), (D, 1e-15), (D, 1e15), (D, 1e30), (torch.float32, 1e-15), (torch.float32, 1e15)]
)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("defense", ["none", "gaussian", "relative:0.1", "designed:0.1", "prune:0.5", "quantize:8"])
def test_the_losss_scale_does_not_matter(mlp, dtype, factor, exact, defense):
    model, x, y = mlp
    same = copy.deepcopy(model) if dtype == D else Single(copy.deepcopy(model).float())  # so that it stays in float32
    text = (lambda c: f"gaussian:{1e-4 * c * c!r}") if defense == "gaussian" else lambda c: defense
    wanted = at_scale_one(text(1), exact)
    (found,) = audit(
        same,
        x,
        y,
        text(factor),
        exact=exact,
        seed=1,
        loss=lambda out, y: factor * F.cross_entropy(out, y),
    )
    rel = 1e-6 if dtype == D else 1e-3
    assert found.judged == pytest.approx(wanted.judged, rel=rel, abs=1e-9, nan_ok=True)
    assert found.bound == pytest.approx(wanted.bound, rel=max(rel, 1e-2 * (not exact)), abs=1e-12)
    assert found.drawn_rmse == pytest.approx(wanted.drawn_rmse, rel=max(rel, 1e-3), nan_ok=True)
    assert found.needed == pytest.approx(wanted.needed * factor**2, rel=max(rel, 0.03 * (not exact)))
    assert found.rank == wanted.rank
