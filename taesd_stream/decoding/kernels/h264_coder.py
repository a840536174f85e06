"""Planes on a GPU -> H.264 pictures in the host's memory: h264.cu's kernels, and what they keep of each stream.

What comes over are some KiB a picture instead of its planes, and no processor encodes.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taesd_stream.decoding.host_copies import HostCopies
from taesd_stream.decoding.host_copy import HostCopy
from taesd_stream.decoding.kernels.cubins import Program
from taesd_stream.decoding.kernels.library import Library
from taesd_stream.media.parameter_sets import macroblocks, parameter_sets

MOST_WIDTH: Final = 2048  # pixels, of planes: what a row needs of a block's shared memory stays under 48 KiB
KEPT_BYTES: Final = 256 << 20  # of pictures as they were coded; those of streams that are coded seldom go first
MOST_PREDICTED: Final = 600  # pictures from one keyframe to the next
FIRST_QP: Final = 32
LEAST_QP: Final = 20
MOST_QP: Final = 40
# As h264.cu has them.
PICTURE: Final = np.dtype(
    [("planes", "u8"), ("coded", "u8")]
    + [(name, "i4") for name in ("qp", "frame_num", "idr_pic_id", "is_first", "refreshed")],
    align=True,
)
CODED: Final = np.dtype([("bytes", "i4"), ("detail", "i4")])
HEAD_BYTES: Final = PICTURE.itemsize + CODED.itemsize
REFRESH: Final = 64
MOST_IDS: Final = 1 << 16
_MOST_MACROBLOCK, _LEAST_MACROBLOCK, _USUAL_MACROBLOCK = 1600, 4, 192  # bytes
SHARED_BYTES: Final = 4608  # of a row, but for its bits
ROW_THREADS: Final = 32
JOIN_THREADS: Final = 256


def coder_program(device: torch.device) -> Program:
    """What an NVIDIA GPU codes with."""
    major, minor = torch.cuda.get_device_capability(device)
    return Program("h264.cu", f"sm_{major}{minor}")


def row_bytes(columns: int) -> int:
    """Room for the bits of a row of so many macroblocks: of a whole number of words."""
    wanted = columns * (_USUAL_MACROBLOCK + _LEAST_MACROBLOCK) + 2 * _MOST_MACROBLOCK + 64
    return -(-wanted // 4) * 4


def row_room(columns: int) -> int:
    """The same with its start code and emulation prevention."""
    return row_bytes(columns) * 3 // 2 + 8


def quantiser(detail: int, count: int) -> int:
    """QP for a picture of so many macroblocks and such detail (see h264.cu).

    Fitted to what libx264 takes at crf 23 for previews, a clip, noise and dark pictures: within 2 of it.
    """
    return min(MOST_QP, round(24 + math.log2(max(2.0 ** (LEAST_QP - 24), detail / count))))


class Due(NamedTuple):
    """A picture to be coded. row: of the planes; pts: 1/90000 s; where it does not go on, a keyframe."""

    row: int
    run: str
    pts: int
    is_keyframe: bool


class CodedStream:
    """What a stream's next picture needs of those before it. Used by the thread that codes, `qp` written by any.

    kept: (H*3//2, W), each macroblock as it was when it was last coded; None: there is no room for it.
    """

    def __init__(self, ids: Iterator[int] | None = None) -> None:
        """ids: of keyframes: two that follow each other differ, also where a run has begun anew."""
        self._ids = ids or itertools.count()
        self._id = 0
        self.kept: Tensor | None = None
        self.qp = FIRST_QP
        self.size = (0, 0)
        self._pts = -1
        self._pictures = 0
        self._since_first = 0

    def next(self, size: tuple[int, int], pts: int, *, is_keyframe: bool) -> tuple[int, ...]:
        """The numbers of the next PICTURE. size: of its planes, (width, height). pts: what goes back begins anew."""
        is_next = self._pts < pts and size == self.size and self._since_first < MOST_PREDICTED - 1
        self._pts = pts
        if is_keyframe or not is_next or self.kept is None:
            self.size, self._since_first = size, 0
            self._id = next(self._ids) % MOST_IDS
        else:
            self._since_first += 1
        self._pictures += 1
        return self.qp, self._since_first % 16, self._id, int(not self._since_first), self._pictures % REFRESH


class CodedBatch:
    """Pictures on their way to the host. Any thread.

    order: which of them each PICTURE is of, with its stream. size: of all planes, (width, height).
    """

    def __init__(self, copy: HostCopy, order: Sequence[tuple[int, CodedStream]], size: tuple[int, int]) -> None:
        self.copy = copy
        self._places = {number: (place, stream) for place, (number, stream) in enumerate(order)}
        self._size = size
        self._macroblocks = math.prod(macroblocks(*size))
        self._joined_at = len(order) * HEAD_BYTES
        self._room = (len(copy.array) - self._joined_at) // len(order)

    def picture(self, number: int) -> tuple[bytes, bool]:
        """An access unit (Annex B), and whether it is a keyframe. Raises: RuntimeError when the device failed."""
        self.copy.wait()
        place, stream = self._places[number]
        said, coded = _heads(self.copy.array, len(self._places))
        nbytes, detail = (int(one) for one in coded[place])
        stream.qp = quantiser(detail, self._macroblocks)
        first = self._joined_at + place * self._room
        slices = self.copy.array[first : first + nbytes].tobytes()
        is_keyframe = bool(said[place]["is_first"])
        return (parameter_sets(*self._size) + slices if is_keyframe else slices), is_keyframe


class H264Coder:
    """Used by the thread that owns the device, `runs` and `forget` by any. The device does other work beside it."""

    def __init__(self, cubin: bytes, copies: HostCopies, device: torch.device) -> None:
        """Raises: KernelsUnavailableError if the driver refuses the machine code."""
        self._library = Library(cubin, device)
        self._copies = copies
        self._code_rows = self._library.kernel("code_rows")
        self._join_rows = self._library.kernel("join_rows")
        self._streams: dict[str, CodedStream] = {}  # in the order in which they were last coded
        self._ids = itertools.count()

    def code(self, planes: Tensor, due: Sequence[Due]) -> CodedBatch:
        """Code the next picture of each run; one that comes more than once goes on in this order.

        planes: (N, H*3//2, W) uint8 I420, contiguous, W up to MOST_WIDTH.
        Raises: torch.OutOfMemoryError; KernelsUnavailableError if the driver refuses.
        """
        _, rows, width = planes.shape
        count = len(due)
        size = (width, rows // 3 * 2)
        columns, slices = macroblocks(*size)
        room = slices * row_room(columns)
        turns = turns_of([one.run for one in due])
        streams = {one.run: self._next_in(one.run) for one in due}
        order = [(number, streams[due[number].run]) for turn in turns for number in turn]

        def write(here: Tensor) -> None:
            said, _ = _heads(here.numpy(), count)
            for place, (number, stream) in enumerate(order):
                one = due[number]
                self._keep(stream, planes[0], size, streams)
                kept = 0 if stream.kept is None else stream.kept.data_ptr()
                state = stream.next(size, one.pts, is_keyframe=one.is_keyframe)
                said[place] = (planes.data_ptr() + one.row * rows * width, kept, *state)
            made = torch.empty(count * room, dtype=torch.uint8, device=planes.device)
            coded = torch.empty(count * slices * CODED.itemsize, dtype=torch.uint8, device=planes.device)
            heads, shape, first = here.data_ptr(), (*size, row_bytes(columns)), 0
            shared = SHARED_BYTES + row_bytes(columns)
            for turn in turns:
                of_turn = (
                    heads + first * PICTURE.itemsize,
                    made.data_ptr() + first * room,
                    coded.data_ptr() + first * slices * CODED.itemsize,
                )
                self._launch(self._code_rows, (slices, len(turn)), ROW_THREADS, shared, of_turn, shape)
                first += len(turn)
            whole = heads + count * PICTURE.itemsize
            joined = (made.data_ptr(), coded.data_ptr(), whole, heads + count * HEAD_BYTES)
            self._launch(self._join_rows, (count, 1), JOIN_THREADS, 0, joined, shape)

        try:
            copy = self._copies.fill((count * (HEAD_BYTES + room),), write, reads=planes)
        except Exception:
            for run in streams:  # a decoder must not miss a picture: the next one begins anew
                self.forget(run)
            raise
        return CodedBatch(copy, order, size)

    def runs(self) -> list[str]:
        """Those that have been coded, the last one last."""
        return list(self._streams)

    def has(self, run: str) -> bool:
        """Whether pictures of a run have been coded, and it is not forgotten."""
        return run in self._streams

    def forget(self, run: str) -> None:
        """A run is over, or its next picture begins anew."""
        self._streams.pop(run, None)

    def _next_in(self, run: str) -> CodedStream:
        stream = self._streams.pop(run, None) or CodedStream(self._ids)
        self._streams[run] = stream
        return stream

    def _keep(
        self, stream: CodedStream, planes: Tensor, size: tuple[int, int], batch: Mapping[str, CodedStream]
    ) -> None:
        """Have room for what is coded of a stream, whose next picture is like these planes; those of its batch stay."""
        if stream.kept is not None and stream.size == size:
            return
        stream.kept = None
        streams = list(self._streams.items())
        left = KEPT_BYTES - planes.nbytes - sum(one.kept.nbytes for _, one in streams if one.kept is not None)
        for run, one in streams:
            if left < 0 and run not in batch and one.kept is not None:
                left += one.kept.nbytes
                one.kept = None
        if left >= 0:
            stream.kept = torch.empty_like(planes)

    def _launch(
        self,
        kernel: Any,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        pointers: tuple[int, ...],
        shape: tuple[int, int, int],
    ) -> None:
        types = (*[ctypes.c_void_p] * len(pointers), *[ctypes.c_int] * len(shape))
        where = (*grid, 1, threads, 1, 1, shared, self._library.stream())
        self._library.do(self._library.driver.cuLaunchKernel(kernel, *where, ((*pointers, *shape), types), 0))


def turns_of(runs: Sequence[str]) -> list[list[int]]:
    """Which pictures can be coded side by side, those that need them after them."""
    turns: list[list[int]] = []
    seen: Counter[str] = Counter()
    for number, run in enumerate(runs):
        if seen[run] == len(turns):
            turns.append([])
        turns[seen[run]].append(number)
        seen[run] += 1
    return turns


def _heads(words: NDArray[np.uint8], count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """What a batch's memory begins with: its PICTUREs, then its CODEDs."""
    ends = count * PICTURE.itemsize, count * HEAD_BYTES
    return words[: ends[0]].view(PICTURE), words[ends[0] : ends[1]].view(CODED)
