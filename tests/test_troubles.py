"""Everything goes wrong, one thing after the other, while a run is kept: its file is whole; and each thing alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from taesd_stream import LatentPublisher
from tests.daemon import Daemon, clean_environment, wait_for
from tests.page_socket import PageSocket
from tests.pictures import decode_file, sd1_latents_of
from tests.processes import lives
from tests.troubles import deaf_viewer, flood, hang, hangable, kill, pid_of, send_garbage, slow_reader, stopped

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

SHADES = 60
PACE_S = 0.05
ROLES = ("broker", "worker", "streamer")


def shade(step: int) -> tuple[int, int, int]:
    """A grey of its own for each of 60 steps, 3 codes from the next."""
    code = 40 + 3 * (step % SHADES)
    return (code, code, code)


@pytest.fixture(scope="module")
def own_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that heals from each of these tests, and whose worker can be hung."""
    folder = tmp_path_factory.mktemp("troubles")
    with Daemon(folder, "recording.lost_after_s=8", environment=hangable(folder / "site")) as one:
        yield one


class KeptRun:
    """A run that is kept whole, published at a sampler's pace by a thread of its own until `finish`."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._over = threading.Event()
        self.steps = 0
        self.slowest_s = 0.0
        self._publisher = LatentPublisher(daemon.broker, stream="kept", latent_format="sd1", record="all")
        self._thread = threading.Thread(target=self._publish)
        self._thread.start()

    def _publish(self) -> None:
        while not self._over.wait(PACE_S):
            latents = sd1_latents_of(shade(self.steps))
            begun_s = time.monotonic()
            self._publisher.publish(latents, step=self.steps)
            self.slowest_s = max(self.slowest_s, time.monotonic() - begun_s)
            self.steps += 1

    def goes_on(self, frames: int = 10) -> None:
        """Wait for some more frames."""
        enough = self.steps + frames
        wait_for(lambda: self.steps >= enough, 60, of="more frames")

    def finish(self) -> None:
        """The file has every frame once, in order, with the right pixels; publish() never waited for anything."""
        self._over.set()
        self._thread.join()
        assert self._publisher.wait_until_acked(120), self._publisher.error
        self._publisher.close(timeout_s=30)
        wait_for(self._daemon.is_ready, 120, of="all roles")
        wait_for(lambda: frames_of(self._daemon, "kept") == self.steps, 180, of=f"{self.steps} frames in the file")
        row = self._daemon.recording(self._publisher.run)
        assert (row["frames"], row["first_seq"], row["last_seq"], row["gaps"]) == (self.steps, 0, self.steps - 1, [])
        greys = [float(np.mean(picture)) for picture in decode_file(self._daemon.file(row["id"]))]
        assert greys == pytest.approx([shade(step)[0] for step in range(self.steps)], abs=1.4)
        assert self.slowest_s < 2.0  # a thread of a busy machine waits; one that waited for a broker took 10 s and more


def trouble_all(daemon: Daemon, run: KeptRun, stop_s: float) -> None:
    """One thing after the other; between them the run goes on."""
    things: list[Callable[[], object]] = [lambda: send_garbage(daemon), lambda: flood(daemon, stop_s)]
    things += [lambda role=role: kill(daemon, role) for role in ROLES]  # type: ignore[misc]
    things += [lambda role=role: stop_for(daemon, role, stop_s) for role in ROLES]  # type: ignore[misc]
    with deaf_viewer(daemon, "kept"), slow_reader(daemon, "kept"):
        for thing in things:
            run.goes_on()
            thing()
            wait_for(daemon.is_ready, 90, of="the daemon ready again")
        run.goes_on()


def stop_for(daemon: Daemon, role: str, seconds: float) -> None:
    """SIGSTOP for a while."""
    with stopped(pid_of(daemon, role)):
        over_s = time.monotonic() + seconds
        wait_for(lambda: time.monotonic() > over_s, seconds + 5, of="the end of the pause")


def test_a_kept_run_through_all_of_it(own_daemon: Daemon) -> None:
    """Garbage, a flood, three deaths, three pauses, viewers that are deaf or slow: the file is whole."""
    run = KeptRun(own_daemon)
    try:
        trouble_all(own_daemon, run, stop_s=2.5)
    finally:
        run.finish()


@pytest.mark.slow
def test_a_kept_run_through_all_of_it_for_long(own_daemon: Daemon) -> None:
    """The same with pauses of 10 s, twice over, and a worker that hangs with the interpreter's lock held."""
    run = KeptRun(own_daemon)
    try:
        trouble_all(own_daemon, run, stop_s=10)
        hung = pid_of(own_daemon, "worker")
        hang(own_daemon)
        wait_for(lambda: not lives(hung), 60, of="the hung worker's end")
        wait_for(own_daemon.is_ready, 90, of="another worker")
        trouble_all(own_daemon, run, stop_s=10)
    finally:
        run.finish()


