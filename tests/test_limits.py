"""Limits of one client and of all: what is over is refused with value, limit and key, and nobody else is harmed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from taesd_stream import LatentPublisher
from taesd_stream.config import BrokerConfig, load_config
from taesd_stream.frames import Kind, StreamInfo
from taesd_stream.keys import load_keys
from taesd_stream.messages import Echo, End, Refused, RunHello
from taesd_stream_workers.broker.limits import Limits
from taesd_stream_workers.broker.registry import Registry
from taesd_stream_workers.broker.runs import Run
from taesd_stream_workers.role.gate import Gate
from taesd_stream_workers.role.key_files import make_client
from tests.broker_role import BrokerRole, Peer, frame, new_run
from tests.daemon import wait_for
from tests.pictures import sd1_latents_of

LARGE = (4, 256, 320)  # 640 KiB
SMALL = (4, 128, 128)  # 128 KiB
HUGE = (4, 1024, 4500)  # 35 MiB


class TwoClients:
    """A broker with small limits, and two clients' keys."""

    def __init__(self, folder: Path, *sets: str) -> None:
        self.a, self.b = (load_keys(make_client(folder / "keys", name, "samplers")) for name in ("a", "b"))
        self.broker = BrokerRole(
            folder,
            f"security.keys_folder={folder / 'keys'}",
            "broker.max_streams=5",
            "broker.max_client_streams=3",
            "broker.max_memory_bytes=67108864",
            "broker.max_client_memory_bytes=41943040",
            "broker.max_client_messages_s=50",
            "broker.max_picture_px=1000000000",
            *sets,
        )
        self.broker.keys = load_keys(folder / "keys")


@pytest.fixture
def two(tmp_path: Path) -> Iterator[TwoClients]:
    """A broker of a test's own."""
    one = TwoClients(tmp_path)
    with one.broker:
        yield one


def opened(peer: Peer, count: int) -> list[str]:
    """Runs that were opened."""
    runs = [new_run() for _ in range(count)]
    for run in runs:
        peer.open(run, f"s/{run}")
    return runs


def open_message(run: str) -> object:
    """OPEN of a run by its own name."""
    return StreamInfo(stream=f"s/{run}", run=run, kind="steps", latent_format="sd1", record="off")


def open_refused(peer: Peer) -> Refused:
    """What the broker says to another stream."""
    run = new_run()
    peer.say(open_message(run))
    return peer.next(Refused, lambda one: one.run == run)


def test_streams_of_one_client_and_of_all(two: TwoClients) -> None:
    """The fourth stream of one client is refused, the sixth of all too; what ends makes room."""
    with two.broker.publisher(two.a) as a, two.broker.publisher(two.b) as b:
        runs = opened(a, 3)
        refused = open_refused(a)
        assert refused.code == "limit"
        assert refused.text == "3 streams of one client are open: broker.max_client_streams = 3 allows no more"
        opened(b, 2)
        assert open_refused(b).text == "5 streams are open: broker.max_streams = 5 allows no more"
        a.end(runs[0], -1)

        def has_room() -> bool:
            run = new_run()
            a.say(open_message(run))
            answer = a.receive(5.0)
            return answer is not None and not isinstance(answer, Refused)

        wait_for(has_room, of="room for another")
    assert two.broker.stats().stats["counts"]["refused_limit"] >= 2


def test_what_ended_makes_room_at_once(two: TwoClients) -> None:
    """A client that ends its streams and opens as many, in one breath, is not refused."""
    with two.broker.publisher(two.a) as a:
        for _ in range(3):
            runs = opened(a, 3)
            for run in runs:
                a.say(End(run=run, last_seq=-1, reason="done"))
        last = new_run()
        a.open(last, f"s/{last}")
    assert "refused_limit" not in two.broker.stats().stats["counts"]


def test_a_picture_that_no_worker_has_memory_for_is_refused(tmp_path: Path) -> None:
    """Its size and the limit are said; the frames of a clip and smaller pictures are taken."""
    with BrokerRole(tmp_path, "broker.max_picture_px=65536") as broker, broker.publisher() as peer:
        cases: tuple[tuple[str, Kind, tuple[int, ...], bool], ...] = (
            ("sd1", "steps", (4, 32, 32), True),
            ("sd1", "steps", (4, 32, 33), False),
            ("sd1", "steps", (2, 4, 32, 32), False),
            ("wan2_1", "clip", (2, 16, 32, 32), True),
            ("somebodys", "steps", (3, 33, 32), False),
        )
        for latent_format, kind, shape, is_taken in cases:
            run = new_run()
            peer.open(run, f"s/{run}", latent_format=latent_format, kind=kind, record="all")
            peer.say(frame(run, 0, kept=True, shape=shape))
            if is_taken:
                peer.ack(run, 0)
                continue
            refused = peer.next(Refused)
            assert refused.run == run
            assert "broker.max_picture_px = 65536 allows no more" in refused.text
            assert refused.code == "format"


