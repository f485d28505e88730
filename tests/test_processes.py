"""Several processes train one model: what they learn is what one learns, whatever is drawn on the way.

Pairs of processes are started as `torchrun` starts them, for two devices on the CPU. Double precision, as in single
precision a last digit may turn a drawn pixel from 0 to 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import socket

import pytest
import torch
from lightning_fabric import Fabric
from torch import distributions
from torch.distributions import Independent, NegativeBinomial

from ddvi import checkpoint
from ddvi.composition import Observations, build_model, make_phases
from ddvi.errors import InputError, TrainingError
from ddvi.likelihoods import DistributionLikelihood
from ddvi.methods import METHODS
from ddvi.networks import DenseDecoder
from ddvi.objectives.base import Labelled, Objective, Update
from ddvi.randomness import Shard, draw, mean, own, sample, seeded, sharded
from ddvi.schedule import Schedule
from ddvi.settings import resolve
from ddvi.training import Interrupted, Trainer
from listeners import Messages

TIME_COLUMNS = {"seconds", "examples_per_second"}
TINY = {"hidden_size": 16, "denoiser_size": 16, "steps": 3, "parts": 3, "dropout": 0.2, "context_size": 8}
TINY |= {"flow_layers": 1, "prior_denoiser": False, "warmup": 0, "sleep_steps": 1}
LABELS = {"semi_supervised": True, "agreement_weight": 2.0, "information_weight": 1.0}
CASES = {
    f"{method} {objective}{' semi' * semi}": (method, objective, LABELS if semi else {})
    for method in METHODS
    for objective in METHODS[method].objectives
    for semi in (False, True)
    if not semi or method in ("vae", "aae", "ddvi")  # the other methods see labels as the first does
}
CASES |= {
    "warm-up": ("ddvi", "wake_sleep", {"warmup": 1, "prior_denoiser": True}),
    "path gradient": ("h_iaf_vae", "elbo", {"path_gradient": True}),
    "gaussian": ("vae", "wake_sleep", {"likelihood": "gaussian", "prior": "less_noisy_square"}),
    "poisson": ("vae", "wake_sleep", {"likelihood": "poisson", "prior": "swiss_roll"}),
    "categorical": ("vae", "wake_sleep", {"likelihood": "categorical", "prior": "gaussian_mixture"}),
    "overdispersed": ("vae", "wake_sleep", {"likelihood": "overdispersed"}),
}
PREPROCESSING = {"bernoulli": "binarise", "gaussian": "dequantise"}


class Overdispersed(torch.nn.Module):
    """A user's own likelihood, whose draws take a number of random numbers that depends on its parameters."""

    def __init__(self):
        super().__init__()
        self.decoder = DenseDecoder(2, torch.Size([12]), hidden_size=16)

    def forward(self, z):
        return Independent(NegativeBinomial(torch.tensor(2.5), logits=self.decoder(z), validate_args=False), 1)


def make_trainer(name, path=None, fabric=None, listener=None, seed=0):
    """Two epochs of ten batches: 9 examples each, 6 in the last one of an epoch."""
    method, objective, changes = CASES[name]
    changes = dict(changes)
    prior, kind = changes.pop("prior", "pinwheel"), changes.pop("likelihood", "bernoulli")
    semi = changes.pop("semi_supervised", False)
    options = TINY | {"objective": objective, "epochs": 2, "samples": 3} | changes
    settings = dataclasses.replace(resolve("digits", method, prior, options), semi_supervised=semi)
    with seeded(seed, "model"):
        known = kind if kind != "overdispersed" else "poisson"
        categories = 4 * (known == "categorical")
        observations = Observations((12,), known, PREPROCESSING.get(known, "as_is"), parts=3, categories=categories)
        model = build_model(settings, observations)
        if kind == "overdispersed":
            model.likelihood = DistributionLikelihood(Overdispersed(), torch.Size([12]))
    with seeded(0, "data"):
        x = torch.rand(87, 12) if kind == "bernoulli" else torch.randint(4 if kind == "categorical" else 2, (87, 12))
        labelled = Labelled(x[:11], torch.randint(3, (11,))) if semi else None
    schedule = Schedule(tuple(make_phases(settings)), batch_size=9, clip_norm=0.5, seed=0)
    return Trainer(model, schedule, x, x[:5], path, fabric, listener, labelled)


