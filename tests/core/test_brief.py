"""What `print` shows of a result: one line, tensors by their shape."""

import pytest
import torch

import i2f
from i2f.audit import audit
from i2f.core.brief import brief


@pytest.fixture(scope="module")
def results():
    x, y = i2f.data.load("mnist", n=1)
    model = i2f.models.build("linear", "mnist", init="uniform", seed=1, normalize=False).double()
    J = i2f.GradientJacobian(model, x, y)
    delta = i2f.perturb.gaussian(J.gradient, variance=1e-5, seed=0)
    return {
        "Influence": i2f.influence(J, delta),
        "LowerBound": i2f.lower_bound(J, delta),
        "LambdaMax": i2f.spectrum.lambda_max(J),
        "Spectrum": i2f.spectrum.decompose(J),
        "Reconstruction": i2f.invert(model, J.gradient, y, x.shape),
        "Audit": audit(model, x, y, "gaussian:1e-4"),
        "Sample": audit(model, x, y, "gaussian:1e-4").samples[0],
    }


def test_a_result_fits_on_a_line(results):
    for name, result in results.items():
        assert repr(result).startswith(f"{name}(")
        assert "tensor(" not in repr(result)
        assert len(repr(result)) < 400, repr(result)
        assert "\n" not in repr(result)


def test_numbers_are_short_and_tensors_have_their_shape(results):
    shown = repr(results["Influence"])
    assert "displacement=(784,)" in shown
    assert f"rmse={results['Influence'].rmse:.4g}" in shown


def test_long_lists_are_counted():
    assert brief(i2f.spectrum.LambdaMax([1.0] * 9, 2, True, torch.tensor(0.5))) == (
        "LambdaMax(value=9 × float, products=2, converged=True, residual=0.5)"
    )
