"""What the HTTP interface answers, as /openapi.json describes it. Answers are not rebuilt by these: tests compare."""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from taesd_stream.frames import Kind, RecordMode, RunState

ID_PATTERN: Final = r"^[0-9a-f]{16}$"
Responses: TypeAlias = dict[int | str, dict[str, Any]]  # `responses` of a route


def says(model: type[BaseModel]) -> Responses:
    """A route that answers with JSON of this model."""
    return {200: {"model": model}}


def content(media_type: str) -> Responses:
    """A route that answers with a file of this type."""
    return {200: {"content": {media_type: {}}}}


def endless(media_type: str) -> Responses:
    """A route whose answer of this type goes on for ever."""
    return {200: {"content": {media_type.partition(";")[0]: {}}, "description": "Without end"}}


class _Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class StreamRow(_Answer):
    """A stream, as its newest run is."""

    name: str
    run: str = Field(pattern=ID_PATTERN)
    """One opening of the stream."""
    state: RunState
    flags: list[str]
    """Of stalled, degraded, stopping."""
    kind: Kind
    latent_format: str
    decoder: str | None
    decoder_reason: str | None
    width: int | None
    """Of the decoded picture, px."""
    height: int | None
    step: int | None
    """From 0."""
    total_steps: int | None
    sigma: float | None
    seq: int | None
    """Counts the publishes of the run from 0."""
    fps: float | None
    """Frames a second that come."""
    latency_ms: float | None
    """From publish() to the packet, of the last picture."""
    viewers: int
    record: RecordMode
    behind: int
    """Kept frames that its recording has not written yet; of a kept `live` run the picture is as far behind."""
    stoppable: bool
    meta: dict[str, Any]
    """What the publisher says of the run: prompt, seed…"""
    started: float
    """Unix time, s."""
    ended: float | None
    end_text: str | None
    note: str | None
    """What is wrong with its pictures: why it is degraded."""
    faults: int
    files: list[str]
    """Ids of its recordings."""
    film: int | None
    """Last seq in the film of what was shown; None: there is no film."""
    daemon: str | None = None
    """The page of the daemon that has it, if that is another than this one."""


class RecordingRow(_Answer):
    """A recording, growing or finished."""

    id: str
    name: str
    stream: str | None
    run: str | None
    state: Literal["recording", "finishing", "finished", "failed"]
    frames: int
    first_seq: int | None
    last_seq: int
    gaps: list[int]
    """seqs that were to be kept and will never come; what was only watched before that has others, untold."""
    part: int | None
    """Of a batch that is recorded in files of their own: which picture of it, from 1; None: all, or it grows still."""
    parts: int
    """How many such files there are, or will be when the run has ended; 1: one for all."""
    bytes: int
    started: float
    """Unix time, s."""
    duration_s: float | None
    width: int | None
    height: int | None
    meta: dict[str, Any]
    error: str | None
    """Why it does not grow, or cannot be finished, at the moment."""
    latents: int | None
    """Bytes of GET /api/v1/runs/{run}/latents, while there is such an error; None: there is none, or no log here."""
    daemon: str | None = None
    """The page of the daemon that has it, if that is another than this one."""


class Streams(_Answer):
    """Every stream."""

    streams: list[StreamRow]


class Recordings(_Answer):
    """Every recording, growing ones first, then the newest."""

    recordings: list[RecordingRow]


class Run(_Answer):
    """One run: how it stands, where it is still known, and its recordings."""

    run: str = Field(pattern=ID_PATTERN)
    name: str | None
    """Of its stream."""
    stream: StreamRow | None
    """None when another run has taken the name since, or the daemon has forgotten it."""
    recordings: list[RecordingRow]


class Workers(_Answer):
    """The decode workers, and how many the load needs."""

    desired_workers: int
    workers: list[dict[str, Any]]


class Done(_Answer):
    """Nothing more to say."""
