"""New data through a trained model: a row each of latents, bounds and class probabilities, streamed into a table.

    z ~ q(z | x),    elbo = E_q[ log w ],    iw_bound = log 1/K Σ_k w_k ≤ log p_θ(x),    q(l | x)

Rows are worked on in batches of one size, each with random numbers of its own, so equal seeds give equal tables. A file
is read as it comes, a `.npy` file never whole. The top imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddvi import folders
from ddvi.catalogue import DATASETS
from ddvi.errors import InputError, check_name
from ddvi.files import write_aside

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ddvi.composition import Observations
    from ddvi.model import LatentVariableModel

SUFFIXES = (".csv", ".npy", ".parquet")
_ROWS = 500
_DRAWS_AT_ONCE = 10_000
_SAMPLES = 10


def check_output(path: Path) -> None:
    """Refuse a file whose form isn't known, or whose writer isn't installed."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"'{path}' ends in none of {', '.join(SUFFIXES)}: its ending says the form of the table")
    if path.suffix == ".parquet" and not find_spec("pyarrow"):
        raise InputError(f"'{path}' needs a package that isn't installed: pip install 'ddvi[parquet]', or write a .csv")


def check_source(data: str) -> None:
    """Refuse what is neither a data set nor a file."""
    if data in DATASETS:
        return
    if not data.endswith((".npz", ".npy")):
        check_name("dataset", data, DATASETS, "give the path of a .npz or .npy file")
    if not Path(data).expanduser().is_file():
        raise InputError(f"there is no file '{data}': give the path of a file that exists")


def embed(
    folder: Path, data: str, output: Path, given: Mapping[str, Any], report: Callable[[int, int], None] | None = None
) -> tuple[list[str], int]:
    """Write a table of what a run makes of data, in the data's order.

    Args:
        folder: the run folder.
        data: a `.npz` or `.npy` file, all of it; or a data set's name, for its test part.
        output: the table, of the form that its ending says; `.npy` holds the columns without their names.
        given: any of seed, samples (K), data_root, device, threads.
        report: told how many of how many rows are done.

    Returns:
        The columns' names and the number of rows.

    Raises:
        InputError: whatever can't be used.
    """
    import torch

    from ddvi import checkpoint, runs
    from ddvi.devices import make_fabric
    from ddvi.randomness import seeded

    settings, observations, model = runs.load_run(folder)
    changed = {name: given[name] for name in ("device", "threads", "data_root") if name in given}
    settings = dataclasses.replace(settings, **changed)
    facts = checkpoint.load(folder / folders.WEIGHTS)[1]
    classes = facts.get("classes") or [str(label) for label in range(model.prior.parts or 0)]
    seed, samples = given.get("seed", 0), given.get("samples", _SAMPLES)
    names = columns(model, settings.semi_supervised, classes)
    count, batches = _open(data, settings.data_root or None, settings.seed)

    def tables() -> Iterator[np.ndarray]:
        done = 0
        for number, batch in enumerate(batches):
            raw = make.to_device(conform(batch, observations, data, done))
            with seeded(seed, "embed", number), torch.no_grad():
                yield _table(model, raw, settings.semi_supervised, samples).cpu().numpy()
            done += len(raw)
            if report:
                report(done, count)

    with runs.arithmetic(settings):
        make = make_fabric(settings)
        make.to_device(model)
        kind = "float64" if settings.precision == "64" else "float32"
        write_aside(output, lambda temporary: _WRITERS[output.suffix](temporary, tables(), names, count, kind))
    return names, count


def columns(model: LatentVariableModel, semi_supervised: bool, classes: Sequence[str]) -> list[str]:
    """What the table holds: latents, bounds where the posterior has a density, probabilities where it knows labels."""
    bounds = ["elbo", "iw_bound"] if model.posterior.has_density else []
    probabilities = [f"p({name})" for name in classes] if semi_supervised else []
    return [*(f"z{i + 1}" for i in range(model.posterior.latent_size)), *bounds, *probabilities]


