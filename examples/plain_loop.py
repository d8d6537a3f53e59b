"""A plain PyTorch loop that looks at each gradient before it leaves: `python examples/plain_loop.py`.

A client trains on its own digits and sends one gradient a step. Where the audit says that noise of this size leaves too
little doubt about an image, the step's noise is raised to what the audit asks for; where no noise would do, or none is
known to, nothing is sent.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

import i2f
from i2f.audit import audit


def client_step(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, variance: float, target_psnr: float
) -> tuple[torch.Tensor | None, float, float]:
    """The gradient to send, flat, or None; its noise's variance; the least judged RMSE of the images behind it."""
    found = audit(model, x, y, f"gaussian:{variance}", together=True, target_psnr=target_psnr)
    needed = max(math.inf if sample.needed is None else sample.needed for sample in found)  # None: not found
    if math.isinf(needed):
        return None, needed, min(s.judged for s in found)
    if needed > variance:
        variance = needed
        found = audit(model, x, y, f"gaussian:{variance}", together=True, target_psnr=target_psnr)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    gradient = torch.cat([g.flatten() for g in gradients])
    noise = i2f.perturb.gaussian(gradient, variance)  # no seed: nobody can draw it again, and take it off
    return gradient + noise, variance, min(s.judged for s in found)


def main(steps: int = 3, batch: int = 1, lr: float = 0.01, target_psnr: float = 20.0) -> list[float]:
    x, y = i2f.data.load("mnist", n=steps * batch, split="train")
    model = i2f.models.build("lenet", "mnist", init="uniform", seed=1, normalize=False).double()
    judged = []
    for step in range(steps):
        part = slice(step * batch, (step + 1) * batch)
        gradient, variance, least = client_step(model, x[part].double(), y[part], 1e-6, target_psnr)
        judged.append(least)
        if gradient is None:
            print(f"step {step}: no noise is known to leave {target_psnr:g} dB; nothing is sent")
            continue
        print(
            f"step {step}: noise of variance {variance:.2g}; the best attacker considered is left with an RMSE of "
            f"{least:.3f} on the least protected image"
        )
        with torch.no_grad():  # the server's side
            first = 0
            for parameter in model.parameters():
                parameter -= lr * gradient[first : first + parameter.numel()].view_as(parameter)
                first += parameter.numel()
    return judged


if __name__ == "__main__":
    main()
