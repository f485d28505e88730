"""A study: a grid of runs, launched by Hydra's multirun; torch-free.

A grid is the product of data sets, methods, priors and the values of settings. Each of its members is `ddvi train` in a
process of its own and a folder of its own,

    FOLDER/DATASET/METHOD/PRIOR[/DEVIATIONS]/seedN,

where DEVIATIONS are the settings that differ from the defaults of data set, method and preset, so that a member finds
its folder again from whatever grid names it. What was done is read from the folders: a finished member is left alone,
one that was cut off goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddvi import folders
from ddvi.catalogue import MEASURES
from ddvi.errors import InputError, check_name
from ddvi.files import write_aside
from ddvi.settings import FIELDS, FREE_ON_RESUME, Settings, as_text, deviations, resolve

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF = Path(__file__).parent / "conf"
COMMANDS, LOG = "commands.sh", "log.txt"
AXES = ("dataset", "method", "prior")
LAUNCHERS = {"local": "", "ray": "ray", "slurm": "hydra_plugins.hydra_submitit_launcher"}
"""Where a study can run, and the module that it takes."""
_OPTIONS = {
    "out": "the study's folder; studies/STUDY if empty",
    "launcher": "local, ray or slurm",
    "workers": "runs at a time on this machine; as many as there are cores for",
    "threads": "CPU threads of a run; the cores shared out between the workers",
    "retries": "how often a run that was killed is resumed by itself",
}
_LONGEST_NAME = 200
_PATIENCE = 60.0  # seconds for a process that lost its holder to save its state and leave the folder
_running: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Member:
    """One run of a study.

    Args:
        names: data set, method and prior as they were written.
        given: the settings that were given, as text, and `out`.
        settings: what follows.
    """

    names: tuple[str, str, str]
    given: Mapping[str, str]
    settings: Settings

    @property
    def words(self) -> list[str]:
        """What stands behind `ddvi train`."""
        return [*self.names, *(f"{name}={value}" for name, value in self.given.items())]

    @property
    def command(self) -> str:
        return shlex.join(["ddvi", "train", *self.words, "resume=true"])


@dataclass(frozen=True)
class Study:
    """Members, and how they are run."""

    members: Sequence[Member]
    folder: Path
    launcher: str
    workers: int
    threads: int
    retries: int
    hydra: Sequence[str]
    """Hydra's own overrides."""


@dataclass(frozen=True)
class Failure:
    """A member that isn't finished, and why."""

    member: Member
    reason: str


