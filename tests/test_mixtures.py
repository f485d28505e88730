"""Neighbourhoods against the sum over all nodes."""

import math

import pytest
import torch

from ddvi.mixtures import Neighbourhoods, Nodes, log_mixture, log_sum_exp_


@pytest.fixture(scope="module")
def nodes() -> Nodes:
    """A spiral of 2,000 nodes in five rows, with weights from 1 to e^-60."""
    t = torch.linspace(1, 6, 2000, dtype=torch.float64)
    values = 25 * t * (2 * t).cos(), 25 * t * (2 * t).sin(), -60 * (t - 2).abs().clamp_max(1)
    return Nodes(*(value.view(5, 400) for value in values))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_only_nodes_that_count_are_left_out(nodes, dtype, tolerance):
    torch.manual_seed(0)
    everywhere = 400 * torch.rand(3000, 2, dtype=torch.float64) - 200  # half of it beyond all cells
    near = torch.stack([nodes.x.flatten(), nodes.y.flatten()], -1) + torch.randn(2000, 2, dtype=torch.float64)
    z = torch.cat([everywhere, near]).to(dtype).requires_grad_()
    every = nodes.to(z)
    value = log_mixture(z, Neighbourhoods(nodes, z).blocks(z))
    truth = log_mixture(z, every.blocks(len(z)))
    torch.testing.assert_close(value, truth, atol=tolerance, rtol=tolerance)
    found, expected = (torch.autograd.grad(each.sum(), z)[0] for each in (value, truth))
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_the_sum_and_its_gradient_are_those_of_its_terms(nodes):
    torch.manual_seed(0)
    z = 100 * torch.randn(200, 2, dtype=torch.float64).requires_grad_()
    row = torch.randint(5, (200,))
    distance = (nodes.x[row] - z[:, :1]) ** 2 + (nodes.y[row] - z[:, 1:]) ** 2
    truth = (nodes.log_weight[row] - distance).logsumexp(-1)
    value = log_mixture(z, nodes.blocks(200, row))
    torch.testing.assert_close(value, truth, atol=1e-9, rtol=1e-12)
    found, expected = (torch.autograd.grad(each.sum(), z)[0] for each in (value, truth))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_every_latent_is_in_one_block(nodes):
    torch.manual_seed(0)
    z = 150 * torch.randn(5000, 2, dtype=torch.float64)
    blocks = list(Neighbourhoods(nodes, z).blocks(z))
    assert torch.cat([block.latents for block in blocks]).sort().values.equal(torch.arange(5000))
    entries = sum(math.prod(torch.broadcast_shapes((len(block.latents), 1), block.x.shape)) for block in blocks)
    assert entries < 0.75 * 5000 * 2000
    assert not list(Neighbourhoods(nodes, z).blocks(z[:0]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_a_sum_without_its_smallest_terms_is_the_sum(dtype, tolerance):
    torch.manual_seed(0)
    terms = 300 * torch.randn(20, 1000, dtype=dtype) - 5000
    terms[0] = -math.inf
    terms[1, 1:] = -math.inf
    expected = terms.logsumexp(-1)
    assert expected[0] == -math.inf
    torch.testing.assert_close(log_sum_exp_(terms, terms.amax(-1)), expected, atol=0, rtol=tolerance)
