"""The best decoder that keeps up with a live view: measured, chosen, said; and a rule's word for one stream."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from taesd_stream import LatentPublisher
from taesd_stream.config import load_config
from taesd_stream.decoding.choice import NoDecoderError
from taesd_stream.decoding.keeping_up import best_that_keeps_up, probe_of
from taesd_stream.decoding.stream_memories import StreamMemory
from taesd_stream.decoding.video_engine import VideoEngine
from taesd_stream.models import build_decoder
from taesd_stream_workers.worker.engines import Engines
from tests.daemon import Daemon, wait_for
from tests.page_socket import PageSocket

EVERYTHING_S, NOTHING_S = "decoder.max_job_s=10", "decoder.max_job_s=0.000001"  # what keeps up
SHAPE = (32, 8, 8)
some_s = st.floats(0, 100)
decoders = st.lists(st.tuples(some_s, some_s), min_size=1, max_size=4)  # what a picture takes, and may take


@given(decoders)
def test_the_best_that_keeps_up_is_taken(found: list[tuple[float, float]]) -> None:
    """What is chosen keeps up and nothing better does; where none does, nothing is faster."""
    place = best_that_keeps_up([took for took, _ in found], [most for _, most in found])
    if found[place][0] <= found[place][1]:
        assert all(took > most for took, most in found[:place])
    else:
        assert all(took > most for took, most in found)
        assert found[place][0] == min(took for took, _ in found)


@given(decoders, st.floats(1, 100))
def test_more_time_never_means_a_worse_decoder(found: list[tuple[float, float]], times: float) -> None:
    """With higher bars the choice is the same or better, once anything keeps up at all."""
    took, most = [one for one, _ in found], [one for _, one in found]
    if any(one <= bar for one, bar in found):
        assert best_that_keeps_up(took, [bar * times for bar in most]) <= best_that_keeps_up(took, most)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with FLUX.2's full decoder, weights of our own."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    save_file(build_decoder("taef2").state_dict(), folder / "taef2_decoder.safetensors")
    return folder


def engines(weights: Path | None, *sets: str, clock_s: Callable[[], float] = time.monotonic) -> Engines:
    """A worker's, on the processor."""
    folder = [f"weights.folder={weights}"] if weights is not None else []
    return Engines(load_config(sets=[*folder, *sets]), torch.device("cpu"), clock_s)


def test_a_large_picture_is_not_measured_whole() -> None:
    """Its time is a smaller one's, by area."""
    assert probe_of((32, 512, 640)) == ((32, 32, 32), 16 * 20)
    assert probe_of((32, 4, 64)) == ((32, 4, 32), 2)
    assert probe_of(SHAPE) == (SHAPE, 1)


def test_sizes_that_one_picture_stands_for_are_measured_once(weights: Path) -> None:
    """A stream whose size changes holds up its neighbours for one measurement; after 10 s it is measured again."""
    now_s = [0.0]
    one = engines(weights, "decoder.max_job_s=0.000001", clock_s=lambda: now_s[0])
    figures = []
    for height in (64, 128, 64):
        one.of_view("flux2", "auto", (32, height, 64))
        said = re.search(r"taef2 (\S+) of", one.told()["flux2"]["reason"])
        assert said is not None
        figures.append(float(said[1]))
        now_s[0] += 6
    assert figures[1] == pytest.approx(2 * figures[0], rel=0.1)
    assert len(one._probed) == 3  # a decoder each
    assert {round(probe.until_s) for probe in one._probed.values()} == {22}


def test_the_choice_is_by_what_is_measured(weights: Path) -> None:
    """Where all keep up a live view takes the full decoder, where none does the fastest; recordings always the full."""
    fast, slow = engines(weights, EVERYTHING_S), engines(weights, NOTHING_S)
    assert fast.of_view("flux2", "auto", SHAPE).decoder == "taef2"
    assert slow.of_view("flux2", "auto", (32, 64, 64)).decoder in ("nano", "linear")
    assert slow.of_recordings("flux2").decoder == "taef2"
    assert re.search(r"taef2 \S+ of 2.5 s that", fast.told()["flux2"]["reason"])
    said = slow.told()["flux2"]["reason"]
    assert re.search(r"taef2 \S+ of 2.5e-07 s, nano \S+ of 1e-06 s, linear \S+ of 1e-06 s that", said)


def test_each_size_has_its_own_choice(weights: Path) -> None:
    """A choice stands for its size: another size is measured anew, the first is not."""
    one = engines(weights, EVERYTHING_S)
    first = one.of_view("flux2", "auto", SHAPE)
    reason = one.told()["flux2"]["reason"]
    one.of_view("flux2", "auto", (32, 40, 40))
    assert one.told()["flux2"]["reason"] != reason
    assert one.of_view("flux2", "auto", SHAPE) is first
    assert one.told()["flux2"]["reason"] == reason


