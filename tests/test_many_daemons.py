"""Several daemons: which one has a stream, and how a run goes on at the next one when that is gone."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taesd_stream import LatentPublisher
from taesd_stream.daemons import AVOID_S, Daemons, addresses_of, ranked
from taesd_stream.frames import LatentFrame, RecordMode, StreamInfo
from taesd_stream.integrations.training import _films, publish_sample
from taesd_stream.keys import load_keys
from taesd_stream.latent_log import read_messages
from taesd_stream.message_fields import MAX_META_BYTES
from taesd_stream.messages import End, PublisherHello
from taesd_stream_workers.role.key_files import make_client, revoke
from tests.broker_peer import BrokerPeer
from tests.broker_role import BrokerRole
from tests.daemon import COMMAND, Daemon, clean_environment, wait_for
from tests.pictures import decode_file, sd1_latents_of

FOX = ["tcp://10.0.0.1:5760", "tcp://10.0.0.2:5760", "tcp://10.0.0.3:5760"]
hosts = st.lists(st.integers(1, 254), min_size=2, max_size=8, unique=True).map(
    lambda numbers: [f"tcp://10.0.0.{number}:5760" for number in numbers]
)


# --- which daemon ---


def test_the_order_of_a_stream_never_changes() -> None:
    """Programs of different versions agree on who has a stream: these orders were written down once."""
    assert [FOX.index(one) for one in ranked(FOX, "fox")] == [1, 2, 0]
    assert [FOX.index(one) for one in ranked(FOX, "comfy/7/3")] == [0, 1, 2]


@given(addresses=hosts, stream=st.integers(0, 1 << 32).map(str), place=st.integers(0, 7))
def test_one_that_goes_moves_only_its_own_streams(addresses: list[str], stream: str, place: int) -> None:
    """Whatever the order in which they are given, and whichever is left out, the others keep their order."""
    order = ranked(addresses, stream)
    assert sorted(order) == sorted(addresses)
    gone = addresses[place % len(addresses)]
    left = [one for one in addresses[::-1] if one != gone]
    assert ranked(left, stream) == [one for one in order if one != gone]


@settings(max_examples=20)
@given(addresses=hosts)
def test_every_daemon_has_a_fair_share(addresses: list[str]) -> None:
    """Of 2,000 names each address is the first choice of its part, within six standard deviations."""
    count, share = 2000, 1 / len(addresses)
    firsts = Counter(ranked(addresses, f"stream-{number}")[0] for number in range(count))
    deviation = (count * share * (1 - share)) ** 0.5
    assert all(abs(firsts[address] - count * share) < 6 * deviation for address in addresses)


def test_one_that_was_left_is_avoided_for_a_while_by_all() -> None:
    """Every publisher of the process passes it over at once, until it answers somebody or the time is up."""
    addresses = ["tcp://avoid-a:1", "tcp://avoid-b:1", "tcp://avoid-c:1"]
    first, second, third = ranked(addresses, "fox")
    one = Daemons(addresses, "fox", 100.0)
    one.leave(100.0)
    other = Daemons(addresses, "fox", 101.0)
    assert (one.current, other.current, other.has_fresh(101.0)) == (second, second, True)
    other.leave(101.0)
    assert (other.current, other.has_fresh(101.0)) == (third, False)
    other.leave(102.0)
    assert other.current == first  # all were left: the one that was left first is due first
    assert Daemons(addresses, "fox", 100.0 + AVOID_S).current == first
    other.answered()
    other.leave(103.0)
    assert Daemons(addresses, "fox", 104.0).current == second  # left before the first was
    one.answered()
    assert Daemons(addresses, "fox", 104.0).current == second  # it is there: it answered


def test_a_daemon_that_is_left_is_told_of_once() -> None:
    """While nobody answers each is worth one line of the log, however often it is tried; then again."""
    addresses = ["tcp://told-a:1", "tcp://told-b:1"]
    one = Daemons(addresses, "fox", 100.0)
    assert [one.leave(101.0 + number) for number in range(4)] == [True, True, False, False]
    one.answered()
    assert one.leave(110.0)


@pytest.mark.parametrize(
    ("given_as", "expected"),
    [
        ("tcp://a:1", ["tcp://a:1"]),
        ("tcp://a:1,tcp://b:2 , ipc:///run/c", ["tcp://a:1", "tcp://b:2", "ipc:///run/c"]),
        ("ipc:///run/a,b", ["ipc:///run/a,b"]),
        (["tcp://a:1", "tcp://b:2,tcp://c:3", "tcp://a:1"], ["tcp://a:1", "tcp://b:2", "tcp://c:3"]),
        (("tcp://a:1, ",), ["tcp://a:1"]),
        (None, ["tcp://env:1", "tcp://env:2"]),
        ("", ["tcp://env:1", "tcp://env:2"]),
    ],
)
def test_addresses_are_read_as_they_are_said(
    given_as: Any, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text, several between commas, a sequence, or the environment's: each address once, in order."""
    monkeypatch.setenv("TAESD_STREAM_ADDRESS", "tcp://env:1,tcp://env:2")
    assert list(addresses_of(given_as)) == expected


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ([], r"at least one .*got \[\]"),
        (" , ", "got ' , '"),
        (5760, "got 5760"),
        (["tcp://127.0.0.1:9", None], "None"),
        (["tcp://127.0.0.1:9", "localhost:5760"], "got 'localhost:5760'"),
        ("tcp://127.0.0.1:9,smoke://signal", "got 'smoke://signal'"),
        ("tcp://127.0.0.1:9,127.0.0.1:10", "got 'tcp://127.0.0.1:9,127.0.0.1:10'"),
    ],
)
def test_a_bad_address_among_good_ones_is_said_at_once(address: Any, words: str) -> None:
    """Whichever of them no socket takes, the ValueError shows that one."""
    with pytest.raises(ValueError, match=f"address: .*{words}"):
        LatentPublisher(address, stream="a", latent_format="sd1")