def test_bytes_of_one_client_and_of_all(two: TwoClients) -> None:
    """Newest frames over the limit are refused, kept ones not acked; the frame before stays, and others have room."""
    with two.broker.publisher(two.a) as a, two.broker.publisher(two.b) as b:
        first, second = opened(a, 2)
        a.say(frame(first, 0, shape=HUGE))
        a.say(frame(second, 0, kept=True, shape=HUGE))
        refused = a.refused()
        assert (refused.run, refused.code) == (second, "limit")
        assert "broker.max_client_memory_bytes = 41943040 allows no more" in refused.text
        (other,) = opened(b, 1)
        b.say(frame(other, 0, shape=HUGE))
        assert "broker.max_memory_bytes = 67108864 allows no more" in b.refused().text
        b.say(frame(other, 0, kept=True, shape=LARGE))
        assert b.ack(other, 0).seq == 0
        rows = {row["run"]: row["seq"] for row in two.broker.stats().streams}
        assert rows == {first: 0, second: None, other: 0}


@pytest.mark.parametrize(("limit", "held"), [(16, 11), (12, 11), (8, 4)])
def test_the_history_of_live_runs_counts(tmp_path: Path, limit: int, held: int) -> None:
    """Of an unwatched `live` run the newest frame and ten before it are held, and counted; over the limit these go."""
    allowed = limit * len(frame(new_run(), 0, shape=SMALL).payload)
    with BrokerRole(tmp_path, f"broker.max_client_memory_bytes={allowed}") as broker, broker.publisher() as publisher:
        run, other = new_run(), new_run()
        publisher.open(run, "live", kind="live", latent_format="unheard of")
        publisher.open(other, "other", latent_format="unheard of")
        for seq in range(20):
            publisher.say(frame(run, seq, shape=SMALL))
        publisher.say(frame(other, 0, shape=(limit, *SMALL)))
        refused = publisher.refused()
        assert (refused.run, broker.row("live")["seq"]) == (other, 19)
        assert refused.text.startswith(f"{(held + limit) * allowed // limit} bytes of latents of one client")


def test_a_client_leaves_room_in_the_log_for_others(tmp_path: Path) -> None:
    """Who holds most of the log is not acked when it is nearly full; others are, and people are told whose it is."""
    two = TwoClients(tmp_path, f"broker.log_max_bytes={4 << 20}")
    with two.broker, two.broker.publisher(two.a) as a, two.broker.publisher(two.b) as b:
        greedy, other = new_run(), new_run()
        a.open(greedy, "greedy", record="all", latent_format="of a user's own")
        seq = 0
        while "log_full" not in two.broker.alerts():
            a.say(frame(greedy, seq, kept=True, shape=SMALL))
            a.receive(0.1)
            seq = a.acked() + 1
        held = seq * len(frame(greedy, 0, shape=SMALL).payload)
        assert 0.95 * (4 << 20) < held < 4 << 20
        b.open(other, "modest", record="all")
        b.say(frame(other, 0, kept=True))
        b.ack(other, 0)
        text = two.broker.alerts()["log_full"]
        assert text.startswith("The latent log is nearly full, and a client that has most of it gets no more")
        assert "greedy, has 3 of 3 MiB" in text


def test_messages_of_one_client(two: TwoClients) -> None:
    """A client that floods is refused, once a second in words and else unread; the other is heard all the time."""
    with two.broker.publisher(two.a) as a, two.broker.publisher(two.b) as b:
        (run,) = opened(a, 1)
        for seq in range(500):
            a.say(frame(run, seq))
        refused = a.refused()
        assert (refused.run, refused.code) == (run, "limit")
        assert "over 50 messages a second of one client: broker.max_client_messages_s allows no more" in refused.text
        (other,) = opened(b, 1)
        b.say(frame(other, 0, kept=True))
        assert b.ack(other, 0).seq == 0
        counts = two.broker.stats().stats["counts"]
        assert counts["refused_speed"] > 0
        a.drain()
        assert sum(isinstance(one, Refused) for one in a.heard) < 20  # in words once a second, a slow machine's too
    assert "client_too_fast client=a" in two.broker.log()


def test_a_hello_of_many_runs_is_as_many_messages(two: TwoClients) -> None:
    """Each run of a HELLO is answered: it is as much of what a client may say."""
    with two.broker.publisher(two.a) as a:
        a.publisher_hello(**{new_run(): RunHello(next_seq=0) for _ in range(200)})
        a.next(Refused, lambda one: one.code == "unknown_run")
        a.say(open_message(new_run()))
        assert "over 50 messages a second of one client" in a.next(Refused, lambda one: one.code == "limit").text


