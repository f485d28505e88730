"""The documentation is true: its code runs, its tables name what there is, its pictures are those of the code."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import StudentT

from ddvi import catalogue, cli, folders
from ddvi.evidence import exact_log_likelihood
from ddvi.methods import ALIASES, METHODS
from ddvi.randomness import seeded

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EVERYWHERE = {"catalogue", "errors", "randomness"}  # left out of the picture of the modules


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page, in order."""
    return [code for kind, code in BLOCK.findall((ROOT / page).read_text()) if kind == language]


def place(block: str) -> str:
    """The file that a block belongs to, from its first line; empty for a block that runs where it stands."""
    found = re.match(r"# ((?:src|tests)/\S+\.py)\n", block)
    return found[1] if found else ""


def execute(page: str) -> dict:
    """Run a page's Python blocks one after the other, but those that belong to a file."""
    names: dict = {}
    with seeded(0, page):
        for number, code in enumerate(blocks(page, "python")):
            if not place(code):
                exec(compile(code, f"{page}, Python block {number + 1}", "exec"), names)
    return names


def table(page: str, first: str) -> list[list[str]]:
    """The rows of the table whose header's first cell is `first`, without it."""
    lines = (ROOT / page).read_text().splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip(" `") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


# The README


@pytest.mark.slow
def test_the_readmes_posterior_finds_both_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = execute("README.md")
    model, z = names["inference"].model, names["z"]
    evidence = exact_log_likelihood(model.prior, model.likelihood, names["x"][:20]).log_likelihood
    assert abs((evidence - names["bound"].value[:20]).mean()) < 0.05
    above = (z[..., 1] > 0).float().mean(0)
    assert ((above > 0.2) & (above < 0.8)).float().mean() > 0.9, "the mirror image is as likely"
    assert (tmp_path / "sensors.safetensors").exists()


@pytest.mark.slow
def test_the_page_on_own_models_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = execute("docs/own_model.md")
    first, last = names["history"][0], names["history"][-1]
    assert last["resampled_reconstruction"] < first["resampled_reconstruction"] - 5
    evidence, bound = names["evidence"].log_likelihood, names["bound"].double()
    assert (evidence - bound).mean() > 0
    assert evidence.mean() > -64 * torch.tensor(2.0).log(), "a fair coin for each pixel does better"


@pytest.mark.slow
def test_the_page_on_fixed_targets_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = execute("docs/fixed_targets.md")
    assert abs(names["evidence"].value - 0.804) < 0.1, "by quadrature"
    assert abs((names["z"][:, 0] > 0).float().mean() - 0.5) < 0.06
    assert names["again"].history == names["target"].history


@pytest.mark.slow
def test_the_page_on_pyro_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyro")
    monkeypatch.chdir(tmp_path)
    names = execute("docs/pyro.md")
    assert names["draws"]["effect"].shape[0] == 500
    assert (names["low"] < names["high"]).all()


@pytest.mark.slow
def test_the_page_on_scikit_learn_runs() -> None:
    names = execute("docs/sklearn.md")
    assert names["embedding"].columns.tolist() == ["ddvi0", "ddvi1"]
    assert names["accuracy"] > 0.8


def test_the_first_page_runs() -> None:
    assert execute("docs/start.md")["density"].shape == (5,)


@pytest.mark.slow
def test_the_page_on_own_data_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], brief: None
) -> None:
    monkeypatch.chdir(tmp_path)
    execute("docs/own_data.md")
    commands = [shlex.split(line) for code in blocks("docs/own_data.md", "sh") for line in code.splitlines()]
    assert [words[1] for words in commands] == ["train", "train", "embed"]
    for words in commands:
        small = ["hidden_size=16", "threads=1", "report=false"] if words[1] == "train" else []
        assert cli.main([*words[1:], *small]) == 0, f"{shlex.join(words)}\n{capsys.readouterr()}"
    assert len((tmp_path / "latents.csv").read_text().splitlines()) == 601
    labelled = folders.read_metrics(tmp_path / "runs/mine_semi/ddvi_semi/gaussian_mixture/seed0")
    assert len(labelled["confusion_matrix"]) == 3


def test_the_readmes_tables_name_what_there_is() -> None:
    papers = {name: alias for alias, name in ALIASES.items()} | {"nsf_vae": "–"}
    methods = [(row[0], row[1], row[3]) for row in table("README.md", "name")]
    assert methods == [(name, papers.get(name, name), method.objective) for name, method in METHODS.items()]
    assert [row[0] for row in table("README.md", "prior")] == list(catalogue.PRIORS)
    assert {row[0] for row in table("README.md", "data set")} == catalogue.DATASETS.keys() - {"digits"}


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_files_of_a_run_are_those_of_the_tables(page: str) -> None:
    named = {name.strip(" `") for row in table(page, "file") for name in row[0].split(",")}
    files = {folders.CONFIG, folders.CHECKPOINT, folders.WEIGHTS, folders.METRICS, folders.HISTORY, folders.REPORT}
    assert named == files | {"latents.png", "samples.png", "reconstructions.png", "curves.png"}


