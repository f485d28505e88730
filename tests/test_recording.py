"""Recorded steps, with a tape in the place of a CUDA graph: it repeats operations, and nothing that Python does."""

import contextlib
import gc
import math
import signal
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lightning_fabric import Fabric
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddvi import ELBO, checkpoint
from ddvi.composition import Observations, build_model, make_phases
from ddvi.errors import TrainingError
from ddvi.objectives.base import Labelled, Objective, Update
from ddvi.randomness import seeded
from ddvi.recording import Recorded, captured, record
from ddvi.schedule import Phase, Schedule
from ddvi.settings import resolve
from ddvi.training import Interrupted, Trainer
from listeners import Messages

TINY = {"hidden_size": 16, "denoiser_size": 16, "steps": 3, "parts": 3, "context_size": 4, "flow_layers": 2}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal"}
COMPOSITIONS = [
    ("vae", {}),
    ("vae", {"objective": "importance_weighted", "path_gradient": True, "kl_rise": 0.5}),
    ("iaf_vae", {}),
    ("nsf_vae", {"objective": "reweighted_wake_sleep", "samples": 2, "prior_samples": 8}),
    ("h_iaf_vae", {}),
    ("aae", {}),
    ("ddvi", {"samples": 2, "prior_samples": 8}),
    ("ddvi", {"objective": "elbo", "covariance": "diagonal", "dropout": 0.2}),
    ("ddvi", {"preset": "paper", "epochs": 9, "warmup": 3, "freeze_decoder": 3, "samples": 1}),
    ("ddvi", {"objective": "marginal_likelihood", "samples": 20}),
    ("vae_semi", {}),
    ("ddvi_semi", {"samples": 2, "prior_samples": 9}),
]


class Tape(TorchDispatchMode):
    """Every operation that has been carried out, with its arguments and its result."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in WAITING, f"{func} would wait for the device"
        result = func(*args, **kwargs or {})
        if not func.is_view:
            self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def play(self):
        """Repeat the operations, each into the result that it had."""
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    old.copy_(new) if isinstance(old, torch.Tensor) else None


class Recorder:
    """Counts what it records."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, function, inputs):
        self.recorded += 1
        with Tape() as tape:
            output = function(*inputs)
        return output, tape.play


def train(method, overrides, recorder, path=None, resume=False, listener=None, phases=None, fabric=None):
    trainer = make(method, overrides, recorder, path, listener, phases, fabric)
    trainer.fit(resume=resume)
    return trainer


def make(method, overrides, recorder, path=None, listener=None, phases=None, fabric=None):
    overrides = TINY | {"epochs": 4, "lr": 1e-3, "clip_norm": 5.0} | overrides
    settings = resolve("digits" + "_semi" * method.endswith("_semi"), method, "gaussian_mixture", overrides)
    with seeded(0, "data"):
        x, label = torch.rand(40, 12), torch.randint(3, (10,))
    with seeded(0, "model"):
        model = build_model(settings, Observations((12,), "bernoulli", "binarise", parts=3, maximum=1.0))
    labelled = Labelled(x[:10], label) if settings.semi_supervised else None
    schedule = Schedule(phases or make_phases(settings), 16, settings.lr, clip_norm=settings.clip_norm)
    with mock.patch("ddvi.training.recorder", return_value=recorder):
        return Trainer(model, schedule, x, x[:8], path, fabric, listener, labelled)


def weights(trainer):
    return trainer.model.state_dict()


@pytest.fixture(autouse=True)
def labels_are_trusted(monkeypatch):
    """On the CPU labels are looked at wherever they are used, which on a GPU would wait for it."""
    monkeypatch.setattr(
        "ddvi.priors.base.Prior._checked",
        lambda self, label, shape, sampling: label.long().expand(
            shape if sampling else torch.broadcast_shapes(shape, label.shape)
        ),
    )


