"""The wire: golden messages byte for byte, broken ones named for their fault, garbage never more than a WireError."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import re

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taesd_stream import message_fields, wire
from taesd_stream.decoding.choice import open_engine
from taesd_stream.errors import WireError
from taesd_stream.frames import DTYPE_BYTES, LatentFrame, Stamps, WireDtype
from taesd_stream.latent_formats import LATENT_FORMATS
from taesd_stream.messages import Degraded, JobItem, RunHello
from taesd_stream_workers.worker.job_pictures import Rows, pictures_of
from tests import wire_document
from tests.golden_messages import BROKEN, FOLDER, FRAME, GOLDEN, changed, every, load_parts, parts_of, path_of

INNER_TABLES = (JobItem, Degraded, RunHello, Stamps)  # maps inside messages: they never travel alone


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_messages_are_packed_byte_for_byte(name: str) -> None:
    """Packing gives exactly the bytes of the golden file: an old peer still understands us."""
    assert parts_of(GOLDEN[name][0]) == load_parts(path_of("golden", name))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes_are_unpacked_to_the_message(name: str) -> None:
    """The golden file's bytes give exactly the message: we still understand an old peer."""
    message, allowed = GOLDEN[name]
    assert wire.unpack(load_parts(path_of("golden", name)), allowed) == message


def test_every_message_class_has_a_golden_one() -> None:
    """No class of the protocol is without golden bytes."""
    assert {type(message) for message, _ in GOLDEN.values()} == set(message_fields.FIELDS) - set(INNER_TABLES)


def test_every_class_may_come_some_way() -> None:
    """Each message is in a table of who may say what, and each table holds only messages."""
    ways = (
        wire.FROM_PUBLISHER,
        wire.TO_PUBLISHER,
        wire.FROM_INSIDE,
        wire.TO_WORKER,
        wire.TO_STREAMER,
        wire.FROM_WORKER_TO_STREAMER,
    )
    assert {cls for way in ways for cls in way} == set(message_fields.FIELDS) - set(INNER_TABLES)


@pytest.mark.parametrize("cls", message_fields.FIELDS, ids=message_fields.type_name)
def test_fields_are_those_of_the_class(cls: type) -> None:
    """Each field of a message but its payload has exactly one checker."""
    fields = {field.name for field in dataclasses.fields(cls)}
    assert set(message_fields.FIELDS[cls]) == fields - {"payload", "payloads"}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_messages_are_wire_errors_that_name_the_fault(name: str) -> None:
    """Each kind of broken message is refused with a text that says what is wrong with it."""
    broken = BROKEN[name]
    parts = load_parts(path_of("broken", name))
    assert parts == broken.parts
    with pytest.raises(WireError, match=re.escape(broken.says)):
        wire.unpack(parts, broken.allowed)


@pytest.mark.parametrize("name", BROKEN)
def test_errors_are_short(name: str) -> None:
    """What a peer sent is quoted only in part: an error is a log line, however large the message."""
    with pytest.raises(WireError) as caught:
        wire.unpack(BROKEN[name].parts, BROKEN[name].allowed)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["golden", "broken"])
def test_there_are_no_stray_message_files(kind: str) -> None:
    """Each file under data/ belongs to a row of the table."""
    assert {path.stem for path in (FOLDER / kind).glob("*.bin")} == set(every(kind))


@pytest.mark.parametrize("name", GOLDEN)
def test_unknown_keys_are_ignored(name: str) -> None:
    """A newer peer may say more: keys that we do not know change nothing."""
    message, allowed = GOLDEN[name]
    parts = changed(name, colour="blue", payload=b"x", payloads=[1], extra={"deep": [1, 2]})
    assert wire.unpack(parts, allowed) == message


@pytest.mark.parametrize("name", GOLDEN)
def test_fields_with_a_default_may_be_absent(name: str) -> None:
    """An older peer may say less: a field with a default takes it, any other absence is named."""
    message, allowed = GOLDEN[name]
    for field in dataclasses.fields(message):
        if field.name.startswith("payload"):
            continue
        parts = changed(name, without=field.name)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            with pytest.raises(WireError, match=f"{field.name} is missing"):
                wire.unpack(parts, allowed)
        else:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            assert getattr(wire.unpack(parts, allowed), field.name) == default