def test_a_meta_has_room_for_the_former_run() -> None:
    """With several daemons a meta at the limit is refused at once: a continued run says more, and must travel."""
    meta = {"from": "here", "prompt": "x" * (MAX_META_BYTES - 40)}
    LatentPublisher("tcp://127.0.0.1:9", stream="a", latent_format="sd1", meta=meta).close(0.0)
    with pytest.raises(ValueError, match="meta"):
        LatentPublisher("tcp://127.0.0.1:9,tcp://127.0.0.1:10", stream="a", latent_format="sd1", meta=meta)


# --- from one to the next ---


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishers that wait less for a daemon than they do."""
    monkeypatch.setattr("taesd_stream.pulse.GONE_S", 0.8)
    monkeypatch.setattr("taesd_stream.pulse.NEVER_HEARD_S", 0.4)


@pytest.fixture
def farm() -> Iterator[list[BrokerPeer]]:
    """Three brokers that the test speaks for, in the order of the stream `a`."""
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(BrokerPeer()) for _ in range(3)]
        order = ranked([peer.address for peer in peers], "a")
        yield sorted(peers, key=lambda peer: order.index(peer.address))


@pytest.fixture
def open_run(farm: list[BrokerPeer], hasty: None) -> Iterator[Any]:
    """Opens publishers at the farm, and ends what the test left open without waiting."""
    opened: list[LatentPublisher] = []

    def open_one(*peers: BrokerPeer, **options: Any) -> LatentPublisher:
        addresses = sorted(peer.address for peer in peers or farm)
        opened.append(LatentPublisher(addresses, **{"stream": "a", "latent_format": "sd1", **options}))
        return opened[-1]

    yield open_one
    for publisher in opened:
        publisher.close(0.0)


def publish(publisher: LatentPublisher, count: int, *, first: int = 0) -> None:
    """Steps `first` and on, each told by its first value."""
    for step in range(first, first + count):
        publisher.publish(np.full((4, 8, 8), step, np.float16), step=step, total_steps=1000, sigma=1.0)


def taken_by(peer: BrokerPeer, record: RecordMode = "all") -> str:
    """The run that a broker opens for the next publisher."""
    run = peer.opened().run
    peer.demand(run, "every", record=record)
    return run


def continued_at(peer: BrokerPeer, former: str) -> StreamInfo:
    """The OPEN of the run that goes on here."""
    info = peer.opened()
    assert (info.meta["continues"], info.run != former) == (former, True)
    return info


def test_a_run_goes_on_at_the_next_daemon(
    farm: list[BrokerPeer], open_run: Any, beside: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """A new run with the same words and everything unacked, nothing that was acked; numbers and times stay."""
    one, two, _ = farm
    publisher = open_run(record="all", meta={"seed": 7}, kind="steps", fps=None)
    former = one.opened()
    publish(publisher, 6)
    said = {frame.seq: frame for frame in (one.frame(seq) for seq in range(6))}
    one.ack(former.run, 2)
    wait_for(lambda: publisher._outbox.kept.count == 3, of="the ack")
    one.close()
    info = continued_at(two, former.run)
    assert (info.stream, info.kind, info.latent_format, info.record) == ("a", "steps", "sd1", "all")
    assert (info.meta["seed"], info.opened_ns) == (7, said[3].sent_ns)
    hello = two.next(PublisherHello).runs[info.run]
    assert (hello.next_seq, hello.kept_from) == (6, 3)
    for seq in (3, 4, 5):
        again = two.frame(seq, kept=True)
        assert again.run == info.run
        assert (again.sent_ns, again.step, bytes(again.payload)) == (
            said[seq].sent_ns,
            said[seq].step,
            bytes(said[seq].payload),
        )
    assert (publisher.run, publisher.stream, publisher.address) == (info.run, "a", two.address)
    publish(publisher, 2, first=6)
    two.frame(7)
    two.ack(info.run, 7)
    assert publisher.wait_until_acked(10)
    closing = beside.submit(publisher.close)
    end = two.finish()
    closing.result(20)
    assert (end.run, end.last_seq, end.reason) == (info.run, 7, "done")
    assert two.seqs() == [3, 4, 5, 6, 7]
    assert publisher.error is None
    logged = [record.getMessage().partition(" ")[0] for record in caplog.records]
    assert logged == ["daemon_left", "stream_goes_on"]


def test_one_that_is_back_in_time_keeps_its_run(farm: list[BrokerPeer], open_run: Any) -> None:
    """A daemon that was only started again: the same run goes on there, and no other daemon hears of it."""
    one, two, _ = farm
    publisher = open_run(record="all")
    run = taken_by(one)
    publish(publisher, 2)
    one.frame(1)
    one.close()
    with BrokerPeer(one.address) as back:
        back.next(PublisherHello)
        back.refuse(run, "unknown_run")
        assert back.opened().run == run
        back.frame(1)
        assert (back.seqs()[-2:], publisher.address) == ([0, 1], one.address)
        assert not two._socket.poll(0), "another daemon was asked"
        publisher.close(0.0)


@pytest.mark.faults
def test_where_all_was_acked_the_next_daemon_waits_for_nothing(
    farm: list[BrokerPeer], open_run: Any, beside: ThreadPoolExecutor
) -> None:
    """It is told that keeping begins with the next publish, so that it takes that one when it comes."""
    one, two, _ = farm
    publisher = open_run(record="all")
    run = taken_by(one)
    publish(publisher, 5)
    one.frame(4)
    one.ack(run, 4)
    assert publisher.wait_until_acked(10)
    one.close()
    info = continued_at(two, run)
    hello = two.next(PublisherHello).runs[info.run]
    assert (hello.next_seq, hello.kept_from) == (5, 5)
    publish(publisher, 1, first=5)
    assert two.frame(5, kept=True).index == 5
    two.ack(info.run, 5)
    closed = beside.submit(publisher.close)
    assert two.finish().last_seq == 5
    closed.result(20)


def test_the_word_end_alone_begins_no_run(farm: list[BrokerPeer], open_run: Any) -> None:
    """All was acked, then the daemon died: close() ends without another daemon's hearing of the stream."""
    one, two, three = farm
    publisher = open_run(record="all")
    run = taken_by(one)
    publish(publisher, 2)
    one.frame(1)
    one.ack(run, 1)
    assert publisher.wait_until_acked(10)
    one.close()
    publisher.close(20.0)
    assert (publisher.run, publisher.error) == (run, None)
    assert not two._socket.poll(0)
    assert not three._socket.poll(0)


