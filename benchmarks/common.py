"""What the benchmarks share: the problem they all start from, and the machine that their seconds belong to."""

import os
import platform
from pathlib import Path

import torch

import i2f

HERE = Path(__file__).parent


def problem(
    dataset: str, image: int, init: str = "uniform", seed: int = 1, dtype: torch.dtype = torch.float64
) -> i2f.GradientJacobian:
    """The released LeNet and one test image, in pixels."""
    x, y = i2f.data.load(dataset, n=1, offset=image)
    model = i2f.models.build("lenet", dataset, init=init, seed=seed, normalize=False)
    return i2f.GradientJacobian(model.to(dtype), x, y)


def machine(threads: int) -> str:
    """What the seconds were taken on; use them as ratios."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    return (
        f"{processor}, {os.cpu_count()} cores; {platform.system()}, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, threads a process: {threads}\n"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
