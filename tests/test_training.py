"""The training loop: a run that is killed and resumed ends as one that was not, and bad steps and files are named.

Runs that die do so in a process of their own, started from a fork server that has imported everything once.
"""

import math
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ddvi import checkpoint, training
from ddvi.composition import Observations, build_model, make_objective
from ddvi.errors import InputError, TrainingError
from ddvi.objectives.base import Objective, Update
from ddvi.randomness import seeded
from ddvi.schedule import Phase, Schedule
from ddvi.settings import resolve
from ddvi.training import Interrupted, Trainer
from listeners import Messages

METHODS = ("vae", "aae", "ddvi")
TIME_COLUMNS = {"seconds", "examples_per_second"}
EPOCHS = 4
TINY = {"hidden_size": 16, "denoiser_size": 16, "steps": 3, "prior_denoiser": False, "parts": 3, "samples": 2}


def tiny_model(method="vae", seed=0, **overrides):
    """A small model of 12 binary pixels, and its objective."""
    settings = resolve("digits", method, "pinwheel", TINY | overrides)
    with seeded(seed, "model"):
        model = build_model(settings, Observations((12,), "bernoulli", "binarise", parts=3, maximum=1.0))
    return model, make_objective(settings)


def tiny_data(count=100):
    with seeded(0, "data"):
        return torch.rand(count, 12)


def train(method, path=None, resume=False, seed=0, objective=None, listener=None, **options):
    """A short run with a frozen first phase, validation and a last batch that is not full."""
    model, own = tiny_model(method, seed)
    objective = objective or own
    phases = (Phase(1, objective, frozenset({"likelihood"})), Phase(EPOCHS - 1, objective))
    schedule = Schedule(options.pop("phases", phases), **{"batch_size": 12, "lr": 1e-2, "seed": seed} | options)
    trainer = Trainer(model, schedule, tiny_data(), tiny_data(20), path, listener=listener)
    trainer.fit(resume=resume)
    return trainer


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_time(history):
    return [{name: value for name, value in row.items() if name not in TIME_COLUMNS} for row in history]


# Runs in processes of their own