@pytest.mark.slow
@pytest.mark.parametrize(("record", "seqs"), [("last", [1]), (None, [0, 1])])
def test_what_a_run_owes_at_its_end_goes_to_the_next_daemon(
    record: RecordMode | None,
    seqs: list[int],
    farm: list[BrokerPeer],
    open_run: Any,
    beside: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """close() finds the daemon gone: the frame of `last`, or all that nobody has decided on, is kept by another one."""
    monkeypatch.setattr("taesd_stream.pulse.GONE_S", 30.0)  # the run is not moved before its end
    one, two, _ = farm
    publisher = open_run(record=record)
    run = one.opened().run
    if record is None:
        one.next(PublisherHello)
    else:
        one.demand(run, "every", record=record)
    publish(publisher, 2)
    wait_for(lambda: publisher._link._pulse.is_heard, of="an answer")
    if record is not None:
        one.frame(1)
    one.close()
    wait_for(lambda: publisher._link._pulse.is_absent(time.monotonic()), of="its being gone")
    closing = beside.submit(publisher.close)
    info = two.opened()
    if record is None:
        two.demand(info.run, "every", record="all")
    assert two.finish().last_seq == 1
    closing.result(20)
    assert [message.seq for message in two.heard if isinstance(message, LatentFrame) and message.kept] == seqs
    assert publisher.error is None


@pytest.mark.slow
def test_a_second_death_leads_to_the_third(farm: list[BrokerPeer], open_run: Any) -> None:
    """Each run names the one before it, and what none of them acked is in the last one."""
    one, two, three = farm
    publisher = open_run(record="all")
    first = taken_by(one)
    publish(publisher, 4)
    one.frame(3)
    one.close()
    second = continued_at(two, first).run
    two.frame(3)
    two.ack(second, 1)
    wait_for(lambda: publisher._outbox.kept.count == 2, of="the ack")
    two.close()
    third = continued_at(three, second).run
    three.frame(3)
    assert (three.seqs(), publisher.run) == ([2, 3], third)


@pytest.mark.slow
def test_a_daemon_that_hangs_is_left_too(farm: list[BrokerPeer], open_run: Any) -> None:
    """One whose connection stands, and that says nothing any more, is as good as gone; also where it never spoke."""
    one, two, three = farm
    publisher = open_run(record="all")
    former = taken_by(one)
    publish(publisher, 2)
    one.frame(1)
    info = three.opened()  # the second has never said a word
    assert (info.meta["continues"], two.opened().meta["continues"]) == (former, former)
    assert three.frame(0).run == info.run


def test_a_run_that_nobody_has_keeps_its_id(farm: list[BrokerPeer], open_run: Any) -> None:
    """The first choice was never there: the run opens at the next one as it is, which says what is kept of it."""
    one, two, _ = farm
    one.close()
    publisher = open_run(record=None)
    run = publisher.run
    publish(publisher, 2)
    info = two.opened()
    assert (info.run, "continues" in info.meta, publisher.run, info.record) == (run, False, run, None)
    two.demand(run, "every", record="all")
    two.frame(1, kept=True)
    assert two.seqs() == [0, 1]


@pytest.mark.faults
def test_a_run_that_nobody_else_has_stays_where_it_is(farm: list[BrokerPeer], open_run: Any) -> None:
    """All are gone, and the one that had the run is the first to come back: it goes on there as the same run."""
    one, two, three = farm
    two.close()
    three.close()
    publisher = open_run(record="all")
    run = one.opened().run
    publish(publisher, 3)
    one.frame(2)
    one.ack(run, 0)
    wait_for(lambda: publisher._outbox.kept.count == 2, of="the ack")
    one.close()
    wait_for(lambda: publisher.address != one.address, of="another try")
    with BrokerPeer(one.address) as back:
        info = back.opened()
        assert (info.run, "continues" in info.meta) == (run, False)
        back.frame(2)
        assert back.seqs() == [1, 2]


def test_the_next_run_does_not_wait_for_it_again(farm: list[BrokerPeer], open_run: Any) -> None:
    """What one publisher found gone the next one of the process passes over from the begin."""
    one, two, _ = farm
    one.close()
    open_run()
    two.opened()
    second = open_run(stream="a")
    assert second.address == two.address


def test_a_daemon_without_room_sends_it_on(farm: list[BrokerPeer], open_run: Any) -> None:
    """REFUSED limit: the next one is asked at once, as the same run, for the first has not taken it."""
    one, two, three = farm
    publisher = open_run(record="all")
    publish(publisher, 1)
    run = one.opened().run
    one.refuse(run, "limit", "1000 streams are open")
    info = two.opened()
    assert (info.run, "continues" in info.meta) == (run, False)
    two.demand(run, record="all")
    two.frame(0)
    two.refuse(run, "limit", "too many bytes")  # by now it has taken the run
    info = continued_at(three, run)
    assert three.frame(0).run == info.run
    three.refuse(publisher.run, "limit", "full as well")
    wait_for(lambda: publisher.error == "full as well", of="the last one's word")
    assert not publisher.wait_until_acked(10)
    assert publisher.address == three.address


@pytest.mark.parametrize("code", ["key", "format"])
def test_any_other_refusal_is_the_answer(farm: list[BrokerPeer], open_run: Any, code: str) -> None:
    """A key or a format that is refused would be refused by all, or should be: it stays, and says so."""
    one, two, _ = farm
    publisher = open_run(record="all")
    one.refuse(one.opened().run, code, "not you")
    publish(publisher, 1)
    wait_for(lambda: publisher.error == "not you", of="the refusal")
    assert not publisher.wait_until_acked(10)
    assert not two._socket.poll(1500), "the next daemon was asked"
    assert publisher.address == one.address


@pytest.mark.faults
def test_what_waits_on_disk_goes_on_too(
    farm: list[BrokerPeer], open_run: Any, monkeypatch: pytest.MonkeyPatch, own_state: Path
) -> None:
    """Frames that the ring had no room for come to the next daemon out of the publisher's own log, which then goes."""
    monkeypatch.setattr("taesd_stream.publisher.RING_BYTES", 3 * 512)
    one, two, _ = farm
    publisher = open_run(record="all")
    run = one.opened().run
    for step in range(20):
        publish(publisher, 1, first=step)
        one.frame(step)
    assert list(own_state.rglob("*.latents"))
    one.ack(run, 4)
    wait_for(lambda: publisher._outbox.kept.count == 15, of="the ack")
    one.close()
    info = continued_at(two, run)
    for seq in range(5, 20):
        frame = two.frame(seq)
        assert (frame.run, np.frombuffer(frame.payload, np.float16)[0]) == (info.run, seq)
        two.ack(info.run, seq)
    assert publisher.wait_until_acked(10)
    wait_for(lambda: not list(own_state.rglob("*.latents")), of="the end of the file")


@pytest.mark.faults
def test_a_picture_that_nobody_keeps_is_shown_again(farm: list[BrokerPeer], open_run: Any) -> None:
    """record="off": the next daemon gets the newest picture at once, though its step was over long ago."""
    one, two, _ = farm
    publisher = open_run(record="off")
    run = taken_by(one, "off")
    publish(publisher, 1)
    one.frame(0)
    one.close()
    info = continued_at(two, run)
    assert info.record == "off"
    assert two.frame(0, kept=False).run == info.run


@pytest.mark.slow
def test_the_word_on_keeping_goes_along(farm: list[BrokerPeer], open_run: Any) -> None:
    """A person pressed Record at the first daemon: the next one keeps too, from the first kept frame on."""
    one, two, _ = farm
    publisher = open_run(record="off")
    run = one.opened().run
    publish(publisher, 2)
    one.frame(1)
    one.demand(run, "every", record="all")
    publish(publisher, 2, first=2)
    one.frame(3, kept=True)
    one.close()
    info = continued_at(two, run)
    assert info.record == "all"
    two.frame(3, kept=True)
    kept = [message.seq for message in one.heard if isinstance(message, LatentFrame) and message.kept]
    assert two.seqs() == kept


@pytest.mark.slow
def test_live_latents_count_on(farm: list[BrokerPeer], open_run: Any) -> None:
    """`live`: the index counts on too, so the next daemon knows that latents before it are missing."""
    one, two, _ = farm
    publisher = open_run(kind="live", fps=16.0, record="all")
    run = one.opened().run
    for step in range(3):
        publisher.publish(np.full((5, 4, 8, 8), step, np.float16), step=step)
    one.frame(2)
    one.ack(run, 1)
    wait_for(lambda: publisher._outbox.kept.count == 1, of="the ack")
    one.close()
    continued_at(two, run)
    assert two.frame(2).index == 10


def test_a_run_ends_at_the_next_daemon(farm: list[BrokerPeer], open_run: Any, beside: ThreadPoolExecutor) -> None:
    """close() right after the daemon died: the next one gets all of it and END within close()'s time."""
    one, two, _ = farm
    publisher = open_run(record="all")
    one.opened()
    publish(publisher, 3)
    one.frame(2)
    one.close()
    closing = beside.submit(publisher.close, 5.0)
    end = two.finish()
    closing.result(20)
    assert (end.run, end.last_seq) == (publisher.run, 2)
    assert two.seqs() == [0, 1, 2]
    assert publisher.error is None


@pytest.mark.slow
def test_where_all_are_gone_its_own_log_has_it(farm: list[BrokerPeer], open_run: Any, own_state: Path) -> None:
    """Nobody is left: the program goes on and ends, and a file has what none acked, as with one daemon."""
    one, two, three = farm
    publisher = open_run(record="all")
    first = taken_by(one)
    publish(publisher, 3)
    one.frame(2)
    one.close()
    second = continued_at(two, first).run
    two.frame(0)
    two.ack(second, 0)
    wait_for(lambda: publisher._outbox.kept.count == 2, of="the ack")
    two.close()
    three.close()
    publish(publisher, 1, first=3)
    publisher.close(1.0)
    (path,) = own_state.rglob("*.latents")
    info, *frames, end = read_messages(path)
    assert isinstance(info, StreamInfo)
    assert isinstance(end, End)
    kept = [frame for frame in frames if isinstance(frame, LatentFrame)]
    assert {info.run, end.run, *(frame.run for frame in kept)} == {first}
    assert [frame.seq for frame in kept] == [1, 2, 3]
    assert str(path) in (publisher.error or "")


@pytest.mark.slow
def test_integrations_take_several_too(farm: list[BrokerPeer], hasty: None) -> None:
    """A trainer's stream, given a list: the link's frame is found under the run of now, at the next daemon too."""
    one, two, _ = farm
    addresses = [peer.address for peer in farm]
    latents = np.ones((4, 8, 8), np.float16)

    def sample(step: int) -> str:
        return publish_sample(latents, step=step, stream="a", latent_format="sd1", address=addresses)

    link = sample(0)
    run = one.opened().run
    assert link.endswith(f"#/s/{run}/0")
    one.frame(0)
    one.ack(run, 0)
    publisher = _films[tuple(addresses), "a", os.getpid()].publisher
    assert publisher.wait_until_acked(10)
    one.close()
    info = continued_at(two, run)
    assert sample(100).endswith(f"#/s/{info.run}/1")
    assert two.frame(1).run == info.run
    del _films[tuple(addresses), "a", os.getpid()]
    publisher.close(0.0)


# --- real daemons ---


def frames_in(folder: Path) -> dict[str, list[int]]:
    """Of each run that a log has, its frames."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.latents")):
        for message in read_messages(path):
            if isinstance(message, LatentFrame):
                found.setdefault(message.run, []).append(message.seq)
    return found


def infos_in(folder: Path) -> list[StreamInfo]:
    """The runs that a log has."""
    every = (message for path in folder.glob("*.latents") for message in read_messages(path))
    return [message for message in every if isinstance(message, StreamInfo)]


@pytest.mark.faults
def test_three_brokers_miss_no_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One of three is killed in a kept run: all frames are in two logs, the second's run continues the first's.

    They share the farm's key, by which the publisher is let in everywhere. The dead one finishes its part when it is
    back, though nobody comes for it.
    """
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr("taesd_stream.pulse.GONE_S", 3.0)  # longer than a handshake takes, where three brokers start
    client = make_client(tmp_path / "keys", "laptop", "samplers")
    with contextlib.ExitStack() as stack:
        brokers: dict[str, BrokerRole] = {}
        for name in "abc":
            (tmp_path / name).mkdir()
            sets = (f"security.keys_folder={tmp_path / 'keys'}", "recording.lost_after_s=1.5")
            one = stack.enter_context(BrokerRole(tmp_path / name, *sets))
            one.keys = load_keys(tmp_path / "keys")
            brokers[one.front] = one
        options: dict[str, Any] = {"latent_format": "sd1", "record": "all", "keys_folder": client}
        publisher = LatentPublisher(",".join(brokers), stream="fox", **options)
        first, former = brokers[publisher.address], publisher.run
        publish(publisher, 100)
        assert publisher.wait_until_acked(30), publisher.error
        publish(publisher, 50, first=100)
        first.kill()
        publish(publisher, 50, first=150)
        assert publisher.wait_until_acked(30), publisher.error
        second = brokers[publisher.address]
        publisher.close()
        assert second is not first
        assert publisher.error is None
        has, rest = frames_in(first.log_folder)[former], frames_in(second.log_folder)[publisher.run]
        assert has == list(range(len(has)))
        assert rest == list(range(rest[0], 200))
        assert 100 <= rest[0] <= len(has)
        assert [info.meta["continues"] for info in infos_in(second.log_folder)] == [former]
        first.start()
        assert first.stats().runs[former]["last_seq"] == len(has) - 1
        wait_for(lambda: first.stats().runs[former]["ended"], of="the end of the part that it has")


@pytest.mark.slow
def test_a_program_that_stood_still_leaves_nobody(tmp_path: Path, hasty: None) -> None:
    """A call that holds the GIL for long while the broker answers late: what is there by then counts, the run stays."""
    with contextlib.ExitStack() as stack:
        brokers: dict[str, BrokerRole] = {}
        for name in "ab":
            (tmp_path / name).mkdir()
            one = stack.enter_context(BrokerRole(tmp_path / name))
            brokers[one.front] = one
        publisher = LatentPublisher([*brokers], stream="fox", latent_format="sd1", record="all")
        run, pulse = publisher.run, publisher._link._pulse
        broker = brokers[publisher.address]
        wait_for(lambda: pulse.is_heard, of="the first answer")
        os.kill(broker.process.pid, signal.SIGSTOP)
        with subprocess.Popen(["sh", "-c", f"sleep 1.2; kill -CONT {broker.process.pid}"]):
            wait_for(lambda: pulse._asked_s, of="a question that is not answered")
            ctypes.PyDLL(None).usleep(3_000_000)
        publish(publisher, 3)
        assert publisher.wait_until_acked(30), publisher.error
        publisher.close()
        assert (publisher.run, brokers[publisher.address]) == (run, broker)


@pytest.mark.slow
def test_a_key_that_is_refused_is_said_and_one_of_another_farm_is_passed_over(tmp_path: Path) -> None:
    """A daemon that knows us not is the answer; one that is encrypted for others is as good as gone, and it is said."""
    client = make_client(tmp_path / "keys", "laptop", "samplers")
    shutil.copytree(tmp_path / "keys", tmp_path / "revoked")
    revoke(tmp_path / "revoked", "laptop")
    make_client(tmp_path / "foreign", "laptop", "samplers")
    with contextlib.ExitStack() as stack:
        at = {}
        for name in ("keys", "revoked", "foreign"):
            (tmp_path / f"at-{name}").mkdir()
            role = BrokerRole(tmp_path / f"at-{name}", f"security.keys_folder={tmp_path / name}")
            at[name] = stack.enter_context(role).front

        def opened(first: str) -> LatentPublisher:
            pair = [at[first], at["keys"]]
            stream = next(name for name in map(str, range(100)) if ranked(pair, name)[0] == at[first])
            options: dict[str, Any] = {"latent_format": "sd1", "record": "all", "keys_folder": client}
            publisher = LatentPublisher(pair, stream=stream, **options)
            publish(publisher, 1)
            return publisher

        revoked, foreign = opened("revoked"), opened("foreign")
        wait_for(lambda: "refuses this key" in (revoked.error or ""), of="the refusal")
        wait_for(lambda: "breaks off every handshake" in (foreign.error or ""), of="the other one's")
        assert foreign.wait_until_acked(20), foreign.error
        assert (foreign.address, revoked.address) == (at["keys"], at["revoked"])
        assert "refuses this key" in (revoked.error or "")
        foreign.close()
        revoked.close(0.0)


@pytest.mark.slow
def test_a_file_is_published_to_whichever_daemon_is_there(daemon: Daemon, tmp_path: Path) -> None:
    """`publish --connect` with several addresses: one that nobody answers at costs seconds, not the file."""
    np.save(tmp_path / "three.npy", np.zeros((3, 4, 8, 8), np.float32))
    words = [
        "publish",
        str(tmp_path / "three.npy"),
        "--latent-format",
        "sd1",
        "--stream",
        "whichever",
        "--record",
        "all",
    ]
    command = [*COMMAND, *words, "--connect", f"tcp://127.0.0.1:9,{daemon.broker}"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(tmp_path), check=False)
    assert done.returncode == 0, done.stderr
    assert daemon.recording(daemon.streams()["whichever"]["run"])["frames"] == 3
    nobody = subprocess.run(
        [*command[:-1], "tcp://127.0.0.1:9,tcp://127.0.0.1:10"],
        capture_output=True,
        text=True,
        env=clean_environment(tmp_path),
        check=False,
    )
    assert nobody.returncode == 69
    assert "127.0.0.1:9:" in nobody.stderr
    assert "127.0.0.1:10:" in nobody.stderr


FRAMES = 60


def shade(step: int) -> int:
    """A grey of its own for each step, 3 codes from the next."""
    return 40 + 3 * step


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_three_daemons_record_a_run_in_two_parts(tmp_path: Path) -> None:
    """One of three whole daemons is killed in a kept run: every frame is in one of two files, right in every picture.

    The second file's run names the first; the dead daemon, started again, finishes its part by itself.
    """
    with contextlib.ExitStack() as stack:
        daemons: dict[str, Daemon] = {}
        for name in "abc":
            (tmp_path / name).mkdir()
            one = stack.enter_context(Daemon(tmp_path / name, "recording.lost_after_s=3"))
            daemons[one.broker] = one
        publisher = LatentPublisher([*daemons], stream="fox", latent_format="sd1", record="all")
        first, former = daemons[publisher.address], publisher.run
        pace = threading.Event()
        for step in range(FRAMES):
            if step == FRAMES // 2:
                kill_all_of(first)
            publisher.publish(sd1_latents_of((shade(step),) * 3), step=step, total_steps=FRAMES)
            pace.wait(0.05)
        assert publisher.wait_until_acked(60), publisher.error
        publisher.close()
        second, address = daemons[publisher.address], first.broker
        assert second is not first
        first.start(f"broker.bind={address}")
        parts = [pictures_of(first, former), pictures_of(second, publisher.run)]
        assert {**parts[0], **parts[1]}.keys() == set(range(FRAMES))
        assert min(parts[0]) == 0
        assert max(parts[1]) == FRAMES - 1
        for part in parts:
            assert list(part.values()) == pytest.approx([shade(seq) for seq in part], abs=1.4)
        assert second.streams()["fox"]["meta"]["continues"] == former


def kill_all_of(daemon: Daemon) -> None:
    """SIGKILL of every process, the supervisor first: nobody is told, nothing is started again."""
    os.kill(daemon.process.pid, signal.SIGSTOP)
    for role in daemon.facts["roles"]:
        os.kill(int(role["pid"]), signal.SIGKILL)
    daemon.stop(signal.SIGKILL)


def pictures_of(daemon: Daemon, run: str) -> dict[int, float]:
    """The grey of each picture in the finished recording of a run, by seq."""
    recording = daemon.recording(run)
    assert recording["gaps"] == []
    greys = [float(np.mean(picture)) for picture in decode_file(daemon.file(recording["id"]))]
    return dict(zip(range(recording["first_seq"], recording["last_seq"] + 1), greys, strict=True))
