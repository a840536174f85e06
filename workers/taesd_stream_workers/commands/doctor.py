"""What works on this machine, and the way out of what does not: each check a line. Nothing is started or changed."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final, Literal

from taesd_stream import __version__
from taesd_stream.config import Config
from taesd_stream.errors import ConfigError, TaesdStreamError
from taesd_stream.latent_formats import LATENT_FORMATS

Verdict = Literal["ok", "note", "fault"]
LOW_BYTES: Final = 5 << 30
FULL_BYTES: Final = 16 << 20
# What the daemon cannot do without, what makes live pictures cheaper, and what export can write.
NEEDED: Final = ("libx264", "mjpeg")
HARDWARE: Final = ("h264_nvenc", "h264_qsv", "h264_amf")
EXPORT: Final = ("libx265", "libsvtav1", "libvpx-vp9", "ffv1", "libwebp_anim", "gif")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. fault: `taesd-stream up` would not start, or not work. note: it works, but there is better."""

    what: str
    verdict: Verdict
    text: str
    way_out: str = ""


def examine(config: Config) -> Iterator[Finding]:
    """Every check, in the order in which a person would ask."""
    yield _versions()
    yield _device(config)
    yield from _encoders()
    yield _decoders(config)
    yield from _addresses(config)
    yield from _keys(config)
    yield from _folders(config)


def _versions() -> Finding:
    import av
    import torch

    text = f"{__version__}; Python {platform.python_version()}, torch {torch.__version__}, PyAV {av.__version__}"
    return Finding("taesd-stream", "ok", f"{text}; {platform.system()} {platform.machine()}")


def _device(config: Config) -> Finding:
    from taesd_stream_workers.worker.devices import choose_device

    try:
        for wanted in config.decoder.device.split(","):  # of several each must be there
            device, reason = choose_device(wanted.strip(), config.decoder.min_free_bytes)
    except ConfigError as error:
        return Finding("device", "fault", str(error), "leave decoder.device at auto")
    if device.type == "cpu" and config.decoder.device == "auto":
        way_out = "a GPU needs a torch that is built for it: https://pytorch.org/get-started/locally/"
        if "under decoder.min_free_bytes" in reason:
            way_out = "lower decoder.min_free_bytes, or leave the GPU to the sampler: the CPU does"
        return Finding("device", "note", f"cpu ({os.cpu_count()} cores): {reason}", way_out)
    return Finding("device", "ok", f"{device}: {reason}")


def _encoders() -> Iterator[Finding]:
    missing = [name for name in NEEDED if not _opens(name)]
    if missing:
        way_out = "install PyAV's own wheel: pip install --force-reinstall --only-binary av av"
        yield Finding("encoders", "fault", f"PyAV has no {', '.join(missing)}", way_out)
    else:
        hardware = [name for name in HARDWARE if _opens(name)]
        also = f"; in hardware: {', '.join(hardware)}" if hardware else "; none in hardware, which is fine"
        yield Finding("encoders", "ok", ", ".join(NEEDED) + also)
    absent = [name for name in EXPORT if not _opens(name)]
    if absent:
        yield Finding("export", "note", f"cannot write {', '.join(absent)}", "another build of PyAV may have them")
    else:
        yield Finding("export", "ok", ", ".join(EXPORT))


def _opens(name: str) -> bool:
    """Whether an encoder opens: of hardware ones every build has the name, and few machines the chip."""
    import av
    from av.video.codeccontext import VideoCodecContext

    from taesd_stream.media.encoder import TIME_BASE

    formats = {"gif": "pal8", "ffv1": "bgr0", "libwebp_anim": "bgra", "mjpeg": "yuvj420p"}
    os.environ.setdefault("SVT_LOG", "0")
    av.logging.set_level(None)
    try:
        context = av.CodecContext.create(name, "w")
        assert isinstance(context, VideoCodecContext)
        context.width, context.height, context.pix_fmt = 256, 256, formats.get(name, "yuv420p")
        context.time_base, context.framerate = TIME_BASE, Fraction(30)
        context.options = {"x265-params": "log-level=none"} if name == "libx265" else {}
        context.open()
    except (av.FFmpegError, ValueError, OSError):  # NVENC without a driver: PermissionError
        return False
    return True


