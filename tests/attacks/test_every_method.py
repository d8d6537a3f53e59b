"""What holds for a reconstruction whatever made it."""

import pytest
import torch

import i2f
from conftest import Trace
from i2f import perturb


@pytest.mark.parametrize("method", ["gauss-newton", "dgl", "dlg", "gs"])
class TestEveryMethod:
    """What holds for a reconstruction whatever made it; the tiny MLP, with a noisy gradient."""

    @pytest.fixture
    def attack(self, mlp, backward, method):
        """Runs the attack; `target` is what was sent."""
        model, x, y = mlp
        clean = backward(model, x, y)

        def run(**options):
            return i2f.invert(model, run.target, y, x.shape, method=method, **{"steps": 5, **options})

        run.target = clean + perturb.gaussian(clean, 1e-3, seed=0)
        return run

    def test_loss_and_residual_are_true(self, attack, mlp, backward, method):
        model, x, y = mlp
        found = attack()
        gradient = backward(model, found.x, y)
        residual = gradient - attack.target
        loss = float(residual @ residual)
        if method == "gs":
            loss = 1 - float(gradient @ attack.target / (gradient.norm() * attack.target.norm()))
        assert found.x.shape == x.shape
        assert found.loss == pytest.approx(loss, rel=1e-9)
        assert found.relative_residual == pytest.approx(float(residual.norm() / attack.target.norm()), rel=1e-9)

    def test_lowers_the_objective(self, attack, method):
        trace = Trace()
        found = attack(callback=trace, start="gray")
        assert found.loss <= min(trace.losses) < trace.losses[0]
        if method != "dlg":  # L-BFGS also keeps what it sees between its outer steps
            assert found.loss == min(trace.losses)

    def test_callback_follows_the_attack(self, attack):
        trace = Trace()
        found = attack(callback=trace)
        assert trace.steps == list(range(found.steps + 1))
        assert trace.evaluations == sorted(set(trace.evaluations))
        assert found.evaluations >= trace.evaluations[-1] > found.steps

    def test_seed_decides_the_start(self, attack):
        first, again, other = Trace(), Trace(), Trace()
        found, repeated = attack(seed=1, callback=first), attack(seed=1, callback=again)
        attack(seed=2, callback=other)
        assert torch.equal(found.x, repeated.x)
        assert torch.equal(first.images[0], again.images[0])
        assert not torch.equal(first.images[0], other.images[0])

    def test_out_of_steps(self, attack):
        found = attack(steps=1)
        assert found.steps == 1
        assert not found.converged
        assert "used its 1 step" in found.reason

    def test_starts_where_it_is_told(self, attack):
        trace, start = Trace(), torch.full((1, 12), 0.25, dtype=torch.float64)
        attack(start=start, callback=trace, steps=1)
        assert torch.equal(trace.images[0], start)
        assert torch.equal(start, torch.full_like(start, 0.25))

    def test_started_at_the_truth(self, attack, mlp, backward):
        model, x, y = mlp
        attack.target = backward(model, x, y)
        found = attack(start=x)
        assert torch.equal(found.x, x)
        assert found.steps == 0
        assert found.converged

    def test_arguments_are_left_alone(self, attack):
        before = attack.target.clone()
        attack()
        assert torch.equal(attack.target, before)
