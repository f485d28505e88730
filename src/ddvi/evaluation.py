"""The measures that a run is judged by, and what they are shown; see `ddvi.catalogue.MEASURES` for what they say.

Latents are one draw from q(z|x) per example, the same for every method. Bounds are at weight 1 whatever training used.
Data that is random by nature (binarised, dequantised) is drawn once, with a seed that no run can choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddvi.catalogue import DENSITIES
from ddvi.data import Dataset
from ddvi.evidence import exact_log_likelihood
from ddvi.likelihoods import means
from ddvi.measures import calibration_error, latent_nll, maximum_mean_discrepancy
from ddvi.model import LatentVariableModel
from ddvi.preprocessing import Dequantise, Preprocessing
from ddvi.priors import Prior, as_prior
from ddvi.randomness import derive_seed, generator, portable, seeded

_FIXED_SEED = 0
_CHUNK = 1000
_DRAWS_AT_ONCE = 10_000
NEIGHBOURS = 20


@dataclass(frozen=True)
class Effort:
    """How many examples, draws and nodes the measures take."""

    examples: int | None = None
    elbo_draws: int = 10
    iw_examples: int = 1000
    iw_draws: int = 1000
    stand_in_examples: int = 500
    stand_in_draws: int = 5000
    gap_examples: int = 500
    gap_draws: int = 4
    gap_auxiliary_draws: int = 250
    prior_draws: int = 10_000
    nodes: int = 50_000
    doublings: int = 12


FULL = Effort()
QUICK = Effort(
    examples=1000,
    iw_examples=200,
    iw_draws=100,
    stand_in_examples=100,
    stand_in_draws=500,
    gap_examples=100,
    gap_auxiliary_draws=50,
    prior_draws=1000,
    nodes=10_000,
    doublings=8,
)


def evaluate(
    model: LatentVariableModel,
    dataset: Dataset,
    *,
    quick: bool = False,
    seed: int = 0,
    semi_supervised: bool = False,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Every measure that applies to the model on the data set's test part.

    Args:
        model: put into evaluation mode.
        dataset: test part read here; the training part only for the neighbours' labels.
        quick: cap examples, draws and nodes.
        seed: of the draws, not of the data.
        semi_supervised: whether the model has learnt from labels, and is to be judged as a classifier too.
        report: told what is being computed.

    Returns:
        JSON-able values by name: those of `MEASURES` that apply, with counts and standard errors beside them.

    Example:
        >>> table = torch.arange(60).view(10, 6) % 2
        >>> dataset = Dataset("mine", table, table, None, None, (), None, {})
        >>> metrics = evaluate(model, dataset, quick=True)
        >>> metrics["elbo"] < metrics["iw_bound"] < metrics["log_likelihood"] + 0.1
        True
    """
    effort = QUICK if quick else FULL
    tell = report or (lambda text: None)
    model.eval()
    with torch.no_grad(), seeded(seed, "evaluation"):
        raw = _on_device(model, dataset.test_x[: effort.examples])
        x = prepared(model.preprocessing, raw)
        metrics: dict[str, Any] = {"test_examples": len(x)}
        if model.posterior.has_density:
            tell("evidence lower bound")
            metrics |= _bounds(model, x, effort, tell)
        metrics |= _log_likelihood(model, x, effort, tell)
        elbo, log_likelihood = metrics.pop("_elbo", None), metrics.pop("_log_likelihood", None)
        if elbo is not None and log_likelihood is not None:
            tell("gaps")
            kind = "gap" if "log_likelihood" in metrics else "gap_iw"
            metrics |= _gaps(model, x, elbo, log_likelihood, effort, kind)
        metrics |= _bits_per_dimension(model, x, log_likelihood)
        if semi_supervised:
            tell("classification")
            metrics |= classification(model, dataset, x, effort)
        tell("latent space")
        z = latents(model, x, seed)
        metrics |= _latent_measures(model, dataset, z, effort, seed)
        if dataset.maximum is not None:
            tell("maximum mean discrepancy")
            metrics |= _image_discrepancy(model, raw, dataset.maximum, effort)
    # Runs whose training examples differ standardise by different units; the data's own are the same for all.
    return metrics | {name: metrics[name] - model.preprocessing.log_volume for name in DENSITIES if name in metrics}