@pytest.mark.slow
def test_a_choice_that_is_not_the_best_is_measured_again(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The machine may have been busy: after 10 s, 20 more, 40 more. The best one is measured no more."""
    now_s = [0.0]
    one = engines(weights, NOTHING_S, clock_s=lambda: now_s[0])
    best = engines(weights, EVERYTHING_S, clock_s=lambda: now_s[0])
    caplog.set_level(logging.INFO)
    for at_s, measured in ((0, 1), (9.9, 1), (10, 2), (29.9, 2), (30, 3), (69.9, 3), (70, 4)):
        now_s[0] = at_s
        one.of_view("flux2", "auto", (32, 64, 64))
        assert sum(record.message.startswith("view_chosen") for record in caplog.records) == measured
    caplog.clear()
    for at_s in (100, 10_000):
        now_s[0] = at_s
        best.of_view("flux2", "auto", SHAPE)
    assert sum(record.message.startswith("view_chosen") for record in caplog.records) == 1


def test_weights_that_come_later_are_taken(tmp_path: Path, weights: Path) -> None:
    """Engines are opened anew within 10 s where weights came or changed; where they went, what is open stays."""
    now_s, name = [0.0], "taef2_decoder.safetensors"
    one = engines(tmp_path, EVERYTHING_S, clock_s=lambda: now_s[0])
    assert {one.of_view("flux2", "auto", SHAPE).decoder, one.of_recordings("flux2").decoder} == {"nano"}
    shutil.copy(weights / name, tmp_path / name)
    now_s[0] = 9.9
    assert one.of_recordings("flux2").decoder == "nano"
    now_s[0] = 10
    view, kept = one.of_view("flux2", "auto", SHAPE), one.of_recordings("flux2")
    assert (view.decoder, kept.decoder, one.told()["flux2"]["decoder"]) == ("taef2", "taef2", "taef2")
    assert all(key[0] in (view, kept) or key[0].decoder != "nano" for key in one._probed)
    (tmp_path / name).write_bytes(b"cut")
    now_s[0] = 20
    assert one.of_recordings("flux2").decoder == "nano"
    shutil.copy(weights / name, tmp_path / name)
    now_s[0] = 30
    again = one.of_recordings("flux2")
    assert again.decoder == "taef2"
    (tmp_path / name).unlink()
    now_s[0] = 40
    assert one.of_recordings("flux2") is again


def test_a_weights_folder_that_went_is_no_decoder(tmp_path: Path) -> None:
    """So that what is kept waits in the log; once it is back there is one."""
    folder = tmp_path / "gone"
    folder.mkdir()
    one = engines(folder)
    folder.rmdir()
    with pytest.raises(NoDecoderError, match=r"No decoder for sd1: weights.folder: .*gone is not a folder"):
        one.of_recordings("sd1")
    folder.mkdir()
    assert one.of_recordings("sd1").decoder == "linear"


def test_an_engine_with_several_names_sheds_once(tmp_path: Path) -> None:
    """Half of the live streams give their memory where it is short, however many choices mean the one decoder."""
    torch.save(build_decoder("taew2_1").state_dict(), tmp_path / "taew2_1.pth")
    one = engines(tmp_path)
    opened = {one.open("wan2_1", choice, is_fast=False) for choice in ("auto", "tiny")}
    (engine,) = opened
    assert isinstance(engine, VideoEngine)
    for run in "abcdefgh":
        engine.memories.put(run, StreamMemory((torch.zeros(2),), 1, 0, (1, 1)))
    one.shed_memories()
    assert set(engine.memories.next_indices()) == set("efgh")


def test_where_there_is_one_decoder_nothing_is_measured() -> None:
    """A format that has factors alone is shown by them, and the reason tells how to get better."""
    one = engines(None, NOTHING_S)
    assert one.of_view("sd1", "auto", (4, 8, 8)).decoder == "linear"
    reason = one.told()["sd1"]["reason"]
    assert "no weights of taesd were found" in reason
    assert "in a live view" not in reason


def test_float8_is_never_a_recordings(weights: Path) -> None:
    """With decoder.float8 a live view's engine is another one than the recordings', which stay exact."""
    one = engines(weights, "decoder.float8=true", "decoder.choice=tiny")
    assert one.of_view("flux2", "tiny", SHAPE).is_float8
    assert not one.of_recordings("flux2").is_float8


@pytest.fixture(scope="module")
def ruled(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Iterator[Daemon]:
    """A daemon on which everything keeps up, with a rule for some streams."""
    rules = json.dumps([{"stream": "quick/*", "decoder": "linear"}])
    sets = (f"weights.folder={weights}", EVERYTHING_S)
    folder = tmp_path_factory.mktemp("ruled")
    with Daemon(folder, *sets, environment={"TAESD_STREAM_RULES": rules}) as one:
        yield one


def shown_by(daemon: Daemon, stream: str) -> str:
    """Which decoder shows a stream's step."""
    with (
        LatentPublisher(daemon.broker, stream=stream, latent_format="flux2") as publisher,
        PageSocket(daemon) as page,
    ):
        wait_for(lambda: stream in daemon.streams(), of="the stream")
        page.watch({stream: "live"})
        publisher.publish(np.zeros(SHAPE, np.float32), step=0)
        return str(page.picture(60)[0]["decoder"])


@pytest.mark.slow
def test_a_rule_gives_a_stream_its_decoder(ruled: Daemon) -> None:
    """`[[rules]]` with `decoder`: what its pattern fits is shown by that one, everything else by the choice."""
    assert shown_by(ruled, "quick/one") == "linear"
    assert shown_by(ruled, "other") == "taef2"


def test_the_reason_is_told_to_people(ruled: Daemon) -> None:
    """A stream's row names its decoder and why it is this one, from what was measured on this machine."""
    assert shown_by(ruled, "why") == "taef2"
    row = wait_for(lambda: (one := ruled.streams()["why"])["decoder_reason"] and one, of="the reason")
    assert row["decoder"] == "taef2"
    assert "that it may take in a live view here" in row["decoder_reason"]
