"""The engine of video decoders: clips in pieces, live streams in batches, memories that go and come back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from taesd_stream.decoding.choice import open_engine
from taesd_stream.decoding.stream_memories import StreamMemories, StreamMemory
from taesd_stream.decoding.video_engine import LiveFrames, LivePart, VideoEngine
from taesd_stream.models.tiny_video import VideoDecoder
from taesd_stream_workers.worker.job_pictures import Rows, pictures_of
from tests.golden_messages import JOB_ITEM
from tests.test_tiny_video import stepped, video_decoder

PLENTY = 1 << 30
SIZE = (1, 2)


@pytest.fixture(scope="module")
def decoder() -> VideoDecoder:
    """The network whose weights the engines load."""
    return video_decoder("taew2_1")


@pytest.fixture(scope="module")
def opened(decoder: VideoDecoder, tmp_path_factory: pytest.TempPathFactory) -> VideoEngine:
    """An engine as a worker opens it, from a file of weights."""
    folder = tmp_path_factory.mktemp("weights")
    save_file(decoder.state_dict(), folder / "taew2_1.safetensors")
    engine = open_engine("wan2_1", weights_folder=folder)
    assert isinstance(engine, VideoEngine)
    return engine


@pytest.fixture
def engine(opened: VideoEngine) -> VideoEngine:
    """The engine without any stream."""
    opened.memories = StreamMemories(PLENTY)
    return opened


def latents_of(length: int, seed: int = 0) -> Tensor:
    """Latents (length, 16, h, w), from a seed."""
    return torch.randn(length, 16, *SIZE, generator=torch.Generator().manual_seed(seed))


def alone(decoder: VideoDecoder, latents: Tensor) -> Tensor:
    """The frames of a stream that nothing ever disturbed, (t', 3, H, W)."""
    return stepped(decoder, latents[None])[0][0]


def shown(engine: VideoEngine, *parts: LivePart, budget_bytes: int = PLENTY) -> list[LiveFrames]:
    """What the parts show, in their order."""
    results = [one for group in engine.decode_live(parts, budget_bytes=budget_bytes) for one in group]
    return sorted(results, key=lambda one: one.place)


def test_a_video_format_opens_its_own_decoder(opened: VideoEngine, decoder: VideoDecoder) -> None:
    """With weights in the folder the format's engine is the full one, and its history the network's."""
    assert (opened.decoder, opened.is_full, opened.history) == ("taew2_1", True, decoder.history)


def test_an_image_of_a_video_decoder_is_a_picture(opened: VideoEngine, decoder: VideoDecoder) -> None:
    """Latents of a batch without time give one picture each, as an image sampler on a video's latents wants."""
    latents = latents_of(3)
    pictures = torch.cat([rgb for _, rgb in opened.decode(latents, budget_bytes=1)])
    torch.testing.assert_close(pictures, decoder.decode_clip(latents[:, None])[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("fitting", [1, 2, 100])
def test_a_clip_in_pieces_is_the_whole_clip(opened: VideoEngine, decoder: VideoDecoder, fitting: int) -> None:
    """However little memory there is, the frames are those of the whole clip, and as many as was said."""
    latents = latents_of(5)
    budget_bytes = fitting * opened.bytes_per_step_px * SIZE[0] * SIZE[1]
    pieces = list(opened.decode_clip(latents, budget_bytes=budget_bytes))
    assert len(pieces) == {1: 5, 2: 3, 100: 1}[fitting]
    frames = torch.cat([part for _, part in pieces])
    assert len(frames) == opened.frames_of_clip(5) == 17
    torch.testing.assert_close(frames, decoder.decode_clip(latents[None])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("fitting", [1, 2, 100])
def test_streams_in_a_batch_show_what_each_shows_alone(
    engine: VideoEngine, decoder: VideoDecoder, fitting: int
) -> None:
    """Runs of different age decode together, in slices by memory, with the frames that each has alone."""
    runs = {"a": latents_of(6, seed=1), "b": latents_of(6, seed=2), "c": latents_of(6, seed=3)}
    ages = {"a": 0, "b": 0, "c": 0}
    got: dict[str, list[Tensor]] = {run: [] for run in runs}
    for job in (("a",), ("a", "b"), ("c", "a", "b"), ("b", "c", "a")):
        parts = [LivePart(run=run, index=ages[run], latents=runs[run][ages[run]][None]) for run in job]
        budget_bytes = fitting * engine.bytes_per_step_px * SIZE[0] * SIZE[1]
        for run, one in zip(job, shown(engine, *parts, budget_bytes=budget_bytes), strict=True):
            got[run].append(one.frames)
            assert not one.is_approximate
            ages[run] += 1
    for run, latents in runs.items():
        torch.testing.assert_close(torch.cat(got[run]), alone(decoder, latents[: ages[run]]), atol=1e-5, rtol=0)
    assert engine.memories.next_indices() == ages


def test_parts_of_one_run_in_a_job_go_in_order(engine: VideoEngine, decoder: VideoDecoder) -> None:
    """A job may hold several parts of a run: each goes on from the one before."""
    latents = latents_of(4)
    parts = [LivePart(run="a", index=index, latents=latents[index : index + 2]) for index in (0, 2)]
    frames = torch.cat([one.frames for one in shown(engine, *parts)])
    torch.testing.assert_close(frames, alone(decoder, latents), atol=1e-5, rtol=0)


def test_a_long_part_is_cut_in_time(engine: VideoEngine, decoder: VideoDecoder) -> None:
    """A part that is over the budget alone is decoded step by step, with the same frames."""
    latents = latents_of(4)
    slices = shown(engine, LivePart(run="a", index=0, latents=latents), budget_bytes=1)
    assert [(one.first, one.latents) for one in slices] == [(0, 1), (1, 1), (5, 1), (9, 1)]
    frames = torch.cat([one.frames for one in slices])
    torch.testing.assert_close(frames, alone(decoder, latents), atol=1e-5, rtol=0)


def test_parts_together_are_cut_by_what_they_hold(engine: VideoEngine, decoder: VideoDecoder) -> None:
    """Of two streams a slice of at most four latents holds two of each, with the frames of each alone."""
    latents = [latents_of(5, seed) for seed in range(2)]
    parts = [LivePart(run=str(seed), index=0, latents=one) for seed, one in enumerate(latents)]
    slices = list(engine.decode_live(parts, budget_bytes=PLENTY, most=lambda: 4))
    assert [[one.latents for one in each] for each in slices] == [[2, 2], [2, 2], [1, 1]]
    for one, *of_stream in zip(latents, *slices, strict=True):
        frames = torch.cat([each.frames for each in of_stream])
        torch.testing.assert_close(frames, alone(decoder, one), atol=1e-5, rtol=0)
    assert engine.memories.next_indices() == {"0": 5, "1": 5}


def test_a_stream_that_comes_from_another_worker_is_rebuilt(engine: VideoEngine, decoder: VideoDecoder) -> None:
    """Without a memory, `history` latents give the frames of the undisturbed stream."""
    latents = latents_of(12)
    part = LivePart(run="a", index=11, latents=latents[11:], history=latents[11 - engine.history : 11])
    (one,) = shown(engine, part)
    torch.testing.assert_close(one.frames, alone(decoder, latents)[-4:], atol=1e-5, rtol=0)
    assert not one.is_approximate


def test_a_stream_without_its_history_is_approximate_until_it_has_one(
    engine: VideoEngine, decoder: VideoDecoder
) -> None:
    """A stream that begins in the middle says so until `history` latents have passed, and is exact from then on."""
    latents = latents_of(engine.history + 5)
    begin = 3
    results = [
        shown(engine, LivePart(run="a", index=index, latents=latents[index][None]))[0]
        for index in range(begin, len(latents))
    ]
    assert [one.is_approximate for one in results] == [True] * engine.history + [False] * 2
    exact = torch.cat([one.frames for one in results[engine.history :]])
    torch.testing.assert_close(exact, alone(decoder, latents)[-8:], atol=1e-5, rtol=0)
    assert len(results[0].frames) == 4  # no start-up frames are hidden in the middle


def test_a_frame_shown_again_does_not_set_the_stream_back(engine: VideoEngine, decoder: VideoDecoder) -> None:
    """An old part, with its history, shows what it showed; the stream goes on from where it was."""
    latents = latents_of(4)
    first = [shown(engine, LivePart(run="a", index=index, latents=latents[index][None]))[0] for index in range(3)]
    (again,) = shown(engine, LivePart(run="a", index=2, latents=latents[2:3], history=latents[:2]))
    torch.testing.assert_close(again.frames, first[2].frames, atol=1e-5, rtol=0)
    (last,) = shown(engine, LivePart(run="a", index=3, latents=latents[3:]))
    torch.testing.assert_close(last.frames, alone(decoder, latents)[-4:], atol=1e-5, rtol=0)


def test_a_forgotten_run_has_no_memory(engine: VideoEngine) -> None:
    """After forget the run is unknown, and one that never was is no error."""
    shown(engine, LivePart(run="a", index=0, latents=latents_of(1)))
    engine.forget("a")
    engine.forget("b")
    assert engine.memories.next_indices() == {}
    assert engine.memories.nbytes == 0


def test_the_least_recently_used_memory_goes_first() -> None:
    """Over the budget the run goes that was asked for the longest ago; one that is too large alone is not kept."""
    memories = StreamMemories(budget_bytes=2 * 800)

    def stream(elements: int) -> StreamMemory:
        return StreamMemory((torch.zeros(elements),), 1, 0, SIZE)

    for run in ("a", "b"):
        memories.put(run, stream(200))
    memories.get("a")
    memories.put("c", stream(200))
    assert set(memories.next_indices()) == {"a", "c"}
    memories.put("d", stream(500))
    assert (set(memories.next_indices()), memories.nbytes, memories.dropped) == ({"a", "c"}, 1600, 2)
    memories.shed()  # memory is short: half of them
    assert (set(memories.next_indices()), memories.nbytes) == ({"c"}, 800)
    memories.shed()
    assert set(memories.next_indices()) == {"c"}  # the one that is stepped keeps its own


def test_a_memory_owns_only_its_stream(engine: VideoEngine) -> None:
    """What a batch leaves behind is counted and freed stream by stream: no memory holds the others' bytes."""
    shown(engine, *(LivePart(run=run, index=0, latents=latents_of(1)) for run in ("a", "b", "c")))
    kept = engine.memories.get("b")
    assert kept is not None
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in kept.memory)
    assert engine.memories.nbytes == 3 * kept.nbytes


def test_what_is_no_live_batch_is_refused_at_once(engine: VideoEngine) -> None:
    """Wrong channels, mixed shapes and NaN, also in the history, are errors before anything is decoded."""
    good, bad = latents_of(1), torch.full((1, 16, *SIZE), float("nan"))
    for parts, message in (
        ([LivePart(run="a", index=0, latents=torch.zeros(1, 4, 2, 2))], "wan2_1: expected 16 channels, got 4"),
        ([LivePart(run="a", index=0, latents=bad)], "NaN or infinity"),
        ([LivePart(run="a", index=1, latents=good, history=bad)], "NaN or infinity"),
        (
            [LivePart(run="a", index=0, latents=good), LivePart(run="b", index=0, latents=latents_of(2))],
            r"one shape, got \(1, 16, 1, 2\) and \(2, 16, 1, 2\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            engine.decode_live(parts, budget_bytes=PLENTY)
    assert engine.memories.next_indices() == {}


def test_wild_latents_give_colours(engine: VideoEngine) -> None:
    """Finite latents, however large, give frames in [0, 1]."""
    (one,) = shown(engine, LivePart(run="a", index=0, latents=latents_of(1) * 1e30))
    assert one.frames.isfinite().all()


def test_a_step_is_dearer_than_a_picture(opened: VideoEngine) -> None:
    """The memory that a step takes is measured with all frames of its latent, more than a picture's one."""
    assert opened.bytes_per_step_px > opened.bytes_per_latent_px + 3 * 3 * 8 * 8 * 4


def test_pictures_of_a_stream_lie_side_by_side_in_time(tmp_path: Path) -> None:
    """CogVideoX hides frames of odd clips and none of a stream: each picture comes one after the one before."""
    save_file(video_decoder("taecvx").state_dict(), tmp_path / "taecvx.safetensors")
    engine = open_engine("cogvideox", weights_folder=tmp_path)
    batch = latents_of(3)
    entries = [
        (index, replace(JOB_ITEM, kind="live", index=index, seq=index, fps=9000.0), Rows(batch, index, 1))
        for index in range(3)
    ]
    shown = [picture for one in pictures_of(engine, entries, PLENTY) for picture in one.pictures]
    assert [picture.pts for picture in shown] == list(range(0, 10 * 12, 10))
