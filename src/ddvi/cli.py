"""The command line: `ddvi train`, `evaluate`, `report`, `compare`, `sample`, `embed`, `study`, `tables`, `list`.

Whatever concerns names, values and run folders is answered before torch is imported.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ddvi._version import __version__
from ddvi.catalogue import DATASETS, LIKELIHOODS, OBJECTIVES, PRIORS
from ddvi.devices import is_first
from ddvi.errors import InputError, TrainingError, check_name
from ddvi.methods import ALIASES, METHODS
from ddvi.settings import FIELDS, Settings, idle, resolve

_DEFAULTS = ("digits", "ddvi", "pinwheel")
_SETTING = re.compile(r"([A-Za-z_][A-Za-z_0-9-]*)=(.*)", re.DOTALL)
_USAGE = "give DATASET ALGORITHM PRIOR, for instance 'mnist ddvi pinwheel', or none of them for 'digits ddvi pinwheel'"
_DESCRIPTION = """\
Diffusion models as variational posteriors for latent-variable models.

  ddvi train [DATASET ALGORITHM PRIOR] [key=value ...]   train, evaluate, fill the run folder
  ddvi evaluate RUN [key=value ...]                      evaluate a run folder again
  ddvi report RUN [RUN ...] [out=FILE.html]              a page on a run, or on several side by side
  ddvi compare RUN RUN [...]                             their measures side by side, here
  ddvi sample RUN [-n N] [-o FILE.npz] [seed=N]          draw from a trained model
  ddvi embed RUN DATA [-o FILE.csv] [seed=N]             latents, bounds, class probabilities of new data
  ddvi study STUDY | DATASETS METHODS PRIORS [key=…]     run a grid, a comma between values; then tables
  ddvi tables FOLDER [-o FOLDER]                         tables and pictures of finished runs
  ddvi list                                              datasets, methods, priors, settings
"""
_STUDY = "STUDY | DATASETS METHODS PRIORS [key=value,value …]"
_STUDY_DESCRIPTION = """\
Train every member of a grid, skip what is finished, go on with what was cut off, then make tables.

  ddvi study mnist                                          a stored study, or FILE.yaml
  ddvi study digits vae,ddvi pinwheel seed=0,1,2 out=first  a grid of your own
  … lr=1e-3,2e-3 ddvi.lr=5e-4                               for all; for one method, prior or data set
  … launcher=local|ray|slurm workers=N threads=N retries=N  where, and how
  … hydra.launcher.partition=gpu                            what Hydra's launcher is told
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an encoding without a sign of ours is no reason to end
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
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", prog="ddvi")

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

    embed = commands.add_parser(
        "embed", usage="ddvi embed RUN DATA [-o FILE] [key=value …]", help="latents of new data", **options
    )
    embed.description = (
        "Latents, bounds on log p(x) and, of a run with labels, class probabilities: of all of a .npz or .npy file, or"
        " of a data set's test part; seed=…, samples=K (10), data_root=…, device=…, threads=…"
    )
    embed.add_argument("words", nargs="*", metavar="RUN DATA", help="the run folder, the data, settings as key=value")
    embed.add_argument("-o", dest="output", metavar="FILE", help="a .csv, .npy or .parquet file (RUN/latents.csv)")
    embed.set_defaults(run=_embed)

    report = commands.add_parser(
        "report", usage="ddvi report RUN [RUN …] [out=FILE]", help="a page on one run or several", **options
    )
    report.description = "One HTML file that opens from disk: measures, latent space, posteriors, samples; data_root=…"
    report.add_argument(
        "words", nargs="*", metavar="RUN", help="run folders; out=FILE (report.html where they all are)"
    )
    report.set_defaults(run=_report)

    compare = commands.add_parser("compare", usage="ddvi compare RUN RUN […]", help="runs side by side", **options)
    compare.description = "The measures of finished runs side by side, the best in bold."
    compare.add_argument("words", nargs="*", metavar="RUN", help="run folders")
    compare.set_defaults(run=_compare)

    study = commands.add_parser("study", usage=f"ddvi study {_STUDY}", help="run a grid and make its tables", **options)
    study.description = _STUDY_DESCRIPTION
    study.add_argument("words", nargs="*", metavar="…", help="a stored study or three names, and settings as key=value")
    study.set_defaults(run=_study)

    tables = commands.add_parser("tables", usage="ddvi tables FOLDER [-o FOLDER]", help="tables of runs", **options)
    tables.description = "Tables (Markdown, CSV, LaTeX) and latent spaces of the finished runs in a folder; data_root=…"
    tables.add_argument("words", nargs="*", metavar="FOLDER", help="with run folders in it, at any depth")
    tables.add_argument("-o", dest="output", metavar="FOLDER", help="where they go (FOLDER/tables)")
    tables.set_defaults(run=_tables)

    show = commands.add_parser("list", help="datasets, methods, priors and settings with their meaning", **options)
    show.set_defaults(run=_list)
    return parser


