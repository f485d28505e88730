"""The command line: `ddvi train`, `evaluate`, `sample`, `list`.

Whatever concerns names, values and run folders is answered before torch is imported.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ddvi._version import __version__
from ddvi.catalogue import DATASETS, LIKELIHOODS, MEASURES, OBJECTIVES, PRIORS
from ddvi.devices import is_first
from ddvi.errors import InputError, TrainingError, check_name
from ddvi.methods import ALIASES, METHODS
from ddvi.settings import FIELDS, Settings, idle, resolve

if TYPE_CHECKING:
    from rich.console import Console

_DEFAULTS = ("digits", "ddvi", "pinwheel")
_SETTING = re.compile(r"([A-Za-z_][A-Za-z_0-9-]*)=(.*)", re.DOTALL)
_USAGE = "give DATASET ALGORITHM PRIOR, for instance 'mnist ddvi pinwheel', or none of them for 'digits ddvi pinwheel'"
_DESCRIPTION = """\
Diffusion models as variational posteriors for latent-variable models.

  ddvi train [DATASET ALGORITHM PRIOR] [key=value ...]   train, evaluate, fill the run folder
  ddvi evaluate RUN [key=value ...]                      evaluate a run folder again
  ddvi sample RUN [-n N] [-o FILE.npz] [seed=N]          draw from a trained model
  ddvi list                                              datasets, methods, priors, settings
