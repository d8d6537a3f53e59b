"""Where tensors live: `auto`, `cpu`, `cuda` or `mps`, chosen once for a process and the workers that it starts.

By `use`, or by the environment variable I2F_DEVICE; `make repro DEVICE=` sets it, and so does `--device` of
`python -m i2f.paper.pipeline run`.
"""

import os

import torch

from i2f.core import checks

NAMES = ("auto", "cpu", "cuda", "mps")
VARIABLE = "I2F_DEVICE"


def resolve(name: str) -> torch.device:
    """The device of that name; "auto": CUDA where there is one, then MPS, then the CPU.

    Raises: ValueError for an unknown name, or a device that this machine lacks.
    """
    checks.one_of("device", name, NAMES)
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in here.items() if there)
    if not here[name]:
        raise ValueError(f"device={name!r} is not on this machine: choose 'auto', or one of "
                         f"{', '.join(repr(kind) for kind, there in here.items() if there)}")  # fmt: skip
    return torch.device(name)


def use(name: str = "") -> torch.device:
    """Take `name` from here on, in this process and in those that it starts; the device it stands for. "": leave it.

    On CUDA, products keep float32's own 24 bits: TensorFloat-32 would leave 11, and an attack's residual stops there.
    """
    if not name:
        return current()
    device = resolve(name)
    os.environ[VARIABLE] = name
    _exact(device)
    return device


def current() -> torch.device:
    """The device last chosen by `use`, here or in the process that started this one; without a choice, the CPU."""
    device = resolve(os.environ.get(VARIABLE, "cpu"))
    _exact(device)
    return device


def _exact(device: torch.device) -> None:
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