def test_a_worker_that_holds_the_interpreters_lock_is_replaced(own_daemon: Daemon) -> None:
    """No Python can run in it: the timer prints its stack and ends it, another takes its jobs, nothing is lost."""
    run = KeptRun(own_daemon)
    try:
        run.goes_on()
        hung = pid_of(own_daemon, "worker")
        hang(own_daemon)
        wait_for(lambda: not lives(hung), 60, of="the hung worker's end")
        wait_for(own_daemon.is_ready, 90, of="another worker")
        assert "Timeout (0:00:" in own_daemon.log()
        assert "sitecustomize" in own_daemon.log()  # where it hung
    finally:
        run.finish()


@pytest.mark.parametrize("role", ROLES)
def test_a_kept_run_survives_a_pause_of_a_role(own_daemon: Daemon, role: str) -> None:
    """SIGSTOP for longer than a worker may be silent, then SIGCONT: the same process goes on, the file is whole."""
    run = KeptRun(own_daemon)
    try:
        run.goes_on()
        before = pid_of(own_daemon, role)
        stop_for(own_daemon, role, 4.0)
        run.goes_on()
        assert pid_of(own_daemon, role) == before
    finally:
        run.finish()


def test_a_run_is_not_lost_while_the_broker_stands_still(tmp_path: Path) -> None:
    """A pause longer than `recording.lost_after_s`: nobody was silent but the broker, and the file goes on."""
    with Daemon(tmp_path, "recording.lost_after_s=3") as daemon:
        run = KeptRun(daemon)
        try:
            run.goes_on()
            for _ in range(3):  # what comes first then, a HELLO or a look at who was silent, is chance
                stop_for(daemon, "broker", 4.0)
                run.goes_on()
        finally:
            run.finish()


SAMPLER = """
import sys, time
from taesd_stream import LatentPublisher
from tests.pictures import sd1_latents_of
publisher = LatentPublisher(sys.argv[1], stream=sys.argv[2], latent_format="sd1", record="all")
for step in range(10_000):
    publisher.publish(sd1_latents_of((40 + 3 * (step % 60),) * 3), step=step)
    time.sleep(0.02)
"""


def sampler(daemon: Daemon, folder: Path, stream: str) -> subprocess.Popen[bytes]:
    """A sampler as a process, and its first frames recorded."""
    process = subprocess.Popen([sys.executable, "-c", SAMPLER, daemon.broker, stream], env=clean_environment(folder))
    wait_for(lambda: frames_of(daemon, stream) >= 20, 60, of="frames in the file")
    return process


def frames_of(daemon: Daemon, stream: str) -> int:
    """How many frames of a stream are in its file."""
    rows = daemon.json("/api/v1/recordings")["recordings"]
    mine = sorted((row for row in rows if row["stream"] == stream), key=lambda row: float(row["started"]))
    return int(mine[-1]["frames"]) if mine else 0


