"""Colours: against values worked out by hand from the recommendations, and back through FFmpeg's converter."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor
from torch.nn import functional as F

from taesd_stream.decoding.colour import count_nan, fit_within, jpeg_planes, pad_to_even, stretched_planes, video_planes

# Patch -> Y, U, V. BT.709 limited: Y = 16 + 219 (0.2126 R + 0.7152 G + 0.0722 B), U = 128 + 224 (B - Y') / 1.8556,
# V = 128 + 224 (R - Y') / 1.5748. BT.601 full: Y = 255 (0.299 R + 0.587 G + 0.114 B), U = 128 + 255 (B - Y') / 1.772,
# V = 128 + 255 (R - Y') / 1.402; ties are rounded down.
PATCHES = {
    "white": ((1, 1, 1), (235, 128, 128), (255, 128, 128)),
    "black": ((0, 0, 0), (16, 128, 128), (0, 128, 128)),
    "red": ((1, 0, 0), (63, 102, 240), (76, 85, 255)),
    "green": ((0, 1, 0), (173, 42, 26), (150, 44, 21)),
    "blue": ((0, 0, 1), (32, 240, 118), (29, 255, 107)),
    "cyan": ((0, 1, 1), (188, 154, 16), (179, 171, 0)),
    "magenta": ((1, 0, 1), (78, 214, 230), (105, 212, 235)),
    "yellow": ((1, 1, 0), (219, 16, 138), (226, 0, 149)),
}


def flat(colour: tuple[float, float, float], height: int = 16, width: int = 16) -> Tensor:
    """One picture of one colour."""
    return torch.tensor(colour, dtype=torch.float32)[None, :, None, None].expand(1, 3, height, width)


def samples(planes: Tensor) -> tuple[set[int], set[int], set[int]]:
    """The values that occur in Y, U and V of one picture's planes."""
    flat_planes = planes[0].flatten()
    luma = len(flat_planes) * 2 // 3
    y, (u, v) = flat_planes[:luma], flat_planes[luma:].reshape(2, -1)
    return set(y.tolist()), set(u.tolist()), set(v.tolist())


@pytest.mark.parametrize("name", PATCHES)
def test_patches_have_the_values_of_the_recommendations(name: str) -> None:
    """Flat colours become exactly the codes that BT.709 (video) and BT.601 full range (JPEG) give them."""
    colour, bt709, bt601 = PATCHES[name]
    assert samples(video_planes(flat(colour))) == tuple({code} for code in bt709)
    assert samples(jpeg_planes(flat(colour))) == tuple({code} for code in bt601)


@pytest.mark.parametrize("name", PATCHES)
def test_patches_come_back_through_ffmpeg(name: str) -> None:
    """FFmpeg, told the matrix and range, turns the planes back into the colour, to 2 of 255."""
    colour = PATCHES[name][0]
    expected = np.array(colour) * 255
    video = av.VideoFrame.from_numpy_buffer(video_planes(flat(colour))[0].numpy(), "yuv420p")
    video.colorspace, video.color_range = Colorspace.ITU709, ColorRange.MPEG
    picture = av.VideoFrame.from_numpy_buffer(jpeg_planes(flat(colour))[0].numpy(), "yuvj420p")
    picture.colorspace, picture.color_range = Colorspace.ITU601, ColorRange.JPEG
    for frame in (video, picture):
        back = frame.to_ndarray(format="rgb24").astype(int)
        assert np.abs(back - expected).max() <= 2


def test_chroma_is_the_mean_of_its_box() -> None:
    """Four pixels share one chroma sample: that of their mean colour; luma is each pixel's own."""
    rgb = torch.zeros(1, 3, 2, 2)
    rgb[0, 0, 0, 0] = 1  # one red pixel of four
    y, u, v = samples(video_planes(rgb))
    assert (y, u, v) == ({63, 16}, {122}, {156})  # 128 - 224*0.25*0.2126/1.8556, 128 + 224*0.25*0.7874/1.5748


