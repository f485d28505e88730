"""Data sets as tensors in memory: digits, MNIST, Fashion-MNIST, CIFAR-10 and a user's own arrays.

`load` reads a named set from `data_root` in its original layout, or downloads it into a cache folder; a path to a
`.npz` or `.npy` file is the user's own data. Values stay as they are stored: scaling, binarising and standardising
happen on the device. Found files are checked by size, record structure and label range, downloads by checksum; the
SHA-256 of every file read is kept in `Dataset.fingerprint`. Nothing is ever unpickled.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor

from ddvi.catalogue import DATASETS
from ddvi.downloads import resume, unpack
from ddvi.errors import InputError, check_name
from ddvi.files import cache_folder
from ddvi.randomness import generator


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test examples, as stored: images are (N, C, H, W), tables (N, features).

    Images of bytes are uint8, other non-negative integers int64, booleans uint8 (0 and 1), all else float32.

    Args:
        name: what it is called.
        train_x: (N, *event).
        test_x: (M, *event).
        train_y: (N,) int64, indices into `classes`, −1 = unknown; None without labels.
        test_y: (M,) the same.
        classes: their names; empty without labels.
        maximum: the value that stands for 1.0 in images; None for tables, counts and unbounded values.
        fingerprint: SHA-256 of every file read, by file name.
        drawn: whether the test part was drawn by a seed.

    Example:
        >>> load("digits").describe()
        'digits: 1,500 training and 297 test examples, 1 x 8 x 8, 10 classes'
    """

    name: str
    train_x: Tensor
    test_x: Tensor
    train_y: Tensor | None
    test_y: Tensor | None
    classes: tuple[str, ...]
    maximum: float | None
    fingerprint: dict[str, str]
    drawn: bool = False

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one example."""
        return self.train_x.shape[1:]

    @property
    def n_classes(self) -> int:
        """Number of classes, 0 without labels."""
        return len(self.classes)

    def held_out(self, rows: Tensor, others: Tensor) -> Dataset:
        """The training examples alone: `rows` of them to train on, `others` in the place of the test examples."""
        x, y = self.train_x, self.train_y
        train_y, test_y = (None, None) if y is None else (y[rows], y[others])
        return replace(self, train_x=x[rows], test_x=x[others], train_y=train_y, test_y=test_y, drawn=True)

    def describe(self) -> str:
        """One line for the terminal."""
        shape, labels = " x ".join(map(str, self.event_shape)), f"{self.n_classes or 'no'} classes"
        return f"{self.name}: {len(self.train_x):,} training and {len(self.test_x):,} test examples, {shape}, {labels}"


def load(name_or_path: str, data_root: str | None = None, seed: int = 0, limit: int | None = None) -> Dataset:
    """Load a data set by name, or a user's own `.npz` or `.npy` file.

    Args:
        name_or_path: a key of `catalogue.DATASETS`, or a path. A `.npy` file holds x; a `.npz` file holds x and perhaps
            y, or else x_train and x_test and perhaps y_train and y_test. x is N x features, N x height x width or
            N x channels x height x width; y is N integers (-1 = unknown) or strings.
        data_root: folder to look in for a named set before anything is downloaded.
        seed: draws the test part (a tenth, in proportion to the classes) of a user's file that has none.
        limit: keep only the first `limit` training and the first `limit` test examples.

    Raises:
        InputError: the name, the path, the file or what is in it can't be used.

    Example:
        >>> load("digits", limit=50).train_x.shape
        torch.Size([50, 1, 8, 8])
    """
    if limit is not None and limit < 2:
        _refuse(f"limit={limit} is too small: give at least 2 examples, or leave limit out to use all")
    path = Path(os.path.expanduser(name_or_path))
    if name_or_path in _SOURCES:
        dataset = _load_named(name_or_path, Path(os.path.expanduser(data_root)) if data_root else None)
    elif name_or_path != "digits" and (path.suffix.lower() in (".npz", ".npy") or os.path.exists(path)):
        dataset = _load_own(path, seed)
    else:
        check_name("dataset", name_or_path, [*DATASETS, "the path of a .npz or .npy file"])
        dataset = _load_digits()
    if limit is not None:
        train_x, test_x = dataset.train_x[:limit].clone(), dataset.test_x[:limit].clone()
        train_y, test_y = (None if y is None else y[:limit].clone() for y in (dataset.train_y, dataset.test_y))
        dataset = replace(dataset, train_x=train_x, test_x=test_x, train_y=train_y, test_y=test_y)
    return dataset


def check_varied(dataset: Dataset) -> None:
    """Refuse a table with features that can't be standardised.

    Raises:
        InputError: some are constant.
    """
    x = dataset.train_x
    if x.ndim == 2 and (constant := (x == x[0]).all(0)).any():
        held = f"{int(constant.sum())} constant features (the first is number {int(constant.nonzero()[0])})"
        _refuse(f"'{dataset.name}' has {held} in {len(x):,} training examples: remove them, they can't be standardised")


def split_validation(dataset: Dataset, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `n` of the N training examples for validation; the test examples are never touched.

    Returns:
        indices into `train_x` of the N - n examples to train on and of the n to validate on, each ascending.

    Raises:
        InputError: `n` is negative or more than half of the training examples.

    Example:
        >>> rows, others = split_validation(load("digits"), 100, seed=0)
        >>> len(rows), len(others)
        (1400, 100)
    """
    total = len(dataset.train_x)
    if not 0 <= n <= total // 2:
        _refuse(f"validation={n} doesn't fit {total} training examples: give 0 to {total // 2}, at most half of them")
    order = torch.randperm(total, generator=generator(seed, "validation"))
    return order[n:].sort().values, order[:n].sort().values