def _table(model: LatentVariableModel, raw: Tensor, semi_supervised: bool, samples: int) -> Tensor:
    """The columns of raw examples (B, *event): (B, columns)."""
    import torch

    from ddvi import evaluation

    x = model.preprocessing(raw)
    parts = [model.latent(x)]
    if model.posterior.has_density:
        pieces = x.split(max(1, _DRAWS_AT_ONCE // (samples * model.summed)))
        elbo = torch.cat([model.log_weights(piece, samples).mean(0) for piece in pieces])
        bounds = torch.stack([elbo, evaluation.importance_weighted_bound(model, x, samples).to(elbo)], 1)
        parts.append(bounds - model.preprocessing.log_volume)
    if semi_supervised:
        parts.append(model.classify(x).exp())
    return torch.cat(parts, 1)


def _open(data: str, data_root: str | None, seed: int) -> tuple[int, Iterator[np.ndarray]]:
    """How many examples there are, and batches of them."""
    import numpy as np

    from ddvi import data as sets

    if data in DATASETS:
        arrays = [sets.load(data, data_root, seed).test_x.numpy()]
    elif data.endswith(".npy"):
        try:
            arrays = [np.load(Path(data).expanduser(), mmap_mode="r", allow_pickle=False)]
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"'{data}' can't be read ({error}): save numbers with numpy.save(file, x)") from None
    else:
        found = sets.read_numpy(Path(data).expanduser(), {})
        arrays = [found["x"]] if "x" in found else [found["x_train"], found["x_test"]]
    for array in arrays:
        if array.ndim < 2:
            raise InputError(
                f"'{data}' has shape {array.shape}: make it N x features, or N x channels x height x width"
            )
    count = sum(map(len, arrays))
    if not count:
        raise InputError(f"'{data}' holds no examples: give at least one")
    return count, (array[start : start + _ROWS] for array in arrays for start in range(0, len(array), _ROWS))


def conform(batch: np.ndarray, observations: Observations, name: str, first: int) -> Tensor:
    """A batch as the tensor that the model's preprocessing takes.

    Raises:
        InputError: examples of another shape, or values that the model's data can't have.
    """
    import numpy as np
    import torch

    from ddvi.data import check_values

    where = f"examples {first + 1} to {first + len(batch)} of '{name}'"
    batch = check_values(where, np.asarray(batch))
    if batch.shape[1:] != tuple(observations.event_shape):
        raise InputError(
            f"'{name}' holds examples of shape {batch.shape[1:]}, but the run was trained on"
            f" {tuple(observations.event_shape)}; give data of that shape"
        )
    top = _top(observations)
    whole = observations.preprocessing in ("dequantise", "as_is") or (
        observations.preprocessing == "binarise" and observations.maximum > 1
    )
    low, high = float(batch.min()), float(batch.max())
    outside = top is not None and (low < 0 or high > top)
    if outside or (whole and (batch % 1 != 0).any()):
        kind = "whole numbers" if whole else "values"
        raise InputError(
            f"{where} lie between {low:g} and {high:g}, but the run was trained on {kind} from 0 to {top:g}; scale them"
            " alike"
        )
    if batch.dtype.kind in "biu":
        return torch.from_numpy(batch.astype(np.int64))
    return torch.from_numpy(batch.astype(np.float64)).to(torch.get_default_dtype())


def _top(observations: Observations) -> float | None:
    """The largest value that the model's data can have, the least being 0; None where any number will do."""
    if observations.preprocessing in ("binarise", "dequantise"):
        return observations.maximum
    counts = dict.fromkeys(("poisson", "negative_binomial"), float("inf"))
    return {"bernoulli": 1.0, "categorical": observations.categories - 1.0, **counts}.get(observations.likelihood)


def _write_csv(path: Path, tables: Iterator[np.ndarray], names: Sequence[str], count: int, kind: str) -> None:
    import csv

    digits = 17 if kind == "float64" else 9
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for table in tables:
            writer.writerows([f"{value:.{digits}g}" for value in row] for row in table.tolist())


def _write_npy(path: Path, tables: Iterator[np.ndarray], names: Sequence[str], count: int, kind: str) -> None:
    from numpy.lib.format import open_memmap

    whole, done = open_memmap(path, "w+", kind, (count, len(names))), 0
    for table in tables:
        whole[done : done + len(table)] = table
        done += len(table)
    whole.flush()


def _write_parquet(path: Path, tables: Iterator[np.ndarray], names: Sequence[str], count: int, kind: str) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([(name, pyarrow.from_numpy_dtype(kind)) for name in names])
    with parquet.ParquetWriter(path, schema) as writer:
        for table in tables:
            arrays = [pyarrow.array(column.astype(kind)) for column in table.T]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


_WRITERS: dict[str, Callable[[Path, Iterator[np.ndarray], Sequence[str], int, str], None]] = {
    ".csv": _write_csv,
    ".npy": _write_npy,
    ".parquet": _write_parquet,
}
