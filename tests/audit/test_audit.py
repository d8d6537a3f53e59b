"""An audit says what attacks then find, and what it does not know; the command is a gate; the report stands alone."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import i2f
from i2f import cli
from i2f.attacks import Reconstruction
from i2f.audit import audit, clamped_square, variance_for
from i2f.audit import figure as draw
from i2f.audit.command import GATE
from i2f.audit.defense import KINDS
from i2f.audit.inputs import samples


@pytest.fixture(scope="module")
def found():
    """Two digits under noise, with the attack."""
    x, y = i2f.data.load("mnist", n=2)
    model = i2f.models.build("lenet", "mnist", init="uniform", seed=1, normalize=False).double()
    return audit(model, x, y, "gaussian:1e-6", attack=True, target_psnr=30.0)


def test_predicted_psnr_is_the_attacks(found):
    for sample in found:
        assert sample.attacked_psnr == pytest.approx(sample.drawn_psnr, abs=0.2)
        assert sample.attacked_rmse == pytest.approx(sample.drawn_rmse, rel=0.05)
        assert sample.judged <= sample.attacked < sample.attacked_rmse
        assert sample.label is True
        assert sample.verdict == "gives the input away"
        assert not sample.reservations


def test_needed_noise_leaves_the_target(lenet, digits):
    """Asked of one audit, judged by another, simulated (one draw's error varies by a quarter), and attacked."""
    x, y = digits[0][:1], digits[1][:1]
    (sample,) = audit(lenet, x, y, target_psnr=30.0)
    (noisy,) = audit(lenet, x, y, f"gaussian:{sample.needed}", attack=True)
    assert min(noisy.boxed, noisy.prior) == pytest.approx(10**-1.5, rel=1e-3)
    assert noisy.attacked_psnr == pytest.approx(noisy.drawn_psnr, abs=0.2)
    J = i2f.GradientJacobian(lenet, x, y)
    J.dense()
    generator = torch.Generator().manual_seed(0)
    deltas = sample.needed**0.5 * torch.randn(400, J.shape[1], generator=generator, dtype=torch.float64)
    found = (x.flatten() + torch.linalg.solve(J.gram(), J.matvec(deltas).T).T).clamp(0, 1)
    assert float((found - x.flatten()).square().mean()) == pytest.approx(1e-3, rel=0.05)


def test_clamped_square_by_simulation():
    x = torch.tensor([0.0, 0.1, 0.5, 1.0, 0.97], dtype=torch.float64)
    s = torch.tensor([0.3, 0.05, 4.0, 0.2, 0.0], dtype=torch.float64)
    z = torch.randn(200_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = ((x + s * z).clamp(0, 1) - x).square().mean(0)
    torch.testing.assert_close(clamped_square(x, s), drawn, rtol=0.02, atol=1e-12)
    torch.testing.assert_close(
        clamped_square(x[:1], s[:1]), s[:1].square() / 2, rtol=0.01, atol=0
    )  # black: half is cut


def test_variance_for_in_closed_form():
    """J Jᵀ = λI: the prior leaves vτ²/(v + λτ²), to black and white pixels the box half of v/λ where it is small."""
    eye, half = torch.eye(2, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    black = torch.tensor([0.0, 1.0], dtype=torch.float64)
    gray, most = variance_for(0.04, half, eye, 4 * half, tau=0.25)  # a gray pixel's box is far away
    assert gray == pytest.approx(2 * 0.04 * 0.0625 / (0.0625 - 0.04))
    assert most == 0.25
    assert variance_for(1e-4, black, eye, 4 * half, tau=0.25)[0] == pytest.approx(2 * 2e-4)
    assert math.isinf(variance_for(0.07, half, eye, 4 * half, tau=0.25)[0])  # above τ²
    found, most = variance_for(0.4, black, eye, 4 * half, tau=1.0)
    assert float(clamped_square(black, (torch.tensor(found) / 2 * half * 2).sqrt()).mean()) == pytest.approx(0.4)
    assert most == pytest.approx(0.5**0.5)  # a pixel drawn far out is clamped to 0 or 1
    assert math.isinf(variance_for(0.6, black, eye, 4 * half, tau=1.0)[0])
    one = eye[:, :1]  # the second direction is hidden: τ²/2 without any noise
    assert variance_for(0.03, half, one, 4 * half[:1], tau=0.25, regular=False)[0] == 0
    v = variance_for(0.04, half, one, 4 * half[:1], tau=0.25, regular=False)[0]
    assert v == pytest.approx(2 * 0.0175 / (1 - 0.0175 / 0.0625))  # v/λ/(1 + v/λτ²) + τ² = 2 · 0.04


def test_unbounded_nonsense_is_not_taken_for_safety(digits):
    """Kaiming's weights predict errors of whole images; pixels lie in [0, 1], and attackers know."""
    model = i2f.models.build("lenet", "mnist", init="kaiming", seed=1, normalize=False).double()
    (sample,) = audit(model, digits[0][:1], digits[1][:1], "gaussian:1e-3")
    assert sample.predicted > 10
    assert sample.judged <= sample.boxed < 1
    assert any("no longer reliable" in words for words in sample.reservations)
    assert "safe" not in sample.verdict


def test_a_pruned_gradient_shows_its_mask(lenet, digits):
    (half,) = audit(lenet, digits[0][:1], digits[1][:1], "prune:0.5")
    assert half.predicted > 0.01
    assert half.masked == half.judged == 0
    (most,) = audit(lenet, digits[0][:1], digits[1][:1], "prune:0.98")
    assert most.masked > 0
    assert any("sees " in words and "directions" in words for words in most.reservations)


def test_a_singular_j_is_judged_by_the_prior(blind):
    model, x, y = blind
    (sample,) = audit(model, x.clamp(0, 1), y, "gaussian:1e-6", tau=0.2)
    lost = sample.d_x - sample.rank
    assert lost > 0
    assert sample.judged >= 0.2 * (lost / sample.d_x) ** 0.5 * 0.99
    tau_alone = audit(model, x.clamp(0, 1), y, f"gaussian:{sample.needed}", tau=0.2).samples[0]
    assert tau_alone.judged == pytest.approx(10**-0.75, rel=1e-6)  # the default, 15 dB
    assert any(f"rank {sample.rank} of {sample.d_x}" in words for words in sample.reservations)
    (pruned,) = audit(model, x.clamp(0, 1), y, "quantize:8")
    assert math.isnan(pruned.judged)
    assert pruned.verdict == "not known"


def test_the_best_informed_attacker_of_designed_noise(lenet, digits):
    """Its error is the same everywhere, √c, whatever the attack; with the box the clamped one."""
    (sample,) = audit(lenet, digits[0][:1], digits[1][:1], "designed:0.01", attack=True)
    J = i2f.GradientJacobian(lenet, digits[0][:1], digits[1][:1])
    c = (0.01 * float(J.gradient.norm())) ** 2 / float(J.gram().diagonal().sum())
    assert sample.predicted == pytest.approx(c**0.5)
    assert sample.attacked_rmse == pytest.approx(c**0.5, rel=0.1)


def middles(digits):
    """Two digits' middles, as `crop` has them."""
    return digits[0][:2, :, 10:18, 10:18], digits[1][:2]


def test_products_alone(crop, digits):
    exact = audit(crop[0], *middles(digits), "gaussian:1e-5")
    cheap = audit(crop[0], *middles(digits), "gaussian:1e-5", exact=False)
    assert not cheap.exact
    for a, b in zip(exact, cheap, strict=True):
        assert b.bound == pytest.approx(a.bound, rel=0.02)
        assert b.rank is None
        assert math.isnan(b.predicted)
        assert b.judged == b.prior
        assert any("not formed" in words for words in b.reservations)
    assert cheap.html().count("<figure>") == 4  # private, and the Bayes attacker's


def test_one_gradient_of_all(crop, digits):
    model, (x, y) = crop[0], middles(digits)
    both, alone = audit(model, x, y, "gaussian:1e-6", together=True), audit(model, x, y, "gaussian:1e-6")
    J = i2f.GradientJacobian(model, x, y)
    inverse = torch.linalg.inv(J.gram()).diagonal().view(2, -1)
    for k, (a, b) in enumerate(zip(both, alone, strict=True)):
        assert a.predicted == pytest.approx(float((1e-6 * inverse[k].mean()).sqrt()), rel=1e-6)
        assert a.predicted >= 2 * b.predicted  # a mean of two: half the share each, and mixed
        assert a.d_x == b.d_x == 64


def test_the_table_and_the_json(found):
    table = found.table()
    assert len(table) == 2
    assert {"judged", "predicted", "bound", "psnr", "verdict", "reservations"} <= set(table)
    record = json.loads(found.json())
    assert record["defense"] == "gaussian:1e-06"
    assert [s["judged"] for s in record["samples"]] == table.judged.tolist()
    assert "image" not in record["samples"][0]
    assert found.passes(0.0)
    assert not found.passes(0.5)


def test_the_report_stands_alone_and_escapes(found):
    page = found.html("<script>alert(1)</script>")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"(src|href)=[\"'](?!data:image/png;base64,)", page)
    assert page.count("<figure>") == 6  # private, predicted, attack
    assert page.count("<tr>") == 3
    assert "<svg" in page


def test_spectra_are_a_line_a_sample(found):
    assert len(draw.spectra([sample.spectrum for sample in found]).axes[0].lines) == 2


def test_an_attack_takes_part_in_the_judgement(mlp):
    """Beyond the first order a prediction may be too large: then what the attack left is what counts."""
    model, x, y = mlp
    for seed in range(4):
        (sample,) = audit(model, x, y, "gaussian:1", attack=True, seed=seed)
        assert sample.judged <= sample.attacked
        assert not sample.beyond_first_order
    (alone,) = audit(model, x, y, "gaussian:1")
    assert alone.beyond_first_order


def test_what_cannot_be_audited_is_named(lenet, digits):
    with pytest.raises(ValueError, match="clips each sample's own gradient"):
        audit(lenet, digits[0][:2], digits[1][:2], "dp:1:0.1", together=True)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1.0)  # nothing passes
    x, y = torch.rand(1, 4, dtype=torch.float64), torch.tensor([1])
    with pytest.raises(ValueError, match="J = 0"):
        audit(model, x, y)


def write_factory(folder, body):
    (folder / "nets.py").write_text(f"from conftest import build_crop\nfrom torch import nn\n\n\ndef make():\n{body}\n")


CROP = "    return build_crop()[0].float()"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a factory and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    write_factory(tmp_path, CROP)
    x, y = middles(i2f.data.load("mnist", n=2))
    torch.save({"x": x.clone(), "y": y}, tmp_path / "batch.pt")
    yield tmp_path
    sys.modules.pop("nets", None)


def test_the_command_is_a_gate(folder, capsys):
    command = ["audit", "--model", "nets:make", "--data", "batch.pt", "--defense", "gaussian:1e-6"]
    assert cli.main([*command, "--report", "out.html", "--json", "out.json", "--min-rmse", "0.01"]) == 0
    said = capsys.readouterr().out
    assert "gives the input away" in said
    assert (folder / "out.html").read_text().startswith("<!doctype html>")
    first = json.loads((folder / "out.json").read_text())["samples"][0]
    assert first["index"] == 0
    assert cli.main([*command, "--min-rmse", "0.1"]) == GATE
    assert "2 of 2 samples are judged below an RMSE of 0.1" in capsys.readouterr().err


def test_local_steps_are_audited(folder, capsys):
    """One step is a gradient; two epochs in batches say so, and the attack is on what they change."""
    command = ["audit", "--model", "nets:make", "--data", "batch.pt", "--together", "--defense", "gaussian:1e-12"]
    one = ["--local-steps", "1", "--lr", "1.0"]
    two = ["--epochs", "2", "--batch-size", "1", "--lr", "0.5", "--momentum", "0.5", "--attack"]
    for name, words in (("none", []), ("one", one), ("two", two)):
        assert cli.main([*command, *words, "--json", f"{name}.json", "--report", f"{name}.html"]) == 0
    none, one, two = (json.loads((folder / f"{name}.json").read_text()) for name in ("none", "one", "two"))
    assert none["message"] is None
    assert one["message"]["steps"] == 1
    for a, b, c in zip(none["samples"], one["samples"], two["samples"], strict=True):
        assert b["predicted"] == pytest.approx(a["predicted"], rel=1e-6)
        assert c["predicted"] != pytest.approx(a["predicted"], rel=0.1)
        assert c["attacked"] == pytest.approx(c["drawn_rmse"], rel=0.1)
    assert "over 2 epochs of SGD, lr 0.5, momentum 0.5, batches of 1" in (folder / "two.html").read_text()
    capsys.readouterr()
    assert cli.main([*command, "--lr", "0.1"]) == 1
    assert "--lr is of local steps: give --local-steps K or --epochs E too" in capsys.readouterr().err
    assert cli.main([*command, "--local-steps", "2"]) == 1
    assert "local steps need their learning rate: give --lr" in capsys.readouterr().err
    assert cli.main([*command, "--epochs", "1", "--batch-size", "3", "--lr", "0.1"]) == 1
    assert "batch_size=3 and x has 2 images" in capsys.readouterr().err
    alone = [word for word in command if word != "--together"]
    assert cli.main([*alone, "--epochs", "1", "--batch-size", "2", "--lr", "0.1"]) == 1
    assert "each sample is audited alone: give together=True (--together)" in capsys.readouterr().err


def test_a_bundled_network_and_its_checkpoint(folder, capsys):
    model = i2f.models.build("lenet", "mnist", init="uniform", seed=7, normalize=False)
    torch.save(model.state_dict(), folder / "weights.pt")
    command = ["audit", "--model", "lenet", "--data", "mnist:1:3", "--bound", "--defense", "gaussian:1e-5"]
    assert cli.main([*command, "--checkpoint", "weights.pt", "--json", "a.json"]) == 0
    assert cli.main([*command, "--init", "uniform", "--seed", "7", "--json", "b.json"]) == 0
    a, b = (json.loads((folder / name).read_text())["samples"][0] for name in ("a.json", "b.json"))
    assert a["lambda_max"] == pytest.approx(b["lambda_max"])
    assert a["y"] == int(i2f.data.load("mnist", n=1, offset=3)[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "lenett", "--data", "mnist:1"], "did you mean 'lenet'"),
        (["--model", "lenet", "--data", "mnist:many"], "malformed: give NAME"),
        (["--model", "lenet", "--data", "mnist:99"], "99 images"),
        (["--model", "lenet", "--data", "nothing.npz"], "nothing.npz"),
        (["--model", "lenet", "--data", "broken.pt"], "cannot be read as x and y"),
        (["--model", "lenet", "--data", "batch.pt"], "give package.module:function"),
        (["--model", "lenet", "--data", "mnist:1", "--target-psnr", "nan"], "--target-psnr nan is out of range"),
        (["--model", "lenet", "--data", "mnist:1", "--min-rmse", "-1"], "--min-rmse -1 is out of range"),
        (["--model", "nets:make", "--data", "lists.pt"], "x is list"),
        (["--model", "nets:make", "--data", "whole.pt"], "x is torch.int64"),
        (["--model", "nets:make", "--data", "half.pt"], "y holds fractions"),
        (["--model", "lenet", "--data", "mnist:1", "--defense", "noise:1"], "defense='noise' is unknown"),
        (["--model", "lenet", "--data", "mnist:1", "--defense", "gaussian"], "give gaussian:<variance>"),
        (["--model", "lenet", "--data", "mnist:1", "--checkpoint", "broken.pt"], "checkpoint='broken.pt' cannot be"),
        (["--model", "lenet", "--data", "mnist:1", "--checkpoint", "absent.pt"], "absent.pt"),
        (["--model", "lenet", "--data", "mnist:1", "--checkpoint", "batch.pt"], "cannot be loaded into this model"),
        (["--model", "lenet", "--data", "mnist:1", "--report", "no/such/out.html"], "there is no folder"),
        (["--model", "nets:other", "--data", "batch.pt"], "no function 'other'"),
        (["--model", "nots:make", "--data", "batch.pt"], "no module 'nots'"),
        (["--model", "nets:nn", "--data", "batch.pt"], "no function 'nn'"),
        (["--model", "nets:make", "--data", "cifar10:1"], "does not fit the model"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(folder, capsys, arguments, words):
    (folder / "broken.pt").write_bytes(b"not a checkpoint")
    torch.save({"x": [[0.5]], "y": [1]}, folder / "lists.pt")
    torch.save({"x": torch.tensor([[3, 1]]), "y": torch.tensor([1])}, folder / "whole.pt")
    torch.save({"x": torch.rand(2, 3), "y": torch.tensor([0.7, 1.0])}, folder / "half.pt")
    before = {path.name for path in folder.iterdir()} | {"__pycache__"}
    assert cli.main(["audit", *arguments, *(["--json", "out.json"] if "--report" not in arguments else [])]) == 1
    error = capsys.readouterr().err
    assert error.startswith("i2f: ") or "Traceback" in error
    assert words in error
    assert {path.name for path in folder.iterdir()} | {"__pycache__"} == before


@pytest.mark.parametrize(
    ("body", "words"), [("    return 1 / 0", "ZeroDivisionError"), ("    return 3", "returned int, and no torch.nn")]
)
def test_a_factory_that_fails_shows_its_own_traceback_once(folder, capsys, body, words):
    write_factory(folder, body)
    assert cli.main(["audit", "--model", "nets:make", "--data", "batch.pt"]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("Traceback") == ("1 / 0" in body)
    assert error.rstrip().splitlines()[-1].startswith("i2f: model='nets:make'")


def test_a_count_alone_starts_at_the_first():
    x, y, name = samples("mnist:2", i2f.data.load)
    assert (len(x), y.tolist(), name) == (2, i2f.data.load("mnist", n=2)[1].tolist(), "mnist")
    assert len(samples("mnist", i2f.data.load)[0]) == 8
    assert samples("mnist:1:5", i2f.data.load)[1].tolist() == i2f.data.load("mnist", n=1, offset=5)[1].tolist()


def test_a_gate_that_opens_beyond_the_first_order_says_so(folder, capsys):
    command = ["audit", "--model", "nets:make", "--data", "batch.pt", "--defense", "gaussian:1e-2"]
    assert cli.main([*command, "--min-rmse", "0.1"]) == 0
    assert "no longer reliable for 2 samples" in capsys.readouterr().err


def test_help_says_what_the_exit_status_means(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["audit", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "3 where --min-rmse is not met" in said
    for name, kind in KINDS.items():
        assert bool(re.search(rf"[\s,]{name}[:,]", said[said.index("Defences:") :])) == (not kind.refusal)


@pytest.mark.parametrize("words", [["--help"], ["audit", "--help"], ["data", "--help"]])
def test_help_does_not_wait_for_pytorch(words):
    code = (
        f"import sys\nfrom i2f import cli\ntry:\n    cli.main({words})\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: i2f")


class Functional(nn.Module):
    """A kink that is no module."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.last, self.activation = nn.Linear(4, 12), nn.Linear(12, 3), activation

    def forward(self, x):
        return self.last(self.activation(self.first(x)))


@pytest.mark.parametrize(
    ("activation", "kinked"),
    [
        (lambda x: torch.maximum(x, 0 * x), True),
        (lambda x: torch.where(x > 0, x, 0.1 * x), True),
        (lambda x: x.unflatten(1, (6, 2)).amax(2).repeat(1, 2), True),
        (torch.relu, True),
        (torch.nn.functional.leaky_relu, True),
        (torch.abs, True),
        (torch.nn.functional.hardtanh, True),
        (torch.nn.functional.gelu, False),
        (torch.tanh, False),
        (torch.nn.functional.softplus, False),
    ],
)
def test_a_kink_is_read_off_the_graph(activation, kinked):
    (sample,) = audit(Functional(activation).double(), torch.rand(1, 4, dtype=torch.float64), torch.tensor([1]))
    assert any("kinks" in words for words in sample.reservations) == kinked


def test_softmax_is_no_kink(transformer):
    """Its node's name holds "max"."""
    (sample,) = audit(*transformer, "gaussian:1e-6")
    assert not any("kinks" in words for words in sample.reservations)


def test_a_network_with_kinks_is_attacked_layer_by_layer():
    """Gauss–Newton stalls at the kinks; the recursion does not, and the sample is judged by it."""
    torch.manual_seed(0)
    layers = [torch.nn.Flatten(), torch.nn.Linear(36, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4)]
    model, x = torch.nn.Sequential(*layers).double().eval(), torch.rand(1, 1, 6, 6, dtype=torch.float64)
    (sample,) = audit(model, x, torch.tensor([1]), attack=True, attack_steps=2)
    assert sample.attacked_reason.startswith("recursive attack: matched")
    assert sample.attacked < 1e-12
    assert sample.judged < 1e-12


def test_of_two_reconstructions_the_nearer_is_judged(monkeypatch):
    """Where neither matches the gradient, its residual does not say which one is better."""
    torch.manual_seed(0)
    model, x = Functional(torch.relu).double(), torch.full((1, 4), 0.3, dtype=torch.float64)
    ends = {"gauss-newton": (0.1, 1e-2), "recursive": (0.3, 1e-4)}  # error and residual

    def invert(model, gradient, y, shape, method="gauss-newton", **keywords):
        error, residual = ends[method]
        return Reconstruction(x + error, residual**2, residual, 1, 1, False, method)

    monkeypatch.setattr("i2f.audit.shared.invert", invert)
    (sample,) = audit(model, x, torch.tensor([1]), attack=True, attack_steps=2)
    assert sample.attacked_reason == "gauss-newton"
    ends["gauss-newton"], ends["recursive"] = ends["recursive"], ends["gauss-newton"]
    (sample,) = audit(model, x, torch.tensor([1]), attack=True, attack_steps=2)
    assert sample.attacked_reason == "recursive attack: recursive"


def test_a_network_that_the_recursion_cannot_read_says_so():
    model, x = Functional(torch.abs).double(), torch.rand(1, 4, dtype=torch.float64)
    (sample,) = audit(model, x, torch.tensor([1]), attack=True, attack_steps=2)
    assert "the recursive attack takes no such problem" in sample.attacked_reason