@pytest.mark.parametrize(("method", "overrides"), COMPOSITIONS)
def test_a_recorded_training_is_the_plain_one(method, overrides):
    """Random numbers, weights and history, for phases with and without a frozen child, and a last batch of fewer."""
    recorder = Recorder()
    recorded, plain = train(method, overrides, recorder), train(method, overrides, None)
    assert recorder.recorded == 2 * len({id(phase) for phase in recorded.schedule.phases})  # full and last batches
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(recorded)[name], value, rtol=1e-4, atol=1e-6)
    for one, other in zip(recorded.state.history, plain.state.history, strict=True):
        assert list(one) == list(other)
        for name in set(one) - {"seconds", "examples_per_second"}:
            assert one[name] == pytest.approx(other[name], rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
@pytest.mark.parametrize(("method", "overrides"), COMPOSITIONS)
def test_recorded_on_a_gpu_it_is_the_plain_one_to_the_last_bit(method, overrides):
    fabric = Fabric(accelerator="cuda", devices=1)
    recorded, plain = (train(method, overrides, how, fabric=fabric) for how in (record, None))
    for name, value in weights(plain).items():
        assert torch.equal(weights(recorded)[name], value), name


class Stops(Messages):
    """Ctrl-C, once."""

    def step(self, epoch, step, steps):
        if (epoch, step) == (2, 2) and not self.told:
            self.told.append("stop")
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_recorded_run_goes_on_from_where_it_was_stopped(recorded, tmp_path):
    """Weights, moments and sums of an epoch that was cut off, whichever of both goes on with it."""
    path, whole = tmp_path / "checkpoint", train("ddvi", {"samples": 2}, Recorder())

    with pytest.raises(Interrupted):
        train("ddvi", {"samples": 2}, Recorder(), path, listener=Stops())
    resumed = train("ddvi", {"samples": 2}, Recorder() if recorded else None, path, resume=True)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], value, rtol=1e-4, atol=1e-6)
    for one, other in zip(resumed.state.history, whole.state.history, strict=True):
        assert one["wake"] == pytest.approx(other["wake"], rel=1e-3)


def test_a_trainer_that_was_stopped_goes_on_itself(tmp_path):
    """What was recorded before adds to sums and moments that aren't those of the checkpoint."""
    whole = train("ddvi", {"samples": 2}, Recorder())
    trainer = make("ddvi", {"samples": 2}, Recorder(), tmp_path / "checkpoint", Stops())
    with pytest.raises(Interrupted):
        trainer.fit()
    trainer.fit(resume=True)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(trainer)[name], value, rtol=1e-4, atol=1e-6)
    assert trainer.state.history[-1]["wake"] == pytest.approx(whole.state.history[-1]["wake"], rel=1e-3)


def test_nothing_of_recordings_is_left_behind():
    trainer = train("vae", {}, Recorder())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert all(type(optimizer.param_groups[0]["lr"]) is float for optimizer in trainer.steps.optimizers.values())
    assert not trainer.steps.recorded


def test_double_precision_is_recorded_too():
    torch.set_default_dtype(torch.float64)
    try:
        recorded, plain = train("vae", {}, Recorder()), train("vae", {}, None)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in weights(plain).items():
        torch.testing.assert_close(
            weights(recorded)[name], value, rtol=1e-6, atol=1e-8
        )  # of a learning rate in single precision


STEPS = 12  # of four epochs


@dataclass(frozen=True)
class Spoilt(Objective):
    """Two updates, one of which isn't finite at certain steps, from 1; by tensors alone, so that it can be recorded."""

    at: tuple[int, ...]
    update: int
    part: str

    def updates(self, model, batch):
        step = torch.as_tensor(batch.progress * STEPS).round() + 1
        hit = torch.isin(step, torch.tensor(self.at, dtype=step.dtype))
        for index, update in enumerate((*ELBO().updates(model, batch), *ELBO().updates(model, batch))):
            loss, terms = update.loss, update.terms
            if index == self.update:
                loss = 1 * loss
                loss.register_hook(lambda gradient: torch.where(hit, torch.inf, gradient))
                if self.part == "loss":
                    loss = torch.where(hit, torch.nan, loss)
                    terms = {name: torch.where(hit, torch.nan, value) for name, value in terms.items()}
            yield Update(update.children, loss, terms)


