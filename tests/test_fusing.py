"""Fused functions, by a backend that only traces them: what they compute is what is written."""

import warnings

import pytest
import torch
from lightning_fabric import Fabric

from ddvi.composition import Observations, build_model, make_phases
from ddvi.devices import choose_device
from ddvi.fusing import fuses, fusible, fusing
from ddvi.randomness import seeded
from ddvi.schedule import Phase, Schedule
from ddvi.settings import resolve
from ddvi.training import Trainer

TINY = {"hidden_size": 16, "denoiser_size": 16, "steps": 2, "denoiser_layers": 2, "parts": 3}
TRACED = "aot_eager"
COMPOSITIONS = [
    ("ddvi", {"samples": 2, "prior_samples": 8}),
    ("ddvi", {"objective": "elbo", "path_gradient": True, "dropout": 0.2, "covariance": "diagonal"}),
    ("ddvi", {"preset": "paper", "warmup": 0, "freeze_decoder": 0, "samples": 1}),
]


def trainer(method, options, device="cpu", compiles=False, graphs=False, steps=3):
    """Of a small model, over random images."""
    settings = resolve("mnist", method, "pinwheel", {**TINY, **options})
    with seeded(0, "model"):
        model = build_model(settings, Observations((6,), "bernoulli", "binarise", parts=3, maximum=255.0))
        x = torch.randint(0, 2, (4 * steps, 6), dtype=torch.uint8) * 255
    fabric = Fabric(accelerator=device, devices=1, precision="64-true")
    model = model.double()
    schedule = Schedule((Phase(2, make_phases(settings)[-1].objective),), 4, 1e-3)
    return Trainer(model, schedule, x, fabric=fabric, graphs=graphs, compiles=compiles)


def weights(trained):
    trained.fit()
    return torch.cat([each.detach().cpu().flatten() for each in trained.model.parameters()])


class Traced:
    """A backend that counts what it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.mark.parametrize(("method", "options"), COMPOSITIONS)
def test_fused_steps_give_the_weights_of_plain_ones(method, options, monkeypatch):
    traced = Traced()
    monkeypatch.setattr("ddvi.training.fuses", lambda wanted, device: wanted)  # on a CPU too
    monkeypatch.setattr("ddvi.training.fusing", lambda fuses: fusing(fuses, traced))
    plain = weights(trainer(method, options))
    assert not traced.graphs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(weights(trainer(method, options, compiles=True)), plain, rtol=0, atol=1e-10)
    assert traced.graphs > 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("method", "options"), COMPOSITIONS)
def test_fused_and_recorded_steps_give_the_weights_of_plain_ones(method, options):
    both = [weights(trainer(method, options, "cuda", fused, fused, steps=8)) for fused in (False, True)]
    torch.testing.assert_close(*both, rtol=0, atol=1e-8)  # Adam makes steps of gradients that are rounding alone


def test_a_function_is_compiled_inside_of_a_block_alone():
    traced = Traced()

    @fusible
    def twice(x):
        return 2 * x

    assert twice(torch.ones(2)).tolist() == [2, 2]
    with fusing(backend=traced):
        with fusing(False):
            twice(torch.ones(2))
        assert not traced.graphs
        assert twice(torch.ones(2)).tolist() == [2, 2]
    assert traced.graphs == 1


def test_a_function_is_fused_for_more_shapes_than_torch_allows_by_itself():
    traced = Traced()

    @fusible
    def twice(x):
        return 2 * x

    with fusing(backend=traced), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [twice(torch.ones([1] * axes)).dim() for axes in range(1, 15)] == [*range(1, 15)]
    assert traced.graphs == 14


def test_fusing_is_for_cuda():
    assert fuses(True, torch.device("cuda"))
    assert not fuses(True, torch.device("cpu"))
    assert not fuses(False, torch.device("cuda"))
    # Elsewhere a run that asked for it is carried out, and read, without.
    assert choose_device(resolve("digits", "ddvi", "pinwheel", {"compile": True, "device": "cpu"})) == "cpu"


def test_what_torch_cannot_compile_runs_as_it_is_written_and_says_so_once():
    @fusible
    def looks(x):
        return x if x.sum().item() > 0 else -x

    with fusing(backend=TRACED), pytest.warns(UserWarning, match="can't fuse .*looks .*it runs unfused"):
        assert looks(-torch.ones(2)).tolist() == [1, 1]
    with fusing(backend=TRACED), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert looks(-torch.ones(2)).tolist() == [1, 1]
