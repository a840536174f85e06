"""The decoding half of a worker: one thread that owns the device, and turns jobs into pictures for the encoders."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import torch

from taesd_stream.config import Config
from taesd_stream.decoding.choice import NoDecoderError
from taesd_stream.decoding.host_copies import HostCopies
from taesd_stream.latent_formats import LatentsError
from taesd_stream.messages import Progress
from taesd_stream_workers.worker.device_coding import DeviceCoding
from taesd_stream_workers.worker.encode_pool import EncodePool, Lanes
from taesd_stream_workers.worker.engines import Engines
from taesd_stream_workers.worker.job_run import JobRun
from taesd_stream_workers.worker.job_slices import JobSlices
from taesd_stream_workers.worker.job_turns import JobTurns
from taesd_stream_workers.worker.rendering import Sizes
from taesd_stream_workers.worker.shower import Outlet
from taesd_stream_workers.worker.staging import Stager
from taesd_stream_workers.worker.warm_up import warm_up

logger = logging.getLogger(__name__)

LEAST_WORK_S: Final = 0.01  # of the processor, between two beats: less is no work
MAX_ENCODERS: Final = 4096  # that one HELLO names


class JobDecoder:
    """A device and its thread; an EncodePool takes what it decodes.

    Other jobs go between the slices of a long one.
    lanes: where pictures are encoded.
    pass_on: called in any thread with PROGRESS, with (endpoint, packet), and with a JobRun that is over.
    engines: what decodes.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        now_ns: Callable[[], int],
        pass_on: Callable[[Any], None],
        *,
        lanes: Lanes,
    ) -> None:
        self.is_warm = False
        self._error: Exception | None = None
        self.engines = Engines(config, device)
        self._device = device
        sizes = Sizes(config.streamer.live_max_px, config.streamer.thumb_max_px)
        copies = HostCopies(device)
        self._outlet = Outlet(sizes, copies, EncodePool(lanes), DeviceCoding(device, copies), now_ns, pass_on)
        self._slice_since_s = float("inf")
        self._at_hand: JobRun | None = None
        self._worked_s = 0.0  # of the processor, by its thread
        self._worked_at_s = 0.0  # when that was seen to grow
        self._turns = JobTurns()
        self._stager = Stager(self._outlet.copies)
        self._slices = JobSlices(
            config, device, self.engines, self._outlet, is_waited_for=lambda: self._turns.is_waited_for
        )
        self._thread = threading.Thread(target=self._run, name="device")

    @property
    def error(self) -> Exception | None:
        """Why it could not even begin, or nothing is encoded any more. Any thread."""
        return self._error or self._outlet.pool.error or self._outlet.coding.error

    @property
    def busy_since_s(self) -> float:
        """When the slice at hand began or, on a processor, last went on, or began to come to the host. Any one thread.

        A hung device shows here.

        Raises: RuntimeError when the device failed: nothing in this process can use it any more.
        """
        return min(max(self._slice_since_s, self._worked_at_s), self._outlet.copies.waiting_since_s)

    def beat(self) -> None:
        """See whether a slice goes on, and say so: one picture may take minutes. Now and then, any one thread.

        Where the processor decodes its time tells that; what a GPU does, nobody can see from here.
        """
        run = self._at_hand
        if run is None or self._device.type != "cpu" or not hasattr(time, "pthread_getcpuclockid"):
            return
        assert self._thread.ident is not None
        worked_s = time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))
        if worked_s - self._worked_s > LEAST_WORK_S:
            self._worked_s, self._worked_at_s = worked_s, time.monotonic()
            self._outlet.pass_on(Progress(job=run.job.job))

    def start(self) -> None:
        """Start the threads."""
        self._outlet.pool.start()
        self._outlet.coding.start()
        self._thread.start()

    def submit(self, run: JobRun) -> None:
        """Queue a job."""
        run.staged = self._stager.stage(run.job)
        self._turns.put(run)

    def forget(self, run: str) -> None:
        """Drop the encoders and memories of a run."""
        self._outlet.forget(run)
        self.engines.forget(run)

    def encoders(self) -> tuple[str, ...]:
        """Runs whose encoders are open. Any thread."""
        return tuple((*self._outlet.pool.runs(), *self._outlet.coding.runs())[-MAX_ENCODERS:])

    def close(self) -> None:
        """Finish the job at hand, or of a long one the slice, then join the threads; the rest is for another worker."""
        self._turns.close()
        self._thread.join()
        self._stager.close()
        self._outlet.coding.close()
        self._outlet.pool.close()

    def _run(self) -> None:
        try:
            warm_up(self._device, self._outlet, budget_bytes=self.engines.budget_bytes)
        except Exception as error:  # noqa: BLE001 the worker ends with it
            self._error = error
            return
        self.is_warm = True
        while (run := self._turns.next()) is not None:
            self._slice_since_s, self._at_hand = time.monotonic(), run
            is_over = self._go_on(run)
            self._slice_since_s, self._at_hand = float("inf"), None
            if is_over:
                self._turns.over(run)
                self._outlet.part_done(run)

    def _go_on(self, run: JobRun) -> bool:
        """Decode the next slice of a long job, or the whole of another. Returns whether the job is over."""
        run.goes_on()
        if run.slices is None:
            run.slices = self._slices.of(run)
        try:
            for _ in run.slices:
                self._slice_since_s = time.monotonic()
                if run.is_sliced:
                    run.pauses()
                    return False
        except NoDecoderError as error:
            run.fail("no_decoder", error, retry=False)
        except LatentsError as error:  # of a format of a user's own, which the broker does not know
            run.fail("bad_frame", error, retry=False)
        except torch.OutOfMemoryError as error:
            run.fail("memory", error, retry=True)
        except Exception as error:  # the worker's outermost loop: this job is lost, the next may do
            logger.exception("job_failed job=%d", run.job.job)
            run.fail("internal", error, retry=True)
        return True
