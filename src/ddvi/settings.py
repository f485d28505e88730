"""All settings of a run: names, meaning, defaults, allowed values; torch-free, so that a typo is refused at once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddvi.catalogue import DATASETS, LIKELIHOODS, NOISE_SCHEDULES, OBJECTIVES, PRIORS
from ddvi.errors import InputError, check_name
from ddvi.methods import ALIASES, METHODS, PAPER

OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "importance_weighted": {"samples": 8},
    "wake_sleep": {"sleep_weight": 1.0, "sleep_levels": 1},
    "reweighted_wake_sleep": {
        "samples": 4,
        "prior_samples": 1024,
        "resampled": 4,
        "decoded": 4,
        "sleep_weight": 0.3,
    },
    "marginal_likelihood": {"samples": 2000},
}
LABELLED_OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "reweighted_wake_sleep": {"samples": 8, "prior_samples": 512, "decoded": 1, "variance_weight": 0.0}
}
"""What differs where labels are learnt too: that with which the other settings of it were chosen."""
_BOUND = ("samples", "kl_weight", "kl_rise", "prior_weight", "label_rate", "path_gradient")
_SLEEP = ("sleep_weight", "sleep_levels", "fantasies")
_WEIGHED = ("samples", "prior_samples", "resampled", "decoded", "variance_weight")
OBJECTIVE_SETTINGS: dict[str, tuple[str, ...]] = {
    "elbo": (*_BOUND, *_SLEEP),
    "importance_weighted": (*_BOUND, "variance_weight", *_SLEEP),
    "wake_sleep": (*_BOUND, *_SLEEP, "sleep_steps"),
    "reweighted_wake_sleep": (*_WEIGHED, "label_rate", *_SLEEP),
    "marginal_likelihood": ("samples", "sleep_levels"),
    "adversarial": ("adversarial_weight",),
}
"""What each objective reads of the settings that are an objective's."""
_LABELS = (
    *("n_labels", "label_temperature", "classifier_weight"),
    *("agreement_weight", "agreement_radius", "information_weight"),
)
"""What is read by any objective where labels are learnt from."""
DATASET_ALIASES = {"cifar10": "cifar"}
SEMI = "_semi"
N_LABELS = {"mnist": 1000, "fashion_mnist": 1000, "cifar": 10_000, "digits": 100}
"""Labels that a semi-supervised run sees by default."""


