"""The protocol as bytes: every message whole, and every way to break one. Both directions read this one table.

The files under data/ are the truth for other languages. `python -m tests.golden_messages` writes them anew, for a
change of the protocol that is meant. A file holds a message's parts, each behind its length (big-endian uint32).
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgpack

from taesd_stream import messages, wire
from taesd_stream.frames import LatentFrame, Packet, Stamps, StreamInfo

FOLDER: Final = Path(__file__).parent / "data"
RUN: Final = "00112233445566ff"
OTHER_RUN: Final = "ffeeddccbbaa9988"
LATENTS: Final = bytes(range(96))  # (4, 3, 4) float16

FRAME: Final = LatentFrame(
    run=RUN,
    seq=7,
    index=7,
    step=6,
    total_steps=20,
    sigma=3.5,
    dtype="float16",
    shape=(4, 3, 4),
    kept=True,
    sent_ns=1_234_567_890_123,
    payload=LATENTS,
)
OPEN: Final = StreamInfo(
    stream="studio/KSampler.3",
    run=RUN,
    kind="clip",
    latent_format="wan21",
    fps=16.0,
    record="all",
    meta={"prompt": "a lighthouse, σ", "seed": 42, "guidance": 3.5, "tiled": False, "loras": ["one", "two"]},
    opened_ns=1_234_000_000_000,
)
JOB_ITEM: Final = messages.JobItem(
    stream="studio/KSampler.3",
    run=RUN,
    seq=7,
    index=7,
    kind="steps",
    shape=(4, 3, 4),
    dtype="float16",
    renditions=("live", "record"),
    attempt=2,
    keyframe=True,
    pts=90_000,
    fps=16.0,
    step=6,
    total_steps=20,
    sigma=None,
    sent_ns=1,
    received_ns=2,
    placed_ns=3,
)
PACKET: Final = Packet(
    stream="studio/KSampler.3",
    run=RUN,
    seq=7,
    index=0,
    count=1,
    rendition="live",
    attempt=0,
    is_keyframe=True,
    pts=90_000,
    width=1024,
    height=768,
    decoder="taef2",
    step=6,
    total_steps=None,
    sigma=0.0,
    stamps=Stamps(sent_ns=1, received_ns=2, started_ns=3, decoded_ns=4, encoded_ns=5),
    placed_ns=6,
    payload=b"\x00\x00\x00\x01\x67",
)

Table = Sequence[type]

# name -> (message, the classes that may come the same way)
GOLDEN: Final[dict[str, tuple[Any, Table]]] = {
    "open": (OPEN, wire.FROM_PUBLISHER),
    "open_small": (
        StreamInfo(stream="a", run=RUN, kind="steps", latent_format="sd1", opened_ns=0),
        wire.FROM_PUBLISHER,
    ),
    "frame": (FRAME, wire.FROM_PUBLISHER),
    "end": (messages.End(run=RUN, last_seq=19, reason="failed", text="ValueError('σ')"), wire.FROM_PUBLISHER),
    "hello_publisher": (
        messages.PublisherHello(
            runs={
                RUN: messages.RunHello(next_seq=8, kept_from=3, stoppable=True),
                OTHER_RUN: messages.RunHello(next_seq=0),
            },
            echo_ns=1_234_567_890_123,
            offset_ns=-55,
        ),
        wire.FROM_PUBLISHER,
    ),
    "demand": (
        messages.DemandUpdate(run=RUN, level="watched", max_fps=30.0, record="last"),
        wire.TO_PUBLISHER,
    ),
    "ack": (messages.Ack(run=RUN, seq=-1, ended=True), wire.TO_PUBLISHER),
    "stop_run": (messages.StopRun(run=RUN), wire.TO_PUBLISHER),
    "refused": (
        messages.Refused(stream="a", run=RUN, code="taken", text="another run of that name lives", use="a~2"),
        wire.TO_PUBLISHER,
    ),
    "echo": (messages.Echo(echo_ns=5, now_ns=9_000_000_000), wire.TO_PUBLISHER),
    "refused_worker": (messages.RefusedPeer(code="key", text="this key was revoked"), wire.TO_WORKER),
    "hello_worker": (
        messages.WorkerHello(
            device="cuda:0 NVIDIA H100",
            credits=2,
            engines={"sd1": {"decoder": "taesd", "reason": "weights found", "history": 0}},
            memories={RUN: 17},
            encoders=(RUN,),
            echo_ns=1,
            offset_ns=2,
        ),
        wire.FROM_INSIDE,
    ),
    "progress": (messages.Progress(job=3), wire.FROM_INSIDE),
    "done": (messages.Done(job=3, ms=12.25), wire.FROM_INSIDE),
    "done_degraded": (
        messages.Done(
            job=3,
            ms=12.25,
            degraded=(messages.Degraded(run=RUN, code="approximate", text="Colours approximate."),),
        ),
        wire.FROM_INSIDE,
    ),
    "failed": (
        messages.Failed(job=3, items=[0, 2], code="bad_frame", text="NaN in the latents", retry=False),
        wire.FROM_INSIDE,
    ),
    "hello_streamer": (
        messages.StreamerHello(
            endpoint="ipc:///run/taesd-stream/packets",
            cursors=(messages.Cursor(run=RUN, attempt=2, written=7, synced=5),),
            echo_ns=1,
        ),
        wire.FROM_INSIDE,
    ),
    "watch": (messages.Watch(stream="a", rendition="thumb", viewers=3), wire.FROM_INSIDE),
    "keyframe": (messages.Keyframe(stream="a", rendition="live"), wire.FROM_INSIDE),
    "record": (messages.Record(stream="a", mode="all"), wire.FROM_INSIDE),
    "stop_stream": (messages.StopStream(stream="a"), wire.FROM_INSIDE),
    "cursor": (messages.Cursor(run=RUN, attempt=2, written=7, synced=-1, finished=True), wire.FROM_INSIDE),
    "stats": (messages.Stats(), wire.FROM_INSIDE),
    "job": (
        messages.Job(
            job=3,
            latent_format="sd1",
            items=(JOB_ITEM, JOB_ITEM),
            packets_to="tcp://127.0.0.1:5761",
            payloads=(LATENTS, LATENTS[::-1]),
        ),
        wire.TO_WORKER,
    ),
    "job_with_history": (
        messages.Job(
            job=4,
            latent_format="wan2_1",
            items=(
                dataclasses.replace(JOB_ITEM, kind="live", history=2),
                dataclasses.replace(JOB_ITEM, kind="live", seq=8, index=8, expects_memory=True),
            ),
            packets_to="tcp://127.0.0.1:5761",
            payloads=(LATENTS, LATENTS * 2, LATENTS[::-1]),
        ),
        wire.TO_WORKER,
    ),
    "forget": (messages.Forget(run=RUN), wire.TO_WORKER),
    "drain": (messages.Drain(), wire.TO_WORKER),
    "state": (
        messages.State(
            streams=[{"name": "a", "run": RUN, "state": "live", "flags": [], "seq": 7}],
            runs={RUN: {"ended": False, "last_seq": 7, "kept_from": 0}},
            workers=[{"id": "one", "device": "cpu"}],
            stats={"counts": {"bad_messages": 2}},
            desired_workers=1,
            now_ns=99,
        ),
        wire.TO_STREAMER,
    ),
    "gap": (messages.Gap(run=RUN, seq=7, attempt=2, code="poison"), wire.TO_STREAMER),
    "packet": (PACKET, wire.FROM_WORKER_TO_STREAMER),
}


@dataclass(frozen=True, slots=True)
class Broken:
    """A message that no peer may take. says: part of the WireError's text, which names the fault."""

    parts: list[bytes]
    allowed: Table
    says: str


