"""Prints how well every method learns with few labels, beside a classifier that sees the labels alone.

python benchmarks/semi_supervised.py --data-root FOLDER [--dataset mnist] [--methods vae ddvi] [--priors pinwheel]
    [--seeds 3] [--runs runs/semi_supervised] [--report FILE] [--search]
    [--held-out 0.33] [key=value…]

A run is what `ddvi train DATASET_semi METHOD_semi PRIOR` does with `SETTINGS` and those at the end of the command; runs
that are finished are read, interrupted ones go on, so several processes may share the work. The classifier is the same
encoder with a linear layer, trained on exactly the labelled examples that the runs of its seed see. Accuracy is that of
argmax q(l|x) on the whole test set; the exact log-likelihood is on its first 1,000 examples.
`--search` trains with a part of the seed's labels and prints accuracy and log p(x) on the rest, never on test data:
with `--held-out 0.95` on 950 of 1,000, to find settings for 50.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddvi import catalogue, data, evaluation, runs
from ddvi.arithmetic import processor
from ddvi.composition import build_model, make_schedule, observe
from ddvi.evidence import exact_log_likelihood
from ddvi.folders import read_config
from ddvi.labels import choose_labelled
from ddvi.objectives.base import Labelled
from ddvi.preprocessing import Preprocessing
from ddvi.randomness import preserved, seeded
from ddvi.settings import SEMI, Settings, resolve
from ddvi.tables import interval
from ddvi.training import Trainer

METHODS = ("vae", "iaf_vae", "aae", "ddvi")
PRIORS = ("pinwheel", "swiss_roll", "less_noisy_square")
SETTINGS: dict[str, dict[str, str]] = {
    "vae": {"epochs": "4", "lr": "3e-3"},
    "iaf_vae": {"epochs": "4", "lr": "3e-3"},
    "aae": {"epochs": "8", "lr": "4e-3"},
    "ddvi": {"epochs": "4", "lr": "3e-3"},
}
"""Of the runs: learning rates for so short a training, from a few runs on held-out labels of another seed; the
adversarial autoencoder, whose steps are the cheapest, needs more of them and takes as long as the others."""
LABELS_ALONE = "labels_alone"
"""The classifier's name beside those of the methods."""
CLASSIFIER = {"lr": 3e-3, "steps": 800.0, "dropout": 0.5}
"""Chosen by `--search`, as the methods' settings were."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a run sees of the training data.

    Args:
        dataset: all of it.
        x: raw images without the validation part.
        labelled: of these, those with a label that may be seen.
        held_out: labelled ones that a search doesn't train with; none otherwise.
    """

    dataset: data.Dataset
    x: Tensor
    labelled: Labelled
    held_out: Labelled

    @classmethod
    def of(cls, settings: Settings, share: float = 0.0) -> Examples:
        """As `runs.train` draws them; `share` of the labels is held out."""
        dataset = data.load(settings.dataset, settings.data_root or None, settings.seed, settings.limit or None)
        rows, _ = data.split_validation(dataset, settings.validation, settings.seed)
        assert dataset.train_y is not None
        x, labels, classes = dataset.train_x[rows], dataset.train_y[rows], len(dataset.classes)
        shown = choose_labelled(labels, settings.n_labels, classes, settings.seed)
        kept = torch.zeros(len(shown), dtype=torch.bool)
        count = round(settings.n_labels * (1 - share))
        kept[choose_labelled(labels[shown], count, classes, settings.seed + 1)] = True
        parts = (Labelled(x[part], labels[part]) for part in (shown[kept], shown[~kept]))
        return cls(dataset, x, *parts)


