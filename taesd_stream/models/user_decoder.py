"""The decoder that a user's format file holds: a nano decoder, a projection, or one colour a cell."""

from __future__ import annotations

import torch
from torch import nn

from taesd_stream.errors import WeightsError
from taesd_stream.models.checkpoints import read_tensors
from taesd_stream.models.linear import FactorProjection, ShuffleProjection
from taesd_stream.models.nano import NanoDecoder, is_nano, layout_of, with_current_names
from taesd_stream.models.strict_loading import first_difference
from taesd_stream.user_formats import UserFormat


def user_decoder(fitted: UserFormat) -> nn.Module:
    """The best that the file has: a NanoDecoder, else a projection of all pixels of a cell, else one colour a cell.

    Raises: WeightsError for tensors that are no decoder of its format.
    """
    state = read_tensors(fitted.path)
    known = fitted.format
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise WeightsError(f"{fitted.path}: {key} is {tensor.dtype}, expected floating point")
    if not state:
        return FactorProjection(known)
    with torch.device("meta"):  # no memory before the file is known to fill it
        if is_nano(state):
            state = with_current_names(state)
            layout = layout_of(state)
            network: nn.Module = NanoDecoder(layout)
            kind, size = "nano decoder", (layout.latent_channels, float(layout.spatial_factor))
        else:
            network = ShuffleProjection(known.channels, round(known.spatial_factor))
            kind, size = "projection", (known.channels, known.spatial_factor)
    difference = first_difference(network.state_dict(), state)
    if difference is None and size != (known.channels, known.spatial_factor):
        difference = f"they are for {size[0]} channels, {size[1]:g} pixels a cell"
    if difference is not None:
        raise WeightsError(f"{fitted.path}: its tensors are no {kind} of {known.name}: {difference}")
    network.load_state_dict(state, assign=True)
    return network