def test_a_hello_costs_nothing_where_it_is_refused_and_is_remembered_where_not() -> None:
    """A client that has said too much by one HELLO stays silent as long as it is in debt; all of it is everybody's."""
    now_s = 0.0
    limits = Limits(BrokerConfig(max_client_messages_s=50, max_messages_s=100), lambda: now_s)
    assert limits.may_speak("a")
    limits.charge("a", 130)
    now_s = 1.01
    limits.recount([])
    assert not limits.may_speak("a")
    assert limits.may_speak("b")
    now_s = 2.0
    assert limits.may_speak("a")
    limits.charge("c", 1000)  # never heard before
    assert not limits.may_speak("b")


def test_a_hello_while_all_together_are_too_fast_is_refused(tmp_path: Path) -> None:
    """The others' flood leaves nothing for a publisher that says HELLO once a second: it is told, and no more."""
    with (
        BrokerRole(tmp_path, "broker.max_messages_s=10") as broker,
        broker.publisher() as flood,
        broker.publisher() as calm,
    ):
        calm.publisher_hello()
        calm.next(Echo)
        run = new_run()

        def told() -> bool:
            for _ in range(20):
                flood.say(open_message(new_run()))
            calm.publisher_hello(**{run: RunHello(next_seq=0)})
            heard = calm.receive(2.0)
            return isinstance(heard, Refused) and heard.code == "limit"

        wait_for(told, of="a refusal")
        wait_for(lambda: broker.stats().stats["counts"]["refused_speed"] > 0, of="the count")


def test_first_frames_that_wait_for_the_log_count(tmp_path: Path) -> None:
    """What a run that is over still holds for a log that is full is within its client's limit, whoever comes next."""
    limits = Limits(BrokerConfig(max_client_memory_bytes=1 << 20))
    registry = Registry(load_config(sets=[f"recording.folder={tmp_path}"]))
    held = frame(new_run(), 0, shape=LARGE)
    info = StreamInfo(stream="held", run=held.run, kind="steps", latent_format="sd1")
    run = Run(info, peer=None, record="all")
    run.client, run.end = "a", End(run=held.run, last_seq=0, reason="done")
    registry.keep_log(run, 0).front = held
    limits.recount([run])
    assert limits.memory_refusal("a", held.nbytes) is not None
    assert limits.memory_refusal("b", held.nbytes) is None
    assert run.kept is not None
    run.kept.front = None  # the log has it
    limits.recount([run])
    assert limits.memory_refusal("a", held.nbytes) is None


def test_the_rest_of_an_endless_message_is_read_by_turns() -> None:
    """Of a message of very many parts no more is read at once than is asked for; the next one is read whole."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        door = Gate(load_config()).bind(context, zmq.ROUTER, "tcp://127.0.0.1:0", "samplers", hwm=16)
        sender = context.socket(zmq.DEALER)
        sender.connect(door.socket.getsockopt_string(zmq.LAST_ENDPOINT))
        sender.send_multipart([b""] * 2500)
        sender.send(b"next")
        assert door.pass_over(1000)  # nothing is under way
        door.socket.recv()
        door.is_amid = True
        assert [door.pass_over(1000) for _ in range(3)] == [False, False, True]
        assert door.socket.recv_multipart()[1:] == [b"next"]
    finally:
        context.destroy(linger=0)


def test_a_sampler_that_is_refused_says_so_and_goes_on(
    two: TwoClients, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The publisher's error and its log have the broker's words; publish() goes on and raises nothing."""
    options = {"latent_format": "sd1", "keys_folder": tmp_path / "keys" / "issued" / "a"}
    publishers = [LatentPublisher(two.broker.front, stream=f"p{n}", **options) for n in range(4)]  # type: ignore[arg-type]
    try:
        refused = wait_for(lambda: next((one for one in publishers if one.error), None), of="a refusal")
        assert "broker.max_client_streams = 3 allows no more" in (refused.error or "")
        refused.publish(sd1_latents_of((90, 90, 90)), step=0)
        assert not refused.wait_until_acked(0.0) or refused.error
    finally:
        for one in publishers:
            one.close(timeout_s=1.0)
    assert any("code=limit" in record.getMessage() for record in caplog.records)


def test_without_keys_a_client_is_a_host(tmp_path: Path) -> None:
    """Two connections of one host share one client's limits."""
    with (
        BrokerRole(tmp_path, "broker.max_client_streams=1") as broker,
        broker.publisher() as one,
        broker.publisher() as other,
    ):
        opened(one, 1)
        assert "1 streams of one client are open" in open_refused(other).text


def test_a_rate_holds_over_any_time() -> None:
    """Of a flood no more is taken than the rate times the time, and one second's worth at once."""
    now = 0.0
    limits = Limits(BrokerConfig(max_client_messages_s=100, max_messages_s=150), lambda: now)
    taken = {"a": 0, "b": 0}
    for _ in range(4000):
        for client in taken:
            taken[client] += limits.may_speak(client)
        now += 0.001
    assert taken["a"] <= 100 * 5
    assert 150 * 4 - 10 <= sum(taken.values()) <= 150 * 5