def setting(
    default: Any,
    meaning: str,
    *,
    choices: Iterable[str] = (),
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A field of `Settings`, with what `ddvi list` says of it and what is allowed."""
    metadata = {"meaning": meaning, "choices": choices, "minimum": minimum, "above": above, "maximum": maximum}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run. `resolve` makes one from what a user wrote."""

    dataset: str = setting("digits", "a name from the list, or the path of a .npz or .npy file")
    method: str = setting("ddvi", "the approximate posterior", choices=METHODS)
    prior: str = setting("pinwheel", "p(z)", choices=PRIORS)

    epochs: int = setting(100, "passes over the training data", minimum=1)
    batch_size: int = setting(128, "examples per step", minimum=1)
    lr: float = setting(1e-3, "Adam's learning rate at its highest; of each method and objective its own", above=0)
    schedule: str = setting("cosine", "of the learning rate", choices=("cosine", "constant"))
    clip_norm: float = setting(10.0, "largest gradient norm; 0 switches clipping off", minimum=0)
    seed: int = setting(0, "of everything random", minimum=0)

    semi_supervised: bool = setting(False, "learn from n_labels labels too; said by _semi behind a method's name")
    n_labels: int = setting(0, "labels that a semi-supervised run may see; 0 takes all that are known", minimum=0)
    classifier_weight: float = setting(50.0, "semi-supervised: weight of log q(l|x) of labelled examples", minimum=0)
    agreement_weight: float = setting(
        0.0, "semi-supervised: weight of q(l|x) agreeing with itself about a disturbed x", minimum=0
    )
    agreement_radius: float = setting(1.0, "semi-supervised: length of the disturbance, in units of x", above=0)
    information_weight: float = setting(
        0.0, "semi-supervised: weight of q(l|x) being sure of each x and, on average, as p(l)", minimum=0
    )
    label_temperature: float = setting(
        1.0, "semi-supervised: temperature at which q(l|x) learns beside the bound; 20 in aae", above=0
    )
    label_rate: float = setting(
        1.0, "semi-supervised: how far q(l|x) goes towards the decoder's verdict at once", minimum=0, maximum=1
    )
    objective: str = setting(
        "auto", "what training maximises; auto takes the method's own", choices=("auto", *OBJECTIVES)
    )
    samples: int = setting(
        1, "K, draws per example in training; 8 where they are weighed, 4 beside draws of the prior", minimum=1
    )
    prior_samples: int = setting(
        0, "draws of the prior that a batch shares; 1,024 in reweighted_wake_sleep where D is 1 or 2", minimum=0
    )
    resampled: int = setting(
        1, "of all draws those that the posterior learns from; 4 in reweighted_wake_sleep", minimum=1
    )
    decoded: int = setting(
        1,
        "of those, at most, that the decoder learns from; 0: all draws by weight; 4 in reweighted_wake_sleep",
        minimum=0,
    )
    variance_weight: float = setting(
        0.0,
        "of the log-variance loss, up to which it rises; 0.25 in ddvi's reweighted_wake_sleep without labels",
        minimum=0,
    )
    kl_weight: float = setting(1.0, "weight of the divergence in training; 1 is the bound", minimum=0)
    kl_rise: float = setting(0.0, "share of training over which kl_weight rises linearly from 0", minimum=0, maximum=1)
    prior_weight: float = setting(1.0, "weight of log p(z) beside the rest of the divergence", minimum=0)
    path_gradient: bool = setting(False, "bounds: score log q with parameters held fixed")
    sleep_steps: int = setting(3, "wake_sleep: steps on fantasies per step on data", minimum=0)
    sleep_weight: float = setting(
        0.0, "of the sleep term of any objective but two; 1 in wake_sleep, 0.3 in reweighted_wake_sleep", minimum=0
    )
    sleep_levels: int = setting(
        0, "terms of the chain's bound drawn per example, 0 for all of them; 1 in wake_sleep", minimum=0
    )
    fantasies: int = setting(1, "for each example of data where both are learnt from", minimum=1)
    warmup: int = setting(0, "ddvi: epochs with the simpler model first", minimum=0)
    warmup_kl_weight: float = setting(1.0, "kl_weight of the simpler model", minimum=0)
    freeze_decoder: int = setting(0, "epochs with a frozen decoder, after warmup", minimum=0)
    decoder: str = setting("", "folder of a run whose decoder is taken and kept as it is")
    adversarial_weight: float = setting(5.0, "aae: weight of fooling the discriminator, in nats", above=0)

    latent_size: int = setting(2, "D", minimum=1)
    hidden_size: int = setting(500, "width of encoder and decoder", minimum=1)
    network: str = setting(
        "auto", "auto takes convolutions for colour images", choices=("auto", "dense", "convolutional")
    )
    dropout: float = setting(0.0, "in dense encoders and decoders", minimum=0, maximum=0.9)
    likelihood: str = setting("auto", "p(x|z)", choices=LIKELIHOODS)
    steps: int = setting(10, "ddvi: T, the length of the chain", minimum=1)
    noise: str = setting("log_snr", "ddvi: the noise schedule", choices=NOISE_SCHEDULES)
    denoiser_size: int = setting(128, "ddvi: width of the denoiser", minimum=1)
    denoiser_layers: int = setting(3, "ddvi: its hidden layers", minimum=1)
    covariance: str = setting(
        "auto", "ddvi: of the steps; auto takes full ones up to D = 4", choices=("auto", "diagonal", "full")
    )
    prior_denoiser: bool = setting(True, "ddvi, D = 2: give the denoiser E[z_0|z_t] under the prior as an input")
    level_weights: str = setting(
        "bound",
        "ddvi: of the chain's levels in denoising; plain weighs |z_0 − ẑ|² of all alike",
        choices=("bound", "plain"),
    )
    guidance: int = setting(
        0,
        "ddvi: Newton steps by which the likelihood guides the chain's last step; 0 leaves it to the network",
        minimum=0,
    )
    laplace: int = setting(
        0,
        "Newton steps, twice, to the coordinates in which the posterior works: Laplace's approximation; 0 for z itself",
        minimum=0,
    )
    flow_layers: int = setting(4, "iaf_vae, nsf_vae, h_iaf_vae: layers of a flow", minimum=1)
    context_size: int = setting(64, "iaf_vae, nsf_vae, h_iaf_vae: what a flow's layers see of x", minimum=1)
    spline_bins: int = setting(8, "nsf_vae: bins of a spline", minimum=2)
    parts: int = setting(10, "parts of a structured prior; the number of classes where there are labels", minimum=1)
    width: float = setting(0.0, "noise that widens a prior's curve; 0 takes the prior's own", minimum=0)

    data_root: str = setting("", "folder with the data; downloaded into a cache if empty")
    limit: int = setting(0, "caps training and test examples; 0 takes all", minimum=0)
    validation: int = setting(1000, "training examples held out for the history", minimum=0)
    measured_on: str = setting(
        "test", "validation leaves the test examples alone, for a search", choices=("test", "validation")
    )
    evaluation: str = setting("full", "quick caps examples, draws and nodes", choices=("quick", "full"))
    report: bool = setting(True, "write report.html when all is done")
    logger: str = setting("none", "who else watches the training", choices=("none", "tensorboard", "wandb", "mlflow"))
    device: str = setting(
        "auto", "auto takes an accelerator where there is one", choices=("auto", "cpu", "cuda", "mps")
    )
    graphs: bool = setting(True, "cuda: record what a step does once, and launch it as one")
    compile: bool = setting(False, "cuda: fuse a chain's small operations by torch.compile, half a minute once")
    devices: int = setting(1, "how many train together, a process each, on batches shared out among them", minimum=1)
    precision: str = setting(
        "32",
        "floating-point numbers; tf32 rounds what matrix products take on CUDA, and is 32 elsewhere",
        choices=("32", "64", "tf32", "bf16"),
    )
    threads: int = setting(0, "CPU threads; 0 takes torch's own choice", minimum=0)
    out: str = setting("", "the run folder; runs/DATASET/METHOD/PRIOR/seedN if empty")
    resume: bool = setting(False, "go on with an interrupted run in the same folder")
    overwrite: bool = setting(False, "start anew over what the folder holds")
    preset: str = setting(
        "default",
        "paper takes the settings of the paper's code, study 5 passes over MNIST",
        choices=("default", "paper", "study"),
    )

    @property
    def full_dataset(self) -> str:
        """The data set's name, a file's without its folder, and `_semi` where labels are learnt from."""
        name = self.dataset if self.dataset in DATASETS else Path(self.dataset).stem
        return name + SEMI * self.semi_supervised

    @property
    def full_method(self) -> str:
        """The method's name, and `_semi` where labels are learnt from."""
        return self.method + SEMI * self.semi_supervised

    @property
    def folder(self) -> Path:
        """The run folder."""
        if self.out:
            return Path(self.out)
        return Path("runs", self.full_dataset, self.full_method, self.prior, f"seed{self.seed}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name, in order."""
        return dataclasses.asdict(self)


FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(Settings)}
FREE_ON_RESUME = {
    *("out", "data_root", "device", "graphs", "compile", "devices", "threads", "resume", "overwrite"),
    *("evaluation", "report", "logger"),
}
"""Settings that don't decide what is learnt, and may differ when a run is resumed."""

DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 150, "hidden_size": 256, "batch_size": 64, "validation": 100},
    "cifar": {"epochs": 40},
}
_SEARCHED = ("mnist", "fashion_mnist", "digits")
"""Data sets that the methods' learning rates were searched for, or are like; elsewhere it is the general default."""
STUDY_EPOCHS = 5
"""Passes of every method under preset=study: with them and its evaluation, a run of DDVI, the slowest, takes some five
minutes on 2 cores."""
PIXEL_VALUES = {"mnist": 784, "fashion_mnist": 784, "digits": 64, "cifar": 3072}
"""The paper's reconstruction is a mean over pixel values: its weights in nats are that many times larger."""