def prepared(preprocessing: Preprocessing, raw: Tensor) -> Tensor:
    """Observations from raw test data (N, *event): what is random in them is drawn once and for all, on any device."""
    with seeded(_FIXED_SEED, "test set"), portable():
        return torch.cat([preprocessing(part) for part in raw.split(_CHUNK)])


@torch.no_grad()
def latents(model: LatentVariableModel, x: Tensor, seed: int = 0) -> Tensor:
    """One draw from q(z|x) for each observation x (N, *event), as `prepared` gives them: (N, D), on the CPU.

    Example:
        >>> latents(model, x, seed=1).shape
        torch.Size([3, 2])
    """
    model.eval()
    with seeded(seed, "latents"):
        parts = [model.latent(part) for part in x.split(_CHUNK)]
    return torch.cat(parts).cpu()


def _on_device(model: LatentVariableModel, value: Tensor) -> Tensor:
    return value.to(next(model.parameters()).device)


def _mean_and_error(name: str, values: Tensor) -> dict[str, float]:
    """Mean over examples (N,) and its standard error."""
    spread = values.std().item() if len(values) > 1 else math.nan
    return {name: values.mean().item(), f"{name}_standard_error": spread / math.sqrt(len(values))}


def _bounds(model: LatentVariableModel, x: Tensor, effort: Effort, tell: Callable[[str], None]) -> dict[str, Any]:
    at_once = max(1, _DRAWS_AT_ONCE // (effort.elbo_draws * model.summed))
    elbo = torch.cat([model.log_weights(part, effort.elbo_draws).double().mean(0) for part in x.split(at_once)])
    tell("importance-weighted bound")
    chosen = x[_permutation(x)[: effort.iw_examples]]
    bound = importance_weighted_bound(model, chosen, effort.iw_draws)
    return {
        **_mean_and_error("elbo", elbo),
        "_elbo": elbo,
        "elbo_draws": effort.elbo_draws,
        **_mean_and_error("iw_bound", bound),
        "iw_bound_draws": effort.iw_draws,
        "iw_bound_examples": len(chosen),
    }


def _permutation(x: Tensor) -> Tensor:
    """The fixed order of test examples (N,) whose first few stand for all."""
    return torch.randperm(len(x), generator=generator(_FIXED_SEED, "permutation")).to(x.device)


def importance_weighted_bound(model: LatentVariableModel, x: Tensor, draws: int) -> Tensor:
    """log 1/K Σ_k w_k of each x (N, *event): (N,), K for each label, in pieces that fit into memory."""
    most = max(1, _DRAWS_AT_ONCE // model.summed)
    counts = [min(most, draws - done) for done in range(0, draws, most)]
    bounds = []
    for part in x.split(max(1, most // draws)):
        pieces = [model.importance_weighted_bound(part, n).double() + math.log(n / draws) for n in counts]
        bounds.append(torch.stack(pieces).logsumexp(0))
    return torch.cat(bounds)


def _log_likelihood(
    model: LatentVariableModel, x: Tensor, effort: Effort, tell: Callable[[str], None]
) -> dict[str, Any]:
    if model.posterior.latent_size == 2:
        tell("exact log-likelihood")
        evidence = exact_log_likelihood(
            model.prior,
            model.likelihood,
            x,
            nodes=effort.nodes,
            doublings=effort.doublings,
            report=lambda text: tell(f"exact log-likelihood: {text}"),
        )
        return {
            **_mean_and_error("log_likelihood", evidence.log_likelihood),
            "log_likelihood_nodes": evidence.nodes,
            "log_likelihood_change": evidence.change.mean().item(),
            "log_likelihood_largest_change": evidence.change.max().item(),
            "_log_likelihood": evidence.log_likelihood[_permutation(x)],
        }
    if not model.posterior.has_density:
        return {}
    tell("importance-weighted bound in the place of the log-likelihood")
    chosen = x[_permutation(x)[: effort.stand_in_examples]]
    bound = importance_weighted_bound(model, chosen, effort.stand_in_draws)
    return {
        **_mean_and_error("log_likelihood_iw", bound),
        "log_likelihood_iw_draws": effort.stand_in_draws,
        "log_likelihood_iw_examples": len(chosen),
        "_log_likelihood": bound,
    }


def _gaps(
    model: LatentVariableModel, x: Tensor, elbo: Tensor, log_likelihood: Tensor, effort: Effort, kind: str
) -> dict[str, Any]:
    """What the bound loses, on all examples, and KL(q(z|x) ‖ p(z|x)), on the first of the fixed permutation, in nats.

    Of x (N, *event) and the bound (N,), with log p(x), or what stands in for it, of the first (M,) of that permutation;
    `kind` ends the measures' names.
    """
    rows = _permutation(x)[: len(log_likelihood)]
    inference_gap = (log_likelihood - elbo[rows]).mean().item()
    if model.classifier is None and not model.posterior(x[:1]).auxiliaries:
        return {f"inference_{kind}": inference_gap, f"marginal_{kind}": inference_gap}
    gaps = []
    for part in x[rows[: effort.gap_examples]].split(10):
        z = torch.stack([model.latent(part) for _ in range(effort.gap_draws)])
        log_q = model.log_posterior(part, z, effort.gap_auxiliary_draws)
        # KL = E_q[ log q(z|x) − log p(x, z) ] + log p(x)
        gaps.append((log_q - model.likelihood.log_prob(part, z) - model.prior.log_prob(z)).double().mean(0))
    gap = torch.cat(gaps)
    gap = gap + log_likelihood[: len(gap)]
    return {
        f"inference_{kind}": inference_gap,
        **_mean_and_error(f"marginal_{kind}", gap),
        f"marginal_{kind}_draws": effort.gap_draws,
        f"marginal_{kind}_auxiliary_draws": effort.gap_auxiliary_draws,
        f"marginal_{kind}_examples": len(gap),
    }


def classification(model: LatentVariableModel, dataset: Dataset, x: Tensor, effort: Effort) -> dict[str, Any]:
    """Accuracy, calibration and confusion of argmax q(l|x), and for D = 2 the exact log p(x, l) at the true label."""
    if dataset.test_y is None:
        return {}
    known = (dataset.test_y[: len(x)] >= 0).nonzero()[:, 0]
    if not len(known):
        return {}
    labels = dataset.test_y[known]
    probability = torch.cat([model.classify(part).exp().cpu() for part in x[known.to(x.device)].split(_CHUNK)])
    confidence, guess = probability.max(-1)
    classes = len(dataset.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion.index_put_((labels, guess), torch.ones_like(labels), accumulate=True)
    metrics = {
        **_mean_and_error("accuracy", (guess == labels).double()),
        "calibration_error": calibration_error(confidence, guess == labels),
        "confusion_matrix": confusion.tolist(),
    }
    if model.posterior.latent_size == 2:
        joint = torch.cat(
            [
                exact_log_likelihood(
                    as_prior(_Part(model.prior, label)).to(x.device),
                    model.likelihood,
                    x[known][labels == label],
                    nodes=effort.nodes // classes,
                    doublings=effort.doublings,
                ).log_likelihood
                for label in range(classes)
                if (labels == label).any()
            ]
        )
        metrics |= _mean_and_error("joint_log_likelihood", joint - math.log(model.prior.parts or 1))
    return metrics


class _Part:
    """p(z | l) as a prior of its own."""

    def __init__(self, prior: Prior, label: int) -> None:
        self.prior = prior
        self.label = label

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.prior.sample(sample_shape, torch.tensor(self.label))

    def log_prob(self, z: Tensor) -> Tensor:
        return self.prior.log_prob(z, torch.tensor(self.label, device=z.device))


def _bits_per_dimension(model: LatentVariableModel, x: Tensor, log_likelihood: Tensor | None) -> dict[str, Any]:
    if log_likelihood is None or not isinstance(model.preprocessing, Dequantise):
        return {}
    nats = -log_likelihood.mean().item() / x[0].numel()
    # A density on [0, 1] to a probability of one of the levels.
    return {"bits_per_dimension": nats / math.log(2) + math.log2(model.preprocessing.levels)}


def _latent_measures(
    model: LatentVariableModel, dataset: Dataset, z: Tensor, effort: Effort, seed: int
) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    if z.shape[1] <= 3:
        metrics |= latent_nll(z, model.prior.sample((effort.prior_draws,)).cpu())
    if dataset.test_y is None or dataset.train_y is None:
        return metrics
    labels = dataset.test_y[: len(z)]
    known = labels >= 0
    if not known.any() or not (dataset.train_y >= 0).any():
        return metrics
    metrics |= _neighbours(model, dataset, z[known], labels[known], seed)
    return metrics | clustering(model, z[known], labels[known], len(dataset.classes), seed)


def _neighbours(model: LatentVariableModel, dataset: Dataset, z: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    from sklearn.neighbors import KNeighborsClassifier

    assert dataset.train_y is not None
    known = dataset.train_y >= 0
    train_labels = dataset.train_y[known]
    if len(train_labels) < NEIGHBOURS:
        return {}
    train_x = prepared(model.preprocessing, _on_device(model, dataset.train_x[known]))
    train_z = latents(model, train_x, derive_seed(seed, "train"))
    classifier = KNeighborsClassifier(NEIGHBOURS).fit(train_z.numpy(), train_labels.numpy())
    return {"knn_accuracy": float(classifier.score(z.numpy(), labels.numpy()))}


def clustering(model: LatentVariableModel, z: Tensor, labels: Tensor, classes: int, seed: int) -> dict[str, float]:
    """Clusters argmax_l p(l) p(z|l) of priors with parts that differ, else k-means, held against labels (N,)."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import completeness_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    clusters = None
    if model.prior.parts:
        parts = torch.arange(model.prior.parts, device=next(model.parameters()).device)[:, None]
        scores = model.prior.log_prob(_on_device(model, z)[None], parts)
        if bool((scores != scores[:1]).any()):
            clusters = scores.argmax(0).cpu().numpy()
    if clusters is None:
        random_state = derive_seed(seed, "k-means") % 2**32
        clusters = KMeans(min(classes, len(z)), n_init="auto", random_state=random_state).fit_predict(
            z.double().numpy()
        )
    truth = labels.numpy()
    table = contingency_matrix(truth, clusters)
    return {
        "nmi": float(normalized_mutual_info_score(truth, clusters)),
        "purity": float(table.max(axis=0).sum() / table.sum()),
        "completeness": float(completeness_score(truth, clusters)),
    }


def _image_discrepancy(model: LatentVariableModel, raw: Tensor, maximum: float, effort: Effort) -> dict[str, Any]:
    """Between means of the model and raw test images (N, *event), whose values go up to a maximum."""
    count = min(effort.prior_draws, len(raw))
    z = model.prior.sample((count,))
    # All images are compared in [0, 1], standardised ones and counts too.
    restore, white = model.preprocessing.restore, model.preprocessing.white(maximum)
    images = torch.cat([restore(means(model.likelihood, part)).flatten(1) for part in z.split(_CHUNK)]) / white
    real = restore(model.preprocessing.picture(raw[:count])).flatten(1) / white
    return {"mmd": maximum_mean_discrepancy(images, real), "mmd_examples": count}
