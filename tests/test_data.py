"""Data sets: every layout read, every fault named, downloads checked and resumed, splits fixed by their seed.

Tests on real MNIST run where the environment variable DDVI_DATA names a data root that holds it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from ddvi import data
from ddvi.catalogue import DATASETS
from ddvi.data import Dataset, check_varied, load, split_validation
from ddvi.errors import InputError

N_TRAIN, N_TEST = 20, 10
IDX_NAMES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
CIFAR_NAMES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


@pytest.fixture(autouse=True)
def small_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The named sets shrunk to 20 + 10 examples; an empty cache, and nothing to download from (port 9 is closed)."""
    monkeypatch.setenv("DDVI_CACHE", str(tmp_path / "cache"))
    for name, source in data._SOURCES.items():
        small = replace(source, sizes=(N_TRAIN, N_TEST), url="http://127.0.0.1:9/")
        monkeypatch.setitem(data._SOURCES, name, small)


def idx_files() -> dict[str, bytes]:
    """The four files of a set in IDX format."""
    random, files = np.random.default_rng(0), {}
    for part, n in (("train", N_TRAIN), ("t10k", N_TEST)):
        pixels, labels = random.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8) % 10
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">IIII", 0x803, n, 28, 28) + pixels.tobytes()
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">II", 0x801, n) + labels.tobytes()
    return files


def cifar_files() -> dict[str, bytes]:
    """The six files of CIFAR-10's binary version: five of 4 training examples, one of 10 test examples."""
    random, files = np.random.default_rng(1), {}
    for i, name in enumerate(CIFAR_NAMES):
        n = 10 if name == "test_batch.bin" else 4
        records = random.integers(0, 256, (n, 3073), np.uint8)
        records[:, 0] = (np.arange(n) + 4 * i) % 10
        files[name] = records.tobytes()
    return files


FILES = {"mnist": idx_files, "fashion_mnist": idx_files, "cifar": cifar_files}


def write(folder: Path, files: dict[str, bytes], zipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


def refused(*said: str, **arguments: Any) -> str:
    """Load, expect to be refused in one line that says all of `said`."""
    with pytest.raises(InputError) as caught:
        load(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    for text in said:
        assert text in message, message
    return message


# ---- named sets ------------------------------------------------------------------------------------------------------

LAYOUTS = [
    *(("mnist", folder) for folder in (".", "mnist", "MNIST/raw")),
    *(("fashion_mnist", folder) for folder in (".", "fashion-mnist", "FashionMNIST/raw", "fashion_mnist")),
    *(("cifar", f"{outer}cifar-10-batches-bin") for outer in ("", "cifar10/", "cifar/")),
    *(("cifar", folder) for folder in (".", "cifar10", "cifar")),
]


@pytest.mark.parametrize("zipped", [False, True], ids=["raw", "gz"])
@pytest.mark.parametrize(("name", "folder"), LAYOUTS)
def test_every_layout_gives_the_bytes_of_the_files(tmp_path: Path, name: str, folder: str, zipped: bool) -> None:
    files = FILES[name]()
    write(tmp_path / folder, files, zipped)
    dataset = load(name, data_root=str(tmp_path))
    assert dataset.train_y is not None
    assert dataset.test_y is not None
    shape = (3, 32, 32) if name == "cifar" else (1, 28, 28)
    assert dataset.train_x.shape == (N_TRAIN, *shape)
    assert dataset.train_x.dtype == torch.uint8
    assert (dataset.maximum, dataset.n_classes, dataset.event_shape) == (255.0, 10, shape)
    assert dataset.train_y.tolist() == [i % 10 for i in range(N_TRAIN)]
    assert dataset.test_y.tolist() == [i % 10 for i in range(N_TEST)]
    if name == "cifar":
        stored = b"".join(files[name] for name in CIFAR_NAMES[:5])
        written = torch.cat([dataset.train_y.to(torch.uint8)[:, None], dataset.train_x.flatten(1)], 1)
        assert written.numpy().tobytes() == stored
    else:
        assert dataset.train_x.numpy().tobytes() == files[IDX_NAMES[0]][16:]
        assert dataset.test_x.numpy().tobytes() == files[IDX_NAMES[2]][16:]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / folder).iterdir()}
    assert {key: dataset.fingerprint[key] for key in hashes} == hashes


