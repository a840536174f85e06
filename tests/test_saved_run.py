"""A run saved without a daemon: what its thread takes, and when it is over."""

from __future__ import annotations

from pathlib import Path

import torch

from taesd_stream.integrations.saved_run import MAX_WAITING, SavedRun
from taesd_stream.latent_formats import LATENT_FORMATS
from taesd_stream.media.finished import read_summary


def test_what_comes_after_the_end_is_passed_over(tmp_path: Path) -> None:
    """A sampler that goes on publishing after close() never waits, and the file stays as it was."""
    path = tmp_path / "run.mp4"
    saved = SavedRun(path, stream="a", known=LATENT_FORMATS["sd1"], kind="steps", fps=None, meta={})
    latents = torch.zeros(4, 8, 8)
    saved.publish(latents, step=0)
    saved.close()
    for step in range(1, MAX_WAITING + 2):
        saved.publish(latents, step=step)
    saved.close()
    assert saved.error is None
    summary = read_summary(path)
    assert summary is not None
    assert summary["frames"] == 1


def test_what_an_earlier_crash_left_stays(tmp_path: Path) -> None:
    """The film of a run that died lies beside the path still when the next one has taken it; nothing else does."""
    path = tmp_path / "run.mp4"
    left = tmp_path / "run.mp4.saving" / "a" / "earlier.mp4.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"a film")
    for number in range(2):
        saved = SavedRun(path, stream=f"b/{number}", known=LATENT_FORMATS["sd1"], kind="steps", fps=None, meta={})
        saved.publish(torch.zeros(4, 8, 8), step=0)
        saved.close()
        assert saved.error is None
    assert left.read_bytes() == b"a film"
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["a", "earlier.mp4.part", "run.mp4", "run.mp4.saving"]