def _refuse(message: str) -> NoReturn:
    raise InputError(message)


@dataclass(frozen=True)
class _Source:
    """Where a named set comes from and what its files must hold."""

    url: str  # what the downloads' addresses begin with
    downloads: dict[str, str]  # file name: published MD5
    folders: tuple[str, ...]  # where to look inside data_root, the most telling first
    files: tuple[tuple[str, ...], tuple[str, ...]]  # of the training and of the test part
    sizes: tuple[int, int]  # examples in each
    # From files, their number of examples and a fingerprint to fill in, to images and labels.
    read: Callable[[Sequence[Path], int, dict[str, str]], tuple[np.ndarray, np.ndarray]]
    classes: tuple[str, ...]


def _load_named(name: str, root: Path | None) -> Dataset:
    source, fingerprint, parts = _SOURCES[name], {}, []
    if root and not os.path.isdir(root):
        _refuse(f"data_root '{root}' is not a folder: {_advice(name)}, or data_root= to download {name}")
    found = (root and _find(name, root)) or _find(name, _download(name)) or {}
    for files, size in zip(source.files, source.sizes, strict=True):
        images, labels = source.read([found[file] for file in files], size, fingerprint)
        if (wrong := labels >= len(source.classes)).any():
            held = f"label {labels[wrong][0]} in record {wrong.argmax()} of {', '.join(files)}"
            _refuse(f"{name} has {held}, not 0 to {len(source.classes) - 1}: get an intact copy")
        parts.append((torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))))
    (train_x, train_y), (test_x, test_y) = parts
    return Dataset(name, train_x, test_x, train_y, test_y, source.classes, 255.0, fingerprint)


def _advice(name: str) -> str:
    """Which files a user may put where."""
    kind = "in the binary version, not Python pickles," if name == "cifar" else "gzipped or not,"
    files = ", ".join(sum(_SOURCES[name].files, ()))
    return f"put {files}, {kind} in FOLDER or FOLDER/{_SOURCES[name].folders[0]} and give data_root=FOLDER"


def _find(name: str, root: Path) -> dict[str, Path] | None:
    """Where each file of a set is under `root`; None if none of them is there, refused if only some are."""
    incomplete, files = "", sum(_SOURCES[name].files, ())
    for folder in (root / inner for inner in _SOURCES[name].folders):
        paths = [(file, folder / f"{file}{ending}") for file in files for ending in (".gz", "")]
        found = {file: path for file, path in paths if os.path.isfile(path)}
        missing = ", ".join(file for file in files if file not in found)
        if not missing:
            return found
        if found and not incomplete:
            incomplete = f"{name} is incomplete, '{folder}' lacks {missing}: {_advice(name)}"
    return _refuse(incomplete) if incomplete else None


