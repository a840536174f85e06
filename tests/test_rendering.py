"""Decoded pictures into renditions: together or alone they become the same planes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from taesd_stream.decoding.colour import fit_within, jpeg_planes, video_planes
from taesd_stream.decoding.host_copies import HostCopies
from taesd_stream.frames import RENDITIONS, Rendition
from taesd_stream.media.encoder import VideoEncoder
from taesd_stream_workers.worker.rendering import Rendered, Sizes, convert, render

SIZES = Sizes(live_max_px=64, thumb_max_px=32)
COPIES = HostCopies(torch.device("cpu"))


def alone(picture: torch.Tensor, rendition: Rendition) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A rendition's planes of one picture, as its size demands."""
    limit = {"record": 0, "film": 0, "thumb": 32}.get(rendition, 64)
    small = fit_within(picture[None], limit) if limit else picture[None]
    return (video_planes if rendition not in ("thumb", "jpeg") else jpeg_planes)(small)[0].numpy()


def test_pictures_rendered_together_are_those_rendered_alone() -> None:
    """Of any sizes and wishes, each rendition of each picture comes once, as if that picture were the only one."""
    torch.manual_seed(0)
    pictures = [torch.rand(3, *size) for size in [(24, 24), (48, 96), (24, 24), (30, 20), (48, 96)]]
    wishes: list[tuple[Rendition, ...]] = [("live",), RENDITIONS, ("live", "thumb"), ("record", "jpeg"), ("thumb",)]
    rendered = list(render(pictures, wishes, SIZES, COPIES))
    assert sorted((one.number, one.rendition) for one in rendered) == sorted(
        (number, rendition) for number, wish in enumerate(wishes) for rendition in wish
    )
    for one in rendered:
        one.copy.wait()
        np.testing.assert_array_equal(one.planes, alone(pictures[one.number], one.rendition))
        height, width = pictures[one.number].shape[-2:]
        assert one.size == ((64, 32) if (width, one.rendition) == (96, "live") else one.size)
        assert one.rendition != "record" or one.size == (width, height)


@pytest.mark.parametrize("rendition", ["record", "film"])
def test_what_no_encoder_takes_is_recorded_smaller(rendition: Rendition) -> None:
    """H.264's encoder takes 16384 pixels on a side: one more, and the frame would never be recorded."""
    sizes = Sizes(live_max_px=1280, thumb_max_px=256)
    assert [sizes.limit(rendition, *size) for size in ((8, 16384), (16384, 8))] == [0, 0]
    ((one,),) = [list(convert([torch.rand(3, 4, 16392)], [(rendition,)], sizes))]
    width, height = one.size
    assert (width, height) == (16384, 4)
    assert VideoEncoder("record").encode(one.planes[0].numpy(), 0).width == 16384


def test_a_rendition_s_pictures_keep_their_order() -> None:
    """Pictures of one shape come in the order in which they were given, within each rendition: encoders are chains."""
    pictures = [torch.full((3, 16, 16), value / 8) for value in range(8)]
    came: dict[Rendition, list[Rendered]] = {}
    for one in render(pictures, [("live", "record")] * 8, SIZES, COPIES):
        came.setdefault(one.rendition, []).append(one)
    assert {rendition: [one.number for one in ones] for rendition, ones in came.items()} == {
        "live": list(range(8)),
        "record": list(range(8)),
    }