_IN_PIXELS = {"kl_weight", "warmup_kl_weight", "sleep_weight", "adversarial_weight", "classifier_weight"}


def _paper(dataset: str, method: str, semi: bool, objective: str | None) -> dict[str, Any]:
    """Settings of the paper's code, weights converted to nats; for another objective than its own nothing of sleep."""
    settings: dict[str, Any] = {**PAPER, **METHODS[method].paper, **(METHODS[method].paper_semi if semi else {})}
    if objective not in (None, settings.get("objective")):
        settings = {name: value for name, value in settings.items() if name not in (*_SLEEP, "sleep_steps")}
    for name in _IN_PIXELS & set(settings):
        settings[name] *= PIXEL_VALUES.get(dataset, 1)
    if dataset == "cifar":
        settings["dropout"] = 0.0
        if method == "aae":
            settings["epochs"] = 100
    return settings


def resolve(dataset: str, method: str, prior: str, overrides: Mapping[str, str] | None = None) -> Settings:
    """The settings of a run: general defaults, then the data set's, the method's, the preset's, then the user's.

    Args:
        dataset: a name or a path.
        method: a method or one of its aliases.
        prior: a prior's name.
        overrides: what the user set, as text or as values.

    Raises:
        InputError: an unknown name or value, with the nearest right one.
    """
    semi = method.endswith(SEMI)
    named = dataset.removesuffix(SEMI)
    if method.removesuffix(SEMI) not in (methods := (*METHODS, *ALIASES)):
        check_name("method", method, [name + SEMI * (semi or dataset.endswith(SEMI)) for name in methods])
    if DATASET_ALIASES.get(named, named) in DATASETS:
        if semi != dataset.endswith(SEMI):
            plain = method.removesuffix(SEMI)
            raise InputError(
                f"'{dataset} {method}' mixes learning with and without labels; write '{named} {plain}' or"
                f" '{named}{SEMI} {plain}{SEMI}'"
            )
        dataset = named
    dataset = DATASET_ALIASES.get(dataset, dataset)
    if dataset not in DATASETS and (dataset.endswith((".npz", ".npy")) or os.path.isfile(dataset)):
        dataset = os.path.abspath(os.path.expanduser(dataset))
        if not os.path.isfile(dataset):
            raise InputError(f"there is no file '{dataset}': give the path of a file that exists")
    elif dataset not in DATASETS:
        check_name(
            "dataset", dataset, [name + SEMI * semi for name in DATASETS], "give the path of a .npz or .npy file"
        )
    method = method.removesuffix(SEMI)
    method = ALIASES.get(method, method)
    check_name("prior", prior, PRIORS)
    given = {check_name("setting", name, FIELDS): value for name, value in (overrides or {}).items()}
    for name in ("dataset", "method", "prior", "semi_supervised"):
        if name in given:
            raise InputError(
                f"'{name}' is given by its place in the command (DATASET ALGORITHM PRIOR), not as {name}=…"
            )
    values = {name: convert(name, value) for name, value in given.items()}
    for name in ("data_root", "decoder"):
        if values.get(name):
            values[name] = os.path.abspath(os.path.expanduser(values[name]))
    if values.get("out"):
        values["out"] = os.path.expanduser(values["out"])
    layers, objective = _layers(dataset, method, prior, semi, values)
    composed: dict[str, Any] = {"dataset": dataset, "method": method, "prior": prior, "objective": objective}
    settings = Settings(**(layers | values | composed))
    _check_together(settings)
    return settings