@pytest.mark.parametrize(
    ("part", "named"),
    [("loss", "reconstruction, divergence are"), ("gradient", "the gradient of reconstruction, divergence is")],
)
@pytest.mark.parametrize("update", [0, 1])
def test_a_bad_step_is_left_out_and_named_when_it_is_recorded(update, part, named):
    messages, recorder = Messages(), Recorder()
    phases = (Phase(4, Spoilt((7, 8), update, part)),)
    trainer = train("vae", {}, recorder, phases=phases, listener=messages)
    assert recorder.recorded == 2
    assert messages.told == [f"epoch 3, step {s}: {named} not finite; the step is skipped" for s in (1, 2)]
    assert [row["skipped"] for row in trainer.state.history] == [0, 0, 2, 0]
    assert all(math.isfinite(value) for row in trainer.state.history for value in row.values())
    assert all(value.isfinite().all() for value in weights(trainer).values())
    updates = {int(entry["step"]) for entry in trainer.steps.optimizers["posterior"].state.values()}
    assert updates == {2 * (STEPS - 2) + 2 * update}, "what goes before a bad update counts, what follows doesn't"


def test_the_third_bad_step_in_a_row_stops_a_recorded_run_too(tmp_path):
    phases = (Phase(4, Spoilt((3, 5, 9, 10, 11, 12), 0, "loss")),)
    with pytest.raises(TrainingError, match="three times in a row by epoch 4, step 2; the last good checkpoint"):
        train("vae", {}, Recorder(), tmp_path / "state", phases=phases)
    tensors, facts = checkpoint.load(tmp_path / "state")
    assert facts["state"]["epoch"] == 3
    assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())


def test_what_waits_for_the_device_is_carried_out_as_it_is(monkeypatch):
    """Torch warns where a CUDA device is waited for; here something else says so."""

    def waits(x):
        if modes[-1:] == ["warn"]:
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
        return 2 * x

    modes = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    recorder = Recorder()
    plain, recorded = Recorded(waits, recorder), Recorded(lambda x: 2 * x, recorder)
    with pytest.warns(UserWarning, match="something else") as warned:
        results = [float(plain(torch.tensor(float(i)))) for i in range(5)]
    assert {str(each.message) for each in warned} == {"something else"}
    assert results == [0, 2, 4, 6, 8]
    assert modes == ["warn", 0]
    assert plain.waits
    assert not recorder.recorded
    assert [float(recorded(torch.tensor(float(i)))) for i in range(5)] == results
    assert recorder.recorded == 1
    assert not recorded.waits


def test_what_cannot_be_recorded_says_how_to_go_on():
    def fails(function, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nsearch for it")

    doubled = Recorded(lambda x: 2 * x, fails)
    with pytest.raises(TrainingError, match=r"can't be recorded .*stream is capturing\); train with graphs=false"):
        [doubled(torch.ones(2)) for _ in range(3)]


def test_each_shape_is_recorded_for_itself():
    recorder = Recorder()
    doubled = Recorded(lambda x: 2 * x, recorder)
    for i in range(4):
        for size in (2, 3):
            assert torch.equal(doubled(torch.full((size,), float(i))), torch.full((size,), 2.0 * i))
    assert recorder.recorded == 2


def test_nothing_is_collected_while_a_device_is_recorded(monkeypatch):
    """A stand-in for torch's own context: what is collected in it could free memory and spoil the recording."""
    collected = []

    @contextlib.contextmanager
    def graph(made, capture_error_mode):
        collected.append(gc.isenabled())
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    output, _ = record(lambda x: 2 * x, [torch.ones(2)])
    assert torch.equal(output, torch.full((2,), 2.0))
    with pytest.raises(RuntimeError, match="no"), captured():
        raise RuntimeError("no")
    assert collected == [False, False]
    assert gc.isenabled()
