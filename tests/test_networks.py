"""Layers that stand in for torch's slower ones, against what they stand for."""

import pytest
import torch

from ddvi.networks import Denoiser, Dropout, Linear


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.4])
def test_dropout_keeps_the_mean_and_drops_its_share(probability):
    torch.manual_seed(0)
    layer, count = Dropout(probability), 1_000_001  # no multiple of the four entries that share a random number
    h = layer(torch.ones(count))
    dropped = (h == 0).double()
    error = (probability * (1 - probability) / count) ** 0.5
    assert abs(dropped.mean() - probability) < 5 * error + 2**-16
    assert abs(h.double().mean() - 1) < 5 * error / (1 - probability) ** 2 + 1e-6
    pairs = dropped[:-1] * dropped[1:]
    assert abs(pairs.mean() - probability**2) < 5 * (probability**2 / count) ** 0.5 + 2**-15, "neighbours depend"
    assert torch.equal(layer.eval()(h), h)


def test_dropouts_gradient_is_its_mask():
    torch.manual_seed(0)
    h = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    value = Dropout(0.4)(h)
    (gradient,) = torch.autograd.grad(value.sum(), h)
    torch.testing.assert_close(gradient * h, value)


def test_dropouts_mask_is_what_its_bits_say(monkeypatch):
    layer = Dropout(0.4)
    edge = layer.dropped - 2**15
    bits = torch.tensor([-(2**15), edge - 1, edge, edge + 1, 2**15 - 1], dtype=torch.int16)
    monkeypatch.setattr("ddvi.networks._random_bits", lambda shape, device: bits)
    value = layer(torch.full((5,), 3.0))
    assert value.tolist() == [0, 0, *[pytest.approx(3 * 2**16 / (2**16 - layer.dropped))] * 3]


def test_a_bias_that_is_added_afterwards_changes_nothing(monkeypatch):
    """What CUDA takes, which has no tensors here: output and gradients are those of a plain layer."""
    x, layer = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), Linear(3, 4).double()
    wanted = [x, *layer.parameters()]

    def answers():
        output = layer(x)
        return output, *torch.autograd.grad(output.square().sum(), wanted)

    plain = answers()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.nn.Linear, "forward", None)  # it isn't asked
    for one, other in zip(answers(), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_denoisers_gradient_agrees_with_finite_differences():
    torch.manual_seed(0)
    denoiser = Denoiser(2, 3, 4, steps=5, hidden_size=6, layers=3).double()
    with torch.no_grad():
        denoiser.exit.weight.normal_()
    context = denoiser.context(torch.randn(4, 4, dtype=torch.float64))

    def answer(inputs: torch.Tensor) -> torch.Tensor:
        return denoiser(inputs, denoiser.biases(torch.tensor([1, 5, 3, 3])), context)

    inputs = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(answer, inputs)
    with torch.no_grad():  # where the layers work in place
        in_place = answer(inputs)
    torch.testing.assert_close(in_place, answer(inputs).detach(), atol=1e-12, rtol=0)


def test_biases_of_a_slice_are_those_of_its_levels():
    denoiser = Denoiser(2, 3, 4, steps=5, hidden_size=6)
    for one, several in zip(denoiser.biases(slice(2, 5)), denoiser.biases(torch.tensor([2, 3, 4])), strict=True):
        torch.testing.assert_close(one, several, atol=0, rtol=0)