# Processes


def take_part(rank, world, port, function, arguments):
    """What a process does: become one of so many, and call the function with their fabric."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    if world > 1:
        torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
        torchrun |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": 1}
        os.environ.update({variable: str(value) for variable, value in torchrun.items()})
    fabric = Fabric(accelerator="cpu", devices=world)
    fabric.launch()
    function(fabric, *arguments)


def run(world, function, *arguments):
    """Call a function of this file in so many processes; a deadlock fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ddvi.training", "ddvi.composition", "ddvi.priors", "scipy.stats"])
    processes = [
        context.Process(target=take_part, args=(rank, world, port, function, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, "the processes wait for each other"
    assert [process.exitcode for process in processes] == [0] * world


def interrupt(trainer, step):
    """Have the user press Ctrl-C while a trainer takes its n-th step."""
    take, count = trainer._step, itertools.count(1)

    def interrupted(*arguments):
        take(*arguments)
        if next(count) == step:
            signal.raise_signal(signal.SIGINT)

    trainer._step = interrupted
    with pytest.raises(Interrupted):
        trainer.fit()


# What they learn


def train_alone(fabric, folder):
    for name in CASES:
        path = folder / f"{name}, alone"
        interrupt(make_trainer(name, path, fabric), 12)
        shutil.copy(path, folder / f"{name}, begun alone")
        make_trainer(name, path, fabric).fit(resume=True)


def others(name):
    """What a case is held against its training alone; going on takes turns, as it is the same code for all."""
    begun = "begun alone" if [*CASES].index(name) % 2 else "begun together"
    return "together", begun


def train_together(fabric, folder):
    """Each process begins with weights of its own, and only the second one is told to stop."""
    for name in CASES:
        path, here = folder / f"{name}, together", fabric.global_rank
        interrupt(make_trainer(name, path, fabric, seed=here), 12 * here)
        fabric.barrier()  # until the first has saved
        if not here:
            shutil.copy(path, folder / f"{name}, begun together")
        for other in others(name):
            if other != "begun together":
                trainer = make_trainer(name, folder / f"{name}, {other}", fabric, seed=3)
                trainer.fit(resume=True)
        if here:
            checkpoint.save(folder / f"{name}, second", trainer.model.state_dict(), {})


def end_alone(fabric, folder):
    for name in CASES:
        if "begun together" in others(name):
            make_trainer(name, folder / f"{name}, begun together", fabric).fit(resume=True)


def read(path):
    """Weights and optimisers, random state, and the history but for time."""
    tensors, facts = checkpoint.load(path)
    random = {name: tensors.pop(name) for name in list(tensors) if name.startswith("random/")}
    rows = [{k: v for k, v in row.items() if k not in TIME_COLUMNS} for row in facts["state"]["history"]]
    return tensors, random, rows


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_go_on_with_what_one_began(tmp_path):
    """Every method and objective, to the end of 20 steps: by one process; by two; begun by one, ended by the other."""
    run(1, train_alone, tmp_path)
    run(2, train_together, tmp_path)
    run(1, end_alone, tmp_path)
    for name in CASES:
        tensors, random, rows = read(tmp_path / f"{name}, alone")
        assert len(rows) == 2
        for other in others(name):
            theirs, their_random, their_rows = read(tmp_path / f"{name}, {other}")
            message = f"{name}, {other}: {{}}".format
            torch.testing.assert_close(theirs, tensors, atol=1e-10, rtol=1e-10, msg=message)
            torch.testing.assert_close(their_random, random, atol=0, rtol=0, msg=message)
            for row, theirs in zip(rows, their_rows, strict=True):
                assert theirs == pytest.approx(row, rel=1e-10, abs=1e-10), message("history")
        second, _ = checkpoint.load(tmp_path / f"{name}, second")
        weights = {key.removeprefix("model/"): value for key, value in tensors.items() if key.startswith("model/")}
        torch.testing.assert_close(second, weights, atol=1e-10, rtol=1e-10, msg=f"{name}: the second process")


# When one of them is in trouble


class Spoiled(Objective):
    """The objective of another, of which one row is spoiled at certain steps (from 1), in the process that has it."""

    def __init__(self, objective, steps, row):
        for name, value in {"objective": objective, "steps": steps, "row": row, "at": [0]}.items():
            object.__setattr__(self, name, value)

    def updates(self, model, batch):
        self.at[0] += 1
        for update in self.objective.updates(model, batch):
            spoil = draw(torch.zeros, (len(batch.x),), 0)
            if self.at[0] in self.steps:
                spoil = draw(
                    lambda shape: torch.full(shape, 0.0).index_fill(0, torch.tensor(self.row), math.nan), spoil.shape, 0
                )
            yield Update(update.children, update.loss + spoil, {k: v + spoil for k, v in update.terms.items()})


class Epochs(Messages):
    """Keeps what each epoch left out, too."""

    def epoch(self, row):
        self.told.append(f"epoch {row['epoch']}, {row['skipped']} skipped")


def meet_bad_steps(fabric, folder):
    """The last of 9 rows is the second process's."""
    listener = Epochs()
    trainer = make_trainer("vae elbo", folder / f"of {fabric.world_size}", fabric, listener)
    (phase,) = trainer.schedule.phases
    spoiled = dataclasses.replace(phase, objective=Spoiled(phase.objective, {2, 5, 14, 15, 16}, 8))
    trainer.schedule = dataclasses.replace(trainer.schedule, phases=(spoiled,))
    with pytest.raises(TrainingError, match="three times in a row by epoch 2, step 6"):
        trainer.fit()
    name = "told first" if fabric.global_rank == 0 else "told second"
    (folder / f"{name} of {fabric.world_size}").write_text("\n".join(listener.told))


def test_a_step_that_is_bad_in_one_process_is_skipped_by_all_and_told_by_the_first(tmp_path):
    for world in (1, 2):
        run(world, meet_bad_steps, tmp_path)
    told = (tmp_path / "told first of 2").read_text()
    assert told == (tmp_path / "told first of 1").read_text()
    assert "epoch 1, step 2: reconstruction, divergence are not finite; the step is skipped" in told
    assert "epoch 1, 2 skipped" in told
    assert (tmp_path / "told second of 2").read_text() == ""
    torch.testing.assert_close(read(tmp_path / "of 2")[0], read(tmp_path / "of 1")[0], atol=1e-10, rtol=1e-10)


def lose_one(fabric):
    trainer = make_trainer("vae elbo", None, fabric)
    if fabric.global_rank:
        trainer._step = lambda *_: os._exit(0)
    with pytest.raises(TrainingError, match="a process of this run has ended"):
        trainer.fit()


def test_a_process_that_dies_is_not_waited_for():
    run(2, lose_one)


def parameters(count):
    """Of `DRAWN`, in their rows."""
    with seeded(0):
        return torch.rand(count, 3, 4) + 0.1


DRAWN = [
    lambda p: Independent(distributions.Bernoulli(p / 2), 2),
    lambda p: distributions.Categorical(p),
    lambda p: distributions.Normal(p, p[:, :1]),
    lambda p: distributions.Poisson(5 * p),
    lambda p: distributions.Gamma(p, 2.0),
    lambda p: distributions.Beta(p, 1.0),
    lambda p: distributions.Binomial(20, p / 2),
    lambda p: distributions.NegativeBinomial(3.0, p / 2),
    lambda p: distributions.Exponential(p),
    lambda p: distributions.Laplace(p, 1.0),
    lambda p: distributions.StudentT(3.0, p),
    lambda p: distributions.MultivariateNormal(p, torch.eye(4)),
    lambda p: distributions.MixtureSameFamily(distributions.Categorical(p), distributions.Poisson(5 * p)),
]


def draw_from_each(fabric):
    shard = Shard(9, fabric.global_rank, fabric.world_size)
    whole = parameters(9)
    for index, make in enumerate(DRAWN):
        with seeded(1):
            expected, after = shard.part(make(whole).sample()), torch.rand(3)
        with seeded(1), sharded(shard, watched=True):
            drawn = sample(make(shard.part(whole)))
        with seeded(1), sharded(shard):
            again = sample(make(shard.part(whole)))
            assert torch.equal(torch.rand(3), after), f"{index}: what is drawn after it is different"
        assert torch.equal(drawn, again)
        assert torch.equal(drawn, expected), f"{index}: {drawn} where one process draws {expected}"


def test_distributions_draw_what_they_draw_in_one_process():
    run(2, draw_from_each)


def differ(fabric):
    trainer = make_trainer("vae elbo", None, fabric)
    trainer.train_x = trainer.train_x[: 87 - fabric.global_rank]
    with pytest.raises(InputError, match="different amounts of data; give each of them all of it"):
        trainer.fit()


def test_processes_with_different_data_are_refused():
    run(2, differ)


def test_a_fabric_that_is_not_launched_is_refused():
    with pytest.raises(InputError, match="has 2 devices but no processes yet; call its launch"):
        make_trainer("vae elbo", None, Fabric(accelerator="cpu", devices=2))


# Parts of a batch


@pytest.mark.parametrize(("count", "world"), [(8, 2), (9, 2), (5, 4), (1, 3), (7, 7), (10, 4), (2, 5)])
def test_parts_have_one_size_and_each_row_counts_once(count, world):
    rows = torch.arange(count)
    shards = [Shard(count, rank, world) for rank in range(world)]
    parts = [shard.part(rows) for shard in shards]
    assert {len(part) for part in parts} == {math.ceil(count / world)}
    assert torch.equal(torch.cat([shard.own(part) for shard, part in zip(shards, parts, strict=True)]), rows)
    values = torch.rand(count)
    means = []
    for shard, part in zip(shards, parts, strict=True):
        with sharded(shard):
            means.append(mean(values[part]))
    torch.testing.assert_close(sum(means), values.mean())


@pytest.mark.parametrize("axis", [0, 1, -2, -1])
def test_parts_of_what_is_drawn_are_what_one_process_draws(axis):
    """Of two batches that stand one after the other along any axis."""
    shape, parts = [3, 4, 5, 6], []
    shape[axis] = 2 * 7
    with seeded(0):
        expected = torch.randn(shape)
    for rank in range(2):
        mine = list(shape)
        mine[axis] = 2 * 4
        with seeded(0), sharded(Shard(7, rank, 2)):
            parts.append(draw(torch.randn, mine, axis).unflatten(axis, (2, 4)))
    axis %= 4
    expected = expected.unflatten(axis, (2, 7))
    assert torch.equal(parts[0], expected.narrow(axis + 1, 0, 4))
    assert torch.equal(parts[1], expected.narrow(axis + 1, 3, 4))


def test_every_process_has_fantasies_of_its_own(float64):
    model = make_trainer("ddvi wake_sleep semi").model.eval()
    with seeded(1):
        expected = model.fantasise(8)
    halves = []
    for rank in range(2):
        with seeded(1), sharded(Shard(8, rank, 2)):
            halves.append(model.fantasise(4))
    for whole, first, second in zip(expected, *halves, strict=True):
        assert torch.equal(torch.cat([first, second]), whole)
    assert not set(map(tuple, halves[0].z.tolist())) & set(map(tuple, halves[1].z.tolist()))


@pytest.mark.parametrize(
    "drawn",
    [
        lambda: torch.randn(4, 2),
        lambda: torch.rand_like(torch.ones(4)),
        lambda: torch.empty(4).normal_(),
        lambda: torch.distributions.Normal(torch.zeros(4), 1.0).sample(),
        lambda: torch.nn.functional.dropout(torch.ones(4)),
        lambda: torch.randint(3, (4,)),
    ],
)
def test_numbers_that_all_processes_would_share_are_refused(drawn):
    with seeded(0), sharded(Shard(8, 0, 2), watched=True):
        with pytest.raises(InputError, match=r"the same random numbers to each of several devices; use .*draw"):
            drawn()
        draw(torch.randn, (4, 2), 0)
        torch.nn.functional.dropout(torch.ones(4), 0.5, False)
    with seeded(0):
        drawn()


def test_a_shape_without_the_batch_is_refused():
    with sharded(Shard(8, 0, 2)):
        with pytest.raises(InputError, match=r"of shape \(3,\) have no axis of 4 rows"):
            draw(torch.rand, (3,), 0)
        with pytest.raises(InputError, match=r"of shape \(\) isn't one for each of the 4 examples"):
            own(torch.zeros(()))