"""
_EXAMPLES = """\
examples:
  ddvi train
  ddvi train mnist diff_vae_warmup pinwheel
  ddvi train cifar h_iaf_vae less_noisy_square epochs=20 seed=3 data_root=/data
  ddvi train my.npz vae gaussian latent_size=8
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 training failed, 2 bad input, 130 interrupted.

    Args:
        argv: the words after the program's name; those of the process by default.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(words)
        sys.stdout.flush()
        return status
    except InputError as error:
        return _fail(str(error), 2)
    except (TrainingError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("stopped", 130)


def _run(words: list[str]) -> int:
    if words and not words[0].startswith("-"):
        _check_command(words[0])
    parser = _parser()
    if not words:
        parser.print_help()
        return 0
    arguments, unknown = parser.parse_known_args(words)
    if "words" in arguments:  # argparse leaves what stands behind an option
        arguments.words += [word for word in unknown if not word.startswith("-")]
        unknown = [word for word in unknown if word.startswith("-")]
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
        hint = f"write {name}=…" if name in FIELDS else "settings are written key=value, and 'ddvi list' shows them"
        raise InputError(f"unknown option '{unknown[0]}'; {hint}")
    if "run" not in arguments:
        parser.print_help()
        return 0
    return arguments.run(arguments)


def _check_command(word: str) -> None:
    if word in DATASETS or word.endswith((".npz", ".npy")):
        raise InputError(f"'{word}' is a data set, not a command; did you mean 'ddvi train {word} …'?")
    check_name("command", word, _COMMANDS)


class _Parser(argparse.ArgumentParser):
    """Errors as sentences."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see '{self.prog} --help'")


def _parser() -> argparse.ArgumentParser:
    form: Any = argparse.RawDescriptionHelpFormatter
    options: dict[str, Any] = {"formatter_class": form, "allow_abbrev": False}
    parser = _Parser(
        prog="ddvi", usage="ddvi COMMAND …", description=_DESCRIPTION, epilog=_EXAMPLES, add_help=True, **options
    )
    parser.add_argument("--version", action="version", version=f"ddvi {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")

    train = commands.add_parser(
        "train", usage="ddvi train [DATASET ALGORITHM PRIOR] [key=value …]", help="train and evaluate", **options
    )
    train.description = "Train a model, evaluate it and fill its run folder; 'ddvi list' shows every name and setting."
    train.epilog = _EXAMPLES
    train.add_argument("words", nargs="*", metavar="…", help="three names or none, and settings as key=value")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate", usage="ddvi evaluate RUN [key=value …]", help="evaluate a run folder again", **options
    )
    evaluate.description = "Evaluate a trained run again: evaluation=quick|full, device=…, threads=…, data_root=…"
    evaluate.add_argument("words", nargs="*", metavar="RUN", help="the run folder, and settings as key=value")
    evaluate.set_defaults(run=_evaluate)

    sample = commands.add_parser(
        "sample", usage="ddvi sample RUN [-n N] [-o FILE.npz] [seed=N]", help="draw from a trained model", **options
    )
    sample.description = "Draw from a trained model: an .npz file with x (draws), mean (E[x|z]) and z. Needs no data."
    sample.add_argument("words", nargs="*", metavar="RUN", help="the run folder, and perhaps seed=N")
    sample.add_argument("-n", dest="count", type=int, default=100, metavar="N", help="how many (100)")
    sample.add_argument("-o", dest="output", metavar="FILE.npz", help="the file (RUN/samples.npz)")
    sample.set_defaults(run=_sample)

    show = commands.add_parser("list", help="datasets, methods, priors and settings with their meaning", **options)
    show.set_defaults(run=_list)
    return parser


def _split(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names, and settings by name; of a setting that is given twice the last counts."""
    matches = [_SETTING.fullmatch(word) for word in words]
    names = [word for word, match in zip(words, matches, strict=True) if not match]
    return names, {match[1].replace("-", "_"): match[2] for match in matches if match}


def _one_run(command: str, words: Sequence[str]) -> tuple[Path, dict[str, str]]:
    names, settings = _split(words)
    if len(names) != 1:
        raise InputError(f"'ddvi {command}' takes one run folder, not {len(names)}: ddvi {command} RUN [key=value …]")
    if not Path(names[0]).is_dir():
        raise InputError(f"there is no run folder '{names[0]}'; 'ddvi train' prints where it puts one")
    return Path(names[0]), settings


def _train(arguments: argparse.Namespace) -> int:
    from ddvi import folders, runs

    names, given = _split(arguments.words)
    if len(names) not in (0, 3):
        raise InputError(f"'{' '.join(names)}' {'is' if len(names) == 1 else 'are'} {len(names)} of 3 names: {_USAGE}")
    dataset, method, prior = names or _DEFAULTS
    settings = resolve(dataset, method, prior, given)
    if not is_first(settings):
        return _take_part(settings)
    folders.plan(settings)
    console = _console()
    if without_effect := idle(settings, given):
        console.print(f"without effect, as objective={settings.objective} doesn't read it: {', '.join(without_effect)}")
    watcher = _Watcher(console, settings)
    again = [word for word in arguments.words if not word.startswith(("resume=", "overwrite="))]
    command = shlex.join([*shlex.split(os.environ.get("DDVI_PROGRAM", "ddvi train")), *again, "resume=true"])
    try:
        with watcher:
            metrics = runs.train(settings, watcher)
    except KeyboardInterrupt:
        return _fail(f"stopped {watcher.place}; go on with: {command}", 130)
    except Exception as error:
        from ddvi.training import Interrupted

        if not isinstance(error, Interrupted):
            raise
        return _fail(f"stopped {watcher.place}; go on with: {command}", 130)
    _print_metrics(console, metrics, settings.folder)
    return 0


def _take_part(settings: Settings) -> int:
    """Train as one of several processes that isn't the first: that one shows, prints and fails for all of them."""
    from ddvi import runs

    try:
        runs.train(settings)
    except (InputError, TrainingError, KeyboardInterrupt):
        pass
    except Exception as error:
        from ddvi.training import Interrupted

        if not isinstance(error, Interrupted):
            raise
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from ddvi import folders, runs

    folder, given = _one_run("evaluate", arguments.words)
    settings = folders.read_settings(folder)
    for name in given:
        check_name("setting of an evaluation", name, sorted(runs.FREE_ON_EVALUATION))
    console = _console()
    with _Watcher(console, settings) as watcher:
        metrics = runs.evaluate_run(folder, given, watcher)
    _print_metrics(console, metrics, folder)
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    folder, given = _one_run("sample", arguments.words)
    for name in given:
        check_name("setting of sampling", name, ["seed"])
    from ddvi import folders, runs
    from ddvi.settings import convert

    seed = convert("seed", given.get("seed", 0))
    if arguments.count < 1:
        raise InputError(f"-n {arguments.count} is not at least 1")
    output = Path(arguments.output or folder / "samples.npz")
    if not output.absolute().parent.is_dir():
        raise InputError(f"the folder of {output} doesn't exist; make it, or give another file with -o")
    folders.read_settings(folder)
    draws = runs.sample(folder, arguments.count, seed)
    import numpy as np

    from ddvi.files import write_aside

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, x=draws["x"].numpy(), mean=draws["mean"].numpy(), z=draws["z"].numpy())

    write_aside(output, write)
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in draws.items())
    print(f"{output}: {shapes}")
    return 0


