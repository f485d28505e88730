"""Studies: which runs a grid names, what is skipped, what happens to runs that fail or are killed."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddvi import checkpoint, cli, folders, study
from ddvi.errors import InputError
from ddvi.settings import resolve

SMALL = ("limit=100", "hidden_size=8", "evaluation=quick", "report=false")
LONG = ("digits", "vae,aae", "pinwheel", "epochs=120", *SMALL)


def names(words: str) -> list[str]:
    """Where the members of a study lie in its folder."""
    found = study.read(shlex.split(words))
    return [str(member.settings.folder.relative_to(found.folder)) for member in found.members]


# Grids


def test_a_grid_is_a_product_seed_after_seed() -> None:
    assert names("digits vae,ddvi pinwheel,gaussian seed=3,1") == [
        f"digits/{method}/{prior}/seed{seed}"
        for seed in (3, 1)
        for prior in ("pinwheel", "gaussian")
        for method in ("vae", "ddvi")
    ]


def test_settings_of_one_method_prior_or_data_set() -> None:
    assert names("digits vae,ddvi pinwheel,gaussian lr=1e-2 vae.lr=2e-3,3e-3 gaussian.hidden_size=8") == [
        "digits/vae/pinwheel/lr=0.002/seed0",
        "digits/vae/pinwheel/lr=0.003/seed0",
        "digits/ddvi/pinwheel/lr=0.01/seed0",
        "digits/vae/gaussian/lr=0.002,hidden_size=8/seed0",
        "digits/vae/gaussian/lr=0.003,hidden_size=8/seed0",
        "digits/ddvi/gaussian/lr=0.01,hidden_size=8/seed0",
    ]


def test_a_member_has_one_folder_whatever_grid_names_it() -> None:
    alone = names("digits ddvi pinwheel steps=5")
    assert alone[0] in names("digits ddvi pinwheel steps=3,5 epochs=150 threads=1 evaluation=quick")
    assert names("digits ddvi pinwheel steps=10") == ["digits/ddvi/pinwheel/seed0"]
    assert names("digits diff_vae_warmup,ddvi pinwheel") == ["digits/ddvi/pinwheel/seed0"], "two names of one run"
    assert names("digits_semi ddvi_semi pinwheel") == ["digits_semi/ddvi_semi/pinwheel/seed0"]
    many = "digits ddvi pinwheel epochs=7 lr=0.0123456 clip_norm=1.2345678 noise=cosine steps=3 denoiser_size=77"
    many += " denoiser_layers=2 covariance=diagonal prior_denoiser=false hidden_size=77 batch_size=33 validation=55"
    many += " dropout=0.123456789 objective=importance_weighted samples=17"
    assert max(map(len, Path(names(many)[0]).parts)) < 100


def test_a_members_words_are_its_settings(tmp_path: Path) -> None:
    found = study.read(["digits", "vae", "pinwheel", "lr=1e-2", f"out={tmp_path}/a b", "threads=2"])
    (member,) = found.members
    given = dict(word.split("=", 1) for word in member.words[3:])
    assert resolve(*member.words[:3], given) == member.settings
    assert member.settings.threads == 2
    assert member.settings.folder == tmp_path / "a b/digits/vae/pinwheel/lr=0.01/seed0"
    assert shlex.split(member.command)[2:-1] == member.words


def test_cores_are_shared_out_between_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)

    def shares(words: str) -> tuple[int, int]:
        found = study.read(["digits", "vae", "pinwheel", *words.split()])
        return found.workers, found.threads

    assert shares("") == (8, 1)
    assert shares("workers=2") == (2, 4)
    assert shares("threads=4") == (2, 4)
    assert shares("workers=3 threads=1") == (3, 1)


def test_stored_studies_and_files(tmp_path: Path) -> None:
    sizes = {
        "mnist_learning_rates": 48,
        "mnist_same_objective": 50,
        "mnist_importance_weighted": 81,
        "mnist_limit": 3,
        "mnist_frozen_decoder": 30,
        "mnist_ablations": 41,
        "mnist_equal_time": 18,
    }
    for name in study.stored():
        assert len(study.read([name]).members) == sizes.get(name, 54)
        assert study.read([name]).folder == Path.cwd() / "studies" / name
    assert len(names("mnist seed=0")) == 18
    file = tmp_path / "own.yaml"
    file.write_text("- {dataset: digits, method: vae, prior: pinwheel, seed: [1, 2], vae.lr: 0.01}\n")
    with file.open("a") as more:
        more.write("- {dataset: digits, method: [vae, aae], prior: gaussian, prior_denoiser: false}\n")
    assert names(f"{file} epochs=5") == [
        "digits/vae/pinwheel/epochs=5,lr=0.01/seed1",
        "digits/vae/pinwheel/epochs=5,lr=0.01/seed2",
        "digits/vae/gaussian/epochs=5,prior_denoiser=false/seed0",
        "digits/aae/gaussian/epochs=5,prior_denoiser=false/seed0",
    ]
    for damage in ("dataset: [", "3", "dataset: digits\nmethod: vae\n"):
        file.write_text(damage)
        with pytest.raises(InputError, match=r"own\.yaml"):
            study.read([str(file)])


# Refusals


def test_files_that_would_share_a_folder_are_told_apart(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "data.npy", np.eye(8))
    both = f"{tmp_path}/first/data.npy,{tmp_path}/second/data.npy"
    with pytest.raises(InputError, match=r"data\.npy' and .* would share the folder .*; rename one of them"):
        study.read([both, "vae", "gaussian", f"out={tmp_path}/study"])
    assert len(study.read(["digits,digits", "vae", "gaussian", f"out={tmp_path}/study"]).members) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "nothing is named"),
        ("mnits", "did you mean 'mnist'"),
        ("digits vae", "is neither: give a stored study"),
        ("digits vae,vea pinwheel", "did you mean 'vae'"),
        ("digits vae pinwheel seed=0,x", "seed=x is not a whole number"),
        ("digits vae,ddvi pinwheel ddvi.lr=0", "lr=0 must be above 0"),
        ("digits vae pinwheel vea.lr=1", "did you mean 'vae'"),
        ("digits vae pinwheel vae.epoch=1", "did you mean 'epochs'"),
        ("digits vae pinwheel seed=0,,1", "empty place"),
        ("digits vae pinwheel resume=true", "leave resume"),
        ("digits vae pinwheel overwrite=true", "leave overwrite"),
        ("digits vae pinwheel workers=0", "workers=0 is not a whole number of at least 1"),
        ("digits vae pinwheel retries=-1", "retries=-1"),
        ("digits vae pinwheel threads=1,2", "threads=1,2"),
        ("digits vae pinwheel launcher=slrum", "did you mean 'slurm'"),
        ("digits vae pinwheel launcher=ray workers=2", "for launcher=local"),
        ("digits vae pinwheel out=/dev/null/study", "can't be written"),
    ],
)
def test_mistakes_get_one_sentence_before_anything_starts(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["study", *words.split()]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("launcher", ["ray", "slurm"])
def test_a_launcher_that_isnt_installed_names_the_extra(
    launcher: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert cli.main(["study", "digits", "vae", "pinwheel", f"launcher={launcher}", f"out={tmp_path}/study"]) == 2
    assert "pip install 'ddvi[cluster]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["evaluation=quick,full", "vae.device=cpu,cuda"])
def test_values_that_make_no_other_runs_are_refused(word: str) -> None:
    with pytest.raises(InputError, match=f"{word} makes no runs that differ"):
        study.read(["digits", "vae", "pinwheel", word])


@pytest.mark.parametrize("name", ["out", "threads", "overwrite"])
def test_a_study_file_says_nothing_of_where_and_how(name: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"dataset: digits\nmethod: vae\nprior: pinwheel\n{name}: 1\n")
    with pytest.raises(InputError, match=f"{name} isn't a study file's to say"):
        study.read([str(path)])


def test_slurm_is_refused_where_jobs_cant_be_submitted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "there")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["study", "digits", "vae", "pinwheel", "launcher=slurm", f"out={tmp_path}/study"]) == 2
    assert "srun" in capsys.readouterr().err


# What is done with the members; processes stand in where training has nothing to add


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the members' processes: seed 7 fails, seed 8 is killed, seed 9 is killed the first time."""
    folders_of: list[str] = []

    def process(words: Sequence[str], folder: Path, threads: int) -> int:
        given: dict[str, Any] = dict(word.split("=", 1) for word in words[3:])
        settings = resolve(words[0], words[1], words[2], given)
        before = folders_of.count(folder.name)
        folders_of.append(folder.name)
        if settings.seed == 7:
            (folder / study.LOG).write_text("epoch 1\nddvi: the disk is full\n\n")
            return 1
        folders.write_config(settings, {}, {}, "highest")
        if settings.seed == 8 or (settings.seed == 9 and not before):
            (folder / folders.CHECKPOINT).touch()
            return -signal.SIGKILL
        (folder / folders.CHECKPOINT).unlink(missing_ok=True)
        folders.write_metrics(folder, {"elbo": -3.0, "seconds": {"training": 1.0}, "evaluation": settings.evaluation})
        return 0

    monkeypatch.setattr(study, "_process", process)
    return folders_of


