"""A nano decoder's picture strip by strip: the whole network's values within a given memory.

Each strip reads as many rows around it as its pixels depend on, and is told the statistics of the whole latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taesd_stream.models.nano import NanoDecoder


def decode_in_strips(network: NanoDecoder, latents: Tensor, *, bytes_per_cell: int, budget_bytes: int) -> Tensor:
    """What `network(latents)` gives, in float32, with a strip at a time in memory beside the result.

    latents: (N, C, h, w). bytes_per_cell: what decoding one latent cell takes. budget_bytes: for one strip of one
    picture; it has as many rows as its halo at the least, whatever that takes: fewer would be more than three times the
    work of the whole.
    """
    count, _, height, width = latents.shape
    halo, factor = network.layout.halo, network.layout.spatial_factor
    rows = max(halo, budget_bytes // (bytes_per_cell * width) - 2 * halo)
    result = torch.empty(count, 3, height * factor, width * factor, device=latents.device)
    for index in range(count):
        whole = latents[index : index + 1]
        statistics = network.statistics(whole)
        for top in range(0, height, rows):
            first, last = max(0, top - halo), min(height, top + rows + halo)
            strip = network(whole[:, :, first:last], statistics)
            bottom = min(height, top + rows)
            kept = strip[0, :, (top - first) * factor : (bottom - first) * factor]
            result[index, :, top * factor : bottom * factor] = kept
    return result
