"""What reaches a page, and what of a page's wishes reaches the broker, though packets are lost and the broker goes."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from websockets.sync.client import ClientConnection, connect

from taesd_stream import LatentPublisher, wire
from taesd_stream.frames import Packet, Stamps
from taesd_stream.messages import Cursor, Echo, Keyframe, Record, State, StopStream, StreamerHello, Watch
from taesd_stream.sockets import bind, prepare
from taesd_stream_workers.role.broken_chains import ASK_AGAIN_S
from taesd_stream_workers.streamer import last_pictures
from taesd_stream_workers.streamer.hub import MAX_KEYFRAMES, MAX_LEFT, Hub
from taesd_stream_workers.streamer.inbox import INBOX_BYTES, Inbox
from taesd_stream_workers.streamer.latency import Latency
from taesd_stream_workers.streamer.newest_runs import NewestRuns
from taesd_stream_workers.streamer.viewer import Viewer, to_message, unpack_picture
from taesd_stream_workers.streamer.web.finished_rows import MAX_TOLD, FinishedRows, News, Told
from taesd_stream_workers.streamer.web.peers import Peers
from tests.daemon import Daemon, wait_for
from tests.golden_messages import OTHER_RUN, PACKET, RUN
from tests.page_socket import PageSocket
from tests.test_recorder import state as kept
from tests.test_recording import chain

M = TypeVar("M")

STREAM = PACKET.stream
KEY = PACKET
DELTA = replace(PACKET, is_keyframe=False, seq=8)
THUMB = replace(PACKET, rendition="thumb")
STATES = ("waiting", "live", "done", "stopped", "failed", "lost")


class Clock:
    """Seconds of the test's own."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def received(packet: Packet, received_ns: int, **changes: Any) -> Packet:
    """The packet of a frame that came to the broker then."""
    return replace(packet, stamps=Stamps(received_ns=received_ns), **changes)


def state(now_ns: int, **row: Any) -> State:
    """STATE with the one stream, and whatever of its row is another."""
    known = {"name": STREAM, "run": RUN, "state": "live", "flags": [], "stoppable": True, "seq": 7}
    rows = [known | {"latent_format": "sd1", "width": 64, "height": 64} | row]
    return State(streams=rows, runs={}, workers=[], stats={}, desired_workers=1, now_ns=now_ns)


# --- a viewer ---


def test_a_viewer_that_gets_only_deltas_asks_for_a_keyframe_again() -> None:
    """The keyframe that was asked for when it came may be lost: while deltas come it is asked for, twice a second."""
    clock = Clock()
    viewer = Viewer(Latency(), clock)
    viewer.want({STREAM: "live"})
    asked = []
    for _ in range(40):
        viewer.offer(DELTA, 0)
        asked.append(viewer.starved())
        clock.now_s += 0.125
    assert [number for number, one in enumerate(asked) if one] == list(range(4, 40, 4))
    assert not viewer.take()


def test_a_delta_that_was_dropped_before_the_time_is_not_forgotten() -> None:
    """The last delta of a slow sampler, dropped right after a keyframe was asked for, makes it asked for later."""
    clock = Clock()
    viewer = Viewer(Latency(), clock)
    viewer.want({STREAM: "live"})
    viewer.offer(DELTA, 0)
    assert viewer.starved() == []
    clock.now_s += ASK_AGAIN_S
    assert viewer.starved() == [STREAM]


def test_a_viewer_with_a_keyframe_asks_for_none() -> None:
    """Once the keyframe is there, nothing is asked for, and the deltas behind it are sent."""
    clock = Clock()
    viewer = Viewer(Latency(), clock)
    viewer.want({STREAM: "live"})
    for packet in (DELTA, KEY, DELTA):
        viewer.offer(packet, 0)
    clock.now_s += 10
    assert viewer.starved() == []
    assert [packet for packet, _ in viewer.take()] == [KEY, DELTA]


