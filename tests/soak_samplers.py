"""Samplers that come and go, as one process: `python -m tests.soak_samplers ADDRESS STREAMS` until its stdin closes.

Each slot opens a run, publishes small latents now and then for a while, closes, and opens the next; some are kept.
"""

from __future__ import annotations

import random
import sys
import threading
import time

import numpy as np

from taesd_stream import LatentPublisher

STEP_S = 1.5
MODES = ("off", "off", "off", "off", "off", "off", "off", "last", "last", "all")


class Slot:
    """One stream's place: a run, a pause, the next run. Some runs have a name of their own."""

    def __init__(self, address: str, number: int) -> None:
        self._address = address
        self._number = number
        self._random = random.Random(number)  # noqa: S311 the same runs each time
        self._publisher: LatentPublisher | None = None
        self._step = self._steps = 0
        self.due_s = time.monotonic() + number * STEP_S / 50

    def turn(self) -> None:
        """One step: a frame, or the end of a run."""
        self.due_s += STEP_S
        if self._publisher is None:
            self._open()
        elif self._step == self._steps:
            publisher, self._publisher = self._publisher, None
            threading.Thread(target=publisher.close, daemon=True).start()  # as samplers end: beside each other
        else:
            latents = np.full((4, 16, 16), self._step / self._steps, np.float32)
            self._publisher.publish(latents, step=self._step, total_steps=self._steps)
            self._step += 1

    def _open(self) -> None:
        own = f"/run-{self._random.randrange(1000)}" if self._random.random() < 0.3 else ""
        self._step, self._steps = 0, self._random.randrange(5, 25)
        self._publisher = LatentPublisher(
            self._address,
            stream=f"soak/slot-{self._number}{own}",
            latent_format="sd1",
            record=self._random.choice(MODES),  # type: ignore[arg-type]
            meta={"prompt": "soak " * self._random.randrange(20)},
        )


def wait_for_stdin(over: threading.Event) -> None:
    """Whoever started this closes it, or is gone."""
    sys.stdin.read()
    over.set()


def main() -> None:
    """Run until stdin closes."""
    address, count = sys.argv[1], int(sys.argv[2])
    slots = [Slot(address, number) for number in range(count)]
    over = threading.Event()
    threading.Thread(target=wait_for_stdin, args=(over,), daemon=True).start()
    while not over.is_set():
        slot = min(slots, key=lambda one: one.due_s)
        if not over.wait(max(0.0, slot.due_s - time.monotonic())):
            slot.turn()


if __name__ == "__main__":
    main()
