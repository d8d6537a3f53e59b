"""How much privacy is left of Opacus' clipping and noise, image by image: `python examples/opacus_noise.py`.

pip install 'i2f[opacus]'. Opacus counts ε for a whole training; an audit says what one step's gradient of one image
would show to someone who sees it, with the same clipping norm and noise multiplier. The digits are standardised, as
they usually are for training: `range` tells the audit which values a pixel can have, and every error is in units of it.
"""

import torch
from opacus import PrivacyEngine
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import i2f
from i2f.audit import audit

MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels


def main(
    digits: int = 20, noise_multiplier: float = 0.01, max_grad_norm: float = 1.0, looked_at: int = 2
) -> list[float]:
    pixels, y = i2f.data.load("mnist", n=digits, split="train")
    x = (pixels - MEAN) / STD
    network = i2f.models.build("lenet", "mnist", init="uniform", seed=1, normalize=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    torch.manual_seed(0)
    model, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
        module=network.train(),
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=10),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
    )
    for inputs, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    defense = f"dp:{optimizer.max_grad_norm}:{optimizer.noise_multiplier}"
    trained = i2f.models.build("lenet", "mnist", init="uniform", seed=1, normalize=False).double()
    trained.load_state_dict(model._module.state_dict())
    limits = ((0 - MEAN) / STD, (1 - MEAN) / STD)
    found = audit(trained, x[:looked_at].double(), y[:looked_at], defense, range=limits)
    for sample in found:
        print(
            f"image {sample.index}: {defense} leaves an RMSE of {sample.judged:.3f} of the range of a pixel: "
            f"{sample.verdict}"
        )
    return [sample.judged for sample in found]


if __name__ == "__main__":
    main()