@pytest.mark.parametrize(("height", "width"), [(5, 7), (6, 7), (1, 1)])
def test_odd_sizes_are_padded_by_their_edge(height: int, width: int) -> None:
    """An odd picture gets its last row or column once more, nothing of another colour."""
    rgb = torch.rand(1, 3, height, width)
    padded = pad_to_even(rgb)
    assert torch.equal(padded[..., :height, :width], rgb)
    assert torch.equal(padded[..., -1, :width], rgb[..., -1, :])
    assert video_planes(rgb).shape == (1, padded.shape[-2] * 3 // 2, padded.shape[-1])


def test_what_is_no_colour_is_grey_or_clamped() -> None:
    """NaN becomes mid grey and is counted; infinities and values out of range are clamped."""
    rgb = torch.full((1, 3, 2, 2), float("nan"))
    assert samples(video_planes(rgb)) == ({125}, {128}, {128})  # 16 + 219/2
    assert count_nan(rgb) == 12
    bright = torch.tensor([float("inf"), 7.0, 1.5])[None, :, None, None].expand(1, 3, 2, 2)
    assert torch.equal(video_planes(bright), video_planes(flat((1, 1, 1), 2, 2)))
    assert torch.equal(video_planes(-bright), video_planes(flat((0, 0, 0), 2, 2)))


def test_half_precision_is_converted_in_single() -> None:
    """float16 pictures give the codes of the same values in float32."""
    rgb = torch.rand(1, 3, 8, 8).half()
    assert torch.equal(video_planes(rgb), video_planes(rgb.float()))


def test_only_pictures_are_converted() -> None:
    """A tensor that is no batch of RGB pictures is an error that names its shape."""
    for convert in (video_planes, lambda cells: stretched_planes(cells, 8)):
        with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\), got shape \(1, 4, 2, 2\)"):
            convert(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("factor", [4, 8, 12, 32])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (5, 4)], ids=str)
def test_stretched_cells_have_the_planes_of_the_stretched_picture(size: tuple[int, int], factor: int) -> None:
    """Cells become what bilinear interpolation of their colours does, to one code; NaN is grey, and all is clamped."""
    cells = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(factor))
    picture = F.interpolate(cells, scale_factor=float(factor), mode="bilinear", align_corners=False)
    off = stretched_planes(cells, factor).int() - video_planes(picture).int()
    assert off.abs().max() <= 1
    assert off.float().abs().mean() < 0.001  # a half is rounded either way
    bad = torch.full((1, 3, *size), float("nan"))
    assert samples(stretched_planes(bad, factor)) == ({125}, {128}, {128})
    assert samples(stretched_planes(cells[:1] + 7, factor)) == ({235}, {128}, {128})


@pytest.mark.parametrize("factor", [0, 2, 6, -4])
def test_chroma_needs_a_factor_of_four(factor: int) -> None:
    """With another factor a box of 2x2 pixels would lie on both sides of a cell's middle."""
    with pytest.raises(ValueError, match=f"factor: expected a multiple of 4, got {factor}"):
        stretched_planes(torch.zeros(1, 3, 2, 2), factor)


@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [
        ((480, 832), 256, (148, 256)),
        ((832, 480), 256, (256, 148)),
        ((512, 512), 512, (512, 512)),
        ((100, 60), 256, (100, 60)),
        ((4000, 8), 256, (256, 2)),
        ((600, 400), 255, (254, 170)),
    ],
)
def test_pictures_shrink_to_fit(size: tuple[int, int], limit: int, expected: tuple[int, int]) -> None:
    """The long side ends within the limit, both sides even; a picture that fits is left alone."""
    assert fit_within(torch.zeros(1, 3, *size), limit).shape[-2:] == expected


def test_shrinking_takes_means() -> None:
    """Each pixel of a half-size picture is the mean of four; a flat colour stays what it is."""
    rgb = torch.rand(1, 3, 32, 32)
    expected = rgb.reshape(1, 3, 16, 2, 16, 2).mean((3, 5))
    torch.testing.assert_close(fit_within(rgb, 16), expected)
    torch.testing.assert_close(fit_within(flat((0.2, 0.4, 0.6), 30, 50), 26), flat((0.2, 0.4, 0.6), 16, 26))
