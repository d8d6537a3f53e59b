"""Where tensors live: `auto`, `cpu`, `cuda` or `mps`, chosen once for a process by `use`."""

import torch

from i2f.core import checks

NAMES = ("auto", "cpu", "cuda", "mps")
_chosen = "cpu"


def resolve(name: str) -> torch.device:
    """The device of that name; "auto": CUDA where there is one, then MPS, then the CPU.

    Raises: ValueError for an unknown name, or a device that this machine lacks.
    """
    checks.one_of("device", name, NAMES)
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in here.items() if there)
    if not here[name]:
        there = ", ".join(repr(kind) for kind, is_there in here.items() if is_there)
        raise ValueError(f"device={name!r} is not on this machine: choose 'auto', or one of {there}")
    return torch.device(name)


def use(name: str = "") -> torch.device:
    """Take `name` from here on in this process; the device that it stands for. "": leave the choice as it is.

    On CUDA, products keep float32's own 24 bits: TensorFloat-32 would leave 11, and an attack's residual stops there.
    """
    global _chosen
    device = resolve(name or _chosen)
    _chosen = name or _chosen
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return device


def current() -> torch.device:
    """The device last chosen by `use` in this process; without a choice, the CPU."""
    return use()


def chosen() -> str:
    """The name given to `use`: "auto" is each machine's own device."""
    return _chosen