def accuracy(classify: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> float:
    """Share of prepared examples whose most probable label is right."""
    with torch.no_grad():
        guess = torch.cat([classify(part).argmax(-1) for part in x.split(1000)])
    return (guess == labels).double().mean().item()


def train_classifier(examples: Examples, settings: Settings, lr: float, steps: float, dropout: float) -> nn.Module:
    """The encoder and a linear layer, trained on labelled examples alone; `dropout` where the encoder is dense."""
    labelled = examples.labelled
    settings = dataclasses.replace(settings, dropout=dropout, latent_size=2)  # which nothing here depends on
    with seeded(settings.seed, "labels alone"):
        model = build_model(settings, observe(examples.dataset, settings), examples.x)
        encoder, prepare = model.posterior.encoder, model.preprocessing
        network = nn.Sequential(encoder, nn.Linear(settings.hidden_size, len(examples.dataset.classes)))
        optimizer = torch.optim.Adam(network.parameters(), lr)
        for step in range(int(steps)):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            rows = torch.randint(len(labelled.label), (settings.batch_size,))
            loss = nn.functional.cross_entropy(network(prepare(labelled.x[rows])), labelled.label[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def preprocessing(examples: Examples, settings: Settings) -> Preprocessing:
    """From images as stored to what the encoder sees."""
    with preserved():
        return build_model(settings, observe(examples.dataset, settings), examples.x).preprocessing


def measure(settings: Settings, folder: Path, alone: bool) -> dict[str, Any]:
    """What a run, or the classifier, is worth; kept in `folder` once it is known."""
    file = folder / "study.json"
    if file.exists():
        if not alone:
            runs.train(settings)  # refuses a folder of other settings
        return dict(json.loads(file.read_text()))
    started = time.monotonic()
    if not alone:
        metrics = runs.train(settings)
        _, _, model = runs.load_run(folder)
        dataset, classify = Examples.of(settings).dataset, model.classify
        x = evaluation.prepared(model.preprocessing, dataset.test_x)
        found: dict[str, Any] = {
            "log_likelihood": metrics["log_likelihood"],
            "log_likelihood_examples": metrics["test_examples"],
            "calibration_error": metrics["calibration_error"],
            "knn_accuracy": metrics["knn_accuracy"],
            "seconds": metrics["seconds"]["training"],
            "epochs": metrics["epochs"],
            "commit": read_config(folder)["git_commit"],
        }
    else:
        examples = Examples.of(settings)
        dataset, x = examples.dataset, evaluation.prepared(preprocessing(examples, settings), examples.dataset.test_x)
        classify = train_classifier(examples, settings, **CLASSIFIER)
        found = {"seconds": time.monotonic() - started}
    assert dataset.test_y is not None
    with seeded(settings.seed, "accuracy"):
        found["accuracy"] = accuracy(classify, x, dataset.test_y)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=2) + "\n")
    return found


def search(settings: Settings, options: dict[str, float], alone: bool, share: float) -> str:
    """Accuracy on a share of the labels after a training without them, and log p(x) of these examples."""
    examples = Examples.of(settings, share)
    held_out = examples.held_out
    model = None
    if alone:
        classify: Callable[[Tensor], Tensor] = train_classifier(examples, settings, **(CLASSIFIER | options))
    else:
        with seeded(settings.seed, "model"):
            model = build_model(settings, observe(examples.dataset, settings), examples.x)
        Trainer(model, make_schedule(settings), examples.x, labelled=examples.labelled).fit()
        classify = model.classify
    with seeded(settings.seed, "held out"):
        x = preprocessing(examples, settings)(held_out.x)
        found = f"accuracy {accuracy(classify, x, held_out.label):.4f}"
        if model is None or settings.latent_size != 2:
            return found
        return f"{found}, log p(x) {exact_log_likelihood(model.prior, model.likelihood, x).log_likelihood.mean():.1f}"


def cell(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """Mean and half width of the 95% t-interval."""
    if not values:
        return ""
    mean, half_width = interval([scale * value for value in values])
    return f"{mean:.{digits}f}" + (f" ± {half_width:.{digits}f}" if len(values) > 1 else "")


def table(found: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """Markdown: a row for each prior and method."""
    lines = [
        "| prior | method | seeds | accuracy, % | log p(x), nats | 20-NN, % | calibration error | training, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    columns = (("accuracy", 2, 100), ("log_likelihood", 1, 1), ("knn_accuracy", 1, 100), ("calibration_error", 3, 1))
    for (prior, method), results in found.items():
        cells = [
            cell([result[name] for result in results if name in result], digits, scale)
            for name, digits, scale in columns
        ]
        seconds = f"{statistics.mean(result['seconds'] for result in results):.0f}"
        lines.append(f"| {' | '.join([prior, method, str(len(results)), *cells, seconds])} |")
    return "\n".join(lines) + "\n"


def differences(found: dict[tuple[str, str], list[dict[str, Any]]], prior: str) -> str:
    """Paired differences in accuracy on the prior with several seeds: is it more than chance?"""
    lines = []
    ours = {result["seed"]: result["accuracy"] for result in found.get((prior, "ddvi"), [])}
    for (where, method), results in found.items():
        theirs = {result["seed"]: result["accuracy"] for result in results}
        if method != "ddvi" and where in (prior, "") and len(both := sorted(ours.keys() & theirs.keys())) > 1:
            paired = [ours[seed] - theirs[seed] for seed in both]
            lines.append(f"* ddvi − {method}: {cell(paired, 2, 100)} points")
    if not lines:
        return ""
    return "\n".join(["", f"Paired differences in accuracy on {prior}, over seeds:", "", *lines]) + "\n"


def machine() -> str:
    return (
        f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} thread(s) a run"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="", help="folder with MNIST; downloaded into a cache if left out")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--methods", nargs="+", default=[LABELS_ALONE, *METHODS], choices=[LABELS_ALONE, *METHODS])
    about = "the first with all seeds, others with one"
    parser.add_argument("--priors", nargs="+", default=list(PRIORS), choices=catalogue.PRIORS, help=about)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/semi_supervised"))
    parser.add_argument("--report", type=Path, help="write the table as Markdown")
    parser.add_argument("--finished", action="store_true", help="only runs that are finished")
    parser.add_argument("--search", action="store_true", help="accuracy on held-out labels instead, of what is given")
    parser.add_argument("--held-out", type=float, default=1 / 3, help="share of the labels that a search holds out")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the runs; of labels_alone in a search")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    given = dict(item.split("=", 1) for item in arguments.settings)
    common = {"data_root": arguments.data_root, "evaluation": "quick", "resume": "true"}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    missing: list[str] = []
    for index, prior in enumerate(arguments.priors):
        for method in arguments.methods:
            alone = method == LABELS_ALONE
            if alone and index > 0:
                continue
            for seed in range(arguments.first_seed, arguments.first_seed + (arguments.seeds if index == 0 else 1)):
                own = {} if alone else SETTINGS[method]
                overrides = common | {"seed": str(seed)} | own | ({} if alone and arguments.search else given)
                settings = resolve(arguments.dataset + SEMI, ("ddvi" if alone else method) + SEMI, prior, overrides)
                if settings.threads:
                    torch.set_num_threads(settings.threads)
                folder = (
                    arguments.runs
                    / f"{arguments.dataset}_{settings.n_labels}_labels"
                    / method
                    / ("" if alone else prior)
                    / f"seed{seed}"
                )
                settings = dataclasses.replace(settings, out=str(folder))
                if arguments.search:
                    options = {name: float(value) for name, value in given.items()} if alone else {}
                    result = search(settings, options, alone, arguments.held_out)
                    print(method, prior, seed, *arguments.settings, result, flush=True)
                    continue
                if arguments.finished and not (folder / "study.json").exists():
                    missing.append(" ".join([method, *([] if alone else [prior]), f"seed {seed}"]))
                    continue
                measured = measure(settings, folder, alone) | {"seed": seed}
                print(method, prior, seed, json.dumps(measured), file=sys.stderr, flush=True)
                found.setdefault(("" if alone else prior, method), []).append(measured)
    if found:
        text = table(found) + differences(found, arguments.priors[0])
        if missing:
            text += f"\nIncomplete, not run yet: {', '.join(missing)}.\n"
        command = shlex.join(["python", "benchmarks/semi_supervised.py", *(sys.argv[1:] if argv is None else argv)])
        commits = sorted(
            {str(result["commit"]) for results in found.values() for result in results if "commit" in result}
        )
        text += f"\n`{command}`, commit {', '.join(commits)}\n\n{machine()}\n"
        print(text)
        if arguments.report:
            arguments.report.parent.mkdir(parents=True, exist_ok=True)
            arguments.report.write_text(text)


if __name__ == "__main__":
    main()