@pytest.mark.parametrize("name", ["frame", "packet", "job"])
def test_payloads_are_not_copied(name: str) -> None:
    """Payloads go in and come out as the same objects, whatever kind of buffer they are."""
    message, allowed = GOLDEN[name]
    head, *payloads = parts_of(message)
    views = [memoryview(payload) for payload in payloads]
    again = wire.unpack([head, *views], allowed)
    held = again.payloads if name == "job" else (again.payload,)
    assert all(one is view for one, view in zip(held, views, strict=True))
    assert all(one is view for one, view in zip(wire.pack(again)[1:], views, strict=True))


def test_the_largest_frame_passes_whole() -> None:
    """A frame of exactly MAX_FRAME_BYTES is taken, and its message is within MAXMSGSIZE."""
    shape = (4, 4096, 2048)
    parts = [changed("frame", shape=list(shape))[0], bytes(wire.MAX_FRAME_BYTES)]
    frame = wire.unpack(parts, wire.FROM_PUBLISHER)
    assert frame.nbytes == wire.MAX_FRAME_BYTES
    assert max(len(part) for part in parts) <= wire.MAX_MESSAGE_BYTES


def test_what_a_publisher_says_of_itself_fits_json() -> None:
    """Meta that the wire takes can be told to a browser: strict JSON, no NaN."""
    message = wire.unpack(load_parts(path_of("golden", "open")), wire.FROM_PUBLISHER)
    assert json.loads(json.dumps(message.meta, allow_nan=False)) == message.meta


@pytest.mark.parametrize("seed", range(200))
def test_garbage_is_always_a_wire_error(seed: int) -> None:
    """Damaging any good message gives a message or a WireError, never another exception."""
    rng = random.Random(seed)  # noqa: S311 which bytes are hit is no secret
    for message, allowed in GOLDEN.values():
        parts = [bytearray(part) for part in parts_of(message)]
        for _ in range(rng.randint(1, 8)):
            part = rng.choice(parts)
            part[rng.randrange(len(part))] = rng.randrange(256)
            if rng.random() < 0.2 and len(part) > 1:
                part.pop()
        if rng.random() < 0.1:
            parts.append(bytearray(rng.randbytes(4)))
        with contextlib.suppress(WireError):
            wire.unpack([bytes(part) for part in parts], allowed)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(data=st.data())
@settings(max_examples=300)
def test_any_value_in_any_field_is_taken_or_named(data: st.DataObject) -> None:
    """Whatever msgpack can hold in one field gives a message or a WireError; what is taken can be packed again."""
    name = data.draw(st.sampled_from(sorted(GOLDEN)))
    message, allowed = GOLDEN[name]
    fields = list(message_fields.FIELDS[type(message)]) or ["v"]
    parts = changed(name, {data.draw(st.sampled_from(fields)): data.draw(JUNK)})
    with contextlib.suppress(WireError):
        again = wire.unpack(parts, allowed)
        assert wire.unpack(wire.pack(again), allowed) == again


@st.composite
def frames(draw: st.DrawFn) -> LatentFrame:
    """Any frame that a publisher may send, up to a few KiB."""
    dtype: WireDtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=3, max_size=5)))
    size = DTYPE_BYTES[dtype]
    for axis in shape:
        size *= axis
    return LatentFrame(
        run=draw(st.from_regex(r"[0-9a-f]{16}", fullmatch=True)),
        seq=draw(st.integers(0, (1 << 32) - 2)),
        index=draw(st.integers(0, (1 << 32) - 2)),
        step=draw(st.integers(0, 1 << 31)),
        total_steps=draw(st.none() | st.integers(1, 1 << 31)),
        sigma=draw(st.none() | st.floats(-1e30, 1e30)),
        dtype=dtype,
        shape=shape,
        kept=draw(st.booleans()),
        sent_ns=draw(st.integers(-(1 << 61), 1 << 61)),
        payload=draw(st.binary(min_size=size, max_size=size)),
    )


