"""What machines ask: whether it lives, whether it works, and how much of what there was, errors too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, generate_latest

from taesd_stream_workers.streamer.hub import Hub
from taesd_stream_workers.streamer.web.errors import ApiError


def add_health(app: FastAPI, hub: Hub) -> None:
    """The routes."""

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> dict[str, Any]:
        return {}

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> dict[str, Any]:
        if not hub.is_ready:
            raise ApiError(503, "not_ready", "; ".join(one["text"] for one in hub.alerts()) or "The broker is silent.")
        return {}

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        _count(hub.latency.streams, (row["state"] for row in hub.streams()))
        _count(hub.latency.recordings, (row["state"] for row in hub.recordings))
        _count(hub.latency.alerts, (alert["code"] for alert in hub.alerts()))
        return Response(generate_latest(hub.latency.registry), media_type=CONTENT_TYPE_LATEST)


def _count(gauge: Gauge, labels: Iterable[str]) -> None:
    gauge.clear()
    for label, count in Counter(labels).items():
        gauge.labels(label).set(count)
