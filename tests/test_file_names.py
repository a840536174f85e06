"""Names of recordings' files: by a template, and inside the folder whatever a stream is called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from taesd_stream import LatentPublisher
from taesd_stream.config import load_config
from taesd_stream.errors import ConfigError
from taesd_stream.frames import is_stream_name, name_of_one
from taesd_stream.media.file_names import DEFAULT_NAME, check_template, file_name
from tests.daemon import Daemon
from tests.pictures import decode_file, sd1_latents_of

RUN = "0123456789abcdef"
STARTED = 1_700_000_000.0
PARTS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
STREAMS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
TEMPLATES = (
    DEFAULT_NAME,
    "{stream}",
    "{run}",
    "../{stream}",
    "/{stream}/..",
    "{stream}/../../{run}",
    ".{stream}",
    "{run:.0}",
)


def test_the_default_name() -> None:
    """By default a file lies in a folder of its stream and is named by its start, in local time, and its run."""
    name = file_name(DEFAULT_NAME, stream="clip/main", run=RUN, started=STARTED)
    folder, _, last = name.rpartition("/")
    assert folder == "clip/main"
    assert last.startswith("2023111")
    assert last.endswith("-012345")


@given(STREAMS, st.integers(0, 63))
@example("a/b/c/" + "d" * 64, 63)
def test_each_video_of_a_batch_has_a_stream(batch: str, place: int) -> None:
    """Whatever the batch is called, its videos have names that a daemon takes, each its own."""
    name = name_of_one(batch, place)
    assert is_stream_name(name)
    assert name != name_of_one(batch, place + 1)


@given(STREAMS, st.sampled_from(TEMPLATES))
def test_names_stay_inside(stream: str, template: str) -> None:
    """Whatever the stream and the template, a name is a plain path below the folder that every system can have."""
    assert is_stream_name(stream)
    name = file_name(template, stream=stream, run=RUN, started=STARTED)
    folder = Path("/recordings")
    assert Path(os.path.normpath(folder / name)) == folder / name
    assert (folder / name).is_relative_to(folder)
    parts = name.split("/")
    for part in parts:
        assert part
        assert not part.startswith(".")
        assert part[-1] not in ". "
        assert len(part.encode()) <= 130
    assert not any(part.lower().endswith((".mp4", ".part")) for part in parts[:-1])


@pytest.mark.parametrize("text", ["a\\..\\b", "a\0b", "a:b", "ü/é", "a\nb", "  ", "con", "NUL.txt", "a" * 500, "*?<>|"])
def test_strange_letters_become_plain_ones(text: str) -> None:
    """A template's own text cannot name what a system takes for something else."""
    name = file_name(text.replace("{", "{{"), stream="a", run=RUN, started=STARTED)
    assert name
    assert all(letter.isascii() and letter.isprintable() and letter not in '\\:*?"<>|' for letter in name)
    assert name.partition("/")[0].partition(".")[0].lower() not in ("con", "nul")


@pytest.mark.parametrize(
    "template",
    ["{streem}", "{stream.__class__}", "{stream[0]}", "{0}", "{stream", "{started:%Q}{run:x}", "{run!q}", "a/" * 9],
)
def test_a_template_that_is_none(template: str) -> None:
    """A template with another field, or one that cannot be filled, is refused at the start, by its key."""
    with pytest.raises(ConfigError, match=r"recording\.name"):
        load_config(sets=[f"recording.name={template}"])


def test_templates_that_are_some() -> None:
    """Fields may have Python's formats, and may be left out."""
    for template in ("{stream}", "{started:%Y/%m/%d}/{stream}-{run}", "{run:.4}", "all"):
        assert check_template(template) == template


@pytest.mark.slow
def test_a_daemon_names_its_files_so(tmp_path: Path) -> None:
    """Recordings lie where the template says, are listed, downloaded and deleted there, and leave no empty folder."""
    with Daemon(tmp_path, "recording.name=kept/{stream}/{run:.8}") as daemon:
        with LatentPublisher(daemon.broker, stream="a.mp4/b", latent_format="sd1", record="all") as publisher:
            publisher.publish(sd1_latents_of((200, 60, 60)), step=0)
            assert publisher.wait_until_acked(20)
        recording = daemon.recording(publisher.run)
        assert recording["id"] == f"kept/a.mp4_/b/{publisher.run[:8]}"
        assert (daemon.recordings_folder / f"{recording['id']}.mp4").is_file()
        assert len(decode_file(daemon.file(recording["id"]))) == 1
        daemon.json(f"/api/v1/recordings/{recording['id']}", method="DELETE")
        assert daemon.recordings_folder.is_dir()
        assert not (daemon.recordings_folder / "kept").exists()
