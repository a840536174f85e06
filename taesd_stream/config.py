"""Every setting of the daemon: one frozen model a section, its defaults, limits and meaning in one place.

Order: defaults < file (TOML) < environment (TAESD_STREAM_SECTION__KEY) < `--set section.key=value`. Loading is pure.
configs/default.toml shows every key; a test holds it equal to this.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from taesd_stream.errors import ConfigError
from taesd_stream.frames import RecordMode
from taesd_stream.media.file_names import DEFAULT_NAME, check_template

AUTO = "auto"
DECODER_BYTES: Final = 1 << 30
LEAST_DECODER_BYTES: Final = 64 << 20
ENV_PREFIX: Final = "TAESD_STREAM_"
DecoderChoice = Literal["auto", "tiny", "nano", "linear"]
FilmMode = Literal["watched", "off"]
BatchMode = Literal["grid", "each"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BrokerConfig(_Section):
    """Where samplers connect, and what is kept for them."""

    bind: str = "tcp://127.0.0.1:5760"
    """Where samplers connect. Port 0 takes a free one. Past loopback, security.keys_folder guards it."""
    workers_bind: str = Field(default=AUTO, min_length=1)
    """Where decode workers and the streamer connect; "auto" is a socket file of this daemon's own."""
    idle_interval_s: float = Field(default=2.0, ge=0.01, le=60)
    """While nobody watches a stream, one frame this often is kept ready for a late viewer."""
    max_fps: float = Field(default=30.0, gt=0, le=240)
    """Most frames a second that a watched stream is asked for."""
    max_streams: int = Field(default=1000, ge=1, le=65536)
    """Most runs open at once; more are refused."""
    max_client_streams: int = Field(default=256, ge=1, le=65536)
    """Most runs that one client has open at once. A client is a key or, without keys, a host."""
    max_memory_bytes: int = Field(default=4 << 30, ge=64 << 20)
    """Most bytes of latents in memory: newest frames, one a stream, and what `live` ones need; more are refused."""
    max_client_memory_bytes: int = Field(default=1 << 30, ge=1 << 20)
    """The same, of one client."""
    max_picture_px: int = Field(default=1 << 27, ge=1 << 16)
    """Most pixels of one picture, of a batch all of its; latents of larger ones are refused: each takes 26 bytes."""
    max_messages_s: int = Field(default=40_000, ge=10)
    """Most messages a second that are taken of all samplers; whose comes too many is told, and rests for 10 s."""
    max_client_messages_s: int = Field(default=10_000, ge=10)
    """The same, of one key or, without keys, one connection. HELLO counts as one for each of its runs, too."""
    log_folder: str = Field(default=AUTO, min_length=1)
    """Folder of the latent log; "auto" is .latents in the recording folder."""
    log_max_bytes: int = Field(default=0, ge=0)
    """Most bytes of latents that wait to be recorded; 0 is half of what the disk has free at start."""
    log_max_age_s: float = Field(default=0.0, ge=0)
    """Latents of an ended run that were not recorded for so long are deleted; 0 keeps them until they are."""


