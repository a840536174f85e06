"""How a publisher's run ends: by close(), an exception, the program's exit, without a broker, in a forked child."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zmq

from taesd_stream import LatentPublisher, wire
from taesd_stream.frames import LatentFrame, RecordMode, StreamInfo
from taesd_stream.latent_log import read_messages
from taesd_stream.messages import Ack, End, PublisherHello, RunHello, StopRun
from taesd_stream.sockets import dial
from tests.broker_peer import BrokerPeer
from tests.daemon import COMMAND, Daemon, clean_environment, wait_for
from tests.golden_messages import FRAME
from tests.golden_messages import OPEN as GOLDEN_OPEN

LATENTS = np.zeros((4, 8, 8), np.float16)
OPEN = "from taesd_stream import LatentPublisher\nimport numpy as np\nLATENTS = np.zeros((4, 8, 8), np.float16)\n"


def logs(folder: Path) -> list[Path]:
    """All latent logs under a folder."""
    return sorted(folder.rglob("*.latents"))


def started(peer: BrokerPeer, tmp_path: Path, code: str) -> subprocess.Popen[bytes]:
    """A program that publishes, as a process of its own."""
    environment = clean_environment(tmp_path) | {"TAESD_STREAM_ADDRESS": peer.address}
    return subprocess.Popen([sys.executable, "-c", OPEN + code], env=environment, stderr=subprocess.PIPE)


def code_of(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Exit code and stderr of a program, waited for."""
    _, stderr = process.communicate(timeout=30)
    return process.returncode, stderr.decode()


# --- with and close() ---


@pytest.mark.parametrize(
    ("error", "reason", "text"),
    [
        (ValueError("no such prompt"), "failed", "ValueError('no such prompt')"),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt()"),
        (GeneratorExit(), "stopped", "GeneratorExit()"),
        (SystemExit(0), "done", ""),
        (SystemExit(3), "failed", "SystemExit(3)"),
    ],
)
def test_a_block_that_raises_says_why_it_ended(
    peer: BrokerPeer, beside: ThreadPoolExecutor, error: BaseException, reason: str, text: str
) -> None:
    """END of a `with` block tells failure, a person's Ctrl-C and a proper exit apart; the exception goes on."""

    def run() -> BaseException | None:
        try:
            with LatentPublisher(peer.address, stream="a", latent_format="sd1"):
                raise error
        except BaseException as caught:  # noqa: BLE001 that it goes on is the claim
            return caught
        return None

    running = beside.submit(run)
    end = peer.finish()
    assert (end.reason, end.text) == (reason, text)
    assert running.result(20) is error