def test_a_killed_sampler_leaves_a_whole_file(own_daemon: Daemon, tmp_path: Path) -> None:
    """SIGKILL of the sampler: after `recording.lost_after_s` its file is finished, whole up to there, in order."""
    process = sampler(own_daemon, tmp_path, "killed")
    process.kill()
    process.wait()
    row = own_daemon.recording(own_daemon.streams()["killed"]["run"])
    assert (row["first_seq"], row["last_seq"], row["gaps"]) == (0, row["frames"] - 1, [])
    greys = [float(np.mean(picture)) for picture in decode_file(own_daemon.file(row["id"]))]
    assert greys == pytest.approx([shade(step)[0] for step in range(row["frames"])], abs=1.4)


def test_a_paused_sampler_goes_on_in_the_same_run(own_daemon: Daemon, tmp_path: Path) -> None:
    """SIGSTOP of the sampler for less than `lost_after_s`, then SIGCONT: the same file grows on, without a hole."""
    process = sampler(own_daemon, tmp_path, "paused")
    try:
        run = own_daemon.streams()["paused"]["run"]
        with stopped(process.pid):
            over_s = time.monotonic() + 2.0
            wait_for(lambda: time.monotonic() > over_s, of="the end of the pause")
            before = frames_of(own_daemon, "paused")
        wait_for(lambda: frames_of(own_daemon, "paused") > before + 50, 60, of="more frames")
        assert own_daemon.streams()["paused"]["run"] == run
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    row = own_daemon.recording(run)
    assert (row["first_seq"], row["last_seq"], row["gaps"]) == (0, row["frames"] - 1, [])


def test_viewers_that_do_not_read_harm_nobody(own_daemon: Daemon) -> None:
    """Beside a player that never reads and one that reads drop by drop, for whom pictures are dropped, a page has every
    step within 2 s of its publish."""
    with (
        LatentPublisher(own_daemon.broker, stream="seen", latent_format="sd1") as publisher,
        deaf_viewer(own_daemon, "seen"),
        slow_reader(own_daemon, "seen"),
        PageSocket(own_daemon) as page,
    ):
        page.watch({"seen": "live"})
        wait_for(lambda: own_daemon.streams().get("seen", {}).get("viewers") == 2, of="both players")
        generator, before, step = np.random.default_rng(0), dropped(own_daemon), 0
        while dropped(own_daemon) < before + 20:
            publisher.publish(generator.standard_normal((4, 64, 64)).astype(np.float32), step=step)
            until_s = time.monotonic() + 2.0
            while page.picture(until_s - time.monotonic())[0]["step"] != step:
                pass
            step += 1
            assert step < 1000, "nothing was dropped: nobody stalled"
    assert own_daemon.is_ready()


def dropped(daemon: Daemon) -> float:
    """Pictures of live.mjpeg that were not sent to a slow viewer, so far."""
    text = daemon.get("/metrics")[1].decode()
    return float(text.partition('\ntaesd_stream_dropped_total{rendition="jpeg"} ')[2].partition("\n")[0] or 0)


def many_states(daemon: Daemon) -> set[str]:
    """States of those of the 200 streams that are still listed."""
    return {str(row["state"]) for name, row in daemon.streams().items() if name.startswith("many/")}


def test_two_hundred_streams_are_all_shown(own_daemon: Daemon) -> None:
    """Two hundred samplers at once: each has its row and its picture, and all end as done."""
    names = [f"many/{number}" for number in range(200)]
    publishers = [LatentPublisher(own_daemon.broker, stream=name, latent_format="sd1") for name in names]
    try:
        for publisher in publishers:
            publisher.publish(sd1_latents_of((90, 160, 90)), step=0, total_steps=1)
        wait_for(lambda: set(names) <= set(own_daemon.streams()), 90, of="200 rows")
        shown: set[str] = set()
        with PageSocket(own_daemon) as page:
            page.watch(dict.fromkeys(names, "thumb"))
            while len(shown) < 200:
                shown.add(page.picture(timeout_s=60)[0]["stream"])
        assert shown == set(names)
    finally:
        threads = [threading.Thread(target=publisher.close) for publisher in publishers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    wait_for(lambda: many_states(own_daemon) == {"done"}, of="the ends")
    assert all(publisher.error is None for publisher in publishers)