class DecoderConfig(_Section):
    """How latents become pictures."""

    device: str = "auto"
    """Devices, a decode worker each: "auto", "cpu", "cuda:0,cuda:1"…; auto leaves busy GPUs to their samplers."""
    choice: DecoderChoice = "auto"
    """Decoder of live views: "tiny", "nano" or "linear"; "auto": the best that gives a picture within max_job_s."""
    max_batch_size: int = Field(default=16, ge=1, le=256)
    """Most frames in one batch. Higher: more throughput, more memory, longer waits."""
    max_job_s: float = Field(default=0.25, gt=0, le=10)
    """Longest job in seconds: what another stream's newer frame may have to wait. Clips are decoded in such slices."""
    latency_budget_s: float = Field(default=4.0, ge=0)
    """A live picture that would take longer is shown by a cheaper decoder; 0: never. Choice "auto" alone."""
    float8: bool = False
    """Live views on a Hopper GPU compute their largest layers in float8: a fifth faster, not quite as exact."""
    memory_bytes: int = Field(default=0, ge=0)
    """Most bytes of activations at once, from 64 MiB. 0: 1 GiB, on a GPU an eighth of what it has free, 1 to 4 GiB."""
    min_free_bytes: int = Field(default=4 << 30, ge=0)
    """A GPU with less free memory at start is left alone by device "auto"."""
    threads: int = Field(default=0, ge=0, le=256)
    """Threads of the CPU decoder; 0 lets torch choose."""
    job_deadline_s: float = Field(default=20.0, gt=0, le=600)
    """A worker that reports no progress for so long has lost its job."""

    @field_validator("memory_bytes")
    @classmethod
    def _is_enough(cls, value: int) -> int:
        if 0 < value < LEAST_DECODER_BYTES:
            raise ValueError(f"expected 0 or at least {LEAST_DECODER_BYTES}")
        return value

    def budget_bytes(self, free_gpu_bytes: int) -> int:
        """`memory_bytes`, resolved (`decoding.slicing.decode_budget`); free_gpu_bytes: 0 of a processor."""
        # 16 pictures of 512x512 take 2 GiB
        return self.memory_bytes or min(max(free_gpu_bytes // 8, DECODER_BYTES), 4 * DECODER_BYTES)


class StreamerConfig(_Section):
    """From the decode workers to viewers and files."""

    packets_bind: str = Field(default=AUTO, min_length=1)
    """Where decode workers push their packets; "auto" is a socket file of this daemon's own."""
    live_max_px: int = Field(default=1280, ge=64, le=8192)
    """Long side of a live picture; larger frames are scaled down. Recordings keep their size."""
    thumb_max_px: int = Field(default=256, ge=32, le=1024)
    """Long side of a tile's picture on the page."""


class WebConfig(_Section):
    """The page and the HTTP interface."""

    bind: str = "127.0.0.1:8765"
    """Address of the page, host:port. Port 0 takes a free one. One that others can reach asks for a token."""
    hosts: Annotated[list[str], NoDecode] = []
    """Other names by which people reach the page, as a proxy's; with any, the page asks for a token."""
    token_file: str = Field(default=AUTO, min_length=1)
    """File of the token, made where there is none; "auto" is taesd-stream/web-token in the user's state folder."""
    max_viewers: int = Field(default=200, ge=1, le=100_000)
    """Most pages and players at once; more are told to come later."""

    @field_validator("hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Of `--set` and the environment: a,b or ["a", "b"]."""
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return [name.strip() for name in value.split(",") if name.strip()]


class RecordingConfig(_Section):
    """What is kept, and where."""

    folder: str = Field(default=AUTO, min_length=1)
    """Folder of recordings; "auto" is taesd-stream in the user's Videos folder."""
    name: str = DEFAULT_NAME
    """Name of a recording's file in the folder, of {stream}, {run}, {started} and Python's formats; / makes folders."""
    default: RecordMode = "off"
    """What is kept of a stream that does not say: "off", "last" (its final frame) or "all"."""
    batch: BatchMode = "grid"
    """A batch of pictures: "grid", all in one picture of one file; "each", a file of its own for each of up to 64."""
    film: FilmMode = "watched"
    """Steps of a run that nobody records: "watched" remembers those that somebody saw, "off" none."""
    film_max_bytes: int = Field(default=4 << 30, ge=1 << 20)
    """Most bytes of films; over it the oldest go."""
    film_max_age_s: float = Field(default=7 * 86400.0, gt=0)
    """A film that has not grown for so long goes."""
    max_age_s: float = Field(default=0.0, ge=0)
    """A finished recording goes when it is so old; 0 keeps all."""
    max_bytes: int = Field(default=0, ge=0)
    """Most bytes of finished recordings; over it the oldest go. 0 keeps all."""
    lost_after_s: float = Field(default=60.0, gt=0)
    """The file of a sampler that vanished is finished after so long."""
    window_bytes: int = Field(default=64 << 20, ge=1 << 20)
    """Most bytes of latents between the log and the files, of all recordings together."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        return check_template(value)


class SecurityConfig(_Section):
    """Who may connect samplers, decode workers and streamers from other hosts."""

    keys_folder: str = ""
    """Folder of `taesd-stream keys new`: with it every tcp socket is encrypted, and asks each client for its key."""
    insecure: bool = False
    """Bind and dial other addresses than loopback without keys: whoever reaches them may watch, publish, decode."""


class WeightsConfig(_Section):
    """Weights of the tiny decoders."""

    folder: str = ""
    """Folder of weights (ComfyUI's models/vae_approx works) and of `taesd-stream fit`'s formats; then caches."""


class Rule(_Section):
    """What holds for the streams whose names fit. A key that is left out stays as it is.

    Of several rules that fit, the later one's word holds. `record` here beats the sampler's own word; a person who
    presses Record, or says it by HTTP or `taesd-stream record`, beats both.
    """

    stream: str = Field(min_length=1)
    """A stream's name, or a pattern: * is any text, also with a slash, ? one letter, [ab] one of these."""
    record: RecordMode | None = None
    """What is kept of them: "off", "last" or "all"."""
    batch: BatchMode | None = None
    """As recording.batch, for them."""
    film: FilmMode | None = None
    """As recording.film, for them."""
    decoder: DecoderChoice | None = None
    """As decoder.choice, for them."""


class PushTo(_Section):
    """A stream that goes to a media server, for as long as the daemon runs: RTSP or RTMP, H.264 as it is."""

    stream: str = Field(min_length=1)
    """The stream's name; it need not be there yet."""
    url: str = Field(min_length=1)
    """Where it goes: rtsp://host/name, rtmp://host/app/name or rtmps://…"""


class PeerDaemon(_Section):
    """Another daemon, whose streams and recordings this one's page shows beside its own."""

    url: str = Field(min_length=1)
    """Where its page is: http://host:port. Its own peers' streams do not come with it."""
    token_file: str = ""
    """File of that page's token, where it asks for one; only its owner may read it."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        parts = urlsplit(value)
        try:
            is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_one = False
        if not is_one or "@" in parts.netloc or parts.path.strip("/") or parts.query or parts.fragment:
            raise ValueError("expected http://host:port, without a path, a name or a token")
        return f"{parts.scheme}://{parts.netloc}"


class Config(BaseSettings):
    """The whole configuration, resolved."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid")

    broker: BrokerConfig = BrokerConfig()
    decoder: DecoderConfig = DecoderConfig()
    streamer: StreamerConfig = StreamerConfig()
    web: WebConfig = WebConfig()
    recording: RecordingConfig = RecordingConfig()
    weights: WeightsConfig = WeightsConfig()
    security: SecurityConfig = SecurityConfig()
    rules: tuple[Rule, ...] = ()
    pushes: tuple[PushTo, ...] = ()
    peers: tuple[PeerDaemon, ...] = ()

    def rule_of(self, stream: str) -> Rule:
        """What all rules together say of a stream; a key that none sets is None. `~N` behind a name counts for none."""
        name = stream.partition("~")[0]
        said: dict[str, Any] = {"stream": stream}
        for rule in self.rules:
            if fnmatch.fnmatchcase(name, rule.stream):
                said |= rule.model_dump(exclude={"stream"}, exclude_none=True)
        return Rule(**said)

    @property
    def recording_folder(self) -> Path:
        """`recording.folder`, resolved."""
        if self.recording.folder != AUTO:
            return Path(self.recording.folder).expanduser()
        return platformdirs.user_videos_path() / "taesd-stream"

    @property
    def log_folder(self) -> Path:
        """`broker.log_folder`, resolved."""
        if self.broker.log_folder != AUTO:
            return Path(self.broker.log_folder).expanduser()
        return self.recording_folder / ".latents"

    @property
    def weights_folder(self) -> Path | None:
        """`weights.folder`, None when none was given."""
        return Path(self.weights.folder).expanduser() if self.weights.folder else None

    @property
    def keys_folder(self) -> Path | None:
        """`security.keys_folder`, None when none was given."""
        return Path(self.security.keys_folder).expanduser() if self.security.keys_folder else None

    def with_values(self, **sections: Mapping[str, Any]) -> Config:
        """A copy with some keys replaced: with_values(broker={"bind": …})."""
        changed = {name: getattr(self, name).model_copy(update=dict(values)) for name, values in sections.items()}
        return self.model_copy(update=changed)

    def to_json(self) -> str:
        """One line that a role takes as the `values` of load_config."""
        return json.dumps(self.model_dump())


SECTIONS: Mapping[str, type[BaseModel]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, _Section)
}


# Of these there may be many.
TABLES: Mapping[str, type[BaseModel]] = {"rules": Rule, "pushes": PushTo, "peers": PeerDaemon}


def load_config(file: Path | None = None, sets: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Config:
    """Read a TOML file (None: none), the environment and `--set` words.

    values: a configuration that another process has resolved, from all of these; it stands alone.
    Raises: ConfigError naming the key, what came, what is allowed, and the nearest known key.
    """
    from_file = _read_toml(file) if file and values is None else {}
    from_sets = _parse_sets(sets) if values is None else dict(values)
    if values is None:
        _refuse_unknown_variables()

    class Loaded(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 pydantic-settings passes all four by name
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            if values is not None:
                return (init_settings,)
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=from_file)

    try:
        loaded = Loaded(**from_sets)  # texts, that pydantic turns into sections
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None
    except SettingsError as error:
        raise ConfigError(_explain_environment(error)) from error
    return Config.model_construct(**{name: getattr(loaded, name) for name in Config.model_fields})


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except ValueError as error:  # no TOML, or no UTF-8
        raise ConfigError(f"{file}: {error}") from error


def _parse_sets(sets: Sequence[str]) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for word in sets:
        path, equals, value = word.partition("=")
        section, dot, key = path.strip().partition(".")
        if not equals or not section or not dot or not key:
            raise ConfigError(f"--set {word}: expected section.key=value, as in --set web.bind=127.0.0.1:9000")
        nested.setdefault(section, {})[key] = value.strip()
    return nested


def _refuse_unknown_variables() -> None:
    """A variable that looks like a key of ours and is none was meant to do something: pydantic would pass it over.

    Raises: ConfigError naming it and the nearest known one.
    """
    known = [f"{ENV_PREFIX}{section}__{key}".upper() for section, key in _keys()]
    prefixes = tuple(f"{ENV_PREFIX}{section}_".upper() for section in SECTIONS)
    for name in os.environ:
        upper = name.upper()
        is_key = upper.startswith(prefixes) or (upper.startswith(ENV_PREFIX) and "__" in upper)
        if is_key and upper not in known:
            nearest = difflib.get_close_matches(upper, known, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; expected {ENV_PREFIX}SECTION__KEY"
            raise ConfigError(f"{name}: there is no such key{hint}")


def _keys() -> list[tuple[str, str]]:
    return [(name, key) for name, section in SECTIONS.items() for key in section.model_fields]


def _explain_environment(error: SettingsError) -> str:
    """Pydantic names a field alone: here are the variable and what it holds."""
    fields = {f"{ENV_PREFIX}{name}".upper(): name for name in (*SECTIONS, *TABLES)}
    for variable, value in os.environ.items():
        name = fields.get(variable.upper(), "")
        if f'"{name}"' in str(error):
            way = f"JSON, or {ENV_PREFIX}{name.upper()}__KEY=value" if name in SECTIONS else "JSON, a list of objects"
            return f"{variable}: expected {way}, got {value!r}"
    return f"environment: {error}: expected {ENV_PREFIX}SECTION__KEY=value, or JSON"


def _explain(item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    key = ".".join(path)
    if item["type"] == "model_type":
        head = f"[[{path[0]}]]" if path[0] in TABLES else f"[{key}]"
        return f"{key}: expected a section of keys, as {head} in a file, got {item['input']!r}"
    if item["type"] != "extra_forbidden":
        return f"{key}: {item['msg']}, got {item['input']!r}"
    if path[0] in TABLES:
        known = [".".join([*path[:-1], name]) for name in TABLES[path[0]].model_fields]
    else:
        known = [*(".".join(pair) for pair in _keys()), *Config.model_fields]
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else f"; sections: {', '.join(Config.model_fields)}"
    return f"{key}: there is no such key{hint}"