def _layers(dataset: str, method: str, prior: str, semi: bool, values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What stands between the general defaults and the values that a user gave, and the objective that follows."""
    layers = {**DATASET_DEFAULTS.get(dataset, {}), **METHODS[method].defaults}
    preset = values.get("preset", "default")
    if preset == "paper":
        layers |= _paper(dataset, method, semi, values.get("objective"))
    elif preset == "study" and dataset != "digits":
        layers["epochs"] = STUDY_EPOCHS
    epochs = layers.get("epochs", FIELDS["epochs"].default)
    for name in {"warmup", "freeze_decoder"} & set(layers):
        layers[name] = layers[name] * values.get("epochs", epochs) // epochs  # the same share of a shorter training
    searched = dataset in _SEARCHED
    if semi:
        own: dict[str, Any] = {}
        if preset != "paper":
            more = METHODS[method].semi_for
            own = {**METHODS[method].semi, **more.get(prior, {}), **more.get(dataset, {})}
        own = {name: value for name, value in own.items() if searched or name != "lr"}
        layers |= {"semi_supervised": True, "n_labels": N_LABELS.get(dataset, 0), **own}
    objective = values.get("objective", layers.get("objective", "auto"))
    objective = METHODS[method].objective if objective == "auto" else objective
    rates = METHODS[method].learning_rates
    rate = rates.get(objective, rates.get(METHODS[method].objective))
    chosen = {"lr": rate} if searched and rate is not None else {}
    usual = {**OBJECTIVE_DEFAULTS.get(objective, {}), **METHODS[method].objective_defaults.get(objective, {})}
    if semi:
        usual = usual | LABELLED_OBJECTIVE_DEFAULTS.get(objective, {})
    if values.get("latent_size", FIELDS["latent_size"].default) > 2:
        usual = usual | {"prior_samples": 0}  # where the posterior is a small part of the space, none would hit it
    if objective == "reweighted_wake_sleep" and not values.get("prior_samples", usual["prior_samples"]):
        usual = usual | {"samples": 8}  # nothing but these finds the posterior
    return usual | chosen | layers, objective


def deviations(settings: Settings) -> dict[str, str]:
    """What of a run differs from the defaults of its data set, method and preset, as a user would write it.

    Without the seed, and without what doesn't decide what is learnt. Equal deviations are equal compositions.
    """
    named = settings.dataset, settings.method, settings.prior, settings.semi_supervised
    decide = ("preset", "objective", "epochs", "latent_size", "prior_samples")  # what other defaults follow
    given = {name: getattr(settings, name) for name in decide}
    layers, _ = _layers(*named, given)
    _, objective = _layers(*named, {"preset": settings.preset})
    usual = {name: layers.get(name, field.default) for name, field in FIELDS.items()} | {"objective": objective}
    left_out = {"dataset", "method", "prior", "seed", "semi_supervised"} | FREE_ON_RESUME
    return {
        name: as_text(getattr(settings, name))
        for name in FIELDS
        if name not in left_out and getattr(settings, name) != usual[name]
    }


def as_text(value: Any) -> str:
    """A setting's value as it is written behind its name."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def convert(name: str, value: Any) -> Any:
    """A setting's value from text, checked against what is allowed.

    Raises:
        InputError: the value has the wrong type or lies outside of what is allowed.
    """
    field = FIELDS[name]
    kind = type(field.default)
    try:
        converted: Any = _BOOLEANS[str(value).lower()] if kind is bool else kind(value)
        if kind is int and not isinstance(value, str) and converted != value:
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise InputError(f"{name}={value} is not {_KINDS[kind]}: {name} is {field.metadata['meaning']}") from None
    if kind is str and "${" in converted:
        raise InputError(f"{name}={value} holds '${{', which config.yaml can't keep; rename the folder")
    allowed = field.metadata
    if allowed["choices"]:
        return check_name(name, converted, allowed["choices"])
    if kind in (int, float):
        limits = {
            f"at least {allowed['minimum']}": allowed["minimum"] is None or converted >= allowed["minimum"],
            f"above {allowed['above']}": allowed["above"] is None or converted > allowed["above"],
            f"at most {allowed['maximum']}": allowed["maximum"] is None or converted <= allowed["maximum"],
            "finite": abs(converted) < float("inf"),
        }
        for limit, holds in limits.items():
            if not holds:
                raise InputError(f"{name}={value} must be {limit}: {name} is {field.metadata['meaning']}")
    return converted


_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def idle(settings: Settings, given: Iterable[str]) -> list[str]:
    """Of the settings that a user gave, those of what the run hasn't got, another objective for one: without effect."""
    owned = [*OBJECTIVE_SETTINGS.values(), *(method.reads for method in METHODS.values())]
    others = {name for names in owned for name in names}
    others -= {*OBJECTIVE_SETTINGS[settings.objective], *METHODS[settings.method].reads}
    sleeps = settings.sleep_weight > 0 and (settings.objective != "wake_sleep" or settings.sleep_steps > 0)
    resamples = settings.objective in ("reweighted_wake_sleep", "marginal_likelihood")
    needed = {
        **dict.fromkeys((*_LABELS, "label_rate"), settings.semi_supervised),
        "warmup_kl_weight": settings.warmup > 0,
        "dropout": settings.network != "convolutional",
        "prior_denoiser": settings.latent_size == 2 and not settings.laplace,  # which draws in other coordinates
        "variance_weight": settings.samples > 1,
        "sleep_weight": settings.objective != "wake_sleep" or settings.sleep_steps > 0,
        "sleep_steps": settings.sleep_weight > 0,
        "sleep_levels": sleeps or resamples,  # as resampled latents have levels too
        "fantasies": sleeps,
    }
    return sorted(name for name in given if name in others or not needed.get(name, True))


def _check_together(settings: Settings) -> None:
    method = METHODS[settings.method]
    if settings.objective not in method.objectives:
        raise InputError(
            f"method {settings.method} can't be trained with objective={settings.objective};"
            f" choose from {', '.join(method.objectives)}"
        )
    if settings.warmup + settings.freeze_decoder > settings.epochs:
        raise InputError(
            f"warmup={settings.warmup} and freeze_decoder={settings.freeze_decoder} leave nothing of"
            f" epochs={settings.epochs}; give more epochs or less warm-up"
        )
    if settings.warmup and not method.warms_up:
        raise InputError(
            f"warmup={settings.warmup} is the diffusion posterior's, not {settings.method}'s; leave it out"
        )
    if settings.latent_size < (least := PRIORS[settings.prior].smallest_latent_size):
        raise InputError(
            f"latent_size={settings.latent_size} is too small for the prior {settings.prior}; use at least {least}, or"
            " the gaussian prior"
        )
    if settings.semi_supervised and settings.latent_size > 2 and settings.prior == "less_noisy_square":
        raise InputError(
            f"latent_size={settings.latent_size} is too large for labels with less_noisy_square, whose parts make up"
            " the prior in the plane only; use latent_size=2, or another prior"
        )
    if settings.preset == "paper" and settings.dataset not in DATASETS:
        raise InputError(f"preset=paper has weights for {', '.join(DATASETS)} alone, not for a file; leave preset out")
    if settings.data_root and not os.path.isdir(settings.data_root):
        raise InputError(f"data_root={settings.data_root} is not a folder; give one, or leave it out to download")
    if settings.decoder and not os.path.isdir(settings.decoder):
        raise InputError(f"decoder={settings.decoder} is not a folder; give that of a trained run")
    if settings.measured_on == "validation" and not settings.validation:
        raise InputError("measured_on=validation needs validation examples; give validation=1000 or so")
    if settings.noise == "learned" and settings.prior_denoiser and settings.latent_size == 2:
        raise InputError(
            "noise=learned moves the levels that the prior's denoiser is tabulated for; add prior_denoiser=false"
        )
    if settings.guidance and settings.covariance == "diagonal":
        raise InputError(
            f"guidance={settings.guidance} gives the last step a full covariance; take covariance=diagonal away"
        )
    if settings.guidance and settings.noise == "learned":
        raise InputError(f"guidance={settings.guidance} is for fixed levels of noise; take noise=learned away")
    if settings.laplace:
        if "laplace" not in method.reads:
            raise InputError(
                f"laplace={settings.laplace} moves a density, but {settings.method} has none; leave it out"
            )
        for name, value in (
            ("guidance", settings.guidance),
            ("warmup", settings.warmup),
            ("level_weights", settings.level_weights if settings.level_weights == "plain" else ""),
        ):
            if value:
                raise InputError(
                    f"{name}={value} is about z, but with laplace={settings.laplace} the posterior draws in other"
                    " coordinates; give one of them"
                )
    if settings.resume and settings.overwrite:
        raise InputError("resume=true goes on with a run and overwrite=true starts anew; give one of them")