def _decoders(config: Config) -> Finding:
    from taesd_stream.models.checkpoints import find_weights
    from taesd_stream.models.hub_weights import all_decoders
    from taesd_stream.models.nano import has_nano_decoder

    folder = config.weights_folder
    if folder is not None and not folder.is_dir():
        return Finding("decoders", "fault", f"weights.folder = {folder}: there is no such folder", "name another")
    known = [decoder for decoder, _ in all_decoders()]
    found = [decoder for decoder in known if find_weights(decoder, folder)]
    way_out = "taesd-stream weights list says which; taesd-stream weights fetch FORMAT gets one"
    if not found:
        own = ", ".join(name for name, known in LATENT_FORMATS.items() if has_nano_decoder(known))
        text = (
            f"no weights of tiny decoders: pictures are made by our nano decoders ({own}), and for other formats by "
            "linear projection, soft but of the right colours"
        )
        return Finding("decoders", "note", text, way_out)
    text = f"{len(found)} of {len(known)} tiny decoders: {', '.join(found)}"
    return Finding("decoders", "ok" if len(found) == len(known) else "note", text, way_out)


def _addresses(config: Config) -> Iterator[Finding]:
    from taesd_stream_workers.role.addresses import check_inner_addresses, require_guarded, web_address
    from taesd_stream_workers.role.web_token import is_token_needed, load_token, token_file
    from taesd_stream_workers.start_checks import check_free

    is_running = _answers(config)
    for key, address in (("broker.bind", config.broker.bind), ("web.bind", config.web.bind)):
        try:
            if key == "broker.bind":
                require_guarded(config, key, address)
                check_inner_addresses(config)
            else:
                web_address(config)
            check_free(key, address)
        except ConfigError as error:
            if is_running:
                yield Finding(key, "note", f"{address}: a daemon runs there already", "use it, or stop it first")
            else:
                yield Finding(key, "fault", str(error))
            continue
        yield Finding(key, "ok", f"{address} is free")
    if is_token_needed(config):
        try:
            if token_file(config).exists():  # else the start makes one
                load_token(config)
        except ConfigError as error:
            yield Finding("token", "fault", str(error))
            return
        yield Finding("token", "ok", f"others can reach the page: it asks for the token in {token_file(config)}")


def _keys(config: Config) -> Iterator[Finding]:
    from taesd_stream_workers.role.key_files import clients_in
    from taesd_stream_workers.start_checks import ROLES, check_keys

    folder = config.keys_folder
    if folder is None:
        return
    try:
        check_keys(folder, ROLES)
        names = [client.name for client in clients_in(folder)]
    except ConfigError as error:
        yield Finding("keys", "fault", str(error))
        return
    yield Finding("keys", "ok", f"{folder}: {', '.join(names) or 'nobody yet'} may connect")


def _answers(config: Config) -> bool:
    from taesd_stream_workers.daemon_client import DaemonClient

    try:
        DaemonClient(config.web.bind).require_alive()
    except (ConfigError, TaesdStreamError):
        return False
    return True


def _folders(config: Config) -> Iterator[Finding]:
    for key, folder in (("recording.folder", config.recording_folder), ("broker.log_folder", config.log_folder)):
        there = _nearest(folder)
        try:
            with tempfile.TemporaryFile(dir=there) as file:  # permissions do not tell of all that may be in the way
                file.write(b"0")
        except OSError as error:
            text = f"{folder}: {there} cannot be written: {error.strerror}"
            yield Finding(key, "fault", text, f"--set {key}=… names another one")
            continue
        free_bytes = shutil.disk_usage(there).free
        text = f"{folder}: {free_bytes / (1 << 30):.1f} GiB free"
        if free_bytes < FULL_BYTES:
            yield Finding(key, "fault", text, f"free some space, or --set {key}=… names another disk")
        elif free_bytes < LOW_BYTES:
            yield Finding(key, "note", text, "recording.max_bytes or recording.max_age_s removes old ones by itself")
        else:
            yield Finding(key, "ok", text)


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that there is."""
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
