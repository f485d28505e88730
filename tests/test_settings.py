"""Settings: what a user writes becomes a run, or one sentence with the nearest right name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddvi.catalogue import OBJECTIVES
from ddvi.errors import InputError
from ddvi.methods import METHODS, PAPER
from ddvi.settings import FIELDS, OBJECTIVE_SETTINGS, Settings, convert, deviations, idle, resolve


@pytest.mark.parametrize("alias", ["ddvi", "diff_vae_warmup"])
def test_seed_names_are_accepted(alias: str) -> None:
    settings = resolve("cifar10", alias, "swiss_roll")
    assert (settings.dataset, settings.method, settings.prior) == ("cifar", "ddvi", "swiss_roll")


@pytest.mark.parametrize(
    ("names", "overrides", "nearest"),
    [
        (("minst", "vae", "pinwheel"), {}, "'mnist'"),
        (("mnist", "vea", "pinwheel"), {}, "'vae'"),
        (("mnist", "diff_vae_warm", "pinwheel"), {}, "'diff_vae_warmup'"),
        (("mnist", "vae", "swissroll"), {}, "'swiss_roll'"),
        (("mnist", "vae", "pinwheel"), {"epoch": "3"}, "'epochs'"),
        (("mnist", "vae", "pinwheel"), {"likelihood": "bernouli"}, "'bernoulli'"),
        (("mnist", "vae", "pinwheel"), {"precision": "16"}, "32, 64, tf32, bf16"),
        (("mnist", "aae", "pinwheel"), {"objective": "elbo"}, "choose from adversarial"),
        (("mnist", "vae", "pinwheel"), {"prior": "gaussian"}, "by its place"),
        (("mnist", "vae", "pinwheel"), {"epochs": "many"}, "a whole number"),
        (("mnist", "vae", "pinwheel"), {"epochs": "0"}, "at least 1"),
        (("mnist", "vae", "pinwheel"), {"epochs": 1.9}, "a whole number"),
        (("mnist", "vae", "pinwheel"), {"lr": "nan"}, "above 0"),
        (("mnist", "vae", "pinwheel"), {"lr": "inf"}, "finite"),
        (("mnist", "vae", "pinwheel"), {"dropout": "1"}, "at most 0.9"),
        (("mnist", "vae", "pinwheel"), {"resume": "perhaps"}, "true or false"),
        (("mnist", "vae", "pinwheel"), {"latent_size": "1"}, "at least 2"),
        (("mnist", "vae", "pinwheel"), {"warmup": "3"}, "diffusion"),
        (("mnist", "ddvi", "pinwheel"), {"warmup": "9", "epochs": "3"}, "more epochs"),
        (("mnist", "vae", "pinwheel"), {"resume": "true", "overwrite": "true"}, "one of them"),
        (("mnist", "vae", "pinwheel"), {"data_root": "/nowhere/at/all"}, "not a folder"),
        (("nothing.npz", "vae", "pinwheel"), {}, "no file"),
        ((__file__, "vae", "pinwheel"), {"preset": "paper"}, "not for a file"),
        (("mnist_semi", "vae_semi", "less_noisy_square"), {"latent_size": "3"}, "in the plane only"),
        (
            ("mnist", "ddvi", "pinwheel"),
            {"guidance": "1", "noise": "learned", "prior_denoiser": "false"},
            "take noise=learned away",
        ),
        (("mnist", "aae", "pinwheel"), {"laplace": "2"}, "aae has none; leave it out"),
        (("mnist", "ddvi", "pinwheel"), {"laplace": "2", "guidance": "1"}, "^guidance=1 .*; give one of them"),
        (("mnist", "ddvi", "pinwheel"), {"laplace": "2", "warmup": "1"}, "^warmup=1 .*; give one of them"),
        (
            ("mnist", "ddvi", "pinwheel"),
            {"laplace": "1", "level_weights": "plain"},
            "^level_weights=plain .*; give one",
        ),
    ],
)
def test_mistakes_get_the_nearest_right_thing(
    names: tuple[str, str, str], overrides: dict[str, str], nearest: str
) -> None:
    with pytest.raises(InputError, match=nearest) as caught:
        resolve(*names, overrides)
    assert "\n" not in str(caught.value)


def test_what_the_user_sets_wins_over_every_default() -> None:
    general, digits = resolve("mnist", "vae", "pinwheel"), resolve("digits", "vae", "pinwheel")
    assert digits.epochs != general.epochs
    paper = resolve("mnist", "vae", "pinwheel", {"preset": "paper", "epochs": "7"})
    assert (paper.epochs, paper.hidden_size, paper.lr) == (7, 1000, 1e-4)


def test_the_papers_weights_are_in_nats() -> None:
    """The paper's reconstruction is a mean over pixels: its 0.003 is 0.003 · 784 in a bound summed over MNIST's."""
    settings = resolve("mnist", "ddvi", "pinwheel", {"preset": "paper"})
    assert settings.kl_weight == pytest.approx(0.003 * 784)
    assert settings.warmup_kl_weight == pytest.approx(0.01 * 784)
    assert settings.objective == "wake_sleep"
    assert resolve("cifar", "vae", "pinwheel", {"preset": "paper"}).kl_weight == pytest.approx(0.01 * 3072)
    weights = {name: resolve("mnist", name, "pinwheel", {"preset": "paper"}).prior_weight for name in METHODS}
    assert weights == dict.fromkeys(METHODS, 1) | {"vae": 5, "h_iaf_vae": 0.5}
    labels = resolve("mnist_semi", "ddvi_semi", "pinwheel", {"preset": "paper"})
    assert (labels.batch_size, labels.steps, labels.sleep_steps) == (1024, 100, 30)
    assert labels.kl_weight == pytest.approx(0.1 * 784)
    assert resolve("mnist_semi", "vae_semi", "pinwheel", {"preset": "paper"}).prior_weight == 1


@pytest.mark.parametrize("objective", ["elbo", "importance_weighted", "reweighted_wake_sleep"])
def test_the_papers_weight_of_sleep_is_its_own_objectives(objective: str) -> None:
    usual, paper = (
        resolve("mnist", "ddvi", "pinwheel", {"objective": objective, "preset": preset})
        for preset in ("default", "paper")
    )
    assert (paper.sleep_weight, paper.sleep_levels) == (usual.sleep_weight, usual.sleep_levels)
    asked = resolve("mnist", "ddvi", "pinwheel", {"objective": objective, "preset": "paper", "sleep_weight": 2})
    assert asked.sleep_weight == 2


@pytest.mark.parametrize("method", METHODS)
def test_auto_takes_the_methods_own_objective(method: str) -> None:
    assert resolve("mnist", method, "pinwheel").objective == METHODS[method].objective


def test_every_setting_survives_its_text() -> None:
    settings = Settings()
    for name in FIELDS:
        assert convert(name, str(getattr(settings, name))) == getattr(settings, name)


def test_the_folder_follows_from_the_names(tmp_path: Path) -> None:
    assert resolve("mnist", "diff_vae_warmup", "pinwheel", {"seed": "3"}).folder == Path(
        "runs/mnist/ddvi/pinwheel/seed3"
    )
    (tmp_path / "cells.npz").touch()
    own = resolve(str(tmp_path / "cells.npz"), "vae", "gaussian")
    assert own.folder == Path("runs/cells/vae/gaussian/seed0")
    assert resolve("mnist", "vae", "gaussian", {"out": "here"}).folder == Path("here")


def test_every_objective_says_what_it_reads() -> None:
    assert set(OBJECTIVE_SETTINGS) == set(OBJECTIVES)
    assert {name for names in OBJECTIVE_SETTINGS.values() for name in names} < set(FIELDS)
    given = {"kl_weight": "2", "samples": "4", "lr": "1e-4", "sleep_steps": "2"}
    assert idle(resolve("mnist", "ddvi", "pinwheel", given), given) == ["kl_weight", "sleep_steps"]
    assert idle(resolve("mnist", "vae", "pinwheel", given), given) == ["sleep_steps"]
    asleep = {"fantasies": "2", "sleep_levels": "1"}
    assert idle(resolve("mnist", "vae", "pinwheel", asleep), asleep) == ["fantasies", "sleep_levels"]
    assert not idle(resolve("mnist", "vae", "pinwheel", asleep | {"sleep_weight": "1"}), asleep)
    steps = {"objective": "wake_sleep", "sleep_steps": "0"}
    assert idle(resolve("mnist", "vae", "pinwheel", asleep | steps), asleep) == ["fantasies", "sleep_levels"]
    off = {"objective": "wake_sleep", "sleep_weight": "0"}
    assert not idle(resolve("mnist", "vae", "pinwheel", off), off), "which it switches off"
    weighed = asleep | {"sleep_weight": "0"}
    for objective in ("reweighted_wake_sleep", "marginal_likelihood"):
        resolved = resolve("mnist", "ddvi", "pinwheel", weighed | {"objective": objective})
        assert idle(resolved, asleep) == ["fantasies"], "resampled latents have levels"


def test_what_another_posterior_reads_is_without_effect() -> None:
    given = {"steps": "5", "flow_layers": "2", "hidden_size": "64"}
    assert idle(resolve("mnist", "vae", "pinwheel", given), given) == ["flow_layers", "steps"]
    assert idle(resolve("mnist", "iaf_vae", "pinwheel", given), given) == ["steps"]
    assert "steps" not in idle(resolve("mnist", "ddvi", "pinwheel", given), given)
    given = {"laplace": "1", "prior_denoiser": "true"}
    assert idle(resolve("mnist", "ddvi", "pinwheel", given), given) == ["prior_denoiser"]


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({"classifier_weight": "2", "n_labels": "5", "label_rate": "0.5", "label_temperature": "2"}, None),
        ({"warmup_kl_weight": "2"}, {"warmup": "1"}),
        ({"variance_weight": "1"}, {"samples": "2"}),
        ({"prior_denoiser": "true"}, {"latent_size": "2"}),
        ({"sleep_steps": "2"}, {"objective": "wake_sleep"}),
        ({"dropout": "0.2"}, {"network": "dense"}),
    ],
)
def test_what_isnt_read_is_said(given: dict[str, str], needed: dict[str, str] | None) -> None:
    without = {"samples": "1", "latent_size": "3", "objective": "wake_sleep", "sleep_weight": "0"}
    without["network"] = "convolutional"
    if "variance_weight" in given:
        without |= {"objective": "importance_weighted"}
    assert idle(resolve("mnist", "ddvi", "pinwheel", without | given), given) == sorted(given)
    if needed is None:
        settings = resolve("mnist_semi", "ddvi_semi", "pinwheel", given)
    else:
        settings = resolve("mnist", "ddvi", "pinwheel", without | given | needed | {"sleep_weight": "1"})
    assert not idle(settings, given)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", ["default", "paper", "study"])
def test_deviations_are_what_a_user_would_write(method: str, preset: str) -> None:
    """Given again, they make the same settings; what needn't be written isn't among them."""
    overrides = {"preset": preset, "epochs": "7", "lr": "0.003", "seed": "4", "threads": "1", "evaluation": "quick"}
    settings = resolve("mnist", method, "pinwheel", overrides)
    found = deviations(settings)
    assert found == {"epochs": "7", "lr": "0.003"} | ({"preset": preset} if preset != "default" else {})
    again = resolve("mnist", method, "pinwheel", found | {"seed": "4", "threads": "1", "evaluation": "quick"})
    assert again == settings
    assert deviations(resolve("digits_semi", f"{method}_semi", "gaussian")) == {}


@pytest.mark.parametrize("given", [{"prior_samples": 0, "samples": 4}, {"prior_samples": 0}, {"samples": 8}])
def test_deviations_say_what_other_defaults_follow(given: dict[str, int]) -> None:
    settings = resolve("mnist", "ddvi", "pinwheel", given)
    assert resolve("mnist", "ddvi", "pinwheel", deviations(settings)) == settings


def test_another_objective_is_one_deviation_with_its_own_defaults() -> None:
    settings = resolve("mnist", "vae", "pinwheel", {"objective": "reweighted_wake_sleep"})
    assert settings.samples == 4
    assert deviations(settings) == {"objective": "reweighted_wake_sleep"}
    assert deviations(resolve("mnist", "ddvi", "pinwheel", {"objective": "reweighted_wake_sleep"})) == {}


@pytest.mark.parametrize(
    ("dataset", "given", "expected"),
    [
        ("mnist", {}, (4, 1024, 4, 4, 0.25)),
        ("mnist", {"latent_size": "8"}, (8, 0, 4, 4, 0.25)),
        ("mnist", {"latent_size": "8", "prior_samples": "16"}, (4, 16, 4, 4, 0.25)),
        ("mnist", {"prior_samples": "0"}, (8, 0, 4, 4, 0.25)),
        ("mnist_semi", {}, (8, 512, 4, 1, 0)),
        ("mnist_semi", {"samples": "3"}, (3, 512, 4, 1, 0)),
        ("mnist_semi", {"objective": "elbo"}, (1, 0, 1, 1, 0)),
    ],
)
def test_draws_of_reweighted_wake_sleep_are_chosen_by_what_they_cost_and_hit(
    dataset: str, given: dict[str, str], expected: tuple[float, ...]
) -> None:
    found = resolve(dataset, "ddvi_semi" if dataset.endswith("_semi") else "ddvi", "pinwheel", given)
    names = ("samples", "prior_samples", "resampled", "decoded", "variance_weight")
    assert tuple(getattr(found, name) for name in names) == expected


def test_the_log_variance_loss_is_the_diffusions_alone_by_default() -> None:
    of = {
        m: resolve("mnist", m, "pinwheel", {"objective": "reweighted_wake_sleep"}) for m in ("vae", "nsf_vae", "ddvi")
    }
    assert {method: settings.variance_weight for method, settings in of.items()} == {
        "vae": 0,
        "nsf_vae": 0,
        "ddvi": 0.25,
    }
    assert {settings.prior_samples for settings in of.values()} == {1024}


def test_a_study_gives_every_method_the_same_passes() -> None:
    of = {method: resolve("mnist", method, "pinwheel", {"preset": "study"}) for method in METHODS}
    assert {(settings.epochs, settings.hidden_size) for settings in of.values()} == {(5, 500)}
    assert (
        resolve("digits", "vae", "pinwheel", {"preset": "study"}).epochs == resolve("digits", "vae", "pinwheel").epochs
    )


def test_the_studys_preset_keeps_what_labels_need_and_the_papers_does_not() -> None:
    usual, study, paper = (
        resolve("mnist_semi", "ddvi_semi", "pinwheel", {"preset": preset}) for preset in ("default", "study", "paper")
    )
    assert (study.label_rate, study.agreement_weight) == (usual.label_rate, usual.agreement_weight)
    assert usual.label_rate < 1
    assert (paper.label_rate, paper.agreement_weight) == (1, 0)


def test_learning_rates_are_those_of_data_that_they_were_searched_for() -> None:
    assert resolve("mnist", "ddvi", "pinwheel").lr == METHODS["ddvi"].learning_rates["reweighted_wake_sleep"]
    assert resolve("cifar", "ddvi", "pinwheel").lr == FIELDS["lr"].default
    assert resolve("cifar_semi", "vae_semi", "pinwheel").lr == FIELDS["lr"].default
    assert resolve("cifar_semi", "vae_semi", "pinwheel", {"preset": "paper"}).lr == PAPER["lr"]


def test_what_labels_weigh_follows_method_prior_and_data_set():
    def weights(*named):
        settings = resolve(*named)
        return settings.classifier_weight, settings.agreement_weight, settings.label_temperature

    assert weights("mnist_semi", "vae_semi", "pinwheel") == (20, 20, 1)
    assert weights("mnist_semi", "aae_semi", "swiss_roll") == (50, 20, 50)
    assert weights("cifar_semi", "vae_semi", "pinwheel") == (2000, 200, 1)
    assert weights("cifar_semi", "aae_semi", "swiss_roll") == (2000, 200, 50)


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    settings = resolve("digits", "vae", "pinwheel", {"out": "~/runs/first"})
    assert settings.folder.as_posix() == "/home/me/runs/first"
