"""`live` pictures of many streams, coded on the GPU that has decoded them; where it cannot, the pool's encoders do."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import av
import numpy as np
import torch
from torch import Tensor

from taesd_stream.decoding.host_copies import HostCopies
from taesd_stream.decoding.host_copy import HostCopy
from taesd_stream.decoding.kernels.cubins import KernelsUnavailableError
from taesd_stream.decoding.kernels.h264_coder import MOST_WIDTH, CodedBatch, Due, H264Coder, coder_program
from taesd_stream.decoding.kernels.later import compile_behind, loaded
from taesd_stream.media.encoder import EncodedPicture
from taesd_stream.media.parameter_sets import has_level

logger = logging.getLogger(__name__)

CHECKED_SIDE: Final = 64  # pixels
LEAST_PSNR: Final = 30.0  # dB, of the picture that is checked, which has 37


@dataclass(frozen=True, slots=True, kw_only=True)
class CodingTask:
    """One picture. size: as shown. on_done: with None where it could not be made."""

    due: Due
    size: tuple[int, int]
    on_done: Callable[[EncodedPicture | None, HostCopy], None]


class DeviceCoding:
    """Kernels as soon as they are compiled and have been checked: until then, and where they cannot be, none is coded.

    Used by the thread that owns the device, `runs` and `forget` by any. Pictures are handed on by a thread of its own.
    error: why that has stopped.
    """

    def __init__(self, device: torch.device, copies: HostCopies, cache: Path | None = None) -> None:
        """cache: of compiled kernels, None for the user's."""
        self._device, self._copies, self._cache = device, copies, cache
        self.error: Exception | None = None
        self._coder: H264Coder | None = None
        self._cubin: Future[bytes] | None = None
        self._batches: queue.SimpleQueue[tuple[CodedBatch, Sequence[CodingTask]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="coded pictures")
        if device.type == "cuda":
            self._program = coder_program(device)
            self._cubin = compile_behind(self._program, cache)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def takes(self, planes: Tensor) -> bool:
        """Whether it can code pictures of such planes, (N, H*3//2, W), by now."""
        self.take_over()
        _, rows, width = planes.shape
        fits = width <= MOST_WIDTH and has_level(width, rows // 3 * 2)
        return self._coder is not None and planes.is_cuda and fits

    def has(self, run: str) -> bool:
        """Whether it codes a run's pictures already."""
        return self._coder is not None and self._coder.has(run)

    def take_over(self, *, wait: bool = False) -> None:
        """Use the kernels if they are compiled by now, having checked them; wait: until they are, or are refused."""
        if self._cubin is None or not (wait or self._cubin.done()):
            return
        cubin, self._cubin = self._cubin, None
        try:
            coder = loaded(cubin, self._program, self._cache, lambda code: H264Coder(code, self._copies, self._device))
            check(coder, self._device)
        except torch.OutOfMemoryError as error:
            self._cubin = cubin  # tried again with the next picture
            logger.debug("device_coding_waits reason=%s", error)
        except Exception as error:  # noqa: BLE001 encoders can do without
            logger.warning("device_coding_not_used reason=%s", error)
        else:
            self._coder = coder
            logger.info("device_coding_used device=%s", torch.cuda.get_device_name(self._device))

    def code(self, planes: Tensor, tasks: Sequence[CodingTask]) -> CodedBatch | None:
        """Code rows of planes, of those that it takes. Raises: torch.OutOfMemoryError.

        Returns: None where the driver refused: then it takes none any more, and encoders can do without.
        """
        assert self._coder is not None
        try:
            return self._coder.code(planes, [task.due for task in tasks])
        except KernelsUnavailableError:
            logger.exception("device_coding_given_up")
            self._coder = None
            return None

    def hand_on(self, batch: CodedBatch, tasks: Sequence[CodingTask]) -> None:
        """Have `on_done` called with what was coded, as soon as it is there."""
        self._batches.put((batch, tasks))

    def runs(self) -> list[str]:
        """Those that it has coded pictures of."""
        return self._coder.runs() if self._coder is not None else []

    def forget(self, run: str) -> None:
        """A run is over."""
        if self._coder is not None:
            self._coder.forget(run)

    def close(self) -> None:
        """Hand on what is coded, then end the thread."""
        self._batches.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._hand_on_all()
        except Exception as error:  # the thread's outermost loop: without it no picture is handed on any more
            self.error = error
            logger.exception("coded_pictures_failed")

    def _hand_on_all(self) -> None:
        while (coded := self._batches.get()) is not None:
            batch, tasks = coded
            for number, task in enumerate(tasks):
                task.on_done(self._picture(batch, number, task), batch.copy)

    def _picture(self, batch: CodedBatch, number: int, task: CodingTask) -> EncodedPicture | None:
        try:
            payload, is_keyframe = batch.picture(number)
        except Exception:
            logger.exception("coding_failed run=%s", task.due.run)
            self.forget(task.due.run)  # a decoder must not miss a picture: the next one begins anew
            return None
        width, height = task.size
        return EncodedPicture(payload=payload, is_keyframe=is_keyframe, width=width, height=height)


def check(coder: H264Coder, device: torch.device) -> None:
    """See that a decoder shows what was coded: a keyframe, and a picture that changes half of it.

    Raises: RuntimeError where it does not.
    """
    ramp = torch.arange(CHECKED_SIDE, dtype=torch.float32)
    waves = 128 + 60 * torch.sin(ramp[:, None] / 9) * torch.cos(ramp / 7)
    first = torch.cat((waves, torch.full((CHECKED_SIDE // 2, CHECKED_SIDE), 100.0))).to(torch.uint8)
    second = first.clone()
    second[:, : CHECKED_SIDE // 2] = 255 - second[:, : CHECKED_SIDE // 2]
    decoder = av.CodecContext.create("h264", "r")
    planes = torch.stack((first, second))
    batch = coder.code(planes.to(device), [Due(0, "", 0, is_keyframe=False), Due(1, "", 1, is_keyframe=False)])
    coder.forget("")
    for number, picture in enumerate(planes.numpy()):
        (shown,) = decoder.decode(av.Packet(batch.picture(number)[0]))
        error = np.mean((shown.to_ndarray()[:CHECKED_SIDE].astype(float) - picture[:CHECKED_SIDE]) ** 2)
        psnr = 10 * np.log10(255**2 / max(error, 1e-9))
        if psnr < LEAST_PSNR:
            raise RuntimeError(f"a picture came back with {psnr:.1f} dB, under {LEAST_PSNR:.0f}")
