"""The run that a publisher's frames go out in: a new one wherever another daemon takes the stream over."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time

from taesd_stream.frames import LatentFrame, StreamInfo
from taesd_stream.messages import End

logger = logging.getLogger(__name__)


def continued(first: StreamInfo, former: str | None, opened_ns: int) -> StreamInfo:
    """The stream's next run; seq and index count on in it, so that two recordings fit together.

    first: the stream as the program opened it, before any broker's word. former: the last run that some daemon has for
    certain, which `meta.continues` names.
    """
    meta = first.meta if former is None else {**first.meta, "continues": former}
    return dataclasses.replace(first, run=secrets.token_hex(8), meta=meta, opened_ns=opened_ns)


class CurrentRun:
    """The side thread alone changes it; any thread may read `info`."""

    def __init__(self, info: StreamInfo) -> None:
        self.first = info  # our own log is of this run, whatever its frames were sent in
        self.info = info
        self._said_to: str | None = None  # a daemon that may have it
        self._taken: str | None = None  # the last run that a daemon answered for

    def said(self, address: str) -> None:
        """OPEN goes to this daemon."""
        self._said_to = address

    def taken(self) -> None:
        """The daemon has it."""
        self._taken = self.info.run

    def not_wanted(self) -> None:
        """The daemon takes nothing more: where it had never taken the run, that is still nobody's."""
        if self._taken != self.info.run:
            self._said_to = None

    def is_anothers(self, address: str) -> bool:
        """Whether another daemon than this may have it: then this one gets a run of its own."""
        return self._said_to not in (None, address)

    def begin_anew(self, address: str, oldest_ns: int | None) -> None:
        """Another daemon takes the stream over. oldest_ns: when the first frame was published that it gets."""
        level = logging.WARNING if self._taken == self.info.run else logging.INFO
        self.info = continued(self.first, self._taken, time.monotonic_ns() if oldest_ns is None else oldest_ns)
        self.said(address)
        said = (self.info.stream, self.info.run, self._taken, address)
        logger.log(level, "stream_goes_on stream=%s run=%s continues=%s at=%s", *said)

    def rename(self, stream: str) -> None:
        """The broker gave it this name."""
        self.info = dataclasses.replace(self.info, stream=stream)

    def frame(self, frame: LatentFrame) -> LatentFrame:
        """A frame as it is sent in this run."""
        return frame if frame.run == self.info.run else dataclasses.replace(frame, run=self.info.run)

    def end(self, end: End) -> End:
        """END as it is said of this run."""
        return dataclasses.replace(end, run=self.info.run)
