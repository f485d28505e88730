"""The scikit-learn estimator: scikit-learn's own checks, and that its numbers are those of the model."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from ddvi.errors import InputError
from ddvi.evidence import exact_log_likelihood
from ddvi.objectives.base import Labelled
from ddvi.randomness import random_state
from ddvi.sklearn import DDVI

TINY = {"steps": 2, "denoiser_size": 8, "denoiser_layers": 1, "prior_denoiser": False}
TINY_DDVI = {"prior": "gaussian", "epochs": 1, "hidden_size": 8, "n_draws": 4, "random_state": 0, "settings": TINY}
"""The Gaussian prior, as scikit-learn's checks take one component, and the others live in the plane."""
KINDS = {
    "reals": ("auto", "gaussian", lambda random: 50 + 9 * random.normal(size=(80, 5))),
    "binary": ("auto", "bernoulli", lambda random: random.integers(0, 2, (80, 5))),
    "counts": ("auto", "poisson", lambda random: random.poisson(4, (80, 5))),
    "counts in floats": ("negative_binomial", "negative_binomial", lambda r: r.poisson(4, (80, 5)).astype(float)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(**parameters) -> DDVI:
    return DDVI(**(TINY_DDVI | parameters))


@pytest.fixture(scope="module")
def iris() -> tuple[np.ndarray, np.ndarray]:
    return load_iris(return_X_y=True)


@pytest.fixture(scope="module")
def semi(iris) -> tuple[DDVI, np.ndarray, np.ndarray]:
    """Fitted with a fifth of the labels of iris, all labels, and which are known."""
    X, y = iris
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    known = np.random.default_rng(0).random(len(y)) < 0.2
    partial = np.where(known, names, "-1").astype(object)
    partial[~known] = -1
    estimator = DDVI(method="vae", epochs=150, lr=3e-3, batch_size=50, n_draws=16, random_state=0)
    return estimator.fit(X, partial), names, known


@parametrize_with_checks([make(random_state=None), make(method="vae", random_state=None)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@kinds
def test_a_row_is_transformed_and_scored_by_itself(kind):
    likelihood, chosen, simulate = KINDS[kind]
    X = simulate(np.random.default_rng(0))
    estimator = make(likelihood=likelihood).fit(X)
    assert type(estimator.model_.likelihood).__name__.lower().startswith(chosen.replace("_", ""))
    order = np.random.default_rng(1).permutation(len(X))
    for method in (estimator.transform, estimator.score_samples):
        whole = method(X)
        np.testing.assert_allclose(method(X[order]), whole[order], rtol=0, atol=1e-10)
        np.testing.assert_allclose(
            np.concatenate([method(X[:1]), method(X[1:3]), method(X[3:])]), whole, rtol=0, atol=1e-10
        )
        np.testing.assert_array_equal(method(X), whole)
    assert np.unique(estimator.transform(X), axis=0).shape == (len(np.unique(X, axis=0)), 2)


def test_the_transform_is_the_posterior_mean(iris):
    """Of independent draws the mean agrees within their standard error, and that of the shared ones."""
    estimator = make(epochs=5, n_draws=2000).fit(iris[0])
    X = iris[0][::10]
    draws = estimator.sample_posterior(X, 2000, random_state=0)
    assert draws.shape == (15, 2000, 2)
    error = draws.std(1) * np.sqrt(2 / 2000)
    assert (np.abs(estimator.transform(X) - draws.mean(1)) < 4.5 * error).all()


def test_the_score_is_a_bound_on_the_density_in_the_datas_units(iris):
    estimator = make(epochs=20, lr=5e-3, n_draws=200).fit(iris[0])
    X, model = iris[0][:40], estimator.model_
    x = model.preprocessing(torch.from_numpy(X.astype(np.float32))).double()
    evidence = (
        exact_log_likelihood(model.prior, model.likelihood, x).log_likelihood - model.preprocessing.scale.log().sum()
    )
    bound = estimator.score_samples(X)
    assert abs((evidence.numpy() - bound).mean()) < 0.1
    assert estimator.score(X) == pytest.approx(bound.mean())
    scaled = clone(estimator).fit(10 * iris[0]).score_samples(10 * X)
    np.testing.assert_allclose(scaled, bound - 4 * np.log(10), atol=0.05)


def test_it_explains_iris_as_well_as_a_linear_map_does(iris):
    X = iris[0]
    estimator = DDVI(prior="gaussian", method="vae", epochs=300, batch_size=50, lr=5e-3, random_state=0).fit(X)
    again = estimator.inverse_transform(estimator.transform(X))
    pca = PCA(2).fit(X)
    assert np.square(again - X).mean() < 3 * np.square(pca.inverse_transform(pca.transform(X)) - X).mean()
    drawn = estimator.sample(2000, random_state=0)
    np.testing.assert_allclose(drawn.mean(0), X.mean(0), atol=0.4 * X.std(0).max())
    assert (drawn.std(0) < 2 * X.std(0)).all()


def test_partial_labels_are_learnt_and_predicted(semi, iris):
    estimator, names, known = semi
    X = iris[0]
    assert estimator.classes_.tolist() == ["setosa", "versicolor", "virginica"]
    probability = estimator.predict_proba(X)
    np.testing.assert_allclose(probability.sum(1), 1, atol=1e-12)
    assert (estimator.predict(X) == estimator.classes_[probability.argmax(1)]).all()
    linear = LogisticRegression().fit(X[known], names[known])
    assert (estimator.predict(X) == names).mean() > linear.score(X, names) - 0.06
    whole = estimator.transform(X)
    np.testing.assert_allclose(
        np.concatenate([estimator.transform(X[:7]), estimator.transform(X[7:])]), whole, atol=1e-10
    )


def test_without_labels_nothing_is_predicted(iris):
    X, y = iris
    for estimator in (
        make().fit(X),
        make().fit(X, -np.ones(150)),
        make().fit(X, X[:, 0]),
        make(use_labels=False).fit(X, y),
    ):
        assert not hasattr(estimator, "predict")
    refitted = make().fit(X, y)
    assert hasattr(refitted, "predict_proba")
    assert not hasattr(refitted.fit(X), "predict_proba")


def test_it_works_in_pipelines_and_searches(iris):
    X, y = iris
    pipeline = make_pipeline(StandardScaler(), make(epochs=3), LogisticRegression())
    assert 0 <= pipeline.fit(X, y).score(X, y) <= 1
    search = GridSearchCV(make(epochs=2), {"method": ["vae", "ddvi"], "n_components": np.array([1, 2])}, cv=2)
    search.fit(X)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_estimator_.transform(X).shape == (150, search.best_params_["n_components"])


def test_tables_come_in_and_go_out(iris):
    frame = pd.DataFrame(iris[0], columns=["a", "b", "c", "d"], index=[f"row{i}" for i in range(150)])
    estimator = make().set_output(transform="pandas")
    embedding = estimator.fit_transform(frame)
    assert embedding.columns.tolist() == estimator.get_feature_names_out().tolist() == ["ddvi0", "ddvi1"]
    assert embedding.index.equals(frame.index)
    assert estimator.feature_names_in_.tolist() == ["a", "b", "c", "d"]
    counts = pd.DataFrame(np.random.default_rng(0).poisson(3, (50, 3)), columns=list("xyz"))
    assert make().fit(counts).inverse_transform(np.zeros((1, 2))).shape == (1, 3)


def test_sparse_data_gives_what_dense_data_does():
    X = np.random.default_rng(0).poisson(0.5, (60, 6))
    dense = make(likelihood="poisson").fit(X)
    for form in (sparse.csr_array, sparse.csc_matrix):
        fitted = make(likelihood="poisson").fit(form(X))
        np.testing.assert_allclose(fitted.transform(form(X)), dense.transform(X), atol=1e-12)


def test_it_can_be_pickled_and_repeats_itself_and_leaves_torchs_random_state(iris):
    X, before = iris[0], random_state()["cpu"]
    estimator = make(prior="pinwheel").fit(X)
    again = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(again.transform(X), estimator.transform(X))
    np.testing.assert_array_equal(clone(estimator).fit(X).transform(X), estimator.transform(X))
    np.testing.assert_array_equal(estimator.sample(3, 1), estimator.sample(3, 1))
    assert torch.equal(random_state()["cpu"], before)


def test_held_out_examples_are_in_the_history(iris):
    history = make(epochs=2, validation_fraction=0.2).fit(iris[0]).history_
    assert [np.isfinite(row["validation_bound"]) for row in history] == [True, True]


def test_unknown_labels_and_counts_are_read_as_pandas_holds_them(iris):
    names = pd.Series(["a", "b", None] * 20)
    X = pd.DataFrame(np.arange(180).reshape(60, 3) % 7)
    for y in (names, names.astype("string"), names.astype(object).where(names.notna(), np.nan)):
        assert list(make(epochs=1).fit(X, y).classes_) == ["a", "b"]
    assert list(make(epochs=1).fit(X, names.fillna("").to_numpy(str)).classes_) == ["a", "b"]
    assert type(make(epochs=1).fit(X.astype("Int64")).model_.likelihood).__name__ == "PoissonLikelihood"


def test_few_labels_are_not_held_out(iris, monkeypatch):
    seen = []
    monkeypatch.setattr("ddvi.sklearn.Labelled", lambda x, label: seen.append(len(label)) or Labelled(x, label))
    y = np.full(len(iris[0]), -1)
    y[:2] = 0, 1
    for seed in range(4):
        make(epochs=1, validation_fraction=0.5, random_state=seed).fit(iris[0], y)
    assert seen == [2] * 4


def test_rows_that_are_nearly_alike_are_transformed_together():
    X = np.random.default_rng(0).normal(1e6, 1e3, (60, 1)) * [1.0, 1e-6]
    estimator = make().fit(X)
    near = X[[0, 0]]
    near[1, 0] += 0.01
    each = np.concatenate([estimator.transform(near[:1]), estimator.transform(near[1:])])
    np.testing.assert_allclose(estimator.transform(near), each)


def test_numbers_that_no_bernoulli_draws_are_refused():
    X = np.random.default_rng(0).random((40, 3))
    estimator = make(likelihood="bernoulli").fit(X)
    for wrong in (-X, 300 * X):
        with pytest.raises(InputError, match="X has values outside of 0 … 1"):
            estimator.score_samples(wrong)


def test_a_column_that_single_precision_would_flatten_is_refused(iris):
    X = iris[0].copy()
    X[:, 1] += 1e9
    with pytest.raises(
        InputError, match=r"X has values around 1e\+09 that differ by .* in feature 1, .* subtract an offset"
    ):
        make().fit(X)


MISTAKES = {
    "method": ({"method": "vea"}, "did you mean 'vae'"),
    "prior": ({"prior": "pinweel"}, "did you mean 'pinwheel'"),
    "components": ({"prior": "pinwheel", "n_components": 1}, "too small for the prior pinwheel; use at least 2"),
    "likelihood": ({"likelihood": "poisson"}, "needs whole numbers, but X holds others"),
    "epochs": ({"epochs": 0}, "epochs=0 must be at least 1"),
    "draws": ({"n_draws": 0}, "n_draws=0 is impossible"),
    "fraction": ({"validation_fraction": 0.7}, "give 0 to 0.5"),
    "twice": ({"settings": {"lr": 1e-3}}, "the parameter lr of DDVI"),
    "another name": ({"settings": {"seed": 1}}, "the parameter random_state of DDVI"),
    "semi": ({"settings": {"semi_supervised": True}}, "for the runs of ddvi train alone"),
    "labels in the name": ({"method": "vae_semi"}, "give method='vae'"),
    "setting": ({"settings": {"step": 3}}, "did you mean 'steps'"),
    "a run's": ({"settings": {"decoder": "runs/vae"}}, "'decoder', which is for the runs of ddvi train alone"),
    "settings": ({"settings": "steps=3"}, "is no mapping; give a dictionary"),
    "half a component": ({"n_components": 2.5}, "latent_size=2.5 is not a whole number"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_in_a_sentence(mistake, iris):
    parameters, message = MISTAKES[mistake]
    with pytest.raises(InputError, match=message) as caught:
        make(**parameters).fit(iris[0])
    assert "\n" not in str(caught.value)


def test_what_a_fit_does_not_allow_is_refused(iris):
    X = iris[0]
    with pytest.raises(InputError, match="3 labels for 150 examples"):
        make().fit(X, [0, 1, 0])
    with pytest.raises(InputError, match="method='aae' has no density"):
        make(method="aae", settings=None).fit(X).score(X)
    with pytest.raises(NotFittedError):
        make().transform(X)
    counts = make(likelihood="poisson").fit(np.arange(60).reshape(20, 3))
    with pytest.raises(InputError, match="X holds -1, but PoissonLikelihood is of whole numbers from 0 on"):
        counts.transform(-np.ones((4, 3)))
    with pytest.raises(InputError, match=r"X holds 0\.5, but PoissonLikelihood"):
        counts.score(np.full((4, 3), 0.5))
    with pytest.raises(InputError, match="has 3 columns, but the embedding has 2"):
        make().fit(X).inverse_transform(X[:, :3])


def test_the_package_is_imported_without_scikit_learn():
    code = "import sys, ddvi; ddvi.Inference; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_grey_values_that_were_learnt_from_are_scored():
    X = np.linspace(0, 1, 60).reshape(20, 3)
    assert np.isfinite(make(likelihood="bernoulli").fit(X).score(X))
