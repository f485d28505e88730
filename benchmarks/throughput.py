"""Prints how fast every method trains and infers, and how near that is to what the machine can do.

python benchmarks/throughput.py [--methods vae ddvi_semi] [--seconds 10] [--data-root FOLDER] [--scaling]
    [--pythae [PYTHON]] [--device cuda [--compile] [--precision tf32]] [--json FILE]

All at the settings of the paper's code (hidden size 1,000, batch 128, T = 40, 3 sleep steps), DDVI at its own defaults
besides. Training is a `Trainer`'s own epoch: gathering, preprocessing, objective, gradients and optimiser, as in a run.
Inference is one draw of q(z|x) per example in evaluation mode. Both are the median over repeats after a warm-up, with
their range. The floor is the least time of the same work, see `floor.py`: the share of it that is reached, like every
ratio, carries over to other machines, as long as nothing else runs on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import report
import torch
from floor import Machine, inference_work, training_work
from launches import Launches
from rates import INFERENCE_BATCH, Case, Images, Rate, Subject, inference_rate, training_rates
from report import Measured, Row, Sheet
from scaling import Bench

from ddvi import runs
from ddvi.arithmetic import LARGEST_ERROR, PATHS, arithmetic, measure_path, path_of, processor
from ddvi.errors import InputError, TrainingError, check_name
from ddvi.methods import METHODS
from ddvi.settings import SEMI
from ddvi.training import Interrupted

NAMES = (*METHODS, *(method + SEMI for method in METHODS))
PROBED = (128, 784, 1000)
"""Examples, inputs and outputs of the product whose error is printed."""
INTERRUPTIONS = (KeyboardInterrupt, Interrupted)
"""Ctrl-C, and what the loop of training makes of it."""
PYTHAE = {"vae": "VAE", "iaf_vae": "VAE_IAF", "aae": "Adversarial_AE"}
PYTHAE_NEEDS = "torch numpy scipy scikit-learn cloudpickle tqdm typing_extensions imageio 'pydantic>=2'"


def make_cases(methods: Sequence[str], steps: int) -> list[Case]:
    """The rows: a method at the paper's settings; DDVI at ours too, with its default T and with the paper's."""
    paper, ours = {"preset": "paper"}, {"preset": "default"}
    cases: list[Case] = []
    for method in methods:
        if method.removesuffix(SEMI) == "ddvi":
            # As many sleep steps with labels as without, so that their costs can be held together.
            cases += [
                Case(f"{method}, the paper's", method, paper | {"steps": steps, "sleep_steps": 3}),
                Case(f"{method}, ours", method, ours),
                Case(f"{method}, ours, T = {steps}", method, ours | {"steps": steps}),
            ]
        else:
            cases.append(Case(method, method, paper))
    return cases


def measure(case: Case, common: dict[str, Any], images: Images, machine: Machine, seconds: float, repeats: int) -> Row:
    """A row: the work is counted, its parts are timed before and, on a CPU, after it is carried out as a whole."""
    settings = case.settings(common)
    subject = Subject.build(settings, images)
    sizes = (settings.batch_size, min(INFERENCE_BATCH, len(images.x)))
    works = [training_work(subject), *(inference_work(subject, size) for size in sizes)]
    for work in works:
        machine.measure(work)
    rates = [Rate.of(training_rates(subject, seconds, repeats))]
    rates += [inference_rate(subject, size, seconds, repeats) for size in sizes]
    for work in works:
        machine.measure(work)
    measured = [Measured(rate, work, machine) for rate, work in zip(rates, works, strict=True)]
    launches = None
    if machine.device.type == "cuda":
        launches = Launches.of(subject, settings.batch_size / rates[0].median, seconds, repeats)
    return Row(case, settings, *measured, launches)


def beside_pythae(
    case: Case, common: dict[str, Any], images: Images, arguments: argparse.Namespace, path: str
) -> dict[str, Any]:
    """Both rates of training, ours measured half before and half after pythae's."""
    settings = case.settings(common)
    subject = Subject.build(settings, images)
    request = {
        "models": [PYTHAE[case.method]],
        "hidden_size": settings.hidden_size,
        "batch_size": settings.batch_size,
        "device": subject.fabric.device.type,
        "threads": torch.get_num_threads(),
        "path": path,
        "seconds": arguments.seconds,
        "repeats": arguments.repeats,
    }
    half = (arguments.seconds / 2, max(1, arguments.repeats // 2))
    ours = training_rates(subject, *half)
    command = [arguments.pythae, str(Path(__file__).with_name("pythae_rate.py")), json.dumps(request)]
    answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    ours += training_rates(subject, *half)
    (theirs,) = answer["rates"].values()
    both = {"theirs": Rate.of(theirs), "ours": Rate.of(ours)}
    return {
        "name": case.name,
        "pythae": PYTHAE[case.method],
        "version": answer["pythae"],
        "torch": answer["torch"],
        **{name: dataclasses.asdict(rate) for name, rate in both.items()},
        "ratio": both["ours"].median / both["theirs"].median,
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(NAMES), metavar="METHOD", help="; ".join(NAMES))
    parser.add_argument("--prior", default="pinwheel")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--hidden-size", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=40, help="the paper's T, of ddvi")
    parser.add_argument("--threads", type=int, default=0, help="torch's own choice by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="cuda: with small operations fused, as by compile=true")
    parser.add_argument("--precision", choices=("32", "tf32"), default="32", help="as the setting")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement, about")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data-root", help="folder with MNIST; random images without")
    parser.add_argument("--scaling", action="store_true", help="tables of cost and memory as quantities double, too")
    parser.add_argument(
        "--pythae", nargs="?", const=sys.executable, metavar="PYTHON", help="train pythae's models too, by this Python"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> tuple[list[Case], dict[str, Any]]:
    """The cases and the settings that they share; whatever is wrong is refused before anything is measured."""
    methods = [check_name("method", name, NAMES) for name in dict.fromkeys(arguments.methods)]
    cases = make_cases(methods, arguments.steps)
    given = ("prior", "hidden_size", "batch_size", "device", "compile", "precision", "threads", "data_root")
    common = {name: value for name in given if (value := getattr(arguments, name)) is not None}
    for case in cases:
        runs.choose_device(case.settings(common))
    if not arguments.seconds > 0:
        raise InputError(f"--seconds {arguments.seconds:g} leaves no time to measure; give more than 0")
    if arguments.repeats < 1:
        raise InputError(f"--repeats {arguments.repeats} measures nothing; give at least 1")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        raise InputError(f"there is no folder for --json {arguments.json}; make it first")
    if arguments.pythae:
        python = shutil.which(arguments.pythae)
        probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('pythae') is None)"
        if python is None or subprocess.run([python, "-c", probe], check=False).returncode:
            raise InputError(
                f"pythae can't be imported by --pythae {arguments.pythae}; make an environment that has it, 'python3"
                " -m venv E && E/bin/pip install --no-deps pythae==0.1.2 && E/bin/pip install"
                f" {PYTHAE_NEEDS}', and give --pythae E/bin/python"
            )
        arguments.pythae = python
    return cases, common


def parts(
    cases: Sequence[Case],
    common: dict[str, Any],
    images: Images,
    arguments: argparse.Namespace,
    path: str,
    say: Callable[[str], None],
) -> Iterator[tuple[str, Any, list[Sheet]]]:
    """What has been measured, part by part: its name, its values and its tables. `say` hears what is being measured."""
    device = torch.device(runs.choose_device(cases[0].settings(common)))
    machine = Machine(device, min(0.05, arguments.seconds / 20))
    if device.type == "cuda":
        gc.freeze()  # what is there by now isn't gone through before each of the many recordings
    rows: list[Row] = []
    stopped = None
    try:
        for case in cases:
            say(f"{case.name}, {len(rows) + 1} of {len(cases)}")
            rows.append(measure(case, common, images, machine, arguments.seconds, arguments.repeats))
    except (*INTERRUPTIONS, TrainingError) as reason:
        stopped = reason  # what has been measured is shown
    makers = [report.training_sheet, report.floor_sheet, report.inference_sheet]
    if device.type == "cuda":
        makers.append(report.launches_sheet)
    yield "rows", [row.as_dict() for row in rows], [make(rows) for make in makers if rows]
    yield "semi_supervised_costs", report.semi_costs(rows), []
    if stopped:
        raise stopped
    if arguments.pythae:
        found = []
        for case in cases:
            if case.method in PYTHAE:
                say(f"{case.name} beside pythae's {PYTHAE[case.method]}")
                found.append(beside_pythae(case, common, images, arguments, path))
        yield "pythae", found, [report.pythae_sheet(found, arguments.prior)] if found else []
    if arguments.scaling:
        bench = Bench(cases, common, images, arguments.seconds / 10, path, say)
        for sweep in bench.sweeps():
            yield f"scaling {sweep.kind} {sweep.quantity}", sweep.as_dict(), [sweep.sheet()]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    arguments = parse(argv)
    cases, common = check(arguments)
    device = runs.choose_device(cases[0].settings(common))
    cpu = device == "cpu"
    images, out = Images.load(arguments.data_root), report.console()
    with arithmetic("32", arguments.threads, path_of(device, arguments.precision)) as path:
        facts: dict[str, Any] = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processor": processor(),
            "processors": os.cpu_count(),
            "device": "cpu" if cpu else torch.cuda.get_device_name(),
            "matrix_products": path,
            "matrix_products_error": measure_path(path, PROBED, 1)[1] if cpu else None,
            "data": "MNIST" if arguments.data_root else "random images of MNIST's shape",
        }
        out.print(heading(facts, arguments))
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        written: dict[str, Any] = {"machine": facts, "arguments": plain, "papers_code": report.PAPERS_CODE}
        try:
            with report.console(errors=True).status("") as status:
                for name, value, sheets in parts(cases, common, images, arguments, path, status.update):
                    written[name] = value
                    for sheet in sheets:
                        sheet.show(out)
        except INTERRUPTIONS:
            out.print("Interrupted: the rest has not been measured.")
            return 130
        finally:
            if arguments.json:
                arguments.json.write_text(json.dumps(written, indent=2) + "\n")
    return 0


def heading(facts: dict[str, Any], arguments: argparse.Namespace) -> str:
    """What the figures belong to."""
    error, path = facts["matrix_products_error"], facts["matrix_products"]
    exactness = f", relative error {error:.0e} (at most {LARGEST_ERROR:.0e})" if error is not None else ""
    library = "" if facts["device"] != "cpu" else ", torch's BLAS" if path == PATHS[0] else ", oneDNN"
    return (
        f"torch {facts['torch']}, {facts['threads']} threads, {facts['processor']}, {facts['device']}\n"
        f"{facts['data']}, prior {arguments.prior}, hidden size {arguments.hidden_size:,}, batch"
        f" {arguments.batch_size:,}\n"
        f"matrix products by float32_matmul_precision '{path}'{library}{exactness}"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (InputError, TrainingError) as error:
        sys.exit(f"throughput: {error}")
