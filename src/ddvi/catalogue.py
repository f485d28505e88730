"""What can be named on the command line, with a line on each; imports no torch, so that `ddvi list` answers at once."""

from __future__ import annotations

from dataclasses import dataclass

DATASETS: dict[str, str] = {
    "digits": "1,797 real handwritten digits, 8 x 8, grey values 0 to 16, embedded (scikit-learn)",
    "mnist": "70,000 handwritten digits, 28 x 28, grey values 0 to 255",
    "fashion_mnist": "70,000 pictures of clothing, 28 x 28, grey values 0 to 255",
    "cifar": "CIFAR-10: 60,000 photographs of ten kinds of things, 3 x 32 x 32, values 0 to 255",
}


@dataclass(frozen=True)
class NamedPrior:
    """A prior that can be named.

    Args:
        description: one line for `ddvi list`.
        source: the class, as module:name; its constructor takes latent_size, parts and width.
        smallest_latent_size: the least D that it can have.
    """

    description: str
    source: str
    smallest_latent_size: int = 2


PRIORS: dict[str, NamedPrior] = {
    "pinwheel": NamedPrior("arms that wind outwards, one part per class", "ddvi.priors:Pinwheel"),
    "swiss_roll": NamedPrior("a spiral from the centre outwards, one part per class", "ddvi.priors:SwissRoll"),
    "less_noisy_square": NamedPrior("the perimeter of a square, one part per class", "ddvi.priors:LessNoisySquare"),
    "gaussian": NamedPrior("standard Gaussian", "ddvi.priors:StandardGaussian", 1),
    "gaussian_mixture": NamedPrior("elongated Gaussians around a circle, one per class", "ddvi.priors:GaussianMixture"),
}

OBJECTIVES: dict[str, str] = {
    "elbo": "the evidence lower bound, differentiated through the draws",
    "importance_weighted": "the importance-weighted bound with K = samples draws",
    "wake_sleep": "the paper's alternation of one ELBO step and sleep_steps steps on fantasies",
    "reweighted_wake_sleep": "K = samples draws weighed and some resampled, plus fantasies; no gradient through draws",
    "marginal_likelihood": "log p(x) by draws of the prior, which needs no posterior; for D = 2",
    "adversarial": "reconstruction, and a discriminator between encoded data and the prior (aae alone)",
}

LIKELIHOODS: dict[str, str] = {
    "auto": "chosen by looking at the data; the choice is printed",
    "bernoulli": "binary entries; grey values in [0, 1] are binarised afresh at each pass",
    "gaussian": "real entries with a learned scale; images dequantised, tables standardised per feature",
    "poisson": "counts",
    "negative_binomial": "counts that vary more than Poisson counts do, with a learned dispersion per feature",
    "categorical": "categories 0, 1, 2, …",
}

NOISE_SCHEDULES: dict[str, str] = {
    "log_snr": "log signal-to-noise ratio linear from 8 to −4",
    "cosine": "signal variance cos² of the time",
    "linear_beta": "the paper's: step variances linear from 1e-4 to 0.02",
    "learned": "log_snr's levels to begin with, learnt with the posterior; without prior_denoiser and guidance",
}

MEASURES: dict[str, tuple[str, str]] = {
    "log_likelihood": ("exact log p(x), nats per example, by quadrature (D = 2)", "higher"),
    "log_likelihood_iw": ("importance-weighted bound with many draws in the place of log p(x), nats (D > 2)", "higher"),
    "elbo": ("mean single-sample bound, nats per example", "higher"),
    "iw_bound": ("importance-weighted bound with K draws, nats per example", "higher"),
    "inference_gap": ("log_likelihood − elbo on the same examples: what the bound loses", "lower"),
    "marginal_gap": ("KL(q(z|x) ‖ p(z|x)), nats", "lower"),
    "inference_gap_iw": (
        "log_likelihood_iw − elbo on the same examples: too small where q is far from p(z|x)",
        "lower",
    ),
    "marginal_gap_iw": (
        "KL(q(z|x) ‖ p(z|x)) by log_likelihood_iw, nats: too small where q is far from p(z|x)",
        "lower",
    ),
    "bits_per_dimension": ("−log p(x) per pixel value in bits, of dequantised images", "lower"),
    "accuracy": ("share of test examples whose label argmax q(l|x) is", "higher"),
    "calibration_error": ("mean distance of confidence and accuracy, 15 bins", "lower"),
    "joint_log_likelihood": ("exact log p(x, l) at the true label, nats per example (D = 2)", "higher"),
    "latent_nll": ("does the aggregate posterior fill the prior? nats", "lower"),
    "mmd": ("distance of the model's images from test images", "lower"),
    "knn_accuracy": ("20-nearest-neighbour classification of test latents from training latents", "higher"),
    "nmi": ("normalised mutual information of the prior's parts with the labels", "higher"),
    "purity": ("share of examples in their cluster's most frequent class", "higher"),
    "completeness": ("are a class's examples in one cluster?", "higher"),
}
"""What a run is judged by: meaning, and whether higher or lower is better."""

DENSITIES: tuple[str, ...] = ("log_likelihood", "log_likelihood_iw", "elbo", "iw_bound", "joint_log_likelihood")
"""The measures that change with the units of continuous data."""

QUICK_SAYS: str = "evaluation=quick: capped examples, draws and nodes; evaluation=full is the measure to report"
