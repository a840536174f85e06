"""The coder of h264.cu without a GPU: compiled by a C++ compiler, whose loops stand for a warp's lanes."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray

from taesd_stream.decoding.kernels.cubins import Program
from taesd_stream.decoding.kernels.h264_coder import CODED, PICTURE, CodedStream, quantiser, row_bytes, row_room
from taesd_stream.media.parameter_sets import macroblocks, parameter_sets

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
Planes = NDArray[np.uint8]


class HostCoder:
    """Codes planes as the device does, and shows what a decoder makes of them."""

    def __init__(self, folder: Path) -> None:
        assert COMPILER is not None
        source, library = folder / "h264.cpp", folder / "h264.so"
        source.write_text(Program("h264.cu", "").source, encoding="utf-8")
        command = [
            COMPILER,
            "-std=c++17",
            "-O2",
            "-Wall",
            "-Werror",
            "-shared",
            "-fPIC",
            "-o",
            str(library),
            str(source),
        ]
        subprocess.run(command, check=True)
        self._pts = 0
        self._code = ctypes.CDLL(str(library)).code_picture

    def code(
        self,
        stream: CodedStream,
        planes: Planes,
        *,
        pts: int | None = None,
        is_keyframe: bool = False,
        qp: int | None = None,
    ) -> bytes:
        """The next access unit of a stream, whose NAL units hold no start code.

        pts: None for one more each time; qp: None for the stream's own.
        """
        size = planes.shape[1], planes.shape[0] // 3 * 2
        if stream.size != size:
            stream.kept = torch.zeros(planes.shape, dtype=torch.uint8)
        assert stream.kept is not None
        if qp is not None:
            stream.qp = qp
        self._pts = self._pts + 1 if pts is None else pts
        picture, coded = np.zeros(1, PICTURE), np.zeros(1, CODED)
        picture[0] = (
            planes.ctypes.data,
            stream.kept.data_ptr(),
            *stream.next(size, self._pts, is_keyframe=is_keyframe),
        )
        columns, rows = macroblocks(*size)
        words = np.zeros(row_bytes(columns) // 4, np.uint32)
        out = np.full(rows * row_room(columns), 0xA5, np.uint8)
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in (picture, words, coded, out))
        self._code(*pointers, *size, row_bytes(columns))
        nbytes, detail = (int(one) for one in coded[0])
        assert (out[nbytes:] == 0xA5).all()
        stream.qp = quantiser(detail, columns * rows)
        said = (parameter_sets(*size) if picture[0]["is_first"] else b"") + out[:nbytes].tobytes()
        for unit in re.split(rb"\x00?\x00\x00\x01", said)[1:]:
            assert not re.search(rb"\x00\x00[\x00-\x02]", unit)
        return said


class Shown:
    """What FFmpeg's decoder makes of access units."""

    def __init__(self, **options: str) -> None:
        """options: of the decoder."""
        self.context = av.CodecContext.create("h264", "r")
        self.context.options = {"err_detect": "explode", **options}

    def __call__(self, access_unit: bytes) -> Planes:
        """Planes of the one picture, of the size that is shown."""
        (frame,) = self.context.decode(av.Packet(access_unit))
        return frame.to_ndarray().astype(np.uint8)


def psnr(one: Planes, other: Planes) -> float:
    """Of all samples, dB."""
    error = float(np.mean((one.astype(float) - other) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-9)))
