"""Latents whose pictures are known, and pictures read back: what the end-to-end tests compare."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from taesd_stream.models import build_decoder

Pixels = NDArray[np.uint8]
# Colours that the linear decoder of sd1 can show.
PATCHES = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "red": (190, 60, 60),
    "green": (60, 170, 60),
    "blue": (60, 70, 180),
    "yellow": (200, 190, 70),
    "cyan": (70, 180, 190),
    "magenta": (180, 70, 170),
}


@torch.no_grad()
def sd1_latents_of(rgb: tuple[int, int, int], height: int = 8, width: int = 8) -> NDArray[np.float32]:
    """(4, h, w) latents that the linear decoder of sd1 shows in one colour, as near as its factors allow."""
    decoder = build_decoder("linear", latent_format="sd1")
    zero = decoder(torch.zeros(1, 4, 1, 1))[0, :, 0, 0]
    basis = torch.stack([decoder(torch.eye(4)[i].reshape(1, 4, 1, 1))[0, :, 0, 0] - zero for i in range(4)], dim=1)
    target = torch.tensor([value / 255 for value in rgb]) - zero
    solution = torch.linalg.lstsq(basis, target.unsqueeze(1)).solution[:, 0]
    return np.broadcast_to(solution.numpy()[:, None, None], (4, height, width)).astype(np.float32)


def decode_jpeg(payload: bytes) -> Pixels:
    """(H, W, 3) RGB of a JPEG."""
    return np.asarray(Image.open(BytesIO(payload)).convert("RGB"))


def decode_h264(payloads: list[bytes]) -> list[Pixels]:
    """(H, W, 3) RGB of Annex B access units."""
    context: Any = av.CodecContext.create("h264", "r")
    frames = [frame for payload in payloads for frame in context.decode(av.Packet(payload))]
    frames += context.decode(None)
    return [to_rgb(frame) for frame in frames]


def decode_file(path: Path) -> list[Pixels]:
    """(H, W, 3) RGB of every picture of a video file."""
    with av.open(path) as container:
        return [to_rgb(frame) for frame in container.decode(video=0)]


def to_rgb(frame: av.VideoFrame) -> Pixels:
    """RGB of a decoded BT.709 picture, as a player shows it."""
    return np.asarray(frame.to_ndarray(format="rgb24", src_colorspace="ITU709", dst_colorspace="ITU709"))


def psnr_db(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio of two pictures of 8 bits, dB."""
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def smooth_picture(height: int, width: int) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]: a sky, a sun with a hard edge, waves: something for every frequency."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    sky = torch.stack([0.3 + 0.5 * y, 0.45 + 0.2 * y, 0.8 - 0.5 * y])
    sun = ((x - 0.65) ** 2 + (y - 0.35) ** 2 < 0.02).float()
    waves = 0.08 * torch.sin(60 * y * y + 4 * x) * (y > 0.6)
    return (sky + waves + sun * torch.tensor([0.5, 0.3, -0.1])[:, None, None]).clamp(0, 1).unsqueeze(0)