def _split(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names, paths that exist among them, and settings by name; of a setting that is given twice the last counts."""
    matches = [None if os.path.exists(word) else _SETTING.fullmatch(word) for word in words]
    names = [word for word, match in zip(words, matches, strict=True) if not match]
    return names, {match[1].replace("-", "_"): match[2] for match in matches if match}


def _one_folder(command: str, words: Sequence[str], kind: str = "run folder") -> tuple[Path, dict[str, str]]:
    names, settings = _split(words)
    if len(names) != 1:
        raise InputError(f"'ddvi {command}' takes one {kind}, not {len(names)}; see 'ddvi {command} --help'")
    if not Path(names[0]).is_dir():
        raise InputError(f"there is no {kind} '{names[0]}'; 'ddvi train' prints where it puts one")
    return Path(names[0]), settings


def _train(arguments: argparse.Namespace) -> int:
    from ddvi import folders, progress, runs

    names, given = _split(arguments.words)
    if len(names) not in (0, 3):
        raise InputError(f"'{' '.join(names)}' {'is' if len(names) == 1 else 'are'} {len(names)} of 3 names: {_USAGE}")
    dataset, method, prior = names or _DEFAULTS
    settings = resolve(dataset, method, prior, given)
    if not is_first(settings):
        return _take_part(settings)
    folders.plan(settings)
    console = progress.console()
    if without_effect := idle(settings, given):
        what = f"{settings.method} by {settings.objective}"
        console.print(f"without effect, as {what} doesn't read it: {', '.join(without_effect)}")
    watcher = progress.Watcher(console, settings)
    again = [word for word in arguments.words if not word.startswith(("resume=", "overwrite="))]
    program = [named] if (named := os.environ.get("DDVI_PROGRAM")) else ["ddvi", "train"]
    command = shlex.join([*program, *again, "resume=true"])
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
    progress.print_metrics(console, metrics, settings.folder)
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
    from ddvi import folders, progress, runs

    folder, given = _one_folder("evaluate", arguments.words)
    settings = folders.read_settings(folder)
    for name in given:
        check_name("setting of an evaluation", name, sorted(runs.FREE_ON_EVALUATION))
    console = progress.console()
    with progress.Watcher(console, settings) as watcher:
        metrics = runs.evaluate_run(folder, given, watcher)
    progress.print_metrics(console, metrics, folder)
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from ddvi import commands

    return commands.sample(*_one_folder("sample", arguments.words), arguments)


def _embed(arguments: argparse.Namespace) -> int:
    from ddvi import commands

    return commands.embed(*_split(arguments.words), arguments.output)


def _report(arguments: argparse.Namespace) -> int:
    from ddvi import commands

    return commands.report(*_split(arguments.words))


def _compare(arguments: argparse.Namespace) -> int:
    from ddvi import commands

    return commands.compare(*_split(arguments.words))


def _study(arguments: argparse.Namespace) -> int:
    from ddvi import study

    found = study.read(arguments.words)
    study.check_launcher(found)
    left = study.left(found)
    study.note_command(found, shlex.join(["ddvi", "study", *arguments.words]))
    done = len(found.members) - len(left)
    print(f"{len(found.members)} runs in {found.folder}: {done} finished, {len(left)} to do", flush=True)
    try:
        failures = study.run(found, left)
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on", 130)
    for failure in failures:
        print(f"failed: {failure.member.command}\n  {failure.reason}", file=sys.stderr)
    if len(failures) < len(found.members):
        _make_tables(found.folder, None)
    return _fail(f"{len(failures)} of {len(found.members)} runs failed", 1) if failures else 0


def _tables(arguments: argparse.Namespace) -> int:
    folder, given = _one_folder("tables", arguments.words, "folder of runs")
    for name in given:
        check_name("setting of tables", name, ["data_root"])
    _make_tables(folder, Path(arguments.output) if arguments.output else None, given.get("data_root"))
    return 0


def _make_tables(folder: Path, output: Path | None, data_root: str | None = None) -> None:
    from ddvi import tables

    for path in [*tables.write(folder, output), *tables.draw(folder, output, data_root)]:
        print(path)


def _list(_: argparse.Namespace) -> int:
    from rich.table import Table

    from ddvi import progress

    console = progress.console()
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
    "report": _report,
    "compare": _compare,
    "sample": _sample,
    "embed": _embed,
    "study": _study,
    "tables": _tables,
    "list": _list,
}


def _fail(sentence: str, status: int) -> int:
    print(f"ddvi: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
