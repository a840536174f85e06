"""How long each stage of a picture's way takes: Prometheus histograms, and a short memory for the page."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from taesd_stream.frames import Packet, Stamps

BUCKETS_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
STAMPS: Final = ("sent", "received", "started", "decoded", "encoded", "streamed")
STAGES: Final = ("receive", "wait", "decode", "encode", "stream")


class Latency:
    """Stages of live pictures, sampler to packet, and to the screen where a page tells."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._stages = Histogram(
            "taesd_stream_stage_seconds",
            "Time a picture spends in one stage, sampler to streamer",
            ["stage"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._shown = Histogram(
            "taesd_stream_shown_seconds",
            "From publish() to the picture drawn in a browser",
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._total = Histogram(
            "taesd_stream_packet_seconds",
            "From publish() to the packet at the streamer",
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self.packets = Counter("taesd_stream_packets", "Packets received", ["rendition"], registry=self.registry)
        self.bytes = Counter("taesd_stream_packet_bytes", "Bytes of packets", ["rendition"], registry=self.registry)
        self.dropped = Counter(
            "taesd_stream_dropped", "Pictures not sent to a slow viewer", ["rendition"], registry=self.registry
        )
        self.refused = Counter(
            "taesd_stream_refused_requests", "Requests refused at the door", ["reason"], registry=self.registry
        )
        self.viewers = Gauge("taesd_stream_viewers", "Open pages", registry=self.registry)
        self.broker = Gauge("taesd_stream_broker", "The broker's counters", ["count"], registry=self.registry)
        self._gate = Gauge("taesd_stream_gate", "Clients that the streamer refused", ["count"], registry=self.registry)
        self.streams = Gauge("taesd_stream_streams", "Streams by state", ["state"], registry=self.registry)
        self.recordings = Gauge(
            "taesd_stream_recordings", "Recordings by state; failed: now", ["state"], registry=self.registry
        )
        self.alerts = Gauge("taesd_stream_alerts", "What the page warns of now", ["code"], registry=self.registry)
        self.recording_errors = Counter(
            "taesd_stream_recording_errors", "Times that a file was not written or finished", registry=self.registry
        )
        self.film_errors = Counter(
            "taesd_stream_film_errors", "Frames of films that the disk did not take", registry=self.registry
        )
        self.push_failures = Counter(
            "taesd_stream_push_failures", "Times that a push lost its receiver", ["stream"], registry=self.registry
        )
        self.http_errors = Counter(
            "taesd_stream_http_errors", "HTTP answers that were errors", ["status", "code"], registry=self.registry
        )
        self.desired_workers = Gauge("taesd_stream_desired_workers", "Workers the load needs", registry=self.registry)
        self._recent: deque[float] = deque(maxlen=256)

    def on_packet(self, packet: Packet, streamed_ns: int) -> None:
        """A packet came; streamed_ns is now, on the broker's clock."""
        self.packets.labels(packet.rendition).inc()
        self.bytes.labels(packet.rendition).inc(len(packet.payload))
        stamps = packet.stamps
        if packet.rendition in ("record", "film") or not stamps.received_ns:
            return  # one that waited in the log says nothing of the way
        times_ns = in_order(stamps, streamed_ns)
        for stage, before, after in zip(STAGES, times_ns[:-1], times_ns[1:], strict=True):
            self._stages.labels(stage).observe(max(0, after - before) / 1e9)
        total_s = max(0, streamed_ns - stamps.sent_ns) / 1e9
        self._total.observe(total_s)
        self._recent.append(total_s)

    def take_gate(self, counts: Mapping[str, int]) -> None:
        """The streamer's own counters of refused clients; the broker's come with its STATE."""
        for name, count in counts.items():
            self._gate.labels(name).set(count)

    def on_shown(self, sent_ns: int, shown_ns: int) -> None:
        """A page drew a picture."""
        self._shown.observe(max(0, shown_ns - sent_ns) / 1e9)

    @property
    def recent_ms(self) -> float | None:
        """Median of the last pictures, sampler to packet, in ms."""
        if not self._recent:
            return None
        return round(sorted(self._recent)[len(self._recent) // 2] * 1000, 1)


def in_order(stamps: Stamps, streamed_ns: int) -> list[int]:
    """The times of STAMPS, each on its host's guess of the broker's clock: none before the one before. 0: not known."""
    way_ns = (stamps.sent_ns, stamps.received_ns, stamps.started_ns, stamps.decoded_ns, stamps.encoded_ns, streamed_ns)
    times_ns, latest_ns = [], 0
    for time_ns in way_ns:
        latest_ns = max(latest_ns, time_ns)
        times_ns.append(latest_ns if time_ns else 0)
    return times_ns