def test_both_idx_sets_in_one_root_are_told_apart(tmp_path: Path) -> None:
    files = idx_files()
    write(tmp_path / "MNIST/raw", files)
    other = {name: content[:-1] + b"\7" for name, content in files.items()}
    write(tmp_path / "FashionMNIST/raw", other)
    assert load("mnist", str(tmp_path)).test_x[-1, 0, -1, -1] == files[IDX_NAMES[2]][-1] != 7
    assert load("fashion_mnist", str(tmp_path)).test_x[-1, 0, -1, -1] == 7


def test_every_name_of_the_catalogue_loads(tmp_path: Path) -> None:
    for name, folder in (("mnist", "mnist"), ("fashion_mnist", "fashion-mnist"), ("cifar", "cifar-10-batches-bin")):
        write(tmp_path / folder, FILES[name]())
    for name in DATASETS:
        assert load(name, str(tmp_path)).name == name


Change = Callable[[bytes], bytes]
IDX_FAULTS: list[tuple[str, Change, str]] = [
    ("train-images-idx3-ubyte", lambda content: content[:-100], "truncated (15,596 bytes, not 15,696)"),
    ("train-images-idx3-ubyte", lambda content: content + b"\0", "too long"),
    ("t10k-images-idx3-ubyte", lambda content: content[:7], "begins with"),
    ("t10k-images-idx3-ubyte", lambda content: b"", "begins with"),
    ("train-images-idx3-ubyte", lambda content: b"PNG!" + content[4:], "begins with 504e4721"),
    (
        "t10k-images-idx3-ubyte",
        lambda content: struct.pack(">IIII", 0x803, 9, 28, 28) + content[16:-784],
        "begins with 00000803 00000009",
    ),
    (
        "train-labels-idx1-ubyte",
        lambda content: struct.pack(">II", 0x801, 19) + content[8:-1],
        "begins with 00000801 00000013",
    ),
    ("train-labels-idx1-ubyte", lambda content: content[:13] + b"\x11" + content[14:], "label 17 in record 5"),
    ("t10k-labels-idx1-ubyte", lambda content: gzip.compress(content)[:-9], "truncated or corrupt"),
    ("t10k-labels-idx1-ubyte", lambda content: gzip.compress(content)[:-8] + b"12345678", "truncated or corrupt"),
    ("t10k-labels-idx1-ubyte", lambda content: b"\x1f\x8b" + content, "truncated or corrupt"),
]


@pytest.mark.parametrize(("file", "change", "said"), IDX_FAULTS)
def test_a_damaged_idx_file_is_refused(tmp_path: Path, file: str, change: Change, said: str) -> None:
    files = idx_files()
    write(tmp_path, files | {file: change(files[file])})
    refused(file, said, "intact copy", name_or_path="mnist", data_root=str(tmp_path))


