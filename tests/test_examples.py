"""The scripts under examples/ run, each where its extra is installed."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return __import__(name)

    return load


def test_plain_loop_raises_its_noise(example, capsys):
    judged = example("plain_loop").main(steps=1, target_psnr=20.0)
    assert 0.05 < judged[0] <= 0.1 * 1.01  # 20 dB is an RMSE of 0.1, for who knows the box alone
    assert "step 0: noise of variance" in capsys.readouterr().out
    example("plain_loop").main(steps=1, target_psnr=1.0)  # no image is so far from another
    assert "nothing is sent" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # Opacus' own
def test_opacus_noise_is_judged(example):
    pytest.importorskip("opacus", reason="needs pip install 'i2f[opacus]'")
    module = example("opacus_noise")
    weak, strong = (module.main(digits=10, noise_multiplier=m, looked_at=1)[0] for m in (1e-5, 1.0))
    assert weak < 0.05 < strong


@pytest.mark.filterwarnings("ignore")  # Flower's own
def test_flower_client_refuses(example):
    pytest.importorskip("flwr", reason="needs pip install 'i2f[flower]'")
    module = example("flower_client")
    assert module.main() == [True, False]
    x, y = module.i2f.data.load("mnist", n=1)
    client = module.AuditedClient(x, y, 1e-6, min_rmse=0.1)
    before = client.get_parameters({})
    sent, count, metrics = client.fit(before, {})
    assert count == 0
    assert metrics["refused"]
    assert all(np.array_equal(a, b) for a, b in zip(before, sent, strict=True))
    from flwr.common import Code, FitIns, ndarrays_to_parameters

    answer = client.to_client().fit(FitIns(ndarrays_to_parameters(before), {}))
    assert answer.status.code == Code.OK
    assert answer.num_examples == 0
