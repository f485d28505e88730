"""The package as a user imports it."""

import ast
import doctest
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ddvi
from ddvi._version import __version__


@pytest.mark.parametrize("name", ddvi.__all__)
def test_a_public_name_is_there_and_says_what_it_is(name):
    value = getattr(ddvi, name)
    if name == "__version__":
        assert value == __version__
        return
    documentation = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert documentation, f"{name} has no docstring"
    assert not documentation.startswith(f"{name}("), f"{name} has the docstring that dataclasses and tuples make up"
    assert ">>>" in documentation, f"{name} has no example"


def modules() -> list[str]:
    """Where the public names are made."""
    return sorted({getattr(ddvi, name).__module__ for name in ddvi.__all__ if name != "__version__"} | {"ddvi.sklearn"})


@pytest.fixture
def names() -> dict:
    """What examples take as given: the model of `LatentVariableModel`'s, and its x."""
    with ddvi.seeded(0):
        likelihood = ddvi.BernoulliLikelihood(torch.nn.Linear(2, 6), torch.Size([6]))
        posterior = ddvi.DiffusionPosterior(torch.nn.Linear(6, 8), latent_size=2, steps=4)
        model = ddvi.LatentVariableModel(ddvi.Pinwheel(), likelihood, posterior)
    return {"ddvi": ddvi, "torch": torch, "model": model, "x": torch.ones(3, 6)}


@pytest.mark.parametrize("module", modules())
def test_the_examples_in_docstrings_are_true(module, names):
    with ddvi.seeded(0, module):
        found = doctest.testmod(importlib.import_module(module), extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert found.attempted
    assert not found.failed


def test_the_example_of_the_guide_is_true(names):
    pytest.importorskip("pyro")
    test_the_examples_in_docstrings_are_true("ddvi.pyro", names)


def test_what_the_stub_imports_is_what_it_makes_public():
    stub = ast.parse(Path(ddvi.__file__).with_suffix(".pyi").read_text())
    imported = [alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    (listed,) = (ast.literal_eval(node.value) for node in stub.body if isinstance(node, ast.Assign))
    assert sorted(listed) == sorted(imported)
    assert set(listed) == set(ddvi.__all__) == set(dir(ddvi))


@pytest.mark.skipif(shutil.which("node") is None, reason="pyright needs node")
def test_every_public_type_is_known():
    command = [sys.executable, "-m", "pyright", "--verifytypes", "ddvi", "--ignoreexternal", "--outputjson"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    report = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if not report.stdout.startswith("{"):
        pytest.skip("pyright itself, which its package fetches, isn't at hand")
    symbols = json.loads(report.stdout)["typeCompleteness"]["symbols"]
    assert len(symbols) > len(ddvi.__all__)
    # Their bases are classes of Pyro and scikit-learn that pyright doesn't know.
    adapters = ("ddvi.pyro.PathDistribution", "ddvi.pyro.AutoDiffusion", "ddvi.sklearn.DDVI")
    unknown = {symbol["name"] for symbol in symbols if not symbol["isTypeKnown"]}
    assert unknown <= {*adapters, "ddvi.pyro.AutoDiffusion.get_posterior"}


def test_a_name_that_is_not_public_is_refused():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ddvi.no_such_name


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, ddvi; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    heavy = {
        "torch",
        "numpy",
        "rich",
        "matplotlib",
        "omegaconf",
        "sklearn",
        "zuko",
        "lightning_fabric",
        "pooch",
        "pyro",
    }
    assert not heavy & set(modules.stdout.split())


def test_the_library_needs_neither_plotting_nor_command_line_packages():
    code = "import sys, ddvi; [getattr(ddvi, name) for name in ddvi.__all__]; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"rich", "matplotlib", "omegaconf", "sklearn", "pooch", "pyro"} & set(modules.stdout.split())
