"""ddvi as a scikit-learn estimator: an adapter of what the command line composes, with scikit-learn's conventions.

    from ddvi.sklearn import DDVI

It is imported on its own, so that `import ddvi` doesn't need scikit-learn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, final

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import ClassifierTags, check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from ddvi.arithmetic import fast_products
from ddvi.arrays import as_tensor
from ddvi.composition import build_model, make_schedule, observe
from ddvi.data import Dataset, check_kept, split_validation
from ddvi.devices import make_fabric
from ddvi.errors import InputError, check_name
from ddvi.likelihoods import ExponentialFamily, means
from ddvi.model import LatentVariableModel
from ddvi.objectives.base import Labelled
from ddvi.preprocessing import AsIs, Binarise
from ddvi.randomness import alike, seeded
from ddvi.settings import FIELDS, FREE_ON_RESUME, SEMI, Settings, resolve
from ddvi.training import Trainer

_ROWS_AT_ONCE = 50_000  # draws × examples
_COUNTS = ("poisson", "negative_binomial", "categorical")
_OF_RUNS = {*FREE_ON_RESUME, "decoder", "n_labels", "limit", "validation", "measured_on", "precision", "preset"} - {
    *("graphs", "compile"),
} | {"dataset", "semi_supervised"}
"""Settings that nothing reads here."""
_LARGEST_SEED = 2**31 - 1


def _has_labels(estimator: Any) -> bool:
    if not hasattr(estimator, "classes_"):
        raise AttributeError("there are no labels to predict: fit with y, in which -1 stands for unknown")
    return True


def _is_unknown(label: Any) -> bool:
    """Whether a label stands for none: -1, None, NaN, or what pandas has for them, and empty text."""
    if label is None or type(label).__name__ in ("NAType", "NaTType"):
        return True
    return label in (-1, "-1", "") or (isinstance(label, float) and math.isnan(label))


@final
class DDVI(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """An embedding by a latent-variable model p(z) p_θ(x | z) with a diffusion posterior q(z | x), or another one.

        transform:      E_q[z | x], by draws whose noise is the same for every row
        score_samples:  log 1/K Σ_k p_θ(x, z_k) r(a_k|z_k) / q(z_k, a_k|x) ≤ log p_θ(x) in expectation, in nats

    X is (n_samples, n_features): reals (standardised inside), binary data or counts, dense or sparse, which is made
    dense. Every row's result is computed by itself: it depends neither on the other rows nor on their order.

    Args:
        n_components: D, the size of the embedding.
        prior: p(z), a name from `ddvi list`.
        method: the posterior, a name from `ddvi list`.
        likelihood: "auto" looks at the data: "bernoulli" for zeros and ones, "poisson" for an integer array of counts,
            else "gaussian"; "negative_binomial" is for counts that vary more. Counts may stand in a float array where
            their likelihood is named.
        objective: what training maximises; "auto" takes the method's own.
        epochs: passes over the data.
        batch_size: examples per step, at most.
        lr: Adam's learning rate, which falls to 0 along a cosine.
        hidden_size: width of encoder and decoder.
        n_draws: K, of `transform` and `score_samples`.
        validation_fraction: of the examples held out for `history_`.
        use_labels: whether y is learnt from. If not, or if y holds continuous values, it is ignored.
        device: "cpu", "cuda", "mps" or "auto", for training.
        settings: any other setting of `ddvi list`, by name.
        random_state: of everything random.

    Attributes:
        model_: the `LatentVariableModel`, in double precision.
        history_: a row an epoch, each term of the loss among them.
        classes_: the labels, where y held any; -1 (None, NaN, empty text) are rows without one.
        n_features_in_, feature_names_in_: as always.

    Raises:
        InputError: a ValueError; names, values or data can't be used.

    Source: Piriyakulkij et al., AAAI 2025; Kingma et al., 2014, for labels.

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(60, 4))
        >>> DDVI(epochs=1, method="vae", random_state=0).fit_transform(X).shape
        (60, 2)
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        prior: str = "pinwheel",
        method: str = "ddvi",
        likelihood: str = "auto",
        objective: str = "auto",
        epochs: int = 100,
        batch_size: int = 128,
        lr: float = 1e-3,
        hidden_size: int = 128,
        n_draws: int = 64,
        validation_fraction: float = 0.0,
        use_labels: bool = True,
        device: str = "cpu",
        settings: Mapping[str, Any] | None = None,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.prior = prior
        self.method = method
        self.likelihood = likelihood
        self.objective = objective
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.hidden_size = hidden_size
        self.n_draws = n_draws
        self.validation_fraction = validation_fraction
        self.use_labels = use_labels
        self.device = device
        self.settings = settings
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on X (n_samples, n_features) and, where y (n_samples,) holds classes, on those that are known.

        Raises:
            InputError: names, values or data can't be used.
        """
        x = self._read(X, reset=True)
        label, classes = self._labels(y, len(x))
        settings = self._settings(int(check_random_state(self.random_state).randint(_LARGEST_SEED)), bool(len(classes)))
        names = tuple(str(name) for name in classes)
        dataset = Dataset("X", x, x, label, None, names, None, {})
        observations = observe(dataset, settings)
        held_out = int(self.validation_fraction * len(x))
        rows, out = split_validation(dataset, held_out, settings.seed)
        labelled = None
        if label is not None:
            # Few may have a label, which is to be learnt from: the others are held out first.
            order = torch.cat([out, rows])
            out, rows = order[(label[order] >= 0).argsort(stable=True)].tensor_split([held_out])
            known = rows[label[rows] >= 0]
            labelled = Labelled(x[known], label[known])
        with seeded(settings.seed, "model"):
            model = build_model(settings, observations, x[rows])
        settings = dataclasses.replace(settings, batch_size=min(settings.batch_size, len(rows)))
        fabric = make_fabric(settings)
        trainer = Trainer(
            *(model, make_schedule(settings), x[rows], x[out] if held_out else None, None, fabric),
            labelled=labelled,
            graphs=settings.graphs,
            compiles=settings.compile,
        )
        with fast_products(fabric.device):
            self.history_: list[dict[str, Any]] = trainer.fit()
        self.model_: LatentVariableModel = model.to("cpu").double().eval()
        vars(self).pop("classes_", None)
        if len(classes):
            self.classes_ = classes
        self._n_features_out = settings.latent_size
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The posterior mean of each row, over `n_draws` draws with the same noise for all: (n_samples, n_components).

        Over labels, where there are any, the mean is taken exactly, weighted by q(l | x).
        """

        def mean(x: Tensor) -> Tensor:
            view = self.model_.view(x)
            z = self.model_.posterior.condition(view.features).sample((self.n_draws,)).mean(0)
            return z if view.log_label is None else (view.log_label.exp().unsqueeze(-1) * z).sum(0)

        return self._by_rows(X, mean)

    def sample_posterior(self, X: Any, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """Draws z ~ q(z | x): (n_samples of X, n_samples, n_components), each row with noise of its own."""
        if n_samples < 1:
            raise InputError(f"n_samples={n_samples} is impossible; give 1 or more")
        x = self._prepared(X)
        with self._seeded(random_state):
            draws = [torch.stack([self.model_.latent(part) for _ in range(n_samples)], 1) for part in self._parts(x, 1)]
        return torch.cat(draws).numpy()

    def inverse_transform(self, X: Any) -> np.ndarray:
        """E[x | z] of latents z (n_samples, n_components), in the data's own units: (n_samples, n_features)."""
        check_is_fitted(self)
        z = torch.from_numpy(np.array(check_array(X, dtype="float64")))
        if z.shape[1] != self._n_features_out:
            raise InputError(f"X has {z.shape[1]} columns, but the embedding has {self._n_features_out}; give latents")
        with torch.no_grad():
            return self.model_.preprocessing.restore(means(self.model_.likelihood, z)).numpy()

    def sample(self, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """Draws of the model, z ~ p(z), x ~ p(x | z), in the data's own units: (n_samples, n_features)."""
        check_is_fitted(self)
        with self._seeded(random_state), torch.no_grad():
            x = self.model_.likelihood(self.model_.prior.sample((n_samples,))).sample()
            return self.model_.preprocessing.restore(x).numpy()

    def score_samples(self, X: Any) -> np.ndarray:
        """The importance-weighted bound on log p(x) of each row with K = `n_draws`, in nats, in the data's own units.

        Raises:
            InputError: the posterior has no density (method "aae").
        """
        check_is_fitted(self)
        if not self.model_.posterior.has_density:
            raise InputError(f"method='{self.method}' has no density, so there is no bound; use another one to score")
        volume = self.model_.preprocessing.log_volume
        return self._by_rows(X, lambda x: self.model_.importance_weighted_bound(x, self.n_draws) - volume)

    def score(self, X: Any, y: Any = None) -> float:
        """The mean of `score_samples`; the higher the better. y isn't looked at."""
        return float(self.score_samples(X).mean())

    @available_if(_has_labels)
    def predict_proba(self, X: Any) -> np.ndarray:
        """q(l | x) of each of `classes_`: (n_samples, n_classes). There only after a fit with labels."""
        return self._by_rows(X, lambda x: self.model_.classify(x).exp())

    @available_if(_has_labels)
    def predict(self, X: Any) -> np.ndarray:
        """The likeliest of `classes_`, (n_samples,). There only after a fit with labels."""
        return self.classes_[self.predict_proba(X).argmax(1)]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.classifier_tags = ClassifierTags()  # what `predict_proba` gives; it still is a transformer
        return tags

    def _settings(self, seed: int, semi: bool) -> Settings:
        """Those of the parameters, found sound."""
        own = ("likelihood", "objective", "epochs", "batch_size", "lr", "hidden_size", "device")
        given: dict[str, Any] = {"latent_size": self.n_components, **{name: getattr(self, name) for name in own}}
        if not isinstance(self.settings or {}, Mapping):
            raise InputError(f"settings={self.settings!r} is no mapping; give a dictionary from names to values")
        for name in self.settings or {}:
            if name in given or name in ("seed", "prior", "method"):
                own_name = {"seed": "random_state", "latent_size": "n_components"}.get(name, name)
                raise InputError(f"settings holds '{name}', which is the parameter {own_name} of DDVI; give it there")
            if check_name("setting", name, FIELDS) in _OF_RUNS:
                raise InputError(f"settings holds '{name}', which is for the runs of ddvi train alone; leave it out")
        if not 0 <= self.validation_fraction <= 0.5:
            raise InputError(f"validation_fraction={self.validation_fraction} is impossible; give 0 to 0.5")
        if self.n_draws < 1:
            raise InputError(f"n_draws={self.n_draws} is impossible; give 1 or more")
        if str(self.method).endswith(SEMI):
            plain = self.method.removesuffix(SEMI)
            raise InputError(f"method='{self.method}' says in its name what y says here; give method='{plain}'")
        suffix = SEMI * semi
        given |= {**(self.settings or {}), "seed": seed}
        return resolve("mnist" + suffix, self.method + suffix, self.prior, given)  # which has the general defaults

    def _labels(self, y: Any, count: int) -> tuple[Tensor | None, np.ndarray]:
        """Of each row its class, -1 where it isn't known, and the classes; None where none is known."""
        if y is None or not self.use_labels:
            return None, np.empty(0)
        y = column_or_1d(y.to_numpy(dtype=object) if hasattr(y, "to_numpy") else y)
        if len(y) != count:
            raise InputError(f"y has {len(y)} labels for {count} examples; give one each, -1 where unknown")
        unknown = np.array([_is_unknown(value) for value in y.tolist()], dtype=bool)
        known = np.array(y[~unknown].tolist())
        if unknown.all() or type_of_target(known).startswith("continuous"):
            return None, np.empty(0)
        classes, index = np.unique(known, return_inverse=True)
        label = torch.full((count,), -1)
        label[torch.from_numpy(~unknown)] = torch.from_numpy(index)
        return label, classes

    def _read(self, X: Any, reset: bool = False) -> Tensor:
        """X as a tensor, found sound; counts as whole numbers."""
        if not reset:
            check_is_fitted(self)
        kinds = [getattr(kind, "kind", "O") for kind in X.dtypes] if hasattr(X, "columns") else []
        X = validate_data(self, X, reset=reset, accept_sparse="csr", ensure_min_samples=2 if reset else 1)
        X = X if isinstance(X, np.ndarray) else X.toarray()
        counts = self.likelihood in _COUNTS or (kinds and set(kinds) <= {"i", "u"})  # pandas' own become floats
        if counts and X.dtype.kind == "f" and (np.round(X) == X).all():
            X = X.astype(np.int64)
        x = as_tensor(X, "X")
        if reset:
            check_kept("X", X, x)
        return x

    def _prepared(self, X: Any) -> Tensor:
        """X as the model sees it, without anything random, in double precision."""
        x = self._read(X)  # which finds out whether there is a model
        x = self.model_.preprocessing.picture(x).double()
        if isinstance(self.model_.preprocessing, Binarise) and not bool(((x >= 0) & (x <= 1)).all()):
            most = float(self.model_.preprocessing.maximum)
            raise InputError(
                f"X has values outside of 0 … {most:g}, between which those lie that the model was fitted on"
            )
        if isinstance(self.model_.preprocessing, AsIs) and isinstance(self.model_.likelihood, ExponentialFamily):
            self.model_.likelihood.check(x, "X")
        return x

    def _by_rows(self, X: Any, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        """What a function makes of each row, with the same noise for all."""
        results = []
        for part in self._parts(self._prepared(X), self.n_draws):
            with seeded(0, "rows"), alike(), torch.no_grad():
                results.append(function(part))
        return torch.cat(results).numpy()

    def _parts(self, x: Tensor, draws: int) -> tuple[Tensor, ...]:
        classes = len(getattr(self, "classes_", "1"))
        return x.split(max(1, math.floor(_ROWS_AT_ONCE / (draws * classes))))

    @contextlib.contextmanager
    def _seeded(self, random_state: Any) -> Iterator[None]:
        with seeded(int(check_random_state(random_state).randint(_LARGEST_SEED))), torch.no_grad():
            yield