def test_a_chain_takes_no_delta_of_another_run() -> None:
    """A delta that belongs to another run's keyframe is not sent behind this one's; the chain itself goes on."""
    viewer = Viewer(Latency())
    viewer.want({STREAM: "live"})
    later = replace(DELTA, seq=9)
    for packet in (KEY, DELTA, replace(DELTA, run=OTHER_RUN), later):
        viewer.offer(packet, 0)
    assert [packet for packet, _ in viewer.take()] == [KEY, DELTA, later]


# --- which run is the newest ---


def test_a_late_packet_of_a_replaced_run_is_known() -> None:
    """A frame that came to the broker later is of a newer run, whatever the order in which the packets come."""
    runs = NewestRuns()
    runs.on_state(state(10))
    assert not runs.is_replaced(received(KEY, 20, run=OTHER_RUN))
    assert runs.is_replaced(received(KEY, 9))
    runs.on_state(state(15))  # was overtaken by the packet
    assert runs.is_replaced(received(KEY, 9))
    assert not runs.is_replaced(received(DELTA, 21, run=OTHER_RUN))


def test_a_keyframe_of_an_old_frame_of_the_newest_run_is_shown() -> None:
    """The newest frame is sent again for a late viewer, however long ago it came."""
    runs = NewestRuns()
    runs.on_state(state(1000))
    assert not runs.is_replaced(received(KEY, 3))


def test_a_packet_without_a_time_follows_state() -> None:
    """A frame that waited in the log tells no time: its run counts once STATE names it."""
    runs = NewestRuns()
    runs.on_state(state(10))
    late = received(KEY, 0, run=OTHER_RUN)
    assert runs.is_replaced(late)
    runs.on_state(state(11, run=OTHER_RUN))
    assert not runs.is_replaced(late)


def test_a_broker_whose_clock_began_anew_is_believed() -> None:
    """After its host was started anew the broker's clock is behind: its STATE holds all the same."""
    runs = NewestRuns()
    runs.on_state(state(10**15))
    runs.on_state(state(5, run=OTHER_RUN))
    assert not runs.is_replaced(received(KEY, 6, run=OTHER_RUN))


def test_packets_of_a_former_worker_are_known() -> None:
    """What was made before the run was given to another worker is late; what one worker makes never is."""
    runs = NewestRuns()
    assert not runs.has_moved(replace(KEY, placed_ns=10))
    assert not runs.has_moved(replace(KEY, run=OTHER_RUN, placed_ns=5))
    assert not runs.has_moved(replace(DELTA, placed_ns=20, seq=3))
    assert runs.has_moved(replace(DELTA, placed_ns=10, seq=9))
    assert not runs.has_moved(replace(DELTA, placed_ns=20, seq=4))


def test_a_worker_of_a_broker_whose_clock_began_anew_is_shown() -> None:
    """After the broker's host was started anew a run's worker has it since an earlier time, and shows it."""
    runs = NewestRuns()
    runs.on_state(state(10**15))
    assert not runs.has_moved(replace(KEY, placed_ns=10**15))
    runs.on_state(state(5))
    assert not runs.has_moved(replace(KEY, placed_ns=4))


def test_a_late_packet_of_a_former_clock_hides_nothing() -> None:
    """Made before the broker's host was started anew and come after its STATE: not shown, and those behind it are."""
    runs = NewestRuns()
    runs.on_state(state(10**15))
    runs.on_state(state(5))
    late = received(replace(KEY, placed_ns=10**15), 10**15)
    assert runs.has_moved(late)
    assert not runs.has_moved(replace(KEY, placed_ns=4))
    assert runs.is_replaced(replace(late, run=OTHER_RUN))
    assert not runs.is_replaced(received(KEY, 6))


# --- the streamer's inbox ---


