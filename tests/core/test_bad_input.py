"""Bad input is refused at once, by a message that names the argument, what was wrong and what would do."""

import math

import pytest
import torch
from torch import nn

import i2f
from i2f import data, metrics, models, perturb, spectrum
from i2f.core import checks
from i2f.core.influence import expected_square


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval()


SIZE = 6 * 8 + 8 + 8 * 3 + 3
X, Y, SHAPE = torch.linspace(0, 1, 6, dtype=torch.float64)[None], torch.tensor([1]), (1, 6)
GRADIENT = torch.linspace(-1, 1, SIZE, dtype=torch.float64)


def spoiled(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[2] = value
    return tensor


def jacobian(model=None, x=X, y=Y, **options):
    return i2f.GradientJacobian(model or network(), x, y, **options)


def invert(gradient=GRADIENT, y=Y, shape=SHAPE, model=None, **options):
    return i2f.invert(model or network(), gradient, y, shape, **options)


def frozen():
    return network().requires_grad_(False)


def training(layer):
    return nn.Sequential(nn.Linear(6, 6), layer, nn.Linear(6, 3)).double().train()


class Additive(nn.Module):
    """Its output is f(x) + h(θ), so that a linear loss has ∂²L/∂x∂θ = 0."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        return x[:, :3] ** 2 + self.theta**2


class Deaf(Additive):
    """Its output does not depend on x."""

    def forward(self, x):
        return (self.theta**2).expand(len(x), 3)


class Mute(Additive):
    """Its output does not depend on θ."""

    def forward(self, x):
        return x[:, :3] ** 2


def total(output, y):
    return output.sum()


# what is done: the error, and words of its message
JACOBIAN = {
    "NaN in x": (lambda: jacobian(x=spoiled(X, math.nan)), "x has 1 NaN .*must be finite"),
    "infinity in x": (lambda: jacobian(x=spoiled(X, math.inf)), "x has 1 .*infinite.*must be finite"),
    "integer x": (lambda: jacobian(x=torch.ones(1, 6, dtype=torch.int64)), "x is .*int64.*floating-point batch"),
    "x without a batch": (lambda: jacobian(x=X[0]), r"x is \(6,\).*batch \(n, \.\.\.\)"),
    "no images": (lambda: jacobian(x=X[:0], y=Y[:0]), r"x is \(0, 6\).*batch"),
    "more labels than images": (lambda: jacobian(y=torch.tensor([1, 2])), "x has 1 images and y has 2.*same n"),
    "fewer labels than images": (lambda: jacobian(x=X.expand(3, 6)), "x has 3 images and y has 1.*same n"),
    "a label without a batch": (lambda: jacobian(y=torch.tensor(1)), "y has no batch dimension"),
    "label too large": (lambda: jacobian(y=torch.tensor([3])), r"y holds \[3\].*3 classes: 0 to 2"),
    "label negative": (lambda: jacobian(y=torch.tensor([-1])), r"y holds \[-1\].*3 classes: 0 to 2"),
    "nothing trainable": (lambda: jacobian(frozen()), "model has no trainable parameter.*requires_grad=True"),
    "loss without x": (lambda: jacobian(Deaf(), loss=total), "loss must depend on x and on θ"),
    "loss without θ": (lambda: jacobian(Mute(), loss=total), "loss must depend on x and on θ"),
    "loss without either": (lambda: jacobian(loss=lambda *_: torch.zeros(())), "loss depends neither on x nor on θ"),
    "loss additive": (lambda: jacobian(Additive(), loss=total), "loss must depend on x and on θ, and on both together"),
    "loss not reduced": (lambda: jacobian(loss=nn.CrossEntropyLoss(reduction="none")), "loss returned shape.*reduce"),
    "BatchNorm training": (lambda: jacobian(training(nn.BatchNorm1d(6))), r"model: 1 \(BatchNorm1d\).*model\.eval\(\)"),
    "Dropout training": (lambda: jacobian(training(nn.Dropout(0.1))), r"model: 1 \(Dropout\).*model\.eval\(\)"),
    "method unknown": (lambda: jacobian(method="matrixfree"), "method='matrixfree' is unknown.*mean 'matrix-free'"),
    "delta too long": (lambda: jacobian().matvec(torch.zeros(SIZE + 1)), f"delta .*{SIZE + 1} entries.*has {SIZE}"),
    "v too long": (lambda: jacobian().rmatvec(torch.zeros(7)), "v .*7 entries.*input space has 6"),
    "NaN in delta": (lambda: jacobian().matvec(spoiled(GRADIENT, math.nan)), "delta has 1 NaN"),
    "NaN in v": (lambda: jacobian().rmatvec(spoiled(X[0], math.nan)), "v has 1 NaN"),
    "x does not fit": (lambda: jacobian(x=torch.zeros(1, 5)), r"x .*\(1, 5\).*does not fit the model"),
}

INFLUENCE = {
    "damping negative": (lambda: i2f.influence(jacobian(), GRADIENT, -1e-3), "damping=-0.001 .*at least 0"),
    "damping NaN": (lambda: i2f.influence(jacobian(), GRADIENT, math.nan), "damping=nan .*finite"),
    "damping infinite": (lambda: i2f.influence(jacobian(), GRADIENT, math.inf), "damping=inf .*finite"),
    "bound's damping": (lambda: i2f.lower_bound(jacobian(), GRADIENT, -1.0), "damping=-1.0 .*at least 0"),
    "expected damping": (lambda: expected_square(jacobian(), 1.0, -1.0), "damping=-1.0 .*at least 0"),
    "expected variance": (lambda: expected_square(jacobian(), -1.0), "variance=-1.0 .*at least 0"),
    "delta short": (lambda: i2f.influence(jacobian(), GRADIENT[1:]), f"delta .*{SIZE - 1} entries.*has {SIZE}"),
    "bound's delta": (lambda: i2f.lower_bound(jacobian(), GRADIENT[1:]), f"delta .*{SIZE - 1} entries.*has {SIZE}"),
    "delta NaN": (lambda: i2f.influence(jacobian(), spoiled(GRADIENT, math.nan)), "delta has 1 NaN"),
    "deltas": (lambda: i2f.influence(jacobian(), GRADIENT.expand(2, -1)), rf"delta .*give a flat \({SIZE},\) tensor$"),
    "index beyond": (lambda: spectrum.right_singular_vector(jacobian(), 6), "index=6 .*eigenvalues 0 to 5"),
    "index negative": (lambda: spectrum.right_singular_vector(jacobian(), -1), "index=-1 .*eigenvalues 0 to 5"),
}

PERTURB = {
    "gaussian variance": (lambda: perturb.gaussian(GRADIENT, -1.0), "variance=-1.0 .*at least 0"),
    "laplace variance": (lambda: perturb.laplace(GRADIENT, -1.0), "variance=-1.0 .*at least 0"),
    "variance NaN": (lambda: perturb.gaussian(GRADIENT, math.nan), "variance=nan .*finite"),
    "gaussian infinite": (lambda: perturb.gaussian(spoiled(GRADIENT, math.inf), 1.0), "gradient has 1 .*infinite"),
    "laplace infinite": (lambda: perturb.laplace(spoiled(GRADIENT, -math.inf), 1.0), "gradient has 1 .*infinite"),
    "prune NaN": (lambda: perturb.prune(spoiled(GRADIENT, math.nan), 0.5), "gradient has 1 NaN"),
    "not flat": (lambda: perturb.gaussian(GRADIENT[None], 1.0), rf"gradient has shape \(1, {SIZE}\).*flat"),
    "ratio one": (lambda: perturb.prune(GRADIENT, 1.0), r"ratio=1.0 .*in \[0, 1\)"),
    "ratio negative": (lambda: perturb.prune(GRADIENT, -0.1), r"ratio=-0.1 .*in \[0, 1\)"),
    "ratio NaN": (lambda: perturb.prune(GRADIENT, math.nan), r"ratio=nan .*in \[0, 1\)"),
    "index beyond": (lambda: perturb.eigenvector(jacobian(), index=6), "index=6 .*eigenvalues 0 to 5"),
    "neither": (lambda: perturb.eigenvector(jacobian()), "one of index and eigenvalue"),
    "both": (lambda: perturb.eigenvector(jacobian(), 1, eigenvalue=0.1), "one of index and eigenvalue"),
    "eigenvalue zero": (lambda: perturb.eigenvector(jacobian(), eigenvalue=0.0), "eigenvalue=0.0 .*positive"),
    "norm negative": (lambda: perturb.eigenvector(jacobian(), 0, norm=-1.0), "norm=-1.0 .*at least 0"),
}

INVERT = {
    "gradient infinite": (lambda: invert(spoiled(GRADIENT, math.inf)), "gradient has 1 .*infinite.*must be finite"),
    "gradient short": (lambda: invert(GRADIENT[:-1]), f"gradient .*{SIZE - 1} entries.*has {SIZE}"),
    "gradients": (lambda: invert(GRADIENT.expand(2, -1)), rf"gradient .*give a flat \({SIZE},\) tensor$"),
    "label too large": (lambda: invert(y=torch.tensor([3])), r"y holds \[3\].*3 classes: 0 to 2"),
    "labels too many": (lambda: invert(y=torch.tensor([1, 2])), r"1 images behind one gradient and y has \(2,\)"),
    "labels too few": (lambda: invert(shape=(3, 6)), r"3 images behind one gradient and y has \(1,\).*None where"),
    "nothing trainable": (lambda: invert(model=frozen()), "model has no trainable parameter"),
    "BatchNorm training": (lambda: invert(model=training(nn.BatchNorm1d(6))), r"BatchNorm1d.*model\.eval\(\)"),
    "Dropout training": (lambda: invert(model=training(nn.Dropout(0.1))), r"Dropout.*model\.eval\(\)"),
    "method unknown": (lambda: invert(method="gauss-newto"), "method='gauss-newto' is .*mean 'gauss-newton'"),
    "start unknown": (lambda: invert(start="grey"), "start='grey' is unknown.*mean 'gray'"),
    "start misshapen": (lambda: invert(start=X[0]), r"start has shape \(6,\) and shape is \(1, 6\).*must agree"),
    "start NaN": (lambda: invert(start=spoiled(X, math.nan)), "start has 1 NaN"),
    "no steps": (lambda: invert(steps=0), "steps=0 .*at least 1"),
    "shape does not fit": (lambda: invert(shape=(1, 5)), r"shape=\(1, 5\) does not fit the model"),
    "shape without a batch": (lambda: invert(shape=(6,)), r"shape=\(6,\).*\(n, "),
    "loss additive": (lambda: invert(torch.ones(3), model=Additive(), loss=total), "loss must depend on x and on θ"),
    "idlg with labels": (lambda: invert(method="idlg"), "idlg reads the labels.*y=None, or method='dgl'"),
    "restarts zero": (lambda: invert(restarts=0), "restarts=0 .*at least 1"),
    "restarts of one start": (lambda: invert(restarts=2, start=X), "restarts=2 from one given start.*random start"),
    "tv negative": (lambda: invert(tv=-1.0), "tv=-1.0 .*at least 0"),
    "ridge negative": (lambda: invert(ridge=-1.0), "ridge=-1.0 .*at least 0"),
    "mean of another shape": (lambda: invert(ridge=1.0, mean=torch.zeros(7)), r"mean has shape \(7,\).*\(1, 6\)"),
    "mean not finite": (lambda: invert(ridge=1.0, mean=float("nan")), "mean .*NaN"),
    "tv of no image": (lambda: invert(tv=1e-3), r"tv=0.001 needs images.*\(1, 6\)"),
    "tolerance NaN": (lambda: invert(tolerance=math.nan), "tolerance=nan .*finite"),
    "mask of numbers": (
        lambda: invert(mask=GRADIENT),
        rf"mask is \({SIZE},\) of torch.float64; give \({SIZE},\) booleans",
    ),
    "mask short": (lambda: invert(mask=GRADIENT[1:] > 0), rf"mask is \({SIZE - 1},\).*give \({SIZE},\) booleans"),
    "mask empty": (lambda: invert(mask=GRADIENT > 9), "mask marks no coordinate"),
    "covariance short": (
        lambda: invert(covariance=torch.ones(3)),
        rf"covariance has shape \(3,\).*\({SIZE},\) variances",
    ),
    "covariance zero": (lambda: invert(covariance=0 * GRADIENT), "covariance has variances ≤ 0.*belong in `mask`"),
    "covariance indefinite": (lambda: invert(covariance=-torch.eye(SIZE)), "covariance is not symmetric positive"),
    "labels of another loss": (
        lambda: invert(y=None, loss=torch.nn.MultiMarginLoss()),
        "y=None: .*cross-entropy.*give y",
    ),
    "labels of no linear layer": (
        lambda: invert(y=None, model=nn.Sequential(*network(), nn.Tanh())),
        "y=None: .*does not end in one; give y",
    ),
    "soft labels of another loss": (
        lambda: invert(y=None, method="dlg", loss=torch.nn.MultiMarginLoss()),
        "dlg.*class probabilities",
    ),
    "seeds too few": (
        lambda: i2f.invert_many(network(), GRADIENT.expand(2, -1), Y.expand(2, 1), SHAPE, seed=[1]),
        "seed has 1 entries for 2 gradients",
    ),
    "many with labels of one": (
        lambda: i2f.invert_many(network(), GRADIENT.expand(2, -1), Y, SHAPE),
        r"y has \(1,\).*a label for each",
    ),
}

NAMES = {
    "model": (lambda: models.build("lenett", "mnist"), "name='lenett' .*mean 'lenet'"),
    "model's dataset": (lambda: models.build("lenet", "cifar"), "dataset='cifar' .*mean 'cifar10'"),
    "init": (lambda: models.build("lenet", "mnist", "unifrom"), "init='unifrom' .*mean 'uniform'"),
    "dataset": (lambda: data.load("minst"), "name='minst' .*mean 'mnist'"),
    "nothing near": (lambda: data.load("qqq"), "name='qqq' is unknown: choose from 'mnist'"),
    "split": (lambda: data.load("mnist", split="tests"), "split='tests' .*mean 'test'"),
    "split not bundled": (lambda: data.load("cifar10", split="train"), "split='train' of cifar10 .*root="),
    "n too large": (lambda: data.load("mnist", n=21), r"n=21 .*mnist \(test\) has 20 here.*root="),
    "n zero": (lambda: data.load("mnist", n=0), "n=0 images"),
    "offset negative": (lambda: data.load("mnist", n=1, offset=-1), "offset=-1 are not there"),
    "offset beyond": (lambda: data.load("mnist", offset=20), "offset=20 are not there"),
    "imagenet from root": (lambda: data.load("imagenet", root="."), "root= does not read ImageNet"),
    "fetch": (lambda: data.fetch("cifar", data.FOLDER), "name='cifar' .*mean 'cifar10'"),
    "metrics of two shapes": (lambda: metrics.mse(X, X[:, 1:]), r"x is \(1, 6\) and truth \(1, 5\).*same"),
    "metrics of NaN": (lambda: metrics.psnr(spoiled(X, math.nan), X), "x has 1 NaN"),
}


def table(**cases):
    return [pytest.param(*case, id=f"{group}: {name}") for group, rows in cases.items() for name, case in rows.items()]


@pytest.mark.parametrize(
    ("act", "words"), table(jacobian=JACOBIAN, influence=INFLUENCE, perturb=PERTURB, invert=INVERT, names=NAMES)
)
def test_refused(act, words):
    with pytest.raises(ValueError, match=words):
        act()


@pytest.mark.parametrize("method", ["gauss-newton", "dgl"])
def test_unknown_option(method):
    with pytest.raises(TypeError, match=f"method '{method}': option='learning_rate' is unknown: .*choose from"):
        invert(method=method, learning_rate=0.1)


def test_a_good_call_passes():
    """The table above would prove nothing if its defaults were bad."""
    assert invert(steps=1).steps == 1
    assert i2f.influence(jacobian(), GRADIENT).converged


def test_layers_that_do_nothing_may_train():
    """Only layers that draw or mix are refused: Dropout(0), and BatchNorm in evaluation inside a training model."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.0), nn.BatchNorm1d(6), nn.Linear(6, 3)).double().train()
    model[2].eval()
    assert jacobian(model).shape == (6, 75)


def test_singular_is_an_answer_not_an_exception(blind):
    J = i2f.GradientJacobian(*blind)
    prediction = i2f.influence(J, J.gradient)
    assert not prediction.converged
    assert "singular: rank 3 of 9" in prediction.reason
    assert "damping > 0" in prediction.reason


@pytest.mark.parametrize("method", ["gauss-newton", "dgl", "gs"])
def test_start_that_overflows(method):
    model = nn.Linear(6, 3).double()
    nn.init.constant_(model.weight, 10.0)
    start = torch.full(SHAPE, 1e308, dtype=torch.float64)
    found = invert(torch.ones(21), model=model, start=start, method=method, steps=3, box=False)
    assert found.failed
    assert not found.converged
    assert found.reason.startswith("failed")


@pytest.mark.parametrize(
    ("option", "near"), [("restart", "restarts"), ("learnrate", ""), ("optimiser", "optimizer"), ("masks", "mask")]
)
def test_option_shows_its_near_matches(option, near):
    with pytest.raises(TypeError, match=f"option='{option}' is unknown: .*{near}"):
        invert(method="dgl", **{option: 2})


@pytest.mark.parametrize(("value", "near"), [("Test", "'test'"), ("tes", "'test'"), ("zzz", None)])
def test_near_matches(value, near):
    with pytest.raises(ValueError, match="choose from 'test', 'train'") as error:
        checks.one_of("split", value, ("test", "train"))
    assert ("did you mean" in str(error.value)) == (near is not None)
    assert near is None or near in str(error.value)