@dataclass(frozen=True)
class SavesOften:
    """A listener that slows the run down, so that there is something to kill."""

    pause: float = 0.004

    def step(self, epoch, step, steps):
        time.sleep(self.pause)

    def epoch(self, row):
        pass

    def message(self, text):
        pass


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def run_in_child(method, path, resume, death=None):
    """What a child does: train, saving nearly after each step, and perhaps die at a point of its n-th save."""
    torch.set_num_threads(1)
    training.SECONDS_BETWEEN_CHECKPOINTS = 0.02
    if death:
        moment, save = death
        count = 0
        write, rename = checkpoint.save_file, os.replace

        def save_file(tensors, file, metadata):
            nonlocal count
            count += 1
            write(tensors, file, metadata)
            if count == save and moment == "half written":
                os.truncate(file, os.path.getsize(file) // 2)
            if count == save and moment != "renamed":
                die()

        def replace(source, target):
            rename(source, target)
            if count == save:
                die()

        checkpoint.save_file, os.replace = save_file, replace
    try:
        train(method, path, resume, listener=SavesOften())
    except Interrupted:
        os._exit(3)


def start(*arguments):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ddvi.training", "ddvi.composition", "ddvi.priors"])
    process = context.Process(target=run_in_child, args=arguments)
    process.start()
    return process


def finish(*arguments):
    process = start(*arguments)
    process.join(120)
    return process.exitcode


def read_run(path):
    """Every tensor of a run's checkpoint (weights, optimisers, random state, sums), and what it says of itself."""
    tensors, facts = checkpoint.load(path)
    state = facts["state"]
    state["history"] = without_time(state["history"])
    state.pop("seconds")
    return tensors, state


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The checkpoint of a run of each method that nobody killed."""
    runs = {}

    def run(method):
        if method not in runs:
            path = tmp_path_factory.mktemp(method) / "state"
            assert finish(method, path, False) == 0
            runs[method] = read_run(path)
        return runs[method]

    return run


def assert_same_run(path, expected):
    tensors, state = read_run(path)
    assert state == expected[1], "the history is another one"
    assert [[*row] for row in state["history"]] == [[*row] for row in expected[1]["history"]], "in another order"
    assert len(state["history"]) == EPOCHS
    different = [name for name in expected[0] if not torch.equal(tensors[name], expected[0][name])]
    assert not different, f"not bit-identical: {different}"
    assert tensors.keys() == expected[0].keys()


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments_a_resumed_run_ends_the_same(method, undisturbed, tmp_path):
    path, chance, kills = tmp_path / "state", random.Random(f"kill {method}"), 0
    expected = undisturbed(method)
    while kills < 3:
        process = start(method, path, path.exists())
        before = path.stat().st_mtime_ns if path.exists() else 0
        while process.is_alive() and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.002)  # until its first save: the time to start is not what is tested
        time.sleep(chance.uniform(0.0, 0.07))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 2, "the run was over before it could be killed"
    assert finish(method, path, True) == 0
    assert_same_run(path, expected)


@pytest.mark.parametrize(
    ("method", "moment"), [("vae", "half written"), ("aae", "written"), ("ddvi", "renamed")]
)  # a file is written in one way whatever is in it
def test_killed_while_saving_a_resumed_run_ends_the_same(method, moment, undisturbed, tmp_path):
    path = tmp_path / "state"
    assert finish(method, path, False, (moment, 4)) == -signal.SIGKILL
    checkpoint.load(path)
    assert finish(method, path, True) == 0
    assert_same_run(path, undisturbed(method))


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_by_the_user_a_run_saves_and_goes_on(method, undisturbed, tmp_path):
    path = tmp_path / "state"
    process = start(method, path, False)
    while process.is_alive() and not path.exists():
        time.sleep(0.002)
    time.sleep(0.03)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 3, "the first Ctrl-C must save and raise Interrupted"
    assert finish(method, path, True) == 0
    assert_same_run(path, undisturbed(method))


# Determinism


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_the_weights_and_the_history(method):
    first, again, other = train(method, seed=1), train(method, seed=1), train(method, seed=2)
    assert same(weights_of(first), weights_of(again))
    assert without_time(first.state.history) == without_time(again.state.history)
    assert not same(weights_of(first), weights_of(other))
    assert without_time(first.state.history) != without_time(other.state.history)


def test_the_schedules_seed_alone_changes_a_run():
    runs = []
    for seed in (0, 1):
        model, objective = tiny_model()
        trainer = Trainer(model, Schedule((Phase(1, objective),), batch_size=8, seed=seed), tiny_data())
        trainer.fit()
        runs.append(weights_of(trainer))
    assert not same(*runs)


def test_every_example_is_seen_once_an_epoch_in_another_order():
    seen = []

    class Watch(Objective):
        def updates(self, model, batch):
            seen.append(batch.x)
            loss = model.likelihood.log_prob(batch.x, torch.zeros(len(batch.x), 2))
            yield Update(("likelihood",), -loss, {"reconstruction": -loss})

    model, _ = tiny_model()
    model.preprocessing = nn.Identity()
    x = tiny_data()
    Trainer(model, Schedule((Phase(2, Watch()),), batch_size=8), x).fit()
    assert [len(batch) for batch in seen] == 2 * ([8] * 12 + [4])
    first, second = torch.cat(seen[:13]), torch.cat(seen[13:])
    assert not torch.equal(first, second)
    for epoch in (first, second):
        torch.testing.assert_close(epoch[epoch[:, 0].argsort()], x[x[:, 0].argsort()], atol=0, rtol=0)


# History, schedule, phases


def test_the_learning_rate_falls_by_a_cosine_and_is_the_one_used():
    schedule = Schedule((Phase(4, None),), lr=0.2)
    for progress in (0.0, 0.25, 0.5, 0.9, 1.0):
        assert schedule.learning_rate(progress) == pytest.approx(0.1 * (1 + math.cos(math.pi * progress)), abs=1e-15)
    assert Schedule((Phase(4, None),), lr=0.2, shape="constant").learning_rate(0.9) == 0.2
    rates = []

    class Watch(SavesOften):
        def step(self, epoch, step, steps):
            rates.append(trainer.steps.optimizers["posterior"].param_groups[0]["lr"])

    model, objective = tiny_model()
    trainer = Trainer(model, Schedule((Phase(2, objective),), 25, lr=0.2), tiny_data(), listener=Watch())
    trainer.fit()
    assert rates == pytest.approx([schedule.learning_rate(step / 8) for step in range(8)], abs=1e-15)


def test_phases_follow_each_other():
    first, second, third = Phase(1, None), Phase(2, None), Phase(3, None)
    schedule = Schedule((first, second, third))
    assert schedule.epochs == 6
    assert [schedule.phase(epoch) for epoch in range(6)] == [first, second, second, third, third, third]


@pytest.mark.parametrize("method", METHODS)
def test_frozen_children_rest_and_the_others_learn(method):
    model, objective = tiny_model(method)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    phases = (Phase(2, objective, frozenset({"likelihood"})),)
    Trainer(model, Schedule(phases, batch_size=20, lr=1e-2), tiny_data()).fit()
    parameters = {name for name, _ in model.named_parameters()}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in parameters if not name.startswith("likelihood.")}


def test_gradients_are_clipped_to_their_norm():
    """Adam's first step is the rate times the gradient's sign; its first moment is a tenth of the clipped gradient."""
    norms = []
    for clip_norm in (0.5, 0.0):
        model, objective = tiny_model()
        schedule = Schedule((Phase(1, objective),), batch_size=100, clip_norm=clip_norm)
        trainer = Trainer(model, schedule, tiny_data())
        trainer.fit()
        moments = [s["exp_avg"] for optimizer in trainer.steps.optimizers.values() for s in optimizer.state.values()]
        norms.append(10 * float(torch.cat([moment.flatten() for moment in moments]).norm()))
    assert norms[0] == pytest.approx(0.5, rel=1e-4)
    assert norms[1] > 0.6


def test_history_holds_means_per_example():
    class Constant(Objective):
        def updates(self, model, batch):
            terms = {"first": batch.x.sum(1), "size": torch.ones(len(batch.x))}, {"second": torch.tensor([1.0, 3.0])}
            for part in terms:
                score = model.likelihood.log_prob(batch.x, torch.zeros(len(batch.x), 2))
                yield Update(("likelihood",), -score, part)

    model, _ = tiny_model()
    model.preprocessing = nn.Identity()
    x = tiny_data()
    history = Trainer(model, Schedule((Phase(1, Constant()),), batch_size=8), x).fit()
    assert history[0]["first"] == pytest.approx(float(x.sum(1).mean()), rel=1e-6)
    assert history[0]["size"] == 1
    assert history[0]["second"] == 2
    assert history[0]["skipped"] == 0


# Bad input


def test_a_batch_larger_than_the_data_is_refused():
    model, objective = tiny_model()
    with pytest.raises(InputError, match="batch_size=128 is larger than the 100 training examples; use at most 100"):
        Trainer(model, Schedule((Phase(1, objective),)), tiny_data())


class Spoiled(Objective):
    """The objective of another, with one of its updates spoiled at certain steps (from 1)."""

    def __init__(self, objective, steps, update=0, part="loss"):
        for name, value in {"objective": objective, "steps": steps, "update": update, "part": part, "at": [0]}.items():
            object.__setattr__(self, name, value)

    def updates(self, model, batch):
        self.at[0] += 1
        for index, update in enumerate(self.objective.updates(model, batch)):
            if self.at[0] in self.steps and index == self.update:
                # An infinite slope at 0 gives a finite loss of non-finite gradient.
                spoil = math.nan if self.part == "loss" else (update.loss - update.loss.detach()).abs().sqrt()
                terms = {name: value + (math.nan if self.part == "loss" else 0) for name, value in update.terms.items()}
                update = Update(update.children, update.loss + spoil, terms)
            yield update


@pytest.mark.parametrize(
    ("part", "named"),
    [("loss", "reconstruction, divergence are"), ("gradient", "the gradient of reconstruction, divergence is")],
)
def test_a_step_that_is_not_finite_is_skipped_and_named(part, named):
    model, objective = tiny_model()
    messages = Messages()
    schedule = Schedule((Phase(1, Spoiled(objective, {2, 3}, part=part)),), batch_size=20)
    trainer = Trainer(model, schedule, tiny_data(), listener=messages)
    history = trainer.fit()
    assert messages.told == [f"epoch 1, step {s}: {named} not finite; the step is skipped" for s in (2, 3)]
    assert history[0]["skipped"] == 2
    assert all(math.isfinite(value) for value in history[0].values())
    assert all(value.isfinite().all() for value in weights_of(trainer).values())
    assert {int(s["step"]) for s in trainer.steps.optimizers["posterior"].state.values()} == {3}


@pytest.mark.parametrize(("method", "update"), [("vae", 0), ("aae", 0), ("aae", 1), ("ddvi", 0)])
def test_the_third_bad_step_in_a_row_stops_with_the_last_good_checkpoint(method, update, tmp_path):
    path = tmp_path / "state"
    _, objective = tiny_model(method)
    spoiled = Spoiled(objective, {2, 3, 5, 9, 10, 11, 12}, update)
    options = {"batch_size": 20, "phases": (Phase(3, spoiled),), "objective": spoiled}
    with pytest.raises(TrainingError, match=r"three times in a row by epoch 3, step 1; the last good checkpoint"):
        train(method, path, **options)
    tensors, facts = checkpoint.load(path)
    assert facts["state"]["epoch"] == 2
    assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())


def trained_file(tmp_path):
    path = tmp_path / "state"
    train("vae", path, batch_size=50)
    return path


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


def fill_with_garbage(path):
    path.write_bytes(random.Random(0).randbytes(5000))


def break_header(path):
    content = path.read_bytes()
    path.write_bytes(content[:8] + content[8:].replace(b"ddvi", b"idvd", 1))


@pytest.mark.parametrize("damage", [truncate, empty, fill_with_garbage, break_header])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(damage, tmp_path):
    path = trained_file(tmp_path)
    damage(path)
    content = path.read_bytes()
    with pytest.raises(InputError, match=r"state is damaged or not a file of ddvi \(.*\); restore it, or train anew"):
        train("vae", path, resume=True)
    assert path.read_bytes() == content


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = trained_file(tmp_path)
    message = r"holds the weights of another model: posterior\.\S+ .*isn't among them; load it with"
    with pytest.raises(InputError, match=message):
        train("ddvi", path, resume=True)


def test_a_file_of_weights_alone_is_refused(tmp_path):
    path = trained_file(tmp_path)
    tensors, _ = checkpoint.load(path)
    checkpoint.save(path, tensors, {})
    with pytest.raises(InputError, match="holds weights but not the state of a training"):
        train("vae", path, resume=True)


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        train("vae", tmp_path / "state", resume=True)
    with pytest.raises(InputError, match="given no path"):
        train("vae", None, resume=True)


def test_a_save_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "state"
    checkpoint.save(path, {"a": torch.ones(3)}, {"good": True})

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"a": torch.zeros(3)}, {})
    assert checkpoint.load(path)[1] == {"good": True}
    assert os.listdir(tmp_path) == ["state"]
