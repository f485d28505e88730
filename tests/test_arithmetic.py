"""The arithmetic of a run: exact enough, remembered, and given back."""

import json

import numpy as np
import pytest
import torch
from torch import distributions

import ddvi
from ddvi.arithmetic import LARGEST_ERROR, PATHS, arithmetic, fast_products, fastest_path, measure_path, path_of
from ddvi.sklearn import DDVI
from ddvi.training import Trainer
from listeners import Messages


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDVI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "matrix_products.json"


def test_the_callers_arithmetic_is_given_back_even_after_an_error():
    before = torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
    with arithmetic("64", threads=1, path="medium"):
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_float32_matmul_precision() == "medium"
    with pytest.raises(ZeroDivisionError), arithmetic("64", threads=1, path="medium"):
        1 / 0  # noqa: B018
    assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision())


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor has no way to flush them")
@pytest.mark.parametrize("callers", [False, True])
def test_denormal_numbers_are_zero_meanwhile_and_then_the_callers_choice(callers):
    smallest = torch.full((100,), 1e-39)
    try:
        torch.set_flush_denormal(callers)
        with arithmetic(threads=1):
            assert not (smallest * 0.5).any()
        assert bool((smallest * 0.5).any()) is not callers
    finally:
        torch.set_flush_denormal(False)


def test_the_chosen_path_keeps_single_precision_and_the_callers_random_state():
    state = torch.get_rng_state()
    path = fastest_path()
    _, error = measure_path(path, (64, 300, 200))
    assert error <= LARGEST_ERROR
    assert torch.equal(torch.get_rng_state(), state)


def test_the_choice_is_remembered_by_machine(cache):
    chosen = fastest_path()
    (machine,) = json.loads(cache.read_text())
    another = next(path for path in PATHS if path != chosen)
    cache.write_text(json.dumps({machine: another}))
    with arithmetic() as path:
        assert path == another, "what was measured before is not measured again"


@pytest.mark.parametrize("content", ["", "[1]", '{"x": 3}', "\x00"])
def test_a_damaged_memory_is_measured_anew(cache, content):
    cache.parent.mkdir()
    cache.write_text(content)
    assert fastest_path() in PATHS
    assert fastest_path() in json.loads(cache.read_text()).values()


def test_an_unwritable_cache_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DDVI_CACHE", str(tmp_path / "file" / "below"))
    assert fastest_path() in PATHS


def test_only_an_accelerator_is_told_which_path_and_only_tf32_rounds():
    assert [path_of("cuda", precision) for precision in ("32", "64", "bf16", "tf32")] == ["highest"] * 3 + ["high"]
    assert path_of("cpu", "tf32") is None


def test_an_inexact_path_is_refused(monkeypatch):
    seconds = {"highest": 3.0, "high": 2.0, "medium": 1.0}
    errors = {"highest": 1e-7, "high": 2e-7, "medium": 1e-3}
    monkeypatch.setattr("ddvi.arithmetic.measure_path", lambda path, shape: (seconds[path], errors[path]))
    assert fastest_path() == "high", "the fastest of those that keep single precision"


def test_a_small_gain_keeps_the_default(monkeypatch):
    seconds = {"highest": 1.1, "high": 1.0, "medium": 1.05}
    monkeypatch.setattr("ddvi.arithmetic.measure_path", lambda path, shape: (seconds[path], 1e-7))
    assert fastest_path() == "highest"


# Models of a user's own


class Paths(Messages):
    """The path of matrix products at each step."""

    def step(self, epoch, step, steps):
        self.told.append(torch.get_float32_matmul_precision())


def amortise(watch):
    prior = distributions.Independent(distributions.Normal(torch.zeros(2), 1.0), 1)
    inference = ddvi.Inference(
        prior, lambda z: distributions.Independent(distributions.Normal(z, 0.5), 1), hidden_size=8, steps=2
    )
    inference.fit(torch.zeros(8, 2), epochs=1, listener=watch)


def target(watch):
    ddvi.Target(lambda z: -z.square().sum(-1), 2, steps=2).fit(steps=1, listener=watch)


@pytest.mark.parametrize("learn", [amortise, target])
@pytest.mark.parametrize(("callers", "taken"), [("highest", "medium"), ("high", "high")])
def test_they_learn_by_the_fastest_path_unless_the_caller_has_chosen(learn, callers, taken, monkeypatch):
    monkeypatch.setattr("ddvi.arithmetic.fastest_path", lambda: "medium")
    watch = Paths()
    torch.set_float32_matmul_precision(callers)
    try:
        learn(watch)
        assert set(watch.told) == {taken}
        assert torch.get_float32_matmul_precision() == callers
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_estimator_learns_by_it_and_gives_the_callers_back(monkeypatch):
    monkeypatch.setattr("ddvi.arithmetic.fastest_path", lambda: "medium")
    watch, fit = Paths(), Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda trainer: watch.step(0, 0, 0) or fit(trainer))
    DDVI(epochs=1, method="vae", hidden_size=8).fit(np.eye(8))
    assert watch.told == ["medium"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_path_measured_on_the_cpu_says_nothing_of_other_devices(monkeypatch):
    monkeypatch.setattr("ddvi.arithmetic.fastest_path", lambda: "medium")
    with fast_products(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "highest"


def test_a_choice_in_torchs_newer_words_stays(monkeypatch):
    def mixed():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr("torch.get_float32_matmul_precision", mixed)
    with fast_products(torch.device("cpu")):
        pass