def _list(_: argparse.Namespace) -> int:
    from rich.table import Table

    console = _console()
    methods = {
        name: method.description + "".join(f" (also as {alias})" for alias, of in ALIASES.items() if of == name)
        for name, method in METHODS.items()
    } | {"METHOD_semi": "any of them, learning from n_labels labels too, as in 'mnist_semi vae_semi pinwheel'"}
    datasets = DATASETS | {
        "DATASET_semi": "any of them, for semi-supervised learning: of the labels n_labels are seen",
        "FILE.npz, FILE.npy": "your own: x, or x_train and x_test; perhaps labels y, -1 where unknown",
    }
    groups = {
        "Datasets": datasets,
        "Methods": methods,
        "Priors": {name: prior.description for name, prior in PRIORS.items()},
    }
    for title, lines in (groups | {"Objectives": OBJECTIVES, "Likelihoods": LIKELIHOODS}).items():
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
        )
        table.add_column(width=21, style="cyan", no_wrap=True)
        table.add_column()
        for name, meaning in lines.items():
            table.add_row(name, meaning)
        console.print(table)
        console.print()
    table = Table(title="Settings, as key=value", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("name", width=18, style="cyan", no_wrap=True)
    table.add_column("default", width=9, style="magenta", overflow="fold")
    table.add_column("meaning")
    for name, field in FIELDS.items():
        if name in ("dataset", "method", "prior"):
            continue
        choices = field.metadata["choices"]
        short = f" ({', '.join(choices)})" if choices and name not in ("objective", "likelihood") else ""
        default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        table.add_row(name, default, field.metadata["meaning"] + short)
    console.print(table)
    console.print("\nSome data sets, methods and preset=paper have defaults of their own; config.yaml holds them all.")
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "sample": _sample,
    "list": _list,
}


class _Watcher:
    """Shows a training: one live line on a terminal, else a plain line for about every tenth of the epochs."""

    def __init__(self, console: Console, settings: Settings) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        self.console = console
        self.total = settings.epochs
        self.place = "before training"
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=12),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[losses]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=console,
            transient=True,
            expand=True,
            disable=not console.is_terminal,
        )
        fields = {"epoch": 0, "epochs": self.total, "rate": "", "losses": ""}
        self.task = self.progress.add_task("", total=None, start=False, **fields)
        self.first = True

    def __enter__(self) -> _Watcher:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, epoch: int, step: int, steps: int) -> None:
        """A step of an epoch (from 0) is over; see `training.Listener`."""
        self.place = f"at epoch {epoch + 1} of {self.total}"
        done = epoch * steps + step
        if self.first:
            self.first = False
            self.progress.update(self.task, total=self.total * steps, completed=done)
            self.progress.start_task(self.task)
        self.progress.update(self.task, completed=done, epoch=epoch + 1)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is over."""
        leave_out = ("epoch", "skipped", "seconds", "examples_per_second")
        losses = " ".join(f"{_short(name)} {value:.2f}" for name, value in row.items() if name not in leave_out)
        rate = f"{row['examples_per_second']:,.0f}/s"
        self.progress.update(self.task, losses=losses, rate=rate)
        epoch = int(row["epoch"])
        tenth = epoch * 10 // self.total > (epoch - 1) * 10 // self.total
        if not self.console.is_terminal and (tenth or epoch == 1):
            self.console.print(f"epoch {epoch}/{self.total}  {rate}  {losses}", soft_wrap=True)

    def message(self, text: str) -> None:
        """Something that the user should know."""
        evaluating = text.startswith("evaluating")
        if evaluating:
            self.place = "while evaluating"
            self.progress.update(self.task, losses=text)
        if not (evaluating and self.console.is_terminal):
            self.console.print(text, soft_wrap=True)


def _short(name: str) -> str:
    """A term's name for the live line."""
    return "valid." if name == "validation_bound" else name if len(name) < 8 else f"{name[:5]}."


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False)


def _print_metrics(console: Console, metrics: Mapping[str, Any], folder: Path) -> None:
    """The closing table."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("measure", style="cyan", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("± s.e.", justify="right", no_wrap=True)
    table.add_column("better", no_wrap=True)
    table.add_column("meaning")
    for name, (meaning, better) in MEASURES.items():
        if isinstance(value := metrics.get(name), int | float):
            error = metrics.get(f"{name}_standard_error")
            table.add_row(name, f"{value:.3f}", "" if error is None else f"{error:.3f}", better, meaning)
    console.print(table)
    if metrics.get("evaluation") == "quick":
        console.print("evaluation=quick: capped examples, draws and nodes; evaluation=full is the measure to report")
    console.print(f"run folder: {folder}", soft_wrap=True)


def _fail(sentence: str, status: int) -> int:
    print(f"ddvi: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