def changed(
    name: str, changes: Mapping[str, object] | None = None, /, without: str = "", **more: object
) -> list[bytes]:
    """The golden message's parts with some header keys replaced, or one taken out."""
    head, *payloads = parts_of(GOLDEN[name][0])
    header = {
        key: value for key, value in (msgpack.unpackb(head) | dict(changes or {}) | more).items() if key != without
    }
    return [msgpack.packb(header), *payloads]


def parts_of(message: Any) -> list[bytes]:
    """What a socket would send."""
    return [bytes(part) for part in wire.pack(message)]


def deep(levels: int) -> list[Any]:
    """A list in a list in a list…"""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def _broken() -> dict[str, Broken]:
    front, inside, worker = wire.FROM_PUBLISHER, wire.FROM_INSIDE, wire.TO_WORKER
    head, payload = parts_of(FRAME)
    nested_head = b"\x82\xa1v\x01\xa4type" + b"\x91" * 5000 + b"\xc0"
    faults: dict[str, tuple[list[bytes], Table, str]] = {
        "no_parts": ([], front, "at least 1 part"),
        "empty_header": ([b""], front, "header is no msgpack"),
        "no_msgpack": ([b"\xc1garbage"], front, "header is no msgpack"),
        "torn_header": ([head[:-3], payload], front, "header is no msgpack"),
        "header_with_a_tail": ([head + b"\xc0", payload], front, "header is no msgpack"),
        "header_nested_too_deep": ([nested_head], front, "header is no msgpack"),
        "header_key_unhashable": ([b"\x81\x91\x01\x02"], front, "header is no msgpack"),
        "header_text_no_utf8": ([b"\x81\xa1v\xa1\xff"], front, "header is no msgpack"),
        "header_is_a_list": ([msgpack.packb([1, "FRAME"])], front, "header: expected a map, got list"),
        "header_too_long": (
            [head + bytes(wire.MAX_HEADER_BYTES), payload],
            front,
            "over the limit",
        ),
        "version_missing": (changed("frame", without="v"), front, "version: expected 1, got None"),
        "version_newer": (changed("frame", v=2), front, "version: expected 1, got 2"),
        "version_true": (changed("frame", v=True), front, "version: expected 1, got True"),
        "type_missing": (changed("frame", without="type"), front, "type: expected one of OPEN, FRAME"),
        "type_unknown": (changed("frame", type="FRAMES"), front, "got 'FRAMES'"),
        "type_no_text": (changed("frame", type=[1]), front, "type: expected one of"),
        "type_of_another_way": (parts_of(GOLDEN["job"][0]), front, "got 'JOB'"),
        "role_unknown": (changed("hello_worker", role="king"), inside, "got 'HELLO'"),
        "role_missing": (changed("hello_worker", without="role"), inside, "got 'HELLO'"),
        "frame_without_payload": ([head], front, "FRAME: expected 2 parts, got 1"),
        "frame_with_two_payloads": ([head, payload, b"more"], front, "FRAME: expected 2 parts, got 3"),
        "end_with_payload": ([*parts_of(GOLDEN["end"][0]), b"x"], front, "END: expected 1 parts, got 2"),
        "payload_empty": ([head, b""], front, "FRAME payload: expected 96 bytes for (4, 3, 4) float16, got 0"),
        "payload_short": ([head, payload[:-1]], front, "got 95"),
        "payload_long": ([head, payload + b"\0"], front, "got 97"),
        "run_missing": (changed("frame", without="run"), front, "FRAME: run is missing"),
        "run_short": (changed("frame", run=RUN[:-1]), front, "FRAME run: expected a run of 16 hex digits"),
        "run_upper_case": (changed("frame", run=RUN.upper()), front, "16 hex digits"),
        "run_with_newline": (changed("frame", run=RUN + "\n"), front, "16 hex digits"),
        "run_bytes": (changed("frame", run=RUN.encode()), front, "16 hex digits"),
        "seq_negative": (changed("frame", seq=-1), front, "FRAME seq: expected an integer from 0"),
        "seq_huge": (changed("frame", seq=1 << 63), front, "FRAME seq"),
        "seq_float": (changed("frame", seq=7.0), front, "FRAME seq"),
        "seq_true": (changed("frame", seq=True), front, "FRAME seq"),
        "seq_null": (changed("frame", seq=None), front, "FRAME seq"),
        "step_negative": (changed("frame", step=-1), front, "FRAME step"),
        "total_steps_zero": (changed("frame", total_steps=0), front, "FRAME total_steps"),
        "sigma_nan": (changed("frame", sigma=float("nan")), front, "FRAME sigma: expected a number"),
        "sigma_infinite": (changed("frame", sigma=float("inf")), front, "FRAME sigma"),
        "sigma_text": (changed("frame", sigma="1.0"), front, "FRAME sigma"),
        "dtype_unknown": (changed("frame", dtype="float64"), front, "FRAME dtype: expected one of float32"),
        "dtype_list": (changed("frame", dtype=["float16"]), front, "FRAME dtype"),
        "shape_null": (changed("frame", shape=None), front, "FRAME shape"),
        "shape_empty": (changed("frame", shape=[]), front, "list of 3 to 5 items"),
        "shape_two_axes": (
            changed("frame", shape=[12, 4]),
            front,
            "FRAME shape: expected a list of 3 to 5 items, each an integer from 1 to 2^20, got 2 items",
        ),
        "shape_six_axes": (changed("frame", shape=[1, 1, 1, 4, 3, 4]), front, "got 6 items"),
        "shape_negative": (changed("frame", shape=[-4, -3, 4]), front, "FRAME shape: expected an integer from 1"),
        "shape_zero": (changed("frame", shape=[4, 0, 4]), front, "FRAME shape"),
        "shape_wrong": (changed("frame", shape=[4, 3, 5]), front, "expected 120 bytes"),
        "shape_float": (changed("frame", shape=[4.0, 3, 4]), front, "FRAME shape"),
        "frame_over_64_mib": (
            changed("frame", shape=[4, 4096, 2049]),
            front,
            "FRAME: expected at most 67108864 bytes",
        ),
        "shape_overflows": (changed("frame", shape=[1 << 20] * 5), front, "FRAME: expected at most 67108864 bytes"),
        "kept_a_number": (changed("frame", kept=1), front, "FRAME kept: expected true or false"),
        "sent_ns_huge": (changed("frame", sent_ns=(1 << 63) - 1), front, "FRAME sent_ns"),
        "stream_with_dots": (changed("open", stream="../etc"), front, "OPEN stream: expected a stream name"),
        "stream_empty": (changed("open", stream=""), front, "OPEN stream"),
        "stream_five_parts": (changed("open", stream="a/b/c/d/e"), front, "OPEN stream"),
        "stream_long_part": (changed("open", stream="a" * 65), front, "OPEN stream"),
        "stream_with_newline": (changed("open", stream="a\n"), front, "OPEN stream"),
        "kind_unknown": (changed("open", kind="film"), front, "OPEN kind: expected one of steps, clip, live"),
        "format_long": (changed("open", latent_format="x" * 65), front, "OPEN latent_format"),
        "fps_zero": (changed("open", fps=0), front, "OPEN fps"),
        "record_unknown": (changed("open", record="some"), front, "OPEN record: expected one of off, last, all"),
        "meta_a_list": (changed("open", meta=[]), front, "OPEN meta: expected a map"),
        "meta_key_a_number": (changed("open", meta={1: 2}), front, "OPEN meta"),
        "meta_over_16_kib": (changed("open", meta={"prompt": "x" * 17000}), front, "OPEN meta"),
        "meta_many_keys": (changed("open", meta={str(i): i for i in range(65)}), front, "OPEN meta"),
        # what JSON has no form for would break the page of every viewer
        "meta_bytes": (changed("open", meta={"a": b"\xff"}), front, "OPEN meta: expected what JSON can hold"),
        "meta_nan": (changed("open", meta={"a": [float("nan")]}), front, "OPEN meta: expected what JSON can hold"),
        "meta_timestamp": (
            changed("open", meta={"a": msgpack.Timestamp(1)}),
            front,
            "OPEN meta: expected what JSON can hold",
        ),
        "meta_inner_key_a_number": (changed("open", meta={"a": {1: 2}}), front, "OPEN meta"),
        "meta_nested_too_deep": (changed("open", meta={"a": deep(9)}), front, "OPEN meta: expected what JSON can hold"),
        "end_reason_unknown": (changed("end", reason="bored"), front, "END reason"),
        "end_last_seq_minus_2": (changed("end", last_seq=-2), front, "END last_seq"),
        "end_text_long": (changed("end", text="x" * 4001), front, "END text"),
        "hello_runs_a_list": (changed("hello_publisher", runs=[RUN]), front, "HELLO runs: expected a map"),
        "hello_run_no_id": (changed("hello_publisher", runs={"x": {"next_seq": 0}}), front, "HELLO runs"),
        "hello_run_no_map": (changed("hello_publisher", runs={RUN: 3}), front, "HELLO runs"),
        "hello_run_empty": (changed("hello_publisher", runs={RUN: {}}), front, "next_seq is missing"),
        "demand_level_unknown": (changed("demand", level="much"), wire.TO_PUBLISHER, "DEMAND level"),
        "demand_negative_fps": (changed("demand", max_fps=-1), wire.TO_PUBLISHER, "DEMAND max_fps"),
        "ack_minus_2": (changed("ack", seq=-2), wire.TO_PUBLISHER, "ACK seq"),
        "refused_use_no_name": (changed("refused", use="a b"), wire.TO_PUBLISHER, "REFUSED use"),
        "credits_many": (changed("hello_worker", credits=65), inside, "HELLO credits"),
        "watch_rendition_unknown": (changed("watch", rendition="huge"), inside, "WATCH rendition"),
        "failed_items_a_map": (changed("failed", items={}), inside, "FAILED items"),
        "cursor_written_minus_2": (changed("cursor", written=-2), inside, "CURSOR written"),
        "job_payload_missing": (parts_of(GOLDEN["job"][0])[:-1], worker, "JOB: 2 items need 2 payloads, got 1"),
        "job_payload_short": (
            [*parts_of(GOLDEN["job"][0])[:-1], LATENTS[:-1]],
            worker,
            "JOB payload: expected 96 bytes for (4, 3, 4) float16, got 95",
        ),
        "job_history_missing": (
            [*parts_of(GOLDEN["job_with_history"][0])[:2], LATENTS],
            worker,
            "JOB: 2 items need 3 payloads, got 2",
        ),
        "job_history_short": (
            [*parts_of(GOLDEN["job_with_history"][0])[:2], LATENTS, LATENTS],
            worker,
            "JOB payload: expected 192 bytes for (2, 4, 3, 4) float16, got 96",
        ),
        "job_item_no_map": (changed("job", items=[1, 2]), worker, "JOB items"),
        "packet_width_zero": (changed("packet", width=0), wire.FROM_WORKER_TO_STREAMER, "PACKET width"),
        "packet_without_payload": (
            parts_of(PACKET)[:1],
            wire.FROM_WORKER_TO_STREAMER,
            "PACKET: expected 2 parts, got 1",
        ),
        "packet_stamps_a_list": (changed("packet", stamps=[]), wire.FROM_WORKER_TO_STREAMER, "PACKET stamps"),
    }
    return {name: Broken(parts, allowed, says) for name, (parts, allowed, says) in faults.items()}


BROKEN: Final = _broken()


def save_parts(path: Path, parts: Sequence[bytes]) -> None:
    """Write one message file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(struct.pack(">I", len(part)) + part for part in parts))


def load_parts(path: Path) -> list[bytes]:
    """Read one message file."""
    data = path.read_bytes()
    parts: list[bytes] = []
    while data:
        (length,) = struct.unpack_from(">I", data)
        parts.append(data[4 : 4 + length])
        data = data[4 + length :]
    return parts


def path_of(kind: str, name: str) -> Path:
    """Where a golden or a broken message lies."""
    return FOLDER / kind / f"{name}.bin"


def every(kind: str) -> dict[str, list[bytes]]:
    """The parts of all messages of a kind: golden or broken."""
    if kind == "golden":
        return {name: parts_of(message) for name, (message, _) in GOLDEN.items()}
    return {name: broken.parts for name, broken in BROKEN.items()}


def main() -> None:
    """Write every file anew."""
    for kind in ("golden", "broken"):
        for old in (FOLDER / kind).glob("*.bin"):
            old.unlink()
        for name, parts in every(kind).items():
            save_parts(path_of(kind, name), parts)


if __name__ == "__main__":
    main()