def read(words: Sequence[str]) -> Study:
    """A study from the words of the command line; every member's names and values are checked.

    Words are a stored study or three comma lists, then settings with comma lists. NAME.setting=… holds for the members
    of one data set, method or prior; hydra.… goes to Hydra as it is.

    Raises:
        InputError: whatever can't be used.
    """
    hydra = [word for word in words if word.lstrip("+~").startswith(("hydra.", "hydra/"))]
    pairs = [word.partition("=") for word in words if "=" in word and word not in hydra]
    given = {name if "." in name else name.replace("-", "_"): value for name, _, value in pairs}
    options = {name: given.pop(name) for name in _OPTIONS if name in given}
    for name in ("resume", "overwrite"):
        if name in given:
            raise InputError(f"a study goes on with what was cut off and keeps what is finished: leave {name}=… out")
    grids, title = _grids([word for word in words if "=" not in word])
    settings = {name: _split(name, value) for name, value in given.items()}
    for grid in grids:
        grid |= settings
        for name, values in grid.items():
            if name.rpartition(".")[2] in FREE_ON_RESUME and len(values) > 1:
                raise InputError(f"{name}={','.join(values)} makes no runs that differ; give one value of it")
            if name in _OPTIONS or name in ("resume", "overwrite"):
                raise InputError(f"{name} isn't a study file's to say; give {name}=… in the command, or leave it out")
    _check_scopes(grids)
    folder = Path(os.path.abspath(os.path.expanduser(options.get("out") or f"studies/{title}")))
    launcher = check_name("launcher", options.get("launcher", "local"), LAUNCHERS)
    if launcher != "local" and "workers" in options:
        raise InputError(f"workers={options['workers']} is for launcher=local; {launcher} knows what it has room for")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = _whole(options, "workers", 1, max(1, cores // _whole(options, "threads", 1, 1)))
    threads = _whole(options, "threads", 1, max(1, cores // workers) if launcher == "local" else 1)
    retries = _whole(options, "retries", 0, 1)
    members: dict[Path, Member] = {}
    for member in (member for grid in grids for member in _members(grid, threads, folder)):
        other = members.setdefault(member.settings.folder, member)
        if other.settings.dataset != member.settings.dataset:
            files = f"'{other.settings.dataset}' and '{member.settings.dataset}'"
            raise InputError(f"{files} would share the folder {member.settings.folder}; rename one of them")
    return Study(list(members.values()), folder, launcher, workers, threads, retries, hydra)


def stored() -> dict[str, Path]:
    """The studies that come with the package."""
    return {path.stem: path for path in sorted((CONF / "study").glob("*.yaml"))}


def _grids(names: Sequence[str]) -> tuple[list[dict[str, list[str]]], str]:
    """Grids, as values by name, and what the study is called."""
    if len(names) == 3:
        values: dict[str, list[str]] = {name: _split(name, text) for name, text in zip(AXES, names, strict=True)}
        return [values], "+".join(Path(name).stem for name in values["dataset"])
    if len(names) != 1:
        given = f"'{' '.join(names)}' is neither" if names else "nothing is named"
        raise InputError(f"{given}: give a stored study ({', '.join(stored())}), or DATASETS METHODS PRIORS")
    path = Path(names[0])
    if path.suffix not in (".yaml", ".yml"):
        path = stored()[check_name("study", names[0], stored())]
    from yaml import YAMLError, safe_load

    try:
        content = safe_load(path.read_text())
        grids = content if isinstance(content, list) else [content]
        lists = [{str(k): v if isinstance(v, list) else [v] for k, v in grid.items()} for grid in grids]
    except (OSError, AttributeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} can't be read as a study ({reason}); it holds name: value or name: [values]"
        ) from None
    for grid in lists:
        if missing := [name for name in AXES if not grid.get(name)]:
            raise InputError(f"{path} names no {missing[0]}; a study names dataset, method and prior")
    return [{name: [as_text(value) for value in values] for name, values in grid.items()} for grid in lists], path.stem


def _split(name: str, text: str) -> list[str]:
    """The values of a comma list, each once; a folder's name may hold commas itself."""
    whole = name == "data_root" or (name.rpartition(".")[2] == "decoder" and os.path.exists(text))
    values = list(dict.fromkeys([text] if whole else text.split(",")))
    if "" in values and name != "data_root":
        raise InputError(f"{name}={text} has an empty place; write the values with single commas between them")
    return values


def _check_scopes(grids: Sequence[Mapping[str, Sequence[str]]]) -> None:
    """Refuse NAME.setting where no grid has that name."""
    names = list(dict.fromkeys(name for grid in grids for axis in AXES for name in grid[axis]))
    for key in (key for grid in grids for key in grid if "." in key):
        check_name("name before the dot", key.rpartition(".")[0], names)
        check_name("setting", key.rpartition(".")[2], FIELDS)


def _whole(options: Mapping[str, str], name: str, least: int, default: int) -> int:
    """An option that is a whole number."""
    value = options.get(name, str(default))
    if not value.isdecimal() or int(value) < least:
        raise InputError(f"{name}={value} is not a whole number of at least {least}: {name} is {_OPTIONS[name]}")
    return int(value)


def _members(grid: Mapping[str, Sequence[str]], threads: int, folder: Path) -> Iterator[Member]:
    """The members of a grid: seed after seed, so that what is there early says something of every place."""
    found: list[tuple[int, int, Member]] = []
    places = itertools.product(grid["dataset"], grid["prior"], grid["method"])
    for dataset, prior, method in places:
        axes = {name: values for name, values in grid.items() if name not in AXES and "." not in name}
        for scope in (dataset, prior, method):
            axes |= {key.rpartition(".")[2]: grid[key] for key in grid if key.rpartition(".")[0] == scope}
        for values in itertools.product(*axes.values()):
            given = dict(zip(axes, values, strict=True)) | {"threads": str(threads)}
            settings = resolve(dataset, method, prior, given)
            given["out"] = str(folder / _place(settings))
            seeds = axes.get("seed", [given.get("seed", "0")])
            order = (grid["dataset"].index(dataset), seeds.index(given.get("seed", "0")))
            member = Member((dataset, method, prior), given, dataclasses.replace(settings, out=given["out"]))
            found.append((*order, member))
    found.sort(key=lambda each: each[:2])
    return (member for *_, member in found)


def _place(settings: Settings) -> Path:
    """A member's folder within that of its study."""
    changes = ",".join(f"{name}={value}" for name, value in deviations(settings).items())
    if len(changes) > _LONGEST_NAME or os.sep in changes:
        changes = hashlib.sha256(changes.encode()).hexdigest()[:16]
    return Path(settings.full_dataset, settings.full_method, settings.prior, changes, f"seed{settings.seed}")


def left(study: Study) -> list[Member]:
    """The members that aren't finished.

    Raises:
        InputError: a folder holds another configuration or is damaged, or the study's folder can't be written.
    """
    folders.make_writable(study.folder)

    def finished(member: Member) -> bool:
        folder = member.settings.folder
        return folder.exists() and folders.plan(dataclasses.replace(member.settings, resume=True)).action == "show"

    return [member for member in study.members if not finished(member)]


def check_launcher(study: Study) -> None:
    """Refuse a launcher whose packages or programs aren't here."""
    from importlib.util import find_spec

    module = LAUNCHERS[study.launcher]
    if module and not find_spec(module):
        raise InputError(f"launcher={study.launcher} needs packages that aren't installed: pip install 'ddvi[cluster]'")
    if study.launcher == "slurm" and not shutil.which("srun"):
        raise InputError(
            "launcher=slurm needs Slurm's srun, which isn't here; start the study where jobs are submitted"
        )


def run(study: Study, members: Sequence[Member]) -> list[Failure]:
    """Launch members through Hydra's multirun, and say which of them aren't finished in the end.

    Raises:
        InputError: Hydra refuses its own overrides.
        KeyboardInterrupt: Ctrl-C; runs in progress save their state and stop.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import ConfigCompositionException, HydraException

    check_launcher(study)
    if not members:
        return []
    sweep = ",".join(_quoted(shlex.join(member.words)) for member in members)
    overrides = [
        f"hydra/launcher={study.launcher}",
        *([f"hydra.launcher.workers={study.workers}"] if study.launcher == "local" else []),
        *study.hydra,
        f"folder={_quoted(str(study.folder))}",
        f"threads={study.threads}",
        f"retries={study.retries}",
        f"member={sweep}",
    ]
    reasons: dict[str, str] = {}
    lost = "it was never started"
    try:
        with initialize_config_dir(str(CONF), job_name="study", version_base="1.3"):
            hydra: Any = GlobalHydra.instance().hydra
            for results in hydra.multirun("study", task_function=run_member, overrides=overrides):
                reasons |= {result.cfg.member: result.return_value for result in results}
    except (ConfigCompositionException, HydraException) as error:
        raise InputError(f"Hydra refuses the study: {_one_line(error)}; 'hydra.' words are its own") from None
    except KeyboardInterrupt:
        for process in list(_running):
            _let_go(process)
        raise
    except Exception as error:  # a launcher's own, as of a job that Slurm lost
        lost = f"launcher={study.launcher} stopped: {_one_line(error)}"
    unfinished = left(dataclasses.replace(study, members=members))
    return [Failure(member, reasons.get(shlex.join(member.words)) or lost) for member in unfinished]


def run_member(config: DictConfig) -> str:
    """A member in a process of its own, resumed if it is killed: why it failed, or nothing. What launchers call."""
    words = shlex.split(config.member)
    given = dict(word.split("=", 1) for word in words[3:])
    folder = Path(given["out"])
    label = folder.relative_to(config.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        starts, status = config.retries + 1, -1
        while starts and status < 0:  # killed
            starts -= 1
            with contextlib.suppress(InputError), folders.alone(folder, _PATIENCE):
                pass  # whoever was at work here and lost its holder has left
            status = _process(words, folder, config.threads)
        reason = "" if status == 0 else _reason(status, folder)
    except OSError as error:
        reason = _one_line(error)
    told = reason if reason.startswith("stopped") else f"failed, {reason}"
    print(f"{label}: {told if reason else _result(folder)}", flush=True)
    return reason


def _process(words: Sequence[str], folder: Path, threads: int) -> int:
    """Run `ddvi train` to its end, its words into the folder's log, and return its status, below 0 if killed."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    report = [] if any(word.startswith("report=") for word in words) else ["report=false"]  # `ddvi report` writes it
    command = [sys.executable, "-m", "ddvi.member", *words, *report, "resume=true"]
    with (folder / LOG).open("ab") as log:
        # Out of reach of a terminal's Ctrl-C, which beside that of `_let_go` would be the second, and save nothing.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    _running.add(process)
    try:
        return process.wait()
    finally:
        _running.discard(process)
        _let_go(process)


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """Close the lifeline: a process that still runs saves its state and stops."""
    if process.stdin:
        process.stdin.close()


def _reason(status: int, folder: Path) -> str:
    """Why a member failed, in its own last words."""
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
        return f"killed by signal {-status}"
    lines = (folder / LOG).read_text(errors="replace").split("\n")
    said = next((line for line in reversed(lines) if line.strip()), f"exit status {status}")
    return said.removeprefix("ddvi: ").partition("; go on with:")[0].strip()


def _result(folder: Path) -> str:
    """The first measure of a finished member, and what it took."""
    metrics = folders.read_metrics(folder)
    values = [f"{name} {metrics[name]:.2f}" for name in MEASURES if metrics.get(name) is not None]
    return f"{values[0] if values else 'finished'}, {sum(metrics['seconds'].values()):.0f} s"


def note_command(study: Study, command: str) -> None:
    """Keep the commands that made a study's folder beside what they made."""
    path = study.folder / COMMANDS
    lines = path.read_text().splitlines() if path.exists() else []
    if command not in lines:
        write_aside(path, lambda temporary: temporary.write_text("\n".join([*lines, command]) + "\n"))


def _quoted(text: str) -> str:
    """Text as one value of Hydra's grammar."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.double).with_quotes()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
