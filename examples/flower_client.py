"""A Flower client that refuses to send what gives too much away: `python examples/flower_client.py`.

pip install 'i2f[flower]'. The client takes one local step from the server's weights; the difference that it would send
is a gradient. It audits that gradient first, and where the least protected image is judged below `min_rmse` it sends
the server's own weights back, counts no examples, and says so in its metrics.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
import torch
from flwr.client import NumPyClient
from torch.nn import functional as F

import i2f
from i2f import perturb
from i2f.audit import audit


class AuditedClient(NumPyClient):
    """One local step on `x`, `y`, its gradient with Gaussian noise of `variance`, if the audit lets it out."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, variance: float, min_rmse: float, lr: float = 0.01):
        self.model = i2f.models.build("lenet", "mnist", init="uniform", seed=1, normalize=False).double()
        self.x, self.y, self.variance, self.min_rmse, self.lr = x.double(), y, variance, min_rmse, lr

    def get_parameters(self, config: dict) -> list[np.ndarray]:
        return [p.detach().numpy().copy() for p in self.model.parameters()]

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        with torch.no_grad():
            for p, value in zip(self.model.parameters(), parameters, strict=True):
                p.copy_(torch.from_numpy(np.asarray(value)))
        found = audit(self.model, self.x, self.y, f"gaussian:{self.variance}", together=True)
        least = min(sample.judged for sample in found)
        if not found.passes(self.min_rmse):
            return parameters, 0, {"refused": True, "judged": least}
        gradients = torch.autograd.grad(F.cross_entropy(self.model(self.x), self.y), list(self.model.parameters()))
        moved = [
            p.detach() - self.lr * (g + perturb.gaussian(g.flatten(), self.variance).view_as(g))
            for p, g in zip(self.model.parameters(), gradients, strict=True)
        ]
        return [p.numpy() for p in moved], len(self.x), {"refused": False, "judged": least}


def main() -> list[bool]:
    x, y = i2f.data.load("mnist", n=1)
    refused = []
    for variance in (1e-6, 1e-3):
        client = AuditedClient(x, y, variance, min_rmse=0.1)
        _, count, metrics = client.fit(client.get_parameters({}), {})
        refused.append(metrics["refused"])
        said = "refuses to send" if metrics["refused"] else f"sends the gradient of {count} image"
        print(f"noise of variance {variance:g}: judged {metrics['judged']:.3f}, the client {said}")
    return refused


if __name__ == "__main__":
    main()