def test_a_failed_member_leaves_the_others_alone(
    started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["study", "digits", "vae", "pinwheel", "seed=0,7,8,9", f"out={tmp_path}", "workers=2", "evaluation=quick"]
    assert cli.main(words) == 1
    assert sorted(started) == ["seed0", "seed7", "seed8", "seed8", "seed9", "seed9"]
    said = capsys.readouterr()
    assert "4 runs" in said.out
    assert "2 of 4 runs failed" in said.err
    for seed, reason in ((7, "the disk is full"), (8, "killed by SIGKILL")):
        folder = tmp_path / f"digits/vae/pinwheel/seed{seed}"
        command = f"ddvi train digits vae pinwheel seed={seed} evaluation=quick threads=1 out={folder} resume=true"
        assert f"failed: {command}\n  {reason}\n" in said.err.replace("threads=2", "threads=1")
    assert (tmp_path / "tables/digits-pinwheel.md").exists(), "of what is there"
    assert (tmp_path / study.COMMANDS).read_text() == shlex.join(["ddvi", *words]) + "\n"
    started.clear()
    assert cli.main([*words, "retries=0"]) == 1
    assert sorted(started) == ["seed7", "seed8"], "what is finished is left alone"
    assert "2 finished, 2 to do" in capsys.readouterr().out
    started.clear()
    assert cli.main([word.replace("0,7,8,9", "0,9") for word in words]) == 0
    assert not started


def test_full_after_quick_is_not_finished(started: list[str], tmp_path: Path) -> None:
    words = ["digits", "vae", "pinwheel", f"out={tmp_path}", "seed=0,1"]
    quick = study.read([*words, "evaluation=quick"])
    assert study.run(quick, study.left(quick)) == []
    assert study.left(quick) == []
    assert len(study.left(study.read(words))) == 2


def test_a_folder_of_another_configuration_is_refused(started: list[str], tmp_path: Path) -> None:
    found = study.read(["digits", "vae", "pinwheel", f"out={tmp_path}"])
    assert study.run(found, study.left(found)) == []
    config = tmp_path / "digits/vae/pinwheel/seed0" / folders.CONFIG
    config.write_text(config.read_text().replace("hidden_size: 256", "hidden_size: 128"))
    with pytest.raises(InputError, match="hidden_size=128 there, hidden_size=256 here"):
        study.left(found)


def test_what_hydra_refuses_is_one_sentence(started: list[str], tmp_path: Path) -> None:
    found = study.read(["digits", "vae", "pinwheel", f"out={tmp_path}", "hydra.launcher.wrokers=3"])
    with pytest.raises(InputError, match=r"hydra\.launcher\.wrokers"):
        study.run(found, study.left(found))
    assert not started


def test_a_launcher_that_stops_is_the_reason(
    started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra_plugins.ddvi_launchers import LocalLauncher

    def lost(launcher: LocalLauncher, configs: Sequence[Any]) -> list[str]:
        launcher.task_function(configs[0])
        raise RuntimeError("the queue\nis gone")

    monkeypatch.setattr(LocalLauncher, "results", lost)
    found = study.read(["digits", "vae", "pinwheel", "seed=0,1", f"out={tmp_path}"])
    (failure,) = study.run(found, study.left(found))
    assert failure.member.settings.seed == 1
    assert failure.reason == "launcher=local stopped: the queue is gone"


def test_names_that_hydra_would_read_otherwise_arrive_as_they_are(started: list[str], tmp_path: Path) -> None:
    odd = tmp_path / 'it\'s a "grid", {x: [1]} \\ = ~done'
    found = study.read(["digits", "vae", "pinwheel", f"out={odd}"])
    assert study.run(found, study.left(found)) == []
    assert (odd / "digits/vae/pinwheel/seed0/metrics.json").exists()


def test_folders_that_a_study_has_named_can_be_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = "objective=elbo,preset=study"
    Path(named).mkdir()
    assert cli._split([named, "seed=3"]) == ([named], {"seed": "3"})
    (member,) = study.read(["digits", "vae", "pinwheel", f"decoder={named}"]).members
    assert Path(member.settings.decoder).name == named
    with pytest.raises(InputError, match="is not a folder"):
        study.read(["digits", "vae", "pinwheel", "decoder=a=1,b=2"])


# With processes that train, and are killed


def start(words: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """`ddvi study` as a process of its own."""
    command = [sys.executable, "-m", "ddvi.cli", "study", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240  # Ray's workers are nice: they wait where the processors are busy
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"no {path}: {process.communicate()[0]}")
        time.sleep(0.02)


def process_of(folder: Path) -> tuple[int, int]:
    """The member at work in a folder, and its parent."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = status.with_name("cmdline").read_bytes().split(b"\0")
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"ddvi.member" in words and f"out={folder}".encode() in words:
            return int(status.parent.name), parent
    raise AssertionError(f"nothing is at work in {folder}")


def check_finished(root: Path, epochs: int) -> None:
    """Every run of `LONG` is there, with each epoch once."""
    found = sorted(root.rglob(folders.METRICS))
    assert [path.parts[-5] for path in found] == ["aae", "vae"]
    for path in found:
        assert [int(row["epoch"]) for row in folders.read_history(path.parent)] == list(range(1, epochs + 1))


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc to find processes in")


@linux
@pytest.mark.slow
def test_an_interrupt_from_the_terminal_saves_the_step(tmp_path: Path) -> None:
    """It reaches a whole process group, and a member is told by its study, once: the second interrupt acts at once."""
    words = ["digits", "vae", "pinwheel", "epochs=400", "batch_size=4", "workers=1", "threads=1", f"out={tmp_path}"]
    (folder,) = (member.settings.folder for member in study.read(words).members)
    process = start(words, start_new_session=True)
    wait_for(folder / folders.HISTORY, process)
    assert os.getpgid(process_of(folder)[0]) != process.pid
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    _, facts = checkpoint.load(folder / folders.CHECKPOINT)
    assert facts["state"]["step"] > 0


@linux
@pytest.mark.slow
def test_killed_members_and_killed_studies_go_on(tmp_path: Path) -> None:
    words = [*LONG, f"out={tmp_path}", "workers=2", "threads=1"]
    vae, aae = (member.settings.folder for member in study.read(words).members)
    first = start(words)
    wait_for(vae / folders.HISTORY, first)
    wait_for(aae / folders.HISTORY, first)
    first.kill()
    first.communicate(timeout=30)
    for folder in (vae, aae):
        with folders.alone(folder, patience=30):  # they notice, save and stop
            assert not (folder / folders.METRICS).exists()
    done = len(folders.read_history(vae))
    second = start(words)
    deadline = time.monotonic() + 60
    while len(folders.read_history(vae)) <= done and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process_of(vae)[0], signal.SIGKILL)
    output, _ = second.communicate(timeout=100)
    assert second.returncode == 0, output
    check_finished(tmp_path, 120)
    assert (tmp_path / "tables/digits-pinwheel.md").exists()
    assert (tmp_path / "tables/digits.png").exists()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray instance with a head that runs nothing and two worker nodes of one core each."""
    from ray.cluster_utils import Cluster  # nodes on one machine, with ports that don't collide

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    memory = {"object_store_memory": 80_000_000}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False} | memory)
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=1, **memory)
        yield nodes.address
    finally:
        nodes.shutdown()


@linux
@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray isn't installed: pip install 'ddvi[cluster]'")
def test_a_ray_cluster_loses_a_worker_and_no_result(tmp_path: Path, cluster: str) -> None:
    words = [*LONG, f"out={tmp_path}", "launcher=ray", f"hydra.launcher.init.address='{cluster}'"]
    vae, _ = (member.settings.folder for member in study.read(words).members)
    process = start(words)
    wait_for(vae / folders.HISTORY, process)
    os.kill(process_of(vae)[1], signal.SIGKILL)  # the worker; its run notices, and Ray starts the task anew
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    check_finished(tmp_path, 120)
