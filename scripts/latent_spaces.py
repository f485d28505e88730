"""Draws the latent spaces of all runs under a folder: a row a prior, a column a method, the prior itself last.

python scripts/latent_spaces.py runs/mnist -o docs/latent_spaces.png [--data-root FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ddvi import data, evaluation, figures, folders, runs
from ddvi.catalogue import PRIORS
from ddvi.errors import InputError
from ddvi.methods import METHODS
from ddvi.randomness import generator


def main() -> int:
    """Find the finished runs, one for each method and prior, and draw them."""
    parser = argparse.ArgumentParser(description="latent spaces of finished runs: a row a prior, a column a method")
    parser.add_argument("root", type=Path, help="a folder with run folders of one data set in it, at any depth")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/latent_spaces.png"))
    parser.add_argument("--data-root", default="", help="folder with the data; by default each run's own")
    parser.add_argument("--points", type=int, default=5000, help="test examples and prior samples a panel")
    arguments = parser.parse_args()
    found = {}
    for config in sorted(arguments.root.rglob(folders.CONFIG), reverse=True):  # of several seeds the first wins
        if (config.parent / folders.WEIGHTS).exists():
            settings = folders.read_settings(config.parent)
            found[settings.prior, settings.method] = config.parent
    if not found:
        raise InputError(f"there is no finished run under {arguments.root}")
    priors = [name for name in PRIORS if any(prior == name for prior, _ in found)]
    methods = [name for name in METHODS if any(method == name for _, method in found)]
    rows, dataset = [], None
    for prior in priors:
        row, prior_z = [], None
        for method in methods:
            if (prior, method) not in found:
                raise InputError(f"there is no finished run of {method} with the prior {prior} under {arguments.root}")
            settings, _, model = runs.load_run(found[prior, method])
            if dataset is None:
                root = arguments.data_root or settings.data_root or None
                dataset = data.load(settings.dataset, root, settings.seed, settings.limit or None)
            labels = None if dataset.test_y is None else dataset.test_y[: arguments.points]
            with runs.arithmetic(settings):
                z = evaluation.latents(model, dataset.test_x[: arguments.points], settings.seed)
                prior_z = model.prior.sample((arguments.points,), generator=generator(settings.seed, "latent spaces"))
            row.append((method, z, labels))
        if prior_z is not None:
            rows.append([*row, ("prior", prior_z, None)])
    figures.save(figures.latent_spaces(rows, [name.replace("_", " ") for name in priors]), arguments.output)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"latent_spaces: {error}")
