"""The one checkpoint format: a safetensors file of every tensor, with everything else as JSON in its header.

Written aside and renamed, so that a file is either whole or not there; nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ddvi.errors import InputError
from ddvi.files import write_aside


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write named tensors and JSON-able facts.

    Args:
        path: the file.
        tensors: by name; moved to the CPU and made contiguous.
        facts: numbers, text, lists and dictionaries.
    """
    plain = {name: tensor.detach().to("cpu").clone().contiguous() for name, tensor in tensors.items()}
    write_aside(path, lambda temporary: save_file(plain, temporary, metadata={"ddvi": json.dumps(facts)}))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote.

    Raises:
        InputError: the file is missing, damaged, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["ddvi"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; give the folder of a run that has been started") from None
    except PermissionError:
        raise InputError(f"{path} may not be read; have its owner allow it, as by chmod +r") from None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise InputError(
            f"{path} is damaged or not a file of ddvi ({error}); restore it, or train anew (a run: with overwrite=true)"
        ) from None


def load_saved(path: Path, kind: str, writer: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and the facts that `save` was given under the name `kind`.

    Args:
        path: the file.
        kind: what it is of, such as "inference".
        writer: what writes such files, for the errors.

    Raises:
        InputError: the file is missing, damaged, or of something else.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}; give one that {writer} wrote")
    tensors, facts = load(path)
    if kind not in facts:
        raise InputError(f"{path} holds no {kind} that was saved; give one that {writer} wrote")
    return tensors, facts[kind]


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy weights into a model of the same composition.

    Raises:
        InputError: names or shapes differ.
    """
    wanted = model.state_dict()
    if difference := _difference(wanted, tensors):
        advice = "load it with the settings and the version that it was trained with, or train anew in another place"
        raise InputError(f"{path} holds the weights of another model: {difference}; {advice}")
    model.load_state_dict(dict(tensors))


def _difference(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What tells two sets of weights apart, or nothing."""
    if lacking := sorted(wanted.keys() - given.keys()):
        return f"{_named(lacking)} isn't among them"
    if more := sorted(given.keys() - wanted.keys()):
        return f"they have {_named(more)} too"
    for name, value in wanted.items():
        if given[name].shape != value.shape:
            return f"{name} is of shape {tuple(given[name].shape)} instead of {tuple(value.shape)}"
    return ""


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (with {len(names) - 1} others)"


def flatten_optimizer(name: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimiser's state, as `optimizer/name/parameter/entry`."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer/{name}/{i}/{key}": value for i, entry in state.items() for key, value in entry.items()}


def restore_optimizer(name: str, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `flatten_optimizer` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer" and rest.startswith(f"{name}/"):
            index, entry = rest.removeprefix(f"{name}/").split("/")
            state.setdefault(int(index), {})[entry] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