def _contents(path: Path, fingerprint: dict[str, str]) -> bytes:
    """A file's bytes, unzipped if they are gzipped; their SHA-256 as stored goes to `fingerprint`."""
    if not os.path.isfile(path):
        _refuse(f"there is no file '{path}': give the path of a file that exists")
    try:
        stored = path.read_bytes()
        fingerprint[path.name] = hashlib.sha256(stored).hexdigest()
        return gzip.decompress(stored) if stored.startswith(b"\x1f\x8b") else stored
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"'{path}' is unreadable, truncated or corrupt ({error}): get an intact copy") from error


def _read_bytes(path: Path, header: bytes, shape: tuple[int, ...], fingerprint: dict[str, str]) -> np.ndarray:
    """The array of bytes in a file that must hold exactly `header` and then the array."""
    content, size = _contents(path, fingerprint), len(header) + math.prod(shape)
    if not content.startswith(header):
        begin = f"begins with {content[: len(header)].hex(' ', 4)}, not {header.hex(' ', 4)}"
        _refuse(f"'{path}' {begin} (the header of {shape} bytes): get an intact copy")
    if len(content) != size:
        fault = "truncated" if len(content) < size else "too long"
        _refuse(f"'{path}' is {fault} ({len(content):,} bytes, not {size:,}): get an intact copy")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def _read_mnist(paths: Sequence[Path], n: int, fingerprint: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """IDX begins with 0, 0, 8 (bytes), the number of dimensions, and each dimension as big-endian uint32."""
    images = _read_bytes(paths[0], struct.pack(">4B3I", 0, 0, 8, 3, n, 28, 28), (n, 1, 28, 28), fingerprint)
    return images, _read_bytes(paths[1], struct.pack(">4BI", 0, 0, 8, 1, n), (n,), fingerprint)


def _read_cifar(paths: Sequence[Path], n: int, fingerprint: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label and 3 x 32 x 32 values, a byte each, spread evenly over the files."""
    records = np.concatenate([_read_bytes(path, b"", (n // len(paths), 3073), fingerprint) for path in paths])
    return records[:, 1:].reshape(n, 3, 32, 32), records[:, 0]


def _idx_source(url: str, md5: str, folders: tuple[str, ...], classes: tuple[str, ...]) -> _Source:
    train, test = ((f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in ("train", "t10k"))
    downloads = {f"{file}.gz": checksum for file, checksum in zip(train + test, md5.split(), strict=True)}
    return _Source(url, downloads, (*folders, "."), (train, test), (60_000, 10_000), _read_mnist, classes)


_LARGEST_LOSS = 1e-3  # of a value to single precision, in standard deviations of its feature
_SPARSE = {"format", "shape", "data"}  # what a file of `scipy.sparse.save_npz` always holds
_CHANNELS = (1, 3, 4)  # grey, colour, and colour with transparency
_SOURCES = {
    "mnist": _idx_source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873 d53e105ee54ea40749a09fcbcd1e9432 "
        "9fb629c4189551a2d022fa330f9573f3 ec29112dd5afa0611ce80d1b7f02629c",
        ("mnist", "MNIST/raw"),
        tuple("0123456789"),
    ),
    "fashion_mnist": _idx_source(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d 25c81989df183df01b3e8a0aad5dffbe "
        "bef4ecab320f06d8554ea6380940ec79 bb300cfdad3c16e7a12a480ee83cd310",
        ("fashion-mnist", "FashionMNIST/raw", "fashion_mnist"),
        ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    "cifar": _Source(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        (*(f"{outer}cifar-10-batches-bin" for outer in ("", "cifar10/", "cifar/")), "cifar10", "cifar", "."),
        (tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)),
        (50_000, 10_000),
        _read_cifar,
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
}


def _load_digits() -> Dataset:
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(values.astype(np.uint8)).reshape(-1, 1, 8, 8), torch.from_numpy(labels.astype(np.int64))
    fingerprint = {"digits": hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()}
    train, test = _draw_test(len(x), 297, y, generator(0, "digits"))  # the same test examples for every seed
    return Dataset("digits", x[train], x[test], y[train], y[test], tuple("0123456789"), 16.0, fingerprint)


def _draw_test(n: int, n_test: int, labels: Tensor | None, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training and test indices, ascending: shuffle, sort by class, take every (n / n_test)-th from a random start."""
    order = torch.randperm(n, generator=random)
    if labels is not None:
        order = order[labels[order].argsort(stable=True)]
    is_test = torch.zeros(n, dtype=torch.bool)
    is_test[order[(torch.arange(n_test) * n + torch.randint(n, (), generator=random)) // n_test]] = True
    return (~is_test).nonzero()[:, 0], is_test.nonzero()[:, 0]


def _download(name: str) -> Path:
    """A set's folder in the cache ($DDVI_CACHE, or the system's), filled by one process at a time unless it is."""
    import pooch
    import urllib3
    from filelock import FileLock

    source, downloader = _SOURCES[name], cast(Any, resume)
    cache = cache_folder() / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "lock"):
            for file, md5 in source.downloads.items():
                if not (cache / source.folders[0]).is_dir():  # an unpacked archive
                    path = Path(pooch.retrieve(source.url + file, f"md5:{md5}", file, cache, downloader=downloader))
                    if file.endswith(".tar.gz"):
                        unpack(path)
    except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
        fault = "wrong checksum, deleted" if type(error) is ValueError else type(error).__name__
        held = f"{name} isn't in data_root, and downloading {source.url} to '{cache}' failed ({fault})"
        raise InputError(f"{held}: try again, or {_advice(name)}") from error
    return cache


def _load_own(path: Path, seed: int) -> Dataset:
    fingerprint: dict[str, str] = {}
    arrays = read_numpy(path, fingerprint)
    if "x" in arrays and {"x_train", "x_test"} & arrays.keys():
        _refuse(f"'{path}' holds {', '.join(arrays)}: give x alone, or x_train and x_test")
    parts = ("",) if "x" in arrays else ("_train", "_test")
    xs = [check_values(f"x{part} of '{path}'", arrays[f"x{part}"]) for part in parts]
    pairs = [(f"y{part}", x) for part, x in zip(parts, xs, strict=True) if f"y{part}" in arrays]
    ys = [_check_labels(f"{key} of '{path}'", arrays[key], x) for key, x in pairs]
    alike = len({x.shape[1:] for x in xs}) == 1 and len({y.dtype.kind for y in ys}) <= 1
    if not alike or len(ys) not in (0, len(xs)):
        held = ", ".join(f"{key} {array.dtype}{array.shape}" for key, array in arrays.items())
        _refuse(f"the parts of '{path}' don't match ({held}): give both alike, with labels in both or in neither")
    whole = np.concatenate(xs)
    (x, maximum), (y, classes) = _as_tensor(whole), _as_classes(ys) if ys else (None, ())
    check_kept(f"x{parts[0]} of '{path}'", whole, x)
    n_train = len(xs[0]) if len(xs) == 2 else len(x) - max(1, len(x) // 10)
    if n_train < 2:
        _refuse(f"x{parts[0]} of '{path}' has too few examples, {len(xs[0])}: give {4 - len(xs)} or more")
    train, test = torch.arange(n_train), torch.arange(n_train, len(x))
    if len(xs) == 1:
        train, test = _draw_test(len(x), len(x) - n_train, y, generator(seed, "test"))
    labels = (None, None) if y is None else (y[train], y[test])
    return Dataset(path.stem, x[train], x[test], *labels, classes, maximum, fingerprint, drawn=len(xs) == 1)


def read_numpy(path: Path, fingerprint: dict[str, str]) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file under the names x and y, or x_train and so on; a `.npy` file and scipy's are x."""
    import scipy.sparse

    content, arrays, names = _contents(path, fingerprint), {}, []
    keys = {"data": "x", "X": "x", "labels": "y"}  # beside our own names, which come later and so win
    keys |= {key: key for key in ("x", "y", "x_train", "x_test", "y_train", "y_test")}
    advice = "save numbers with numpy.savez(file, x=x, y=y) or numpy.save(file, x)"
    if not content.startswith((b"PK", b"\x93NUMPY")):
        _refuse(f"'{path}' is no .npz or .npy file ({len(content):,} bytes): {advice}")
    try:
        file = np.load(io.BytesIO(content), allow_pickle=False)
        file = {"x": file} if isinstance(file, np.ndarray) else file
        names = list(file)
        if _SPARSE.issubset(names):
            return {"x": scipy.sparse.load_npz(io.BytesIO(content)).toarray()}
        arrays = {keys[key]: file[key] for key in keys if key in names}
    except Exception as error:  # on damaged bytes numpy and zipfile raise a dozen kinds, TokenError among them
        reason = "holds Python objects" if "Object arrays" in str(error) else "is truncated or corrupt"
        raise InputError(f"'{path}' {reason}: {advice}") from error
    if "x" not in arrays and not {"x_train", "x_test"} <= arrays.keys():
        _refuse(f"'{path}' holds {', '.join(names) or 'nothing'}, but neither x nor x_train and x_test: {advice}")
    return arrays


def check_values(what: str, x: np.ndarray) -> np.ndarray:
    """Refuse what can't be modelled; images without a channel get one."""
    if x.dtype.kind not in "biuf":
        _refuse(f"{what} has dtype {x.dtype}: convert it to real numbers, such as float32")
    if not 2 <= x.ndim <= 4:
        _refuse(f"{what} has {x.ndim} dimensions: make it N x features, or N x channels x height x width")
    if x.ndim == 4 and x.shape[3] in _CHANNELS and x.shape[1] not in _CHANNELS and x.shape[3] < min(x.shape[1:3]):
        _refuse(f"{what} has shape {x.shape}, N x height x width x channels: give x.transpose(0, 3, 1, 2)")
    if x.size == 0:
        _refuse(f"{what} is empty (shape {x.shape}): give examples of at least one value each")
    bad = ~(np.abs(x) <= np.finfo(np.float32).max)
    if bad.any():
        first, *place = (int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
        held = f"{bad.sum():,} NaN or infinite values (as float32), the first in row {first} at {tuple(place)}"
        _refuse(f"{what}: there are {held}; remove or replace them")
    return x[:, None] if x.ndim == 3 else x


def _check_labels(what: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Labels as int64 or strings."""
    if y.dtype.kind not in "iuUS":
        _refuse(f"{what} has dtype {y.dtype}: labels are integers (-1 = unknown) or strings (empty = unknown)")
    if y.shape != (len(x),):
        _refuse(f"{what} has shape {y.shape}, for {len(x):,} examples: give one label each, shape ({len(x)},)")
    if y.dtype.kind in "US":
        try:
            y = y.astype(np.str_)
        except UnicodeDecodeError:
            _refuse(f"{what} has bytes that aren't ASCII: give text, as by numpy.char.decode(y, 'latin-1')")
        return np.where(y == "-1", "", y)  # which is what -1 among text becomes
    y = y.astype(np.int64)
    if y.min() < -1:
        first = int(np.argmax(y < -1))
        _refuse(f"{what} has label {y[first]} in example {first}: labels are 0 or more, or -1 where unknown")
    return y


def _as_classes(ys: Sequence[np.ndarray]) -> tuple[Tensor | None, tuple[str, ...]]:
    """Indices of the labels in their sorted distinct values and these as class names; -1 where it is -1 or empty."""
    values, index = np.unique(np.concatenate(ys), return_inverse=True)
    unknown = int(len(values) > 0 and values[0] in ("", -1))  # which is the first
    classes = tuple(str(value) for value in values[unknown:])
    return (torch.from_numpy(index.astype(np.int64) - unknown) if classes else None), classes


def check_kept(what: str, x: np.ndarray, kept: Tensor) -> None:
    """Refuse values (N, …) that differ too little from each other for single precision, in which they are kept."""
    if kept.dtype != torch.float32 or x.dtype == np.float32:
        return
    flat = x.reshape(len(x), -1).astype(np.float64)
    lost = np.abs(flat - kept.flatten(1).double().numpy()).max(0) > _LARGEST_LOSS * flat.std(0)
    lost &= (flat != flat[0]).any(0)
    if lost.any():
        place = int(lost.argmax())
        held = f"values around {flat[0, place]:g} that differ by {flat[:, place].std():g} in feature {place}"
        _refuse(f"{what} has {held}, too little for single precision: subtract an offset from them")


def _as_tensor(x: np.ndarray) -> tuple[Tensor, float | None]:
    """Values as documented in `Dataset`, and which of them stands for 1.0."""
    is_bytes = x.dtype == np.bool_ or (x.dtype == np.uint8 and x.ndim == 4)
    is_count = not is_bytes and x.dtype.kind in "iu" and x.min() >= 0 and x.max() <= np.iinfo(np.int64).max
    dtype = np.uint8 if is_bytes else np.int64 if is_count else np.float32
    top = 1.0 if not is_count and x.min() >= 0 and x.max() <= 1 else 255.0 if is_bytes else None
    return torch.from_numpy(x.astype(dtype)), top if x.ndim == 4 else None