# Extending


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the posterior of `docs/extending.md` in it: one file, one line and its tests."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tests").mkdir()
    for name in ("pyproject.toml", "tests/conftest.py", "tests/test_contracts.py"):
        shutil.copy(ROOT / name, root / name)
    new, line, tests = [code for code in blocks("docs/extending.md", "python") if place(code)]
    assert not (root / place(new)).exists()
    (root / place(new)).write_text(new)
    (root / place(tests)).write_text(tests)
    head, fragment = "METHODS: dict[str, Method] = {\n", line.partition("\n")[2]
    listed = (root / place(line)).read_text()
    assert listed.count(head) == fragment.count("\n") == 1, "the page says one line"
    (root / place(line)).write_text(listed.replace(head, head + fragment))
    return root


def run(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with the package of `root`, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "DDVI"))}
    environment["PYTHONPATH"] = str(root / "src")
    return subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_the_new_posterior_keeps_the_contracts_and_its_bound_is_the_evidence(extended: Path) -> None:
    result = run(extended, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "full_gaussian", "tests")
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.findall(r"(\d+) passed", result.stdout)[0]) > 30, "the contracts have taken it up"


@pytest.mark.slow
def test_the_pages_commands_run_with_one_file_and_one_line_more(extended: Path) -> None:
    """In one process, in which the commands are called as their script calls them."""
    (data,) = (code for code in blocks("docs/extending.md", "python") if "np.savez" in code)
    commands = [shlex.split(line) for code in blocks("docs/extending.md", "sh") for line in code.splitlines()]
    assert {words[1] for words in commands} == {"list", "train", "sample"}
    small = ["limit=200", "hidden_size=16", "threads=1", "report=false"]
    lines = [data, "from ddvi.cli import main"]
    for words in commands:
        given = [*words[1:], *(small if words[1] == "train" else [])]
        lines.append(f"assert main({given}) == 0, {shlex.join(words)!r}")
    result = run(extended, "-c", "\n".join(lines))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "full_gaussian" in result.stdout.partition("epoch 1/1")[0], "the list comes first"
    metrics = folders.read_metrics(extended / "runs/digits/full_gaussian/pinwheel/seed0")
    assert metrics["elbo"] < metrics["log_likelihood"]


def test_the_pages_prior_and_likelihood_have_the_densities_of_what_they_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = execute("docs/extending.md")
    line = torch.linspace(-30, 30, 301, dtype=torch.float64)[:, None]
    prior = names["StudentT"]
    torch.testing.assert_close(prior(1).log_prob(line), StudentT(3.0).log_prob(line)[:, 0], atol=1e-7, rtol=0)
    with seeded(0, "draws"):
        draws = prior(2).double().sample((200_000,))
        counts = names["likelihood"](torch.randn(2, 2)).sample((5,))
    # |z|²/2 of a plane's Student distribution follows F(2, 3): P(F ≤ f) = 1 − (1 + 2f/3)^(−3/2).
    for f in (0.1, 1.0, 10.0):
        expected = 1 - (1 + 2 * f / 3) ** -1.5
        assert abs(float((draws.square().sum(-1) / 2 <= f).double().mean()) - expected) < 0.005
    assert counts.shape == (5, 2, 20)
    assert names["likelihood"].pairwise_log_prob(counts[0], torch.zeros(3, 2)).shape == (2, 3)
    assert names["clover"].event_shape == (2,)


# The picture of the modules


def imports() -> dict[str, set[str]]:
    """Which module of ddvi imports which, at its top or in a function; a package counts as one."""
    found: dict[str, set[str]] = {}
    root = ROOT / "src/ddvi"
    for path in root.rglob("*.py"):
        module = path.relative_to(root).with_suffix("").parts[0]
        if module.startswith("_"):
            continue
        tree = ast.parse(path.read_text())
        of_types = {id(node) for branch in ast.walk(tree) if _is_for_types(branch) for node in ast.walk(branch)}
        targets = found.setdefault(module, set())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in of_types:
                package, _, rest = (node.module or "").partition(".")
                if package == "ddvi":
                    targets |= {rest.split(".")[0]} if rest else {alias.name for alias in node.names}
        targets -= {module, "_version"}
    return found


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """All that `start` imports, directly or through others."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen


def test_the_picture_of_the_modules_is_that_of_the_imports() -> None:
    code = imports()
    assert not [module for module in EVERYWHERE if code[module] - EVERYWHERE], "drawn as if it imported nothing"
    code = {module: targets - EVERYWHERE for module, targets in code.items() if module not in EVERYWHERE}
    assert not [module for module in code if module in reached(code, module)], "a circle of imports"
    shortest = {
        (module, target)
        for module, targets in code.items()
        for target in targets
        if not any(target in reached(code, other) for other in targets - {target})
    }
    drawn = re.findall(r"^ +(\w+) --> (\w+)$", blocks("docs/architecture.md", "mermaid")[0], re.MULTILINE)
    assert sorted(drawn) == sorted(shortest), (
        "the arrows of docs/architecture.md, without those that follow from others"
    )


def test_the_table_of_the_modules_is_complete() -> None:
    named = [name for row in table("docs/architecture.md", "module") for name in re.findall(r"\w+", row[0])]
    assert sorted(named) == sorted(imports())


# Links


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target, anchor in re.findall(r"\[[^\]]*\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        file = (ROOT / page).parent / target
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, f"{target} has no {anchor}"
    for named in re.findall(r"`((?:src|tests|docs|scripts|benchmarks|\.ci)/[\w./]*)`", text):
        assert (ROOT / named).exists(), f"{page} names {named}"
