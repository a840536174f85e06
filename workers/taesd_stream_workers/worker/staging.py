"""Jobs' latents brought together in memory, and NaN found, before the device thread has its turn with them.

That thread is what a busy GPU waits for: beside dozens of encoders, each of its calls that lets go of the GIL waits to
get it back. Here such waits go side by side.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

from torch import Tensor

from taesd_stream.decoding.host_copies import HostCopies
from taesd_stream.decoding.payloads import copy_payloads, rows_not_finite, torch_dtype
from taesd_stream.messages import Job

# words (N, ...) as they travelled, in the order of Job.parts(), and which of the N hold NaN or infinity
Staged: TypeAlias = tuple[Tensor, list[int]]


class Stager:
    """A thread that stages jobs one after the other."""

    def __init__(self, copies: HostCopies) -> None:
        self._copies = copies
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="staging")

    def stage(self, job: Job) -> Future[Staged]:
        """Begin with a job, behind those before it. The result raises ValueError for payloads that do not fit."""
        return self._thread.submit(self._stage, job)

    def close(self) -> None:
        """End the thread; what has not begun is cancelled."""
        self._thread.shutdown(cancel_futures=True)

    def _stage(self, job: Job) -> Staged:
        payloads = [payload for _, payload, _ in job.parts()]
        first = job.items[0]
        words = self._copies.staging((len(payloads), *first.shape), torch_dtype(first.dtype))
        copy_payloads(payloads, words)
        return words, rows_not_finite(words)