def test_an_inbox_over_its_bound_drops_to_the_next_keyframe() -> None:
    """Of a chain whose oldest packet was dropped nothing is delivered before its next keyframe, which is asked for."""
    asked: list[str] = []
    dropped: list[Packet] = []
    inbox = Inbox(asked.append, dropped.append)
    big = bytes(INBOX_BYTES // 4)
    chain = [replace(DELTA, seq=seq, is_keyframe=seq in (0, 6), payload=big) for seq in range(8)]
    for packet in chain:
        inbox.put(packet, 0)
    assert [packet.seq for packet, _ in inbox.take_all()] == [6, 7]
    assert dropped == chain[:6]
    assert asked == [STREAM]


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["key", "delta", "delta", "take"]), st.integers(0, 40))))
def test_no_delta_is_delivered_behind_a_hole(steps: list[tuple[int, str, int]]) -> None:
    """Whatever comes and whenever it is taken: a delivered delta's chain was delivered back to its keyframe."""
    inbox = Inbox(lambda _: None, lambda _: None)
    big = bytes(INBOX_BYTES)
    sent = [0, 0, 0]
    delivered = [-1, -1, -1]

    def take() -> None:
        for packet, _ in inbox.take_all():
            number = int(packet.stream)
            assert packet.is_keyframe or packet.seq == delivered[number] + 1
            delivered[number] = packet.seq

    for number, word, parts in steps:
        if word == "take":
            take()
            continue
        payload = memoryview(big)[: INBOX_BYTES * parts // 40]
        is_key = word == "key" or not sent[number]
        run = f"{number:016x}"
        inbox.put(replace(DELTA, stream=str(number), run=run, seq=sent[number], is_keyframe=is_key, payload=payload), 0)
        sent[number] += 1
    take()


def test_the_rate_holds_the_last_seconds_only() -> None:
    """With no page open to read it, a daemon's picture rate holds the last two seconds and no more."""
    clock = Clock()
    hub = Hub(Latency(), lambda _: None, clock)

    async def deliver() -> None:
        hub.attach(asyncio.get_running_loop())
        for seq in range(1000):
            hub.offer_packet(replace(THUMB, seq=seq), 0)
            await asyncio.sleep(0)
            clock.now_s += 0.1

    asyncio.run(deliver())
    assert 0 < len(hub.rate._times_s) <= 21


# --- a streamer whose broker comes and goes ---


class LoneStreamer(Daemon):
    """A streamer by itself; the test is its broker and its worker, from `come` to `go`."""

    def start(self, *more_sets: str) -> None:
        """Start it and wait until its sockets are bound."""
        self._address = f"ipc://{self.folder}/workers"
        options = [
            *self._sets,
            *more_sets,
            f"broker.workers_bind={self._address}",
            f"streamer.packets_bind=ipc://{self.folder}/p",
        ]
        self.web = self._spawn("streamer", sets=options)["web"]
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._packets = self._context.socket(zmq.PUSH)
        prepare(self._packets, hwm=64)
        self._packets.connect(f"ipc://{self.folder}/p")

    def stop(self, number: int = 2) -> int:
        """End it, and the test's ends of its sockets."""
        try:
            return super().stop(number)
        finally:
            self._context.destroy(linger=0)

    def come(self) -> None:
        """Be its broker."""
        self._broker = bind(self._context, zmq.ROUTER, self._address)

    def go(self) -> None:
        """Be away, as a killed broker is."""
        self._broker.close(linger=0)

    def receive(self) -> Any:
        """The next message to the broker. HELLO is answered."""
        assert self._broker.poll(20_000), "nothing came in 20 s"
        self._peer, *parts = self._broker.recv_multipart()
        message = wire.unpack(parts, wire.FROM_INSIDE)
        if isinstance(message, StreamerHello):
            self.say(Echo(echo_ns=message.echo_ns, now_ns=message.echo_ns))
        return message

    def next(self, cls: type[M]) -> M:
        """The next message of a kind to the broker."""
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s:
            if isinstance(message := self.receive(), cls):
                return message
        raise AssertionError(f"no {cls.__name__} in 20 s")

    def before_a_record(self) -> list[Any]:
        """What comes to the broker before a RECORD that is asked for now."""
        mark = f"mark/{secrets.token_hex(4)}"
        self.json(f"/api/v1/streams/{mark}/record", method="POST", body={"mode": "all"})
        heard = []
        while not (isinstance(message := self.receive(), Record) and message.stream == mark):
            heard.append(message)
        return heard

    def say(self, message: Any) -> None:
        """Say something as the broker."""
        self._broker.send_multipart([self._peer, *wire.pack(message)])

    def tell(self, told: State) -> None:
        """Say STATE to its next HELLO, and wait until people see it."""
        self.next(StreamerHello)
        self.say(told)
        run, flags = told.streams[0]["run"], told.streams[0]["flags"]
        wait_for(lambda: self._shows(run, flags), of="the state")

    def _shows(self, run: str, flags: list[str]) -> bool:
        row = self.streams().get(STREAM)
        return row is not None and row["run"] == run and row["flags"] == flags

    def push(self, packet: Packet) -> None:
        """Send a packet as a worker."""
        self._packets.send_multipart(wire.pack(packet))


@pytest.fixture
def streamer(tmp_path: Path) -> Iterator[LoneStreamer]:
    """A streamer without a broker."""
    one = LoneStreamer(tmp_path)
    with one:
        yield one


class Page:
    """A page's WebSocket, raw."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._pictures: deque[bytes] = deque()  # that came while something else was waited for

    def say(self, kind: str, **fields: Any) -> None:
        """Send a message, and wait until it and all before it is handled."""
        self._socket.send(json.dumps({"type": kind, **fields}))
        self._socket.send('{"type": "ping", "t": 1}')
        while True:
            message = self._socket.recv(timeout=20)
            if isinstance(message, bytes):
                self._pictures.append(message)
            elif json.loads(message)["type"] == "pong":
                return

    def picture(self) -> tuple[str, str, int]:
        """(stream, run, seq) of the next one."""
        while not self._pictures:
            message = self._socket.recv(timeout=20)
            if isinstance(message, bytes):
                self._pictures.append(message)
        header, _ = unpack_picture(self._pictures.popleft())
        return header["stream"], header["run"], header["seq"]


@pytest.fixture
def page(streamer: LoneStreamer) -> Iterator[Page]:
    """A page of that streamer."""
    with connect(streamer.web.replace("http", "ws") + "/ws", max_size=None) as socket:
        yield Page(socket)


def test_a_viewer_that_came_while_the_broker_was_away_gets_its_picture(streamer: LoneStreamer, page: Page) -> None:
    """Its keyframe could not be asked for then; the deltas of the broker that is back make it asked for."""
    page.say("watch", streams={STREAM: "live"})
    streamer.come()
    assert not [message for message in streamer.before_a_record() if isinstance(message, Keyframe)]
    streamer.push(DELTA)
    assert streamer.next(Keyframe) == Keyframe(stream=STREAM, rendition="live")
    streamer.push(replace(KEY, seq=9))
    assert page.picture() == (STREAM, RUN, 9)


def test_record_pressed_while_the_broker_is_away_is_told_it(streamer: LoneStreamer) -> None:
    """Each RECORD that was answered with 200 comes to the next broker, in the order in which they were pressed."""
    pressed = [Record(stream=f"s{number}", mode="all") for number in range(20)]
    for record in pressed:
        streamer.json(f"/api/v1/streams/{record.stream}/record", method="POST", body={"mode": "all"})
    streamer.come()
    assert [streamer.next(Record) for _ in pressed] == pressed


@pytest.mark.faults
def test_stop_pressed_while_the_broker_is_away_reaches_the_run(streamer: LoneStreamer) -> None:
    """STOP is said to the next broker once that knows the run, until it says `stopping`, and then no more."""
    streamer.come()
    streamer.tell(state(1))
    streamer.go()
    streamer.json(f"/api/v1/streams/{STREAM}/stop", method="POST")
    streamer.come()
    streamer.tell(state(2))
    assert streamer.next(StopStream) == StopStream(stream=STREAM)
    streamer.tell(state(3, flags=["stopping"]))
    streamer.before_a_record()
    streamer.tell(state(4))
    assert not [message for message in streamer.before_a_record() if isinstance(message, StopStream)]


def test_a_stop_means_the_run_it_was_pressed_for(streamer: LoneStreamer) -> None:
    """A new run that took the name while the broker was away is not stopped."""
    streamer.come()
    streamer.tell(state(1))
    streamer.go()
    streamer.json(f"/api/v1/streams/{STREAM}/stop", method="POST")
    streamer.come()
    streamer.tell(state(2, run=OTHER_RUN))
    assert not [message for message in streamer.before_a_record() if isinstance(message, StopStream)]


def test_a_growing_file_that_is_removed_while_the_broker_is_away_is_told_it(streamer: LoneStreamer) -> None:
    """It would send the run from where the file ended, and wait for ever."""
    streamer.come()
    streamer.tell(replace(state(1), runs=kept(ended=False).runs))
    for packet in chain(0, 2):
        streamer.push(packet)
    while streamer.next(Cursor).synced < 2:
        pass
    streamer.go()
    (growing,) = streamer.recordings_folder.rglob("*.mp4.part")
    growing.unlink()
    wait_for(lambda: "removed" in streamer.get("/api/v1/recordings")[1].decode(), of="the loss")
    streamer.come()
    assert streamer.next(Cursor).written == -1


def test_a_broker_that_talks_nonsense_does_not_fill_the_log(streamer: LoneStreamer) -> None:
    """What is wrong with its messages is said once, however many come."""
    streamer.come()
    streamer.tell(state(1))
    for _ in range(100):
        streamer.say(Keyframe(stream=STREAM, rendition="live"))  # the streamer's own word
    streamer.tell(state(2, flags=["stalled"]))
    assert streamer.log().count("broker_message_bad") == 1


def test_a_late_delta_of_a_replaced_run_is_not_shown(streamer: LoneStreamer, page: Page) -> None:
    """Behind the new run's first picture come its own only."""
    streamer.come()
    page.say("watch", streams={STREAM: "live"})
    streamer.tell(state(10, run=OTHER_RUN))
    for packet in (received(KEY, 11, run=OTHER_RUN), received(DELTA, 9), received(DELTA, 12, run=OTHER_RUN, seq=8)):
        streamer.push(packet)
    assert [page.picture() for _ in range(2)] == [(STREAM, OTHER_RUN, 7), (STREAM, OTHER_RUN, 8)]


def test_a_late_whole_picture_of_a_replaced_run_is_not_shown(streamer: LoneStreamer, page: Page) -> None:
    """A tile does not go back to the run before, nor does latest.jpg."""
    streamer.come()
    page.say("watch", streams={STREAM: "thumb", "other": "thumb"})
    streamer.tell(state(10, run=OTHER_RUN))
    streamer.push(received(THUMB, 11, run=OTHER_RUN))
    assert page.picture() == (STREAM, OTHER_RUN, 7)
    page.say("credit", stream=STREAM)
    streamer.push(received(THUMB, 9, payload=b"old"))
    streamer.push(replace(THUMB, stream="other"))
    assert page.picture() == ("other", RUN, 7)
    status, body = streamer.get(f"/streams/{STREAM}/latest.jpg?rendition=thumb")
    assert (status, body) == (200, bytes(PACKET.payload))


def test_all_that_a_page_watches_is_told_at_once(streamer: LoneStreamer, page: Page) -> None:
    """A page opens on a wall of a thousand streams: the broker hears of each, and not by and by."""
    streamer.come()
    streamer.tell(state(1))
    names = {f"many/{number}" for number in range(1000)}
    page.say("watch", streams=dict.fromkeys(names, "thumb"))
    told = [message for message in streamer.before_a_record() if isinstance(message, Watch)]
    assert {watch.stream for watch in told if watch.viewers} == names


def test_a_woken_workers_pictures_are_not_shown(streamer: LoneStreamer, page: Page) -> None:
    """Behind the keyframe of the worker that a run moved to, neither chain nor tile takes what the former one made."""
    streamer.come()
    streamer.tell(state(1))
    page.say("watch", streams={STREAM: "live"})
    pushed = [
        replace(DELTA, seq=6, placed_ns=10),
        replace(KEY, seq=9, placed_ns=20),
        replace(DELTA, seq=7, placed_ns=10),
        replace(DELTA, seq=10, placed_ns=10),
        replace(DELTA, seq=10, placed_ns=20),
        replace(THUMB, seq=10, payload=b"new", placed_ns=20),
        replace(THUMB, seq=7, payload=b"old", placed_ns=10),
        replace(KEY, seq=10, placed_ns=20),  # once more, for a late viewer
    ]
    for packet in pushed:
        streamer.push(packet)
    assert [page.picture() for _ in range(3)] == [(STREAM, RUN, 9), (STREAM, RUN, 10), (STREAM, RUN, 10)]
    page.say("watch", streams={STREAM: "thumb"})
    assert page.picture() == (STREAM, RUN, 10)
    assert streamer.get(f"/streams/{STREAM}/latest.jpg?rendition=thumb") == (200, b"new")


def test_the_number_of_workers_that_are_needed_is_told(streamer: LoneStreamer) -> None:
    """Whoever places workers reads it in /api/v1/workers, whoever watches a farm in /metrics: as the broker says it."""
    streamer.come()
    streamer.tell(replace(state(1), desired_workers=3))
    wait_for(lambda: streamer.json("/api/v1/workers")["desired_workers"] == 3, of="the broker's word")
    assert b"\ntaesd_stream_desired_workers 3.0\n" in streamer.get("/metrics")[1]


def test_a_worker_that_is_back_soon_alarms_nobody() -> None:
    """`No decode worker` is said, as an alert and on living tiles, once none was there for 10 s, not before."""
    clock = Clock()
    hub = Hub(Latency(), lambda _: None, clock)
    rows = [state(0, name=word, run=f"{number:016x}", state=word).streams[0] for number, word in enumerate(STATES)]

    async def told(*workers: dict[str, Any]) -> tuple[list[str], list[str]]:
        hub.attach(asyncio.get_running_loop())
        hub.offer_state(State(streams=rows, runs={}, workers=list(workers), stats={}, desired_workers=1, now_ns=0))
        await asyncio.sleep(0)
        noted = [row["name"] for row in hub.streams() if row["note"] == "No decode worker."]
        return [alert["code"] for alert in hub.alerts()], noted

    assert asyncio.run(told()) == ([], [])
    clock.now_s += 9.9
    assert asyncio.run(told()) == ([], [])
    clock.now_s += 0.1
    assert asyncio.run(told()) == (["no_worker"], ["waiting", "live"])
    assert asyncio.run(told({"engines": {}})) == ([], [])
    clock.now_s += 60
    assert asyncio.run(told()) == ([], [])


def test_what_nobody_watches_any_more_is_said_again() -> None:
    """For ten seconds, to a broker that was away when the last viewer left; one who is back counts at once."""
    clock = Clock()
    hub = Hub(Latency(), lambda _message: None, clock)

    def told() -> dict[str, int]:
        return {watch.stream: watch.viewers for watch in hub.watches()}

    for name in ("gone", "back"):
        with hub.watching(name, "thumb"):
            assert told()[name] == 1
    assert told() == {"gone": 0, "back": 0}
    clock.now_s += 9.9
    with hub.watching("back", "thumb"):
        assert told() == {"gone": 0, "back": 1}
        clock.now_s += 0.2
        assert told() == {"back": 1}
    assert told() == {"back": 0}


def test_of_what_nobody_watches_any_more_little_is_said_again() -> None:
    """A page that watches ever new names makes no HELLO longer than a wall of them does: the newest are said."""
    hub = Hub(Latency(), lambda _message: None, Clock())
    for number in range(2 * MAX_LEFT):
        with hub.watching(f"s{number}", "thumb"):
            pass
    assert [watch.stream for watch in hub.watches()] == [f"s{number}" for number in range(MAX_LEFT, 2 * MAX_LEFT)]


def test_many_wishes_for_a_keyframe_are_few_keyframes() -> None:
    """Of a thousand at once a few are said, and one more later, for whoever came last; of another stream its own."""
    told: list[Any] = []

    async def ask() -> None:
        is_late = asyncio.Event()

        def tell(message: Any) -> None:
            told.append(message.stream)
            if len(told) == MAX_KEYFRAMES + 2:
                is_late.set()

        hub = Hub(Latency(), tell)
        hub.attach(asyncio.get_running_loop())
        for _ in range(1000):
            hub.keyframe("much")
        hub.keyframe("little")
        assert told == [*["much"] * MAX_KEYFRAMES, "little"]
        async with asyncio.timeout(20):
            await is_late.wait()

    asyncio.run(ask())
    assert told[-1] == "much"


def test_a_picture_that_had_to_go_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who watches a stream that stands still gets its picture, though there was no room to hold it."""
    monkeypatch.setattr(last_pictures, "MAX_BYTES", 1)
    told: list[Any] = []

    async def look() -> None:
        hub = Hub(Latency(), told.append)
        hub.attach(asyncio.get_running_loop())
        for stream in (STREAM, "newer"):
            hub.offer_packet(replace(THUMB, stream=stream), 0)
        await asyncio.sleep(0)  # what was offered is taken
        for stream in (STREAM, "newer"):
            with hub.watching(stream, "thumb"):
                pass

    asyncio.run(look())
    assert [message for message in told if isinstance(message, Keyframe)] == [
        Keyframe(stream=STREAM, rendition="thumb")
    ]


def told(known: Told | None, news: News) -> tuple[list[str], list[str]]:
    """Ids of the rows that are said, and of those that are gone."""
    said = json.loads(f"{{{news.fields.removeprefix(', ')}}}")
    assert all(json.loads(news.known[row["id"]]) == row for row in said.get("recordings", ()))
    assert set(news.known) == {*(known or ()), *(row["id"] for row in said.get("recordings", ()))} - {
        *said.get("gone", ())
    }
    return [row["id"] for row in said.get("recordings", ())], said.get("gone", [])


def test_pages_are_told_what_is_new_of_finished_recordings() -> None:
    """Each row once, changed ones again, some at a time, those that went; and those that know the same share it."""
    rows = FinishedRows()
    rows.take({"id": str(number), "frames": 1} for number in range(MAX_TOLD + 1))
    first = rows.news(None)
    assert rows.news(None) is first
    assert told(None, first) == ([str(number) for number in range(MAX_TOLD)], [])
    assert first.is_more
    second = rows.news(first.known)
    assert told(first.known, second) == ([str(MAX_TOLD)], [])
    assert not second.is_more
    assert rows.news(second.known) == News("", second.known, is_more=False)
    rows.take({"id": str(number), "frames": 1 + (number == 3)} for number in range(1, MAX_TOLD + 1))
    assert told(second.known, rows.news(second.known)) == (["3"], ["0"])
    late = rows.news(first.known)
    assert told(first.known, late) == (["3", str(MAX_TOLD)], ["0"])
    assert late.known is rows.news(second.known).known


def test_nothing_finished_is_said_too() -> None:
    """A page that knows nothing is told that there is nothing."""
    assert FinishedRows().news(None) == News(', "recordings": []', {}, is_more=False)


def test_what_grows_is_no_news_of_what_is_finished() -> None:
    """A state has all that grows; the finished ones are told when one came or went."""
    hub = Hub(Latency(), lambda _message: None)
    peers = Peers(hub)
    known: Told | None = None
    for finished, frames, expected in (("a", 1, ["a"]), ("a", 2, None), ("b", 3, ["b"]), ("", 4, None)):
        facts = {"run": RUN, "last_seq": 0}
        growing = {"id": "c", "state": "recording", "frames": frames} | facts
        hub.recordings = [growing, *({"id": one, "state": "finished"} | facts for one in finished)]
        hub.changes += 1
        text, news = peers.state_json(known)
        known, state = news.known, json.loads(text)
        assert [row["frames"] for row in state["growing"]] == [frames]
        assert ([row["id"] for row in state["recordings"]] if "recordings" in state else None) == expected
        assert sorted(known) == sorted(finished)


def test_a_page_is_told_finished_recordings_when_they_change(daemon: Daemon) -> None:
    """The first state has them, later ones only where one came; what grows is in each."""
    with PageSocket(daemon) as page:
        before = {row["id"] for row in page.next_state()["recordings"]}
        with LatentPublisher(daemon.broker, stream="told/once", latent_format="sd1", record="all") as publisher:
            publisher.publish(np.zeros((4, 8, 8), np.float32), step=0)
            assert publisher.wait_until_acked(20), publisher.error
            while not [row for row in page.next_state()["growing"] if row["run"] == publisher.run]:
                assert "recordings" not in page.state
        while "recordings" not in page.next_state():
            pass
        (new,) = (row for row in page.state["recordings"] if row["id"] not in before)
        assert (new["run"], new["state"], new["daemon"]) == (publisher.run, "finished", None)


def test_hundreds_of_recordings_come_in_parts(tmp_path: Path) -> None:
    """A page knows all of them after a few states, none of which is long; one that is deleted is gone for it too."""
    with Daemon(tmp_path, "recording.film=off") as daemon:
        with LatentPublisher(daemon.broker, stream="one", latent_format="sd1", record="all") as publisher:
            publisher.publish(np.zeros((4, 8, 8), np.float32), step=0)
        row = daemon.recording(publisher.run)
        (path,) = daemon.recordings_folder.rglob("*.mp4")
        names = {f"{number:03}" for number in range(MAX_TOLD + 50)}
        for name in names:
            os.link(path, daemon.recordings_folder / f"{name}.mp4")
        wait_for(lambda: len(daemon.json("/api/v1/recordings")["recordings"]) == len(names) + 1, of="all of them")
        with PageSocket(daemon) as page:
            known: set[str] = set()
            while known != {row["id"], *names}:
                rows = page.next_state().get("recordings", [])
                assert len(rows) <= MAX_TOLD
                assert known.isdisjoint(one["id"] for one in rows)
                known |= {one["id"] for one in rows}
            daemon.json("/api/v1/recordings/007", method="DELETE")
            while "gone" not in page.next_state():
                assert "recordings" not in page.state
            assert page.state["gone"] == ["007"]


def test_stamps_never_go_back() -> None:
    """Where hosts' guesses of the broker's clock differ, no stage ends before it began; what is unknown stays 0."""
    stamps = Stamps(sent_ns=9_000, received_ns=0, started_ns=7_000, decoded_ns=11_000, encoded_ns=10_000)
    header, _ = unpack_picture(to_message(replace(PACKET, stamps=stamps), 8_000))
    assert list(header["stamps"].values()) == [9, 0, 9, 11, 11, 11]
