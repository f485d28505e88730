"""Diagonal and full Gaussians against torch.distributions."""

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from ddvi import gaussians
from ddvi.gaussians import DiagonalGaussian, FullGaussian, stack, standard_log_prob


@pytest.fixture(autouse=True)
def double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def diagonal(*shape: int) -> DiagonalGaussian:
    return DiagonalGaussian(torch.randn(*shape), torch.rand(*shape) + 0.2)


def full(*shape: int) -> FullGaussian:
    factor = 0.7 * torch.randn(*shape, shape[-1]).tril(-1) + torch.diag_embed(torch.rand(*shape) + 0.3)
    return FullGaussian(torch.randn(*shape), packed(factor))


def packed(factor: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.tril_indices(factor.shape[-1], factor.shape[-1], -1)
    return gaussians.packed(factor.diagonal(dim1=-2, dim2=-1), factor[..., rows, columns])


def reference(gaussian: DiagonalGaussian | FullGaussian) -> torch.distributions.Distribution:
    if isinstance(gaussian, FullGaussian):
        return MultivariateNormal(gaussian.mean, scale_tril=gaussian.factor)
    return Independent(Normal(gaussian.mean, gaussian.variance.sqrt()), 1)


def covariance(gaussian: DiagonalGaussian | FullGaussian) -> torch.Tensor:
    if isinstance(gaussian, FullGaussian):
        return gaussian.factor @ gaussian.factor.mT
    return torch.diag_embed(gaussian.variance)


sizes = pytest.mark.parametrize("size", [1, 2, 3, 5])
kinds = pytest.mark.parametrize("make", [diagonal, full])


@sizes
@kinds
def test_log_density(make, size):
    gaussian, z = make(6, 4, size), torch.randn(3, 6, 4, size)
    torch.testing.assert_close(gaussian.log_prob(z), reference(gaussian).log_prob(z), atol=1e-11, rtol=0)


@sizes
@kinds
def test_divergence_from_a_diagonal_gaussian(make, size):
    gaussian, other = make(7, size), diagonal(7, size)
    expected = kl_divergence(
        MultivariateNormal(other.mean, covariance(other)), MultivariateNormal(gaussian.mean, covariance(gaussian))
    )
    torch.testing.assert_close(gaussian.divergence_from(other), expected, atol=1e-10, rtol=0)
    narrow = other._replace(variance=other.variance[..., :1])
    same = other._replace(variance=narrow.variance.expand_as(other.mean))
    torch.testing.assert_close(gaussian.divergence_from(narrow), gaussian.divergence_from(same))


@sizes
@kinds
def test_an_affine_map_with_noise_has_the_mapped_moments(make, size):
    gaussian = make(5, size)
    factor, shift, noise = torch.randn(5, 1), torch.randn(5, size), torch.rand(5, 1)
    mapped = gaussian.mapped(factor, shift, noise)
    torch.testing.assert_close(mapped.mean, factor * gaussian.mean + shift)
    expected = factor[..., None] ** 2 * covariance(gaussian) + noise[..., None] * torch.eye(size)
    torch.testing.assert_close(covariance(mapped), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_narrow_slanting_gaussian_keeps_its_width_in_single_precision(size):
    factor = (300 * torch.randn(500, size, size)).tril(-1) + torch.diag_embed(torch.rand(500, size) * 1e-2 + 1e-3)
    exact = FullGaussian(torch.zeros(500, size), packed(factor))
    mapped = exact.mapped(torch.tensor(0.9), None, torch.tensor([1e-4]))
    single = FullGaussian(exact.mean.float(), exact.entries.float())
    mapped_single = single.mapped(torch.tensor(0.9).float(), None, torch.tensor([1e-4]).float())
    widths = [gaussian.factor.diagonal(dim1=-2, dim2=-1) for gaussian in (mapped, mapped_single)]
    torch.testing.assert_close(widths[1].double(), widths[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(
        covariance(mapped), 0.81 * covariance(exact) + 1e-4 * torch.eye(size), rtol=1e-12, atol=1e-9
    )


@kinds
def test_draws_have_mean_and_covariance(make):
    count, gaussian = 200_000, make(3)
    z = gaussian.sample((count,))
    deviation = covariance(gaussian).diagonal().sqrt()
    assert ((z.mean(0) - gaussian.mean).abs() < 4.5 * deviation / count**0.5).all()
    error = torch.cov(z.T) - covariance(gaussian)
    assert (error.abs() < 4.5 * (2 / count) ** 0.5 * torch.outer(deviation, deviation)).all()


@kinds
def test_stacking_keeps_each(make):
    parts = [make(4, 2) for _ in range(3)]
    z = torch.randn(4, 2)
    torch.testing.assert_close(stack(parts).log_prob(z), torch.stack([part.log_prob(z) for part in parts]))


def test_standard_density():
    z = torch.randn(5, 3)
    torch.testing.assert_close(standard_log_prob(z), reference(DiagonalGaussian(0 * z, 0 * z + 1)).log_prob(z))


@sizes
def test_gradients_of_the_factorisation(size):
    def value(factor: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        gaussian = FullGaussian(torch.zeros(2, size), packed(factor)).mapped(
            torch.full((2, 1), 0.7), torch.zeros(2, size), noise
        )
        return gaussian.log_prob(torch.ones(2, size))

    inputs = (full(2, size).factor.requires_grad_(), torch.rand(2, 1).requires_grad_())
    assert torch.autograd.gradcheck(value, inputs)


@sizes
def test_a_gaussian_of_a_gaussian_has_the_composed_moments(size):
    outer, inner = full(7, size), full(7, size)
    found = outer.after(inner)
    expected = outer.mean + (outer.factor @ inner.mean.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.mean, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.factor, outer.factor @ inner.factor, atol=1e-12, rtol=0)
