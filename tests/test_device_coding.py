"""H.264 that the device codes: what a decoder shows of it, and that the device's bytes are the host's."""

from __future__ import annotations

import itertools
import queue
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from taesd_stream.decoding.host_copies import HostCopies
from taesd_stream.decoding.kernels.cubins import kernel_cubin
from taesd_stream.decoding.kernels.h264_coder import (
    LEAST_QP,
    MOST_QP,
    REFRESH,
    CodedStream,
    Due,
    H264Coder,
    coder_program,
    quantiser,
    turns_of,
)
from taesd_stream.media.encoder import EncodedPicture
from taesd_stream.media.parameter_sets import has_level, parameter_sets
from taesd_stream_workers.worker.device_coding import CodingTask, DeviceCoding, check
from tests.host_coder import COMPILER, HostCoder, Planes, Shown, psnr

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> HostCoder:
    """Compiled once."""
    return HostCoder(tmp_path_factory.mktemp("coder"))


def waves(width: int, height: int, phase: float = 0.0) -> Planes:
    """A picture with slopes, edges and colours."""
    y, x = np.mgrid[:height, :width]
    luma = 110 + 60 * np.sin(x / 13 + phase) * np.cos(y / 9) + 40 * ((x // 24 + y // 20) % 2)
    planes = np.empty((height * 3 // 2, width), np.uint8)
    planes[:height] = luma.clip(16, 235)
    planes[height:].reshape(-1)[: width * height // 4] = (100 + 50 * np.sin(x[::2, ::2] / 30 + phase)).reshape(-1)
    planes[height:].reshape(-1)[width * height // 4 :] = (130 + 50 * np.cos(y[::2, ::2] / 25)).reshape(-1)
    return planes


def noise(width: int, height: int, seed: int = 0) -> Planes:
    """Nothing that could be predicted."""
    return np.random.default_rng(seed).integers(0, 256, (height * 3 // 2, width), np.uint8)


@needs_compiler
@pytest.mark.parametrize("size", [(512, 512), (96, 64), (98, 50), (16, 16), (2, 2), (2, 130), (1030, 18)])
def test_pictures_of_any_size_are_shown_as_they_are(coder: HostCoder, size: tuple[int, int]) -> None:
    """Also those that are no whole number of macroblocks: a keyframe, and many that follow it."""
    stream, shown = CodedStream(), Shown()
    for number in range(35):  # frame_num begins anew twice
        planes = waves(*size, phase=number / 2)
        unit = coder.code(stream, planes, qp=24)
        assert (b"\x67\x42\xc0" in unit) == (number == 0)
        assert psnr(shown(unit), planes) > 36
    assert shown.context.profile == "Constrained Baseline"


@needs_compiler
def test_a_finer_quantiser_shows_more(coder: HostCoder) -> None:
    """Of noise in calm surroundings, whose levels are the largest there are."""
    planes = waves(128, 64)
    planes[16:48, 32:64] = noise(32, 64)[:32]
    found = [psnr(Shown()(coder.code(CodedStream(), planes, qp=qp)), planes) for qp in range(LEAST_QP, MOST_QP + 1)]
    assert found[0] > 41
    assert found[-1] < 34
    assert all(finer > coarser - 0.3 for finer, coarser in itertools.pairwise(found))


@needs_compiler
def test_black_and_white_in_one_block(coder: HostCoder) -> None:
    """The largest steps from sample to sample, at the finest quantiser: no level is too large for its code.

    Without the decoder's deblocking, which takes such edges for its own.
    """
    y, x = np.mgrid[:96, :64]
    planes = np.where((x + y) % 2, 255, 0).astype(np.uint8)
    planes[:, 32:] = np.where((y[:, 32:] // 4) % 2, 255, 0)
    assert psnr(Shown(skip_loop_filter="all")(coder.code(CodedStream(), planes, qp=LEAST_QP)), planes) > 40


@needs_compiler
def test_what_stays_takes_little_and_stays_good(coder: HostCoder) -> None:
    """A still picture: rows are coded anew in turns, and it looks no worse when all of them have been."""
    stream, shown, planes = CodedStream(), Shown(), waves(256, 1040)
    whole = coder.code(stream, planes, qp=30)
    first = psnr(shown(whole), planes)
    later = [coder.code(stream, planes, qp=30) for _ in range(2 * REFRESH)]
    assert sum(map(len, later)) / len(later) < len(whole) / 8
    assert min(psnr(shown(unit), planes) for unit in later) > first - 0.5


@needs_compiler
def test_what_changes_is_shown_at_once(coder: HostCoder) -> None:
    """Beside what stays, wherever it is."""
    stream, shown = CodedStream(), Shown()
    planes = waves(160, 96)
    shown(coder.code(stream, planes, qp=24))
    for number in range(40):
        column, row = 8 * (number * 7 % 19), 8 * (number * 5 % 11)
        planes = planes.copy()
        planes[row : row + 8, column : column + 8] = 16 + 5 * number
        assert psnr(shown(coder.code(stream, planes, qp=24)), planes) > 36
    slow = [planes.astype(float) + number / 8 for number in range(80)]  # below what is seen, until it adds up
    for one in slow:
        picture = shown(coder.code(stream, one.astype(np.uint8), qp=24))
        assert psnr(picture, one.astype(np.uint8)) > 36


@needs_compiler
def test_a_row_without_room_goes_on_without_its_residuals(coder: HostCoder) -> None:
    """Noise takes more than there is room for: the picture is worse, but whole, and right as soon as there is room."""
    stream, shown, planes = CodedStream(), Shown(), noise(640, 64)
    worse = psnr(shown(coder.code(stream, planes, qp=LEAST_QP)), planes)
    assert worse < 25
    assert psnr(shown(coder.code(stream, planes, qp=34)), planes) > worse + 3
    planes = waves(640, 64)
    assert psnr(shown(coder.code(stream, planes, qp=24)), planes) > 36


@needs_compiler
def test_keyframes_come_when_they_are_asked_for(coder: HostCoder) -> None:
    """And with another size; a decoder that begins there shows the same as one that has seen all."""
    stream, shown = CodedStream(), Shown()
    shown(coder.code(stream, waves(64, 64)))
    unit = coder.code(stream, waves(64, 64, 1), is_keyframe=True)
    np.testing.assert_array_equal(shown(unit), Shown()(unit))
    repeated = [coder.code(stream, waves(64, 64, 2), pts=1 << 20) for _ in range(2)]
    assert [b"\x67" in unit[:5] for unit in repeated] == [False, True]  # for the first one may be lost
    unit = coder.code(stream, waves(96, 64))
    assert b"\x67" in unit[:5]
    assert Shown()(unit).shape == (96, 96)


@needs_compiler
def test_the_quantiser_follows_the_picture(coder: HostCoder) -> None:
    """Noise gets a coarser one than a calm picture, as x264's crf does."""
    stream = CodedStream()
    coder.code(stream, waves(64, 64))
    calm = stream.qp
    coder.code(stream, noise(64, 64))
    assert LEAST_QP <= calm < stream.qp <= MOST_QP
    assert (quantiser(0, 16), quantiser(1 << 30, 1)) == (LEAST_QP, MOST_QP)


@pytest.mark.parametrize("width", [2, 16, 640, 1920, 4096])
def test_parameter_sets_hold_no_start_code(width: int) -> None:
    """Whatever the height."""
    for height in range(2, 4098, 2):
        _, sps, pps = parameter_sets(width, height).split(b"\0\0\0\1")
        for unit in (sps, pps):
            assert not any(unit[at : at + 2] == b"\0\0" and unit[at + 2] < 3 for at in range(len(unit) - 2))


def test_levels_allow_what_is_coded() -> None:
    """Table A-1 and A.3.1, at 60 pictures a second: 512x512 is of 3.1; a long strip needs more than its area."""
    told = {size: parameter_sets(*size)[7] for size in [(16, 16), (512, 512), (1280, 720), (2048, 48), (2048, 2048)]}
    assert told == {(16, 16): 10, (512, 512): 31, (1280, 720): 32, (2048, 48): 31, (2048, 2048): 51}
    assert has_level(2048, 4096)
    assert not has_level(2048, 8192)
    assert not has_level(16, 8704)


def test_pictures_of_one_run_are_coded_one_after_the_other() -> None:
    """Those of a batch side by side, but where a run comes again."""
    assert turns_of(["a", "b", "c"]) == [[0, 1, 2]]
    assert turns_of(["a", "a", "b", "a", "b"]) == [[0, 2], [1, 4], [3]]


def test_a_processor_codes_none() -> None:
    """There the pool's encoders do it all."""
    device = torch.device("cpu")
    coding = DeviceCoding(device, HostCopies(device))
    assert not coding.takes(torch.zeros(1, 24, 16, dtype=torch.uint8))
    assert coding.runs() == []


@pytest.fixture(scope="module")
def gpu_coder(tmp_path_factory: pytest.TempPathFactory) -> H264Coder:
    """On the first GPU, compiled once."""
    device = torch.device("cuda", 0)
    cubin = kernel_cubin(coder_program(device), tmp_path_factory.mktemp("kernels"))
    return H264Coder(cubin, HostCopies(device), device)


@pytest.mark.gpu
@needs_compiler
def test_the_device_codes_what_the_host_does(gpu_coder: H264Coder, coder: HostCoder) -> None:
    """Byte for byte: many runs side by side, one of them twice in a batch, keyframes between."""
    check(gpu_coder, torch.device("cuda", 0))
    ids = itertools.count(1)  # one was the check's
    for size in [(512, 512), (98, 50), (1030, 18)]:
        runs = [f"{size} {number}" for number in (0, 1, 2, 1, 3)]
        streams = {run: CodedStream(ids) for run in runs}
        for turn in range(20):
            planes = np.stack([waves(*size, phase=turn // 2 + place) for place in range(len(runs))])
            keyframes = [turn == 7 and place == 2 for place in range(len(runs))]
            qps = {run: stream.qp for run, stream in streams.items()}
            times = [10 * turn + place for place in range(len(runs))]
            due = [Due(*one) for one in zip(range(len(runs)), runs, times, keyframes, strict=True)]
            batch = gpu_coder.code(torch.from_numpy(planes).cuda(), due)
            for place, run in enumerate(runs):
                expected = coder.code(
                    streams[run], planes[place], pts=times[place], is_keyframe=keyframes[place], qp=qps[run]
                )
                assert batch.picture(place)[0] == expected


@pytest.mark.gpu
def test_coded_pictures_are_handed_on_in_order(tmp_path: Path) -> None:
    """With the sizes that are shown, as soon as the kernels are there; of chosen rows alone."""
    device = torch.device("cuda", 0)
    coding = DeviceCoding(device, HostCopies(device), tmp_path)
    coding.start()
    planes = torch.from_numpy(np.stack([waves(64, 64, phase) for phase in range(4)])).cuda()
    coding.take_over(wait=True)
    assert coding.takes(planes)
    made: queue.SimpleQueue[tuple[str, EncodedPicture | None]] = queue.SimpleQueue()
    tasks = [
        CodingTask(
            due=Due(row, f"run {row}", 0, is_keyframe=False),
            size=(63, 64),
            on_done=lambda picture, _, row=row: made.put((f"run {row}", picture)),  # type: ignore[misc]
        )
        for row in (1, 3)
    ]
    for pts in range(3):
        due = [replace(task, due=task.due._replace(pts=pts)) for task in tasks]
        batch = coding.code(planes, due)
        assert batch is not None
        coding.hand_on(batch, due)
    coding.close()
    came = [made.get_nowait() for _ in range(6)]
    assert [run for run, _ in came] == ["run 1", "run 3"] * 3
    assert coding.runs() == ["run 1", "run 3"]
    shown = Shown()
    for (_, picture), is_keyframe in zip(came[::2], (True, False, False), strict=True):
        assert picture is not None
        assert (picture.is_keyframe, picture.width, picture.height) == (is_keyframe, 63, 64)
        assert psnr(shown(picture.payload), planes[1].cpu().numpy()) > 30