@given(frame=frames())
@settings(max_examples=200)
def test_any_frame_comes_back_as_it_was(frame: LatentFrame) -> None:
    """unpack(pack(frame)) is the frame, for every frame that can be."""
    assert wire.unpack(parts_of(frame), wire.FROM_PUBLISHER) == frame


def test_times_of_two_hosts_add_up_within_the_limits() -> None:
    """A publisher's time plus its offset to the broker still fits a JOB, whatever a publisher claims."""
    most = (1 << 61) - 1
    assert wire.unpack(changed("frame", sent_ns=most), wire.FROM_PUBLISHER).sent_ns == most
    hello = wire.unpack(changed("hello_publisher", offset_ns=most), wire.FROM_PUBLISHER)
    job = GOLDEN["job"][0]
    items = tuple(dataclasses.replace(item, sent_ns=most + hello.offset_ns) for item in job.items)
    parts = parts_of(dataclasses.replace(job, items=items))
    assert wire.unpack(parts, wire.TO_WORKER).items[0].sent_ns == 2 * most


def test_the_furthest_latents_of_a_live_run_can_be_told_of_everywhere() -> None:
    """The last index that a frame may have, of the slowest video: memories, times and packets pass."""
    with pytest.raises(WireError, match="FRAME index"):
        wire.unpack(changed("frame", index=(1 << 32) - 1), wire.FROM_PUBLISHER)
    last = wire.unpack(changed("frame", index=(1 << 32) - 2), wire.FROM_PUBLISHER)
    known, engine = LATENT_FORMATS["wan2_1"], open_engine("wan2_1", weights_folder=None, choice="linear")
    (item,) = GOLDEN["job"][0].items[:1]
    item = dataclasses.replace(item, kind="live", index=last.index, fps=0.001)
    latents = torch.zeros(2, known.channels, 4, 4)
    (shown,) = pictures_of(engine, [(0, item, Rows(latents, 0, 2))], 1 << 30)
    packet = dataclasses.replace(GOLDEN["packet"][0], pts=shown.pictures[-1].pts)
    assert wire.unpack(parts_of(packet), wire.FROM_WORKER_TO_STREAMER).pts > 1 << 60
    memories = {item.run: last.index + len(latents)}
    hello = dataclasses.replace(GOLDEN["hello_worker"][0], memories=memories)
    assert wire.unpack(parts_of(hello), wire.FROM_INSIDE).memories == memories


def test_an_own_frame_is_checked_before_it_is_sent() -> None:
    """check() says of our own values what a peer would say of them, so that a publisher complains at home."""
    message_fields.check(LatentFrame, shape=[4, 3, 4], step=0, total_steps=None, sigma=1.0)
    with pytest.raises(WireError, match="FRAME step"):
        message_fields.check(LatentFrame, step=-1)


def test_the_document_tells_every_field_and_limit() -> None:
    """docs/wire.md has the tables that are made from the checks themselves."""
    assert (
        f"{wire_document.BEGIN}\n\n{wire_document.tables()}\n{wire_document.END}"
        in wire_document.DOCUMENT.read_text(encoding="utf-8")
    )


def test_the_document_leaves_nothing_out() -> None:
    """Each class and each limit of the wire has its place in the tables."""
    told = {cls for classes in wire_document.CHAPTERS.values() for cls in classes}
    assert told == set(message_fields.FIELDS)
    limits = {name for name in (*vars(wire), *vars(message_fields)) if name.startswith("MAX_")}
    assert set(wire_document.LIMITS) == limits | {"VERSION"}


def test_golden_bytes_speak_for_themselves() -> None:
    """Golden bytes that a stranger decodes with plain msgpack say what they are."""
    head, payload = load_parts(path_of("golden", "frame"))
    header = msgpack.unpackb(head)
    assert (header["v"], header["type"], header["shape"]) == (1, "FRAME", [4, 3, 4])
    assert payload == FRAME.payload
