"""Weights into a network: all of them, each of its shape, or an error that names the first that differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from taesd_stream.errors import WeightsError

StateDict: TypeAlias = Mapping[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)


def without_weights(build: Callable[[], Network]) -> Network:
    """A network for `load_strictly`, its weights not even random.

    torch draws those from the process's one generator: `preview(save=…)` opens its decoder in a thread of the
    sampler's process, whose noise comes from there, too.
    """
    with torch.device("meta"):
        network = build()
    return network.to_empty(device="cpu")


def load_strictly(network: nn.Module, state_dict: StateDict, *, name: str, hint: Callable[[], str] = str) -> None:
    """Copy `state_dict` into `network`, in the network's dtype.

    hint: called when the weights do not fit; its text ends the message.
    Raises: WeightsError that names the first key that differs, the expected and the given.
    """
    difference = first_difference(network.state_dict(), state_dict)
    if difference is not None:
        raise WeightsError(f"weights do not fit {name}: {difference}{hint()}")
    network.load_state_dict(dict(state_dict))


def first_difference(expected: StateDict, given: StateDict) -> str | None:
    """The first key, in the network's order, whose presence or shape differs, in words; None when all fit."""
    for key, tensor in expected.items():
        if key not in given:
            return f"key '{key}' is missing"
        if given[key].shape != tensor.shape:
            return f"'{key}': expected shape {tuple(tensor.shape)}, got {tuple(given[key].shape)}"
    unexpected = next((key for key in given if key not in expected), None)
    return None if unexpected is None else f"key '{unexpected}' has no place"