CIFAR_FAULTS: list[tuple[str, Change, str]] = [
    ("data_batch_3.bin", lambda content: content[:-1], "truncated"),
    ("data_batch_3.bin", lambda content: content[: len(content) // 2], "truncated"),  # at the border of a record
    ("test_batch.bin", lambda content: content + bytes(3073), "too long"),
    ("data_batch_1.bin", lambda content: b"\x0a" + content[1:], "label 10 in record 0"),
]


@pytest.mark.parametrize(("file", "change", "said"), CIFAR_FAULTS)
def test_a_damaged_cifar_file_is_refused(tmp_path: Path, file: str, change: Change, said: str) -> None:
    files = cifar_files()
    write(tmp_path / "cifar10", files | {file: change(files[file])})
    refused(file, said, "intact copy", name_or_path="cifar", data_root=str(tmp_path))


@pytest.mark.parametrize(("name", "file"), [("mnist", "t10k-labels-idx1-ubyte"), ("cifar", "data_batch_4.bin")])
def test_a_missing_file_is_named(tmp_path: Path, name: str, file: str) -> None:
    files = FILES[name]()
    del files[file]
    write(tmp_path, files)
    refused(f"lacks {file}", str(tmp_path), "data_root=", name_or_path=name, data_root=str(tmp_path))


def test_a_data_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    root = str(tmp_path / "nowhere")
    refused(root, "not a folder", "train-images-idx3-ubyte", name_or_path="mnist", data_root=root)


def test_cifar_pickles_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "cifar-10-batches-py", {f"data_batch_{i}": b"cos\nsystem\n" for i in range(1, 6)})
    refused("not Python pickles", "data_batch_1.bin", name_or_path="cifar", data_root=str(tmp_path))


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    refused("'mnits'", "did you mean 'mnist'?", ".npz", name_or_path="mnits")


def test_limit_takes_the_first_examples(tmp_path: Path) -> None:
    write(tmp_path, idx_files())
    whole, part = load("mnist", str(tmp_path)), load("mnist", str(tmp_path), seed=5, limit=7)
    assert part.train_y is not None
    assert whole.train_y is not None
    assert torch.equal(part.train_x, whole.train_x[:7])
    assert torch.equal(part.test_x, whole.test_x[:7])
    assert torch.equal(part.train_y, whole.train_y[:7])
    assert part.train_x.untyped_storage().nbytes() == 7 * 784  # the rest is let go


@pytest.mark.parametrize("limit", [1, 0, -3])
def test_a_limit_below_two_is_refused(limit: int) -> None:
    refused(f"limit={limit}", "at least 2", name_or_path="digits", limit=limit)


# ---- real data -------------------------------------------------------------------------------------------------------

MNIST_MD5 = {  # of the original files, decompressed
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


@pytest.fixture
def real_root(monkeypatch: pytest.MonkeyPatch) -> str:
    root = os.environ.get("DDVI_DATA")
    if not root:
        pytest.skip("needs real MNIST: set DDVI_DATA to a data root that has it")
    monkeypatch.setitem(data._SOURCES, "mnist", replace(data._SOURCES["mnist"], sizes=(60_000, 10_000)))
    if not data._find("mnist", Path(root)):
        pytest.skip(f"needs real MNIST: there is none in DDVI_DATA={root}")
    return root


def test_real_mnist_is_the_original(real_root: str) -> None:
    dataset = load("mnist", real_root)
    assert dataset.train_y is not None
    assert dataset.test_y is not None
    assert dataset.train_y.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert dataset.test_y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert dataset.train_x.float().mean().item() / 255 == pytest.approx(0.1307, abs=5e-5)  # the value everyone quotes
    content = {
        "train-images-idx3-ubyte": struct.pack(">4I", 0x803, 60_000, 28, 28) + dataset.train_x.numpy().tobytes(),
        "train-labels-idx1-ubyte": struct.pack(">2I", 0x801, 60_000) + dataset.train_y.byte().numpy().tobytes(),
        "t10k-images-idx3-ubyte": struct.pack(">4I", 0x803, 10_000, 28, 28) + dataset.test_x.numpy().tobytes(),
        "t10k-labels-idx1-ubyte": struct.pack(">2I", 0x801, 10_000) + dataset.test_y.byte().numpy().tobytes(),
    }
    assert {name: hashlib.md5(value).hexdigest() for name, value in content.items()} == MNIST_MD5


def test_digits_have_the_same_test_set_for_each_seed() -> None:
    from sklearn.datasets import load_digits

    first, second = load("digits", seed=0), load("digits", seed=1)
    assert torch.equal(first.test_x, second.test_x)
    assert torch.equal(first.train_x, second.train_x)
    assert (len(first.train_x), len(first.test_x), first.maximum) == (1500, 297, 16.0)
    assert first.fingerprint == second.fingerprint
    assert first.train_y is not None
    assert first.test_y is not None
    together = torch.cat([first.train_x, first.test_x]).flatten(1).tolist()
    assert sorted(together) == sorted(load_digits(return_X_y=True)[0].tolist())  # each of them once
    share = first.test_y.bincount() - 297 / 1797 * (first.test_y.bincount() + first.train_y.bincount())
    assert share.abs().max() <= 1  # stratified


# ---- downloads -------------------------------------------------------------------------------------------------------


class Server:
    """Serves files from memory on 127.0.0.1, ranges included; `cut` breaks the first answer off after so many bytes."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.cut, self.ranges = files, 0, True
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name, span = self.path[1:], self.headers.get("Range")
                outer.asked.append((name, span))
                content = outer.files.get(name)
                if content is None:
                    return self.send_error(404)
                start = int(span[6:-1]) if span and outer.ranges else 0
                if start and start >= len(content):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                self.wfile.write(content[start : start + outer.cut] if outer.cut else content[start:])
                outer.cut = 0

            def log_message(self, format: str, *args: object) -> None:
                """Be quiet."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


def archive(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Offers MNIST and CIFAR-10 with the right checksums."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    idx = {f"{name}.gz": gzip.compress(content) for name, content in idx_files().items()}
    server = Server(idx | {"cifar-10-binary.tar.gz": archive(cifar_files())})
    for name in ("mnist", "cifar"):
        source = data._SOURCES[name]
        md5 = {file: hashlib.md5(server.files[file]).hexdigest() for file in source.downloads}
        monkeypatch.setitem(data._SOURCES, name, replace(source, url=server.url, downloads=md5))
    yield server
    server.close()


def in_cache(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()} - {"lock"}


@pytest.mark.parametrize("name", ["mnist", "cifar"])
def test_a_download_happens_once(tmp_path: Path, server: Server, name: str) -> None:
    dataset = load(name)
    asked = len(server.asked)
    assert asked == len(data._SOURCES[name].downloads)
    found = load(name, str(write(tmp_path / "found", FILES[name]())))
    assert torch.equal(dataset.train_x, found.train_x)
    assert torch.equal(load(name).test_x, found.test_x)
    assert len(server.asked) == asked
    assert in_cache(tmp_path) == ({f"{file}.gz" for file in IDX_NAMES} if name == "mnist" else set(CIFAR_NAMES))


def test_two_at_once_download_once(server: Server) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(load, ["cifar", "cifar"])
    assert torch.equal(first.train_x, second.train_x)
    assert len(server.asked) == 1


def test_an_empty_data_root_falls_back_to_the_download(tmp_path: Path, server: Server) -> None:
    assert len(load("mnist", str(tmp_path)).train_x) == N_TRAIN


@pytest.mark.parametrize(("name", "file"), [("mnist", f"{IDX_NAMES[0]}.gz"), ("cifar", "cifar-10-binary.tar.gz")])
def test_a_wrong_checksum_leaves_nothing_behind(tmp_path: Path, server: Server, name: str, file: str) -> None:
    right = server.files[file]
    server.files[file] = right[:-1] + b"?"
    refused(name, "wrong checksum", server.url, "data_root=", name_or_path=name)
    assert in_cache(tmp_path) == set()
    server.files[file] = right
    assert len(load(name).train_x) == N_TRAIN


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path: Path, server: Server) -> None:
    load("mnist")
    (tmp_path / "cache/mnist" / f"{IDX_NAMES[1]}.gz").write_bytes(b"nonsense")
    assert len(load("mnist").train_x) == N_TRAIN
    assert server.asked[-1][0] == f"{IDX_NAMES[1]}.gz"


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_an_interrupted_download_goes_on(tmp_path: Path, server: Server, ranges: bool) -> None:
    server.cut, server.ranges = 20_000, ranges
    refused("cifar", "downloading", server.url, "try again", name_or_path="cifar")
    assert in_cache(tmp_path) == {"cifar-10-binary.tar.gz.part"}
    kept = next((tmp_path / "cache").rglob("*.part")).stat().st_size
    assert kept > 0
    assert len(load("cifar").train_x) == N_TRAIN  # right by its checksum, whether the server resumed or began afresh
    assert server.asked == [("cifar-10-binary.tar.gz", None), ("cifar-10-binary.tar.gz", f"bytes={kept}-")]
    assert in_cache(tmp_path) == set(CIFAR_NAMES)


def test_a_download_killed_after_its_last_byte_is_taken(tmp_path: Path, server: Server) -> None:
    write(tmp_path / "cache/cifar", {"cifar-10-binary.tar.gz.part": server.files["cifar-10-binary.tar.gz"]})
    assert len(load("cifar").train_x) == N_TRAIN


def test_a_part_of_something_else_is_thrown_away(tmp_path: Path, server: Server) -> None:
    write(tmp_path / "cache/cifar", {"cifar-10-binary.tar.gz.part": b"something else"})
    refused("wrong checksum", name_or_path="cifar")
    assert in_cache(tmp_path) == set()
    assert len(load("cifar").train_x) == N_TRAIN


def test_a_file_that_the_server_lacks_is_no_data(tmp_path: Path, server: Server) -> None:
    del server.files["cifar-10-binary.tar.gz"]
    refused("HTTPError", name_or_path="cifar")
    assert in_cache(tmp_path) == set()


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar"])
def test_without_network_the_message_says_which_files_to_put_where(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    refused(*FILES[name](), "data_root=", "127.0.0.1:9", "ConnectionError", name_or_path=name)


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DDVI_CACHE", str(tmp_path / "file"))
    refused(str(tmp_path / "file"), "NotADirectoryError", name_or_path="mnist")


# ---- a user's own arrays ---------------------------------------------------------------------------------------------


def table(n: int = 40, features: int = 3) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(n, features))


def own(tmp_path: Path, **arrays: Any) -> str:
    path = tmp_path / "own.npz"
    np.savez(path, **arrays)
    return str(path)


def rows(x: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(tuple(row) for row in x.flatten(1).tolist())


def test_a_npy_file_is_split_by_the_seed(tmp_path: Path) -> None:
    x, path = table(), tmp_path / "own.npy"
    np.save(path, x)
    first, again, other = (load(str(path), seed=seed) for seed in (0, 0, 1))
    assert (first.name, first.train_x.dtype, first.train_y, first.classes) == ("own", torch.float32, None, ())
    assert (first.train_x.shape, first.test_x.shape, first.maximum) == ((36, 3), (4, 3), None)
    assert rows(torch.cat([first.train_x, first.test_x])) == rows(torch.from_numpy(x).float())  # each of them once
    assert torch.equal(first.test_x, again.test_x)
    assert not torch.equal(first.test_x, other.test_x)
    assert first.fingerprint == {"own.npy": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert "36 training and 4 test examples, 3," in first.describe()


def test_the_test_part_has_every_class_in_proportion(tmp_path: Path) -> None:
    y = np.array([0] * 500 + [1] * 300 + [2] * 190 + [-1] * 10)
    for seed in range(5):
        dataset = load(own(tmp_path, x=table(1000), y=y), seed=seed)
        assert dataset.test_y is not None
        assert (dataset.test_y + 1).bincount().tolist() == [1, 50, 30, 19]


@pytest.mark.parametrize("names", [("x", "y"), ("X", "labels"), ("data", "y")])
def test_the_names_in_a_npz_file(tmp_path: Path, names: tuple[str, str]) -> None:
    dataset = load(own(tmp_path, **{names[0]: table(), names[1]: np.arange(40) % 2, "other": np.zeros(3)}))
    assert dataset.classes == ("0", "1")
    assert len(dataset.train_x) == 36


@pytest.mark.parametrize("kind", [scipy.sparse.csr_matrix, scipy.sparse.csc_array, scipy.sparse.coo_array])
def test_a_sparse_matrix_of_scipys_is_x(tmp_path: Path, kind: Any) -> None:
    x = np.random.default_rng(0).poisson(0.3, (40, 5))
    scipy.sparse.save_npz(tmp_path / "own.npz", kind(x))
    dataset = load(str(tmp_path / "own.npz"))
    assert dataset.train_x.dtype == torch.int64
    assert rows(torch.cat([dataset.train_x, dataset.test_x])) == rows(torch.from_numpy(x))


def test_given_parts_are_kept(tmp_path: Path) -> None:
    x, y = table(50), np.arange(50) % 3
    path = own(tmp_path, x_train=x[:30], x_test=x[30:], y_train=y[:30], y_test=y[30:])
    dataset = load(path, seed=3)
    assert dataset.train_y is not None
    assert torch.equal(dataset.train_x, torch.from_numpy(x[:30]).float())
    assert torch.equal(dataset.test_x, torch.from_numpy(x[30:]).float())
    assert dataset.train_y.tolist() == y[:30].tolist()


@pytest.mark.parametrize(
    ("y", "classes", "indices"),
    [
        ([7, 3, -1, 3], ("3", "7"), [1, 0, -1, 0]),
        ([10, 9, 2, 10], ("2", "9", "10"), [2, 1, 0, 2]),
        (["dog", "cat", "ant", "cat"], ("ant", "cat", "dog"), [2, 1, 0, 1]),
        ([b"dog", b"cat", b"ant", b"cat"], ("ant", "cat", "dog"), [2, 1, 0, 1]),
        ([-1, -1, -1, -1], (), None),
    ],
)
def test_labels_become_indices_of_sorted_classes(
    tmp_path: Path, y: list[Any], classes: tuple[str, ...], indices: list[int] | None
) -> None:
    x = table(4)
    dataset = load(own(tmp_path, x_train=x, y_train=np.array(y), x_test=x, y_test=np.array(y)))
    assert dataset.classes == classes
    assert (dataset.train_y if dataset.train_y is None else dataset.train_y.tolist()) == indices


IMAGES = np.random.default_rng(3).integers(0, 256, (12, 2, 4, 5))


@pytest.mark.parametrize(
    ("x", "dtype", "maximum", "shape"),
    [
        (IMAGES.astype(np.uint8), torch.uint8, 255.0, (2, 4, 5)),
        (IMAGES[:, 0].astype(np.uint8), torch.uint8, 255.0, (1, 4, 5)),
        (IMAGES > 127, torch.uint8, 1.0, (2, 4, 5)),
        ((IMAGES > 127).astype(np.uint8), torch.uint8, 1.0, (2, 4, 5)),
        (IMAGES / 255, torch.float32, 1.0, (2, 4, 5)),
        (IMAGES / 100, torch.float32, None, (2, 4, 5)),
        (IMAGES / 255 - 0.5, torch.float32, None, (2, 4, 5)),
        (IMAGES, torch.int64, None, (2, 4, 5)),
        (IMAGES[:, 0, 0], torch.int64, None, (5,)),
        (IMAGES[:, 0, 0].astype(np.uint8), torch.int64, None, (5,)),
        (IMAGES[:, 0, 0] - 200, torch.float32, None, (5,)),
        (IMAGES[:, 0, 0] > 100, torch.uint8, None, (5,)),
        (IMAGES[:, 0, 0].astype(np.float16), torch.float32, None, (5,)),
        (IMAGES[:, 0, 0].astype(">f8"), torch.float32, None, (5,)),
        (np.asfortranarray(IMAGES[:, 0, 0].astype(">i4")), torch.int64, None, (5,)),
    ],
)
def test_kinds_of_values(
    tmp_path: Path, x: np.ndarray, dtype: torch.dtype, maximum: float | None, shape: tuple[int, ...]
) -> None:
    dataset = load(own(tmp_path, x_train=x, x_test=x))
    assert (dataset.train_x.dtype, dataset.maximum, dataset.event_shape) == (dtype, maximum, shape)
    torch.testing.assert_close(dataset.train_x.double().numpy(), x.reshape(12, *shape).astype("f8"), rtol=1e-6, atol=0)


def with_value(value: float) -> np.ndarray:
    x = table()
    x[5, 1] = x[7, 0] = value
    return x


FAULTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "NaN": ({"x": with_value(np.nan)}, ["x of", "2 NaN or infinite", "row 5 at (1,)"]),
    "infinite": ({"x": with_value(-np.inf)}, ["x of", "2 NaN or infinite", "row 5 at (1,)"]),
    "beyond float32": ({"x": with_value(1e200)}, ["2 NaN or infinite", "as float32", "row 5 at (1,)"]),
    "NaN in the test part": ({"x_train": table(), "x_test": with_value(np.nan)}, ["x_test", "2 NaN"]),
    "empty": ({"x": np.zeros((0, 3))}, ["empty", "(0, 3)"]),
    "no features": ({"x": np.zeros((9, 0))}, ["empty", "(9, 0)"]),
    "empty test part": ({"x_train": table(), "x_test": np.zeros((0, 3))}, ["x_test", "empty"]),
    "one example": ({"x": table(1)}, ["too few examples, 1", "3 or more"]),
    "two examples": ({"x": table(2)}, ["too few examples, 2", "3 or more"]),
    "one training example": ({"x_train": table(1), "x_test": table()}, ["x_train", "too few examples, 1", "2 or more"]),
    "complex": ({"x": table() + 1j}, ["complex128", "real numbers"]),
    "strings": ({"x": table().astype(str)}, ["dtype <U", "real numbers"]),
    "one dimension": ({"x": table()[:, 0]}, ["1 dimensions", "N x features"]),
    "five dimensions": ({"x": np.zeros((5, 1, 2, 3, 4))}, ["5 dimensions", "N x features"]),
    "channels last": ({"x": np.zeros((5, 8, 8, 3))}, ["(5, 8, 8, 3)", "give x.transpose(0, 3, 1, 2)"]),
    "objects": ({"x": np.array([[1, "a"]] * 9, object)}, ["Python objects", "numpy.save"]),
    "lengths": ({"x": table(40), "y": np.zeros(39, int)}, ["y of", "(39,)", "40 examples"]),
    "labels of two dimensions": ({"x": table(40), "y": np.zeros((40, 1), int)}, ["y of", "(40, 1)", "(40,)"]),
    "fractions as labels": ({"x": table(40), "y": np.zeros(40)}, ["y of", "float64", "integers"]),
    "negative label": ({"x": table(3), "y": np.array([0, 1, -2])}, ["label -2 in example 2", "-1"]),
    "other shapes": ({"x_train": table(9, 3), "x_test": table(9, 2)}, ["(9, 3)", "(9, 2)", "alike"]),
    "labels of one part": (
        {"x_train": table(), "x_test": table(), "y_train": np.zeros(40, int)},
        ["y_train int64(40,)", "labels in both"],
    ),
    "kinds of labels": (
        {"x_train": table(2), "x_test": table(2), "y_train": np.zeros(2, int), "y_test": np.array(["a", "b"])},
        ["y_train int64", "y_test <U1", "alike"],
    ),
    "x and parts": ({"x": table(), "x_test": table()}, ["x, x_test", "give x alone"]),
    "bytes": ({"x": table(3), "y": np.array([b"caf\xe9", b"b", b"c"])}, ["y of", "aren't ASCII"]),
    "too close": ({"x": table() + 1.7e9}, ["x of", "around 1.7e+09", "in feature 0", "subtract an offset"]),
    "no x": ({"features": table(), "target": np.zeros(40)}, ["features, target", "neither x nor x_train"]),
    "training part only": ({"x_train": table()}, ["x_train", "neither x nor x_train and x_test"]),
    "nothing": ({}, ["holds nothing"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_arrays_that_cannot_be_used(tmp_path: Path, fault: str) -> None:
    arrays, said = FAULTS[fault]
    refused("own.npz", *said, name_or_path=own(tmp_path, **arrays))


def test_a_feature_constant_within_the_limit_is_refused(tmp_path: Path) -> None:
    x = table()
    x[:25, 1] = 4.0
    path = own(tmp_path, x_train=x, x_test=x)
    check_varied(load(path))
    with pytest.raises(InputError, match=r"1 constant features \(the first is number 1\) in 20 training examples"):
        check_varied(load(path, limit=20))


def test_empty_text_is_no_label(tmp_path: Path) -> None:
    data = load(own(tmp_path, x=table(4), y=np.array(["b", "", "a", ""])))
    assert data.classes == ("a", "b")
    assert data.train_y is not None
    assert data.test_y is not None
    assert sorted([*data.train_y.tolist(), *data.test_y.tolist()]) == [-1, -1, 0, 1]


def test_minus_one_among_text_is_no_label(tmp_path: Path) -> None:
    data = load(own(tmp_path, x=table(4), y=np.array(["b", "-1", "a", "-1"])))
    assert data.classes == ("a", "b")


def test_only_a_test_part_that_a_seed_drew_is_said_to_be(tmp_path: Path) -> None:
    drawn = [load(own(tmp_path, x=table(9))).drawn, load(own(tmp_path, x_train=table(9), x_test=table(9))).drawn]
    assert [*drawn, load("digits").drawn] == [True, False, False]


def test_pixels_may_be_constant(tmp_path: Path) -> None:
    assert load(own(tmp_path, x=np.zeros((5, 1, 2, 2), np.uint8))).event_shape == (1, 2, 2)


@pytest.mark.parametrize("name", ["own.npz", "own.npy"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    refused(f"no file '{path}'", name_or_path=str(path))
    np.savez_compressed(path, x=table(500)) if name == "own.npz" else np.save(path, table(500))
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 20):
        path.write_bytes(whole[:size])
        refused(str(path), "truncated or corrupt", name_or_path=str(path))
    path.write_bytes(b"")
    refused(str(path), "0 bytes", name_or_path=str(path))
    path.write_bytes(b"a,b\n1,2\n")
    refused(str(path), "no .npz or .npy file", name_or_path=str(path))


def test_every_damaged_byte_of_an_archive_is_refused_or_harmless(tmp_path: Path) -> None:
    x = table(12, 2)
    path = Path(own(tmp_path, x=x))
    whole, refusals = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            dataset = load(str(path))
        except InputError:
            refusals += 1
        else:
            assert rows(torch.cat([dataset.train_x, dataset.test_x])) == rows(torch.from_numpy(x).float())
    assert refusals > 192  # at the least, each byte of the values


@pytest.mark.parametrize("flip", [0xFF, 0x01, 0x10])
def test_a_damaged_header_of_an_array_is_refused_or_read(tmp_path: Path, flip: int) -> None:
    path = tmp_path / "own.npy"
    np.save(path, table(12, 2))
    whole = path.read_bytes()
    for place in range(128):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        with contextlib.suppress(InputError):  # anything else is a fault of ours
            load(str(path))


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "own.npy"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "run").encode() + b"'\ntR.")
    refused("no .npz or .npy file", name_or_path=str(path))
    assert not (tmp_path / "run").exists()


def test_other_things_that_exist(tmp_path: Path) -> None:
    csv = tmp_path / "own.csv"
    csv.write_text("1,2\n")
    refused(str(csv), "no .npz or .npy file", name_or_path=str(csv))
    refused(f"no file '{tmp_path}'", name_or_path=str(tmp_path))


# ---- validation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return load(own(tmp_path, x_train=table(41), x_test=table(5)))


@pytest.mark.parametrize("n", [0, 1, 20])
def test_validation_is_disjoint_and_fixed_by_the_seed(dataset: Dataset, n: int) -> None:
    train, validation = split_validation(dataset, n, seed=0)
    assert (len(train), len(validation)) == (41 - n, n)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(41))
    assert torch.equal(split_validation(dataset, n, seed=0)[1], validation)
    assert n == 0 or not torch.equal(split_validation(dataset, n, seed=1)[1], validation)


@pytest.mark.parametrize("n", [-1, 21, 41, 100])
def test_validation_of_more_than_half_is_refused(dataset: Dataset, n: int) -> None:
    with pytest.raises(InputError, match=rf"validation={n} .* 41 training examples: give 0 to 20"):
        split_validation(dataset, n, seed=0)


def test_the_callers_random_state_is_left_alone(dataset: Dataset, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    split_validation(dataset, 5, seed=0)
    load(own(tmp_path, x=table()))
    load("digits")
    assert torch.equal(torch.get_rng_state(), before)


def test_imports_stay_cheap() -> None:
    code = (
        "import sys; import ddvi.catalogue; assert 'torch' not in sys.modules; import ddvi.data; "
        "print(*{'sklearn', 'pooch', 'requests'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("shape", [(9, 8, 4, 4), (9, 2, 3, 3), (9, 10, 1, 1), (9, 2, 64, 3)])
def test_channels_that_come_first_are_left_there(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "own.npy", np.random.default_rng(0).random(shape))
    assert load(str(tmp_path / "own.npy")).train_x.shape[1:] == shape[1:]
