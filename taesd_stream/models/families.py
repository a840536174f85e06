"""Networks by name: which families there are, and weights that must fit them exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from taesd_stream.errors import WeightsError
from taesd_stream.models.networks import TINY_FAMILIES, TinyFamily, tiny_decoder, tiny_encoder

Part: TypeAlias = Literal["decoder", "encoder"]
StateDict: TypeAlias = Mapping[str, Tensor]
_Builder: TypeAlias = Callable[[TinyFamily], nn.Module]

_BUILDERS: dict[Part, _Builder] = {"decoder": tiny_decoder, "encoder": tiny_encoder}


def build_decoder(family: str, state_dict: StateDict | None = None, *, latent_format: str | None = None) -> nn.Module:
    """A decoder by its family's name: (N, C, h, w) latents -> (N, 3, H, W), values in [0, 1] but not clamped.

    family: a key of TINY_FAMILIES, or "linear" with the `latent_format` whose projection it is.
    state_dict: as in the original file, `nn.Sequential` indices without a prefix; None leaves random weights.
    Raises: ValueError for an unknown family; WeightsError for weights that do not fit.
    """
    if family == "linear":
        return _build_linear(state_dict, latent_format)
    if latent_format is not None:
        raise ValueError(f"latent_format belongs to the family 'linear', not to {family!r}")
    return _build_tiny("decoder", family, state_dict)


def build_encoder(family: str, state_dict: StateDict | None = None) -> nn.Module:
    """An encoder by its family's name: (N, 3, H, W) pixels in [0, 1] -> (N, C, h, w) latents.

    Raises: ValueError for an unknown family; WeightsError for weights that do not fit.
    """
    return _build_tiny("encoder", family, state_dict)


def _build_linear(state_dict: StateDict | None, latent_format: str | None) -> nn.Module:
    # Imported here: linear.py uses load_strictly of this module.
    from taesd_stream.latent_formats import latent_format as format_named
    from taesd_stream.models.linear import linear_decoder

    if latent_format is None:
        raise ValueError("the family 'linear' needs latent_format=NAME: a projection belongs to one latent space")
    network = linear_decoder(format_named(latent_format))
    if state_dict is not None:
        load_strictly(network, state_dict, name=f"linear {latent_format}")
    return network


def _build_tiny(part: Part, family: str, state_dict: StateDict | None) -> nn.Module:
    if family not in TINY_FAMILIES:
        raise ValueError(f"no {part} family {family!r}; there are: {', '.join(TINY_FAMILIES)}")
    network = _BUILDERS[part](TINY_FAMILIES[family])
    if state_dict is not None:
        load_strictly(network, state_dict, name=f"{family} {part}", hint=lambda: _fit_hint(state_dict))
    return network


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


def families_that_fit(state_dict: StateDict) -> list[str]:
    """Families and parts that the weights would fit, as "taef1 decoder"; several share one layout."""
    fitting = []
    with torch.device("meta"):  # shapes only: neither memory nor time
        for part, builder in _BUILDERS.items():
            for name, family in TINY_FAMILIES.items():
                if first_difference(builder(family).state_dict(), state_dict) is None:
                    fitting.append(f"{name} {part}")
    return fitting


def _fit_hint(state_dict: StateDict) -> str:
    fitting = families_that_fit(state_dict)
    return f"; they fit {' or '.join(fitting)}" if fitting else "; they fit no family known here"