def test_a_stopped_run_ends_as_stopped(peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """After a viewer pressed stop close() says `stopped`."""
    publisher = LatentPublisher(peer.address, stream="a", latent_format="sd1")
    peer.opened()
    peer.send(StopRun(run=publisher.run))
    wait_for(lambda: publisher.stopped, of="the stop")
    closing = beside.submit(publisher.close)
    assert peer.finish().reason == "stopped"
    closing.result(20)


@pytest.mark.parametrize("text", ["x" * 100_000, "lone \ud800 surrogate"])
def test_any_text_can_be_the_last_word(peer: BrokerPeer, beside: ThreadPoolExecutor, text: str) -> None:
    """A reason that is too long, or no UTF-8, is cut or mended, never the cause of a run without END."""
    publisher = LatentPublisher(peer.address, stream="a", latent_format="sd1")
    closing = beside.submit(publisher.close, reason="failed", text=text)
    assert peer.finish().text[:4] == text[:4]
    closing.result(20)


def test_close_twice_and_publish_after_it_raise_nothing(peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """A second close() does nothing; a publish after it is not sent, and `error` says so."""
    publisher = LatentPublisher(peer.address, stream="a", latent_format="sd1", record="off")
    closing = beside.submit(publisher.close)
    peer.finish()
    closing.result(20)
    publisher.close()
    publisher.publish(LATENTS, step=0, total_steps=1)
    assert "closed" in (publisher.error or "")
    assert publisher.wait_until_acked(0.0)


def test_a_reason_that_is_none_is_said(peer: BrokerPeer) -> None:
    """close(reason=…) with a word of its own is a ValueError, and the run is still open."""
    with LatentPublisher(peer.address, stream="a", latent_format="sd1") as publisher:
        with pytest.raises(ValueError, match="reason: expected one of done, stopped, failed, got 'fine'"):
            publisher.close(reason="fine")  # type: ignore[arg-type]
        publisher.close(0.0)


def test_a_publisher_that_is_forgotten_ends_its_run(peer: BrokerPeer) -> None:
    """Dropped without close(): the run still says END, after what it kept."""
    publisher = LatentPublisher(peer.address, stream="a", latent_format="sd1", record="all")
    publisher.publish(LATENTS, step=0)
    del publisher
    gc.collect()
    assert peer.finish().last_seq == 0
    assert peer.seqs() == [0]


# --- no broker ---


@pytest.mark.parametrize("record", [None, "off"])
def test_without_a_broker_nothing_is_left(own_state: Path, record: RecordMode | None) -> None:
    """No daemon, nothing to keep: the end of the run waits for nobody and leaves no file."""
    publisher = LatentPublisher("tcp://127.0.0.1:9", stream="a", latent_format="sd1", record=record)
    publisher.publish(LATENTS, step=0)
    publisher.close(timeout_s=1e6)
    assert not own_state.exists()
    assert publisher.error is None


@pytest.mark.parametrize(("record", "seqs"), [("all", [0, 1, 2]), ("last", [2])])
def test_what_no_broker_took_is_in_a_log_that_is_named(
    own_state: Path, caplog: pytest.LogCaptureFixture, record: RecordMode, seqs: list[int]
) -> None:
    """Kept frames that were not acked by the end lie, with END, in the publisher's own log; `error` and log name it."""
    publisher = LatentPublisher("tcp://127.0.0.1:9", stream="a", latent_format="sd1", record=record)
    for step in range(3):
        publisher.publish(LATENTS, step=step)
    publisher.close(0.0)
    (path,) = logs(own_state)
    messages = list(read_messages(path))
    assert [message.seq for message in messages if isinstance(message, LatentFrame)] == seqs
    assert isinstance(messages[-1], End)
    assert str(path) in (publisher.error or "")
    assert str(path) in caplog.text
    assert not publisher.wait_until_acked(600.0)


def test_only_what_was_not_acked_is_left(peer: BrokerPeer, own_state: Path) -> None:
    """Acked frames are the broker's: the own log begins behind them."""
    publisher = LatentPublisher(peer.address, stream="a", latent_format="sd1", record="all")
    for step in range(4):
        publisher.publish(LATENTS, step=step)
    peer.frame(3)
    peer.ack(publisher.run, 1)
    wait_for(lambda: publisher._outbox.kept.count == 2, of="the ack")
    publisher.close(0.0)
    (path,) = logs(own_state)
    assert [message.seq for message in read_messages(path) if isinstance(message, LatentFrame)] == [2, 3]


def test_a_log_that_cannot_be_written_is_said(own_state: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither broker nor disk take the frames: close() raises nothing, but the loss is not silent."""
    own_state.write_text("a file where the folder should be")
    publisher = LatentPublisher("tcp://127.0.0.1:9", stream="a", latent_format="sd1", record="all")
    publisher.publish(LATENTS, step=0)
    publisher.close(0.0)
    assert "are lost" in (publisher.error or "")
    assert "frames_not_taken" in caplog.text


def test_a_refused_run_does_not_wait_at_its_end(peer: BrokerPeer, own_state: Path) -> None:
    """Refused for another 10 s: close() does not sit out its time; what was to be kept is in the log."""
    publisher = LatentPublisher(peer.address, stream="a", latent_format="sd1", record="all")
    publisher.publish(LATENTS, step=0)
    peer.frame(0)
    peer.refuse(publisher.run, "limit", "too many")
    wait_for(lambda: publisher.error == "too many", of="the refusal")
    publisher.close()
    assert len(logs(own_state)) == 1


# --- the program's end ---


def test_a_program_that_just_ends_says_end(peer: BrokerPeer, tmp_path: Path) -> None:
    """Without close(): what is kept is sent, then END, and the exit code is the program's."""
    code = (
        "p = LatentPublisher(stream='a', latent_format='sd1', record='all')\n"
        "[p.publish(LATENTS, step=i) for i in range(3)]"
    )
    process = started(peer, tmp_path, code)
    end = peer.finish()
    assert (end.reason, end.last_seq, peer.seqs()) == ("done", 2, [0, 1, 2])
    assert code_of(process)[0] == 0


def test_a_program_that_dies_of_an_exception_says_failed(peer: BrokerPeer, tmp_path: Path) -> None:
    """Without a `with` block an exception that ends the program is END's reason too."""
    process = started(peer, tmp_path, "p = LatentPublisher(stream='a', latent_format='sd1')\nraise OSError('no disk')")
    end = peer.finish()
    assert (end.reason, end.text) == ("failed", "OSError('no disk')")
    assert code_of(process)[0] == 1


def test_ctrl_c_stops_the_run(peer: BrokerPeer, tmp_path: Path) -> None:
    """SIGINT to a program in its loop: END says `stopped`."""
    code = "import time\np = LatentPublisher(stream='a', latent_format='sd1')\nwhile True: time.sleep(0.01)"
    process = started(peer, tmp_path, code)
    peer.next(PublisherHello)
    process.send_signal(signal.SIGINT)
    assert peer.finish().reason == "stopped"
    code_of(process)


def test_many_publishers_end_together(tmp_path: Path) -> None:
    """A program with 40 kept runs and no broker ends within the time of one, and leaves the log of each."""
    code = (
        "ps = [LatentPublisher(stream=f's{i}', latent_format='sd1', record='all') for i in range(40)]\n"
        "[p.publish(LATENTS, step=0) for p in ps]"
    )
    environment = clean_environment(tmp_path) | {"TAESD_STREAM_ADDRESS": "tcp://127.0.0.1:9"}
    subprocess.run([sys.executable, "-c", OPEN + code], env=environment, timeout=40, check=True, capture_output=True)
    assert len(logs(tmp_path)) == 40


def test_a_forked_child_is_told_to_open_its_own(peer: BrokerPeer, tmp_path: Path) -> None:
    """In a forked child publish(), waiting and closing neither hang nor send: `error` says what to do."""
    code = (
        "import os\n"
        "p = LatentPublisher(stream='a', latent_format='sd1', record='all')\n"
        "p.publish(LATENTS, step=0)\n"
        "p._outbox.changed.acquire()  # as the side thread may hold it at the fork\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    p._outbox.changed = None  # whoever touched it would fail\n"
        "    p.publish(LATENTS, step=1, total_steps=2)\n"
        "    waited = p.wait_until_acked(600)\n"
        "    p.close()\n"
        "    raise SystemExit(0 if 'must open its own' in p.error and not waited else 1)\n"
        "p._outbox.changed.release()\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "p.publish(LATENTS, step=1)\n"
        "p.close()"
    )
    process = started(peer, tmp_path, code)
    assert (peer.finish().last_seq, peer.seqs()) == (1, [0, 1])
    exit_code, stderr = code_of(process)
    assert exit_code == 0, stderr


def test_a_forked_child_may_open_its_own(peer: BrokerPeer, tmp_path: Path) -> None:
    """A forked child that forgets the parent's publisher and opens one of its own says nothing of the parent's run."""
    code = (
        "import gc, os\n"
        "p = LatentPublisher(stream='parent', latent_format='sd1', record='all')\n"
        "p.publish(LATENTS, step=0)\n"
        "assert p.wait_until_acked(20)\n"
        "parent = p.run\n"
        "if os.fork() == 0:\n"
        "    del p; gc.collect()\n"
        "    p = LatentPublisher(stream='child', latent_format='sd1', record='all')\n"
        "    p.publish(LATENTS, step=0)\n"
        "    raise SystemExit(0)\n"
        "assert os.wait()[1] == 0\n"
        "assert p.run == parent and not p.error\n"
        "p.publish(LATENTS, step=1)\n"
    )
    process = started(peer, tmp_path, code)
    ends = [peer.finish(), peer.finish()]
    names = {one.run: one.stream for one in peer.heard if isinstance(one, StreamInfo)}
    assert [(names[end.run], end.last_seq) for end in ends] == [("child", 0), ("parent", 1)]
    exit_code, stderr = code_of(process)
    assert exit_code == 0, stderr


def test_a_child_that_multiprocessing_forked_ends_its_run(peer: BrokerPeer, tmp_path: Path) -> None:
    """Such a child ends without atexit: what it published is sent all the same, and then END."""
    code = (
        "import multiprocessing\n"
        "def work():\n"
        "    p = LatentPublisher(stream='child', latent_format='sd1', record='all')\n"
        "    for step in range(20):\n"
        "        p.publish(LATENTS, step=step)\n"
        "    globals()['held'] = p\n"
        "child = multiprocessing.get_context('fork').Process(target=work)\n"
        "child.start()\n"
        "child.join()\n"
    )
    process = started(peer, tmp_path, code)
    assert (peer.finish().last_seq, peer.seqs()) == (19, list(range(20)))
    exit_code, stderr = code_of(process)
    assert exit_code == 0, stderr


def publish_in_a_child(address: str) -> None:
    """What a spawned process runs."""
    with LatentPublisher(address, stream="spawned", latent_format="sd1", record="all") as publisher:
        publisher.publish(LATENTS, step=0)


def test_a_spawned_child_publishes(peer: BrokerPeer) -> None:
    """A process that multiprocessing spawns opens a publisher as any other program does."""
    child = multiprocessing.get_context("spawn").Process(target=publish_in_a_child, args=(peer.address,))
    child.start()
    assert peer.finish().last_seq == 0
    child.join(20)
    assert child.exitcode == 0


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("import sys; sys.exit(3)", 3),
        ("import atexit; atexit.register(lambda: p.publish(LATENTS, step=1))", 0),
        (
            "import threading\n"
            "threading.Thread(target=lambda: [p.publish(LATENTS, step=0) for _ in range(200)]).start()",
            0,
        ),
        (
            "import threading\n"
            "def forever():\n"
            "    while True: p.publish(LATENTS, step=1)\n"
            "threading.Thread(target=forever, daemon=True).start()",
            0,
        ),
        ("import threading; threading.Thread(target=p.close, daemon=True).start()", 0),
        ("p.cycle = p; del p", 0),
    ],
    ids=["sys.exit", "atexit", "thread", "daemon thread", "closing daemon thread", "cycle"],
)
def test_however_a_program_ends_it_ends(peer: BrokerPeer, tmp_path: Path, code: str, exit_code: int) -> None:
    """sys.exit, atexit handlers, threads that still publish: END is said, and the exit code is the program's own."""
    process = started(peer, tmp_path, "p = LatentPublisher(stream='a', latent_format='sd1', record='off')\n" + code)
    assert peer.finish().run
    found, stderr = code_of(process)
    assert found == exit_code
    assert "Traceback" not in stderr, stderr


def test_a_publisher_that_atexit_opens_does_not_hang(peer: BrokerPeer, tmp_path: Path) -> None:
    """Opened when the interpreter is ending already: the program still ends, as soon as the run has."""
    code = (
        "import atexit\n"
        "def late():\n"
        "    with LatentPublisher(stream='late', latent_format='sd1', record='all') as p: p.publish(LATENTS, step=0)\n"
        "atexit.register(late)"
    )
    process = started(peer, tmp_path, code)
    assert peer.finish().last_seq == 0
    assert code_of(process)[0] == 0


# --- the real broker ---


class BrokerProcess:
    """`taesd-stream broker` on its own, at an address that stays the same when it is started again."""

    def __init__(self, folder: Path) -> None:
        self.address = f"ipc://{folder}/front"
        self.logs = folder / "logs"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> BrokerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it; publishers find it by themselves."""
        sets = {"broker.bind": self.address, "broker.workers_bind": f"ipc://{self._folder}/inner"}
        sets |= {"broker.log_folder": str(self.logs), "recording.folder": str(self._folder / "recordings")}
        words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
        self._process = subprocess.Popen(
            [*COMMAND, "broker", *words], env=clean_environment(self._folder), stderr=subprocess.DEVNULL
        )

    def kill(self) -> None:
        """SIGKILL: no word to anybody."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(20)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def frames(self, run: str) -> list[int]:
        """What its log has of a run."""
        return [
            message.seq
            for path in logs(self.logs)
            if path.name.startswith(run)
            for message in read_messages(path)
            if isinstance(message, LatentFrame)
        ]


def test_the_broker_has_what_it_acked(tmp_path: Path) -> None:
    """After wait_until_acked() and a kill of the broker the frames are in its log."""
    with BrokerProcess(tmp_path) as broker:
        publisher = LatentPublisher(broker.address, stream="a", latent_format="sd1", record="all")
        for step in range(50):
            publisher.publish(LATENTS, step=step)
        assert publisher.wait_until_acked(30), publisher.error
        broker.kill()
        assert broker.frames(publisher.run) == list(range(50))
        publisher.close(0.0)
        broker.start()


@pytest.mark.faults
def test_a_broker_that_is_killed_and_back_misses_nothing(tmp_path: Path) -> None:
    """Killed twice under load: in the end its log has every frame once, in order."""
    with BrokerProcess(tmp_path) as broker:
        publisher = LatentPublisher(broker.address, stream="a", latent_format="sd1", record="all")
        for round_ in range(3):
            for step in range(100):
                publisher.publish(LATENTS, step=100 * round_ + step)
            if round_ < 2:
                wait_for(lambda: publisher._outbox.kept.count < 100, 30.0, of="the first acks")
                broker.kill()
                broker.start()
        assert publisher.wait_until_acked(60), publisher.error
        publisher.close()
        assert publisher.error is None
        assert broker.frames(publisher.run) == list(range(300))


@pytest.mark.slow
def test_a_broker_that_is_gone_for_a_minute_misses_nothing(tmp_path: Path) -> None:
    """The sampler goes on all the while, at its pace; the broker that comes back has every frame once, in order."""
    pace, step = threading.Event(), 0
    with BrokerProcess(tmp_path) as broker:
        publisher = LatentPublisher(broker.address, stream="a", latent_format="sd1", record="all")
        publisher.publish(LATENTS, step=0)
        assert publisher.wait_until_acked(30), publisher.error
        broker.kill()
        gone_until_s = time.monotonic() + 60.0
        while time.monotonic() < gone_until_s:
            step += 1
            publisher.publish(LATENTS, step=step)
            pace.wait(0.05)
        broker.start()
        assert publisher.wait_until_acked(60), publisher.error
        publisher.close()
        assert publisher.error is None
        assert broker.frames(publisher.run) == list(range(step + 1))


def test_last_is_one_frame_in_the_recording(daemon: Daemon) -> None:
    """record="last" to the daemon: the recording has the final frame and nothing else."""
    with LatentPublisher(daemon.broker, stream="only-last", latent_format="sd1", record="last") as publisher:
        for step in range(5):
            publisher.publish(LATENTS, step=step, total_steps=5)
    recording = daemon.recording(publisher.run)
    assert (recording["frames"], recording["first_seq"], recording["last_seq"]) == (1, 4, 4)


def test_last_is_one_frame_though_the_one_before_it_was_shown(daemon: Daemon) -> None:
    """record="last", the frame before the last being the newest that the broker holds: still one frame."""
    with LatentPublisher(daemon.broker, stream="shown-last", latent_format="sd1", record="last") as publisher:
        publisher.publish(LATENTS, step=0)
        wait_for(lambda: daemon.streams().get("shown-last", {}).get("seq") == 0, of="the first frame")
        publisher.publish(LATENTS, step=1)
    assert daemon.recording(publisher.run)["frames"] == 1


def test_a_recording_never_begins_behind_a_frame_that_did_not_come(tmp_path: Path) -> None:
    """The oldest kept frame was lost on its way: the broker acks nothing until it is sent again, then everything."""
    run = "00000000000000aa"
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with BrokerProcess(tmp_path) as broker:
        socket = dial(context, zmq.DEALER, broker.address)
        try:
            assert socket.poll(30_000, zmq.POLLOUT)

            def say(*messages: object) -> None:
                for message in messages:
                    socket.send_multipart(wire.pack(message))

            def acked(seq: int) -> None:
                while True:
                    assert socket.poll(20_000)
                    answer = wire.unpack(socket.recv_multipart(), wire.TO_PUBLISHER)
                    if isinstance(answer, Ack):
                        assert answer.seq in (-1, seq)
                        if answer.seq == seq:
                            return

            frames = [replace(FRAME, run=run, seq=seq, index=seq) for seq in range(4)]
            hello = PublisherHello(runs={run: RunHello(next_seq=4, kept_from=0)}, echo_ns=0)
            say(replace(GOLDEN_OPEN, run=run, kind="steps", latent_format="sd1"), hello, *frames[1:], hello)
            acked(-1)
            acked(-1)  # of the second HELLO, said behind the frames
            say(*frames)
            acked(0)
        finally:
            socket.close(linger=0)
            context.term()


def test_the_record_button_pressed_off_and_on_leaves_no_frame_unacked(daemon: Daemon) -> None:
    """Recording off and on again at once, in mid-run: every frame that is kept is acked."""
    with LatentPublisher(daemon.broker, stream="pressed", latent_format="sd1", record="all") as publisher:
        for step in range(30):
            publisher.publish(LATENTS, step=step)
            if step in (10, 20):
                for mode in ("off", "all"):
                    daemon.json("/api/v1/streams/pressed/record", method="POST", body={"mode": mode})
        wait_for(lambda: publisher._outbox.mode == "all", of="the last word")
        assert publisher.wait_until_acked(60), publisher.error
