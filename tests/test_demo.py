"""The demo: its sampler walks a real schedule to the scene, and its one command shows all of it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from taesd_stream.demo_sampler import CLIP, DemoScene, flow_sigmas, load_clip, load_scenes, x0_predictions
from taesd_stream.latent_formats import LATENT_FORMATS
from tests.daemon import Daemon, wait_for
from tests.pictures import decode_jpeg, psnr_db
from tests.troubles import patient

STREAMS = {"landscapes", "still-life", "nights", "sweep/cfg-2.5", "sweep/cfg-4.5", "quick", CLIP}


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_sigmas_fall_from_one_to_zero(steps: int) -> None:
    """A schedule has one more number than steps, strictly falling from 1 to 0."""
    sigmas = flow_sigmas(steps)
    assert (len(sigmas), sigmas[0], sigmas[-1]) == (steps + 1, 1.0, 0.0)
    assert all(before > after for before, after in pairwise(sigmas))


def test_scenes_are_latents_of_several_sizes() -> None:
    """Pictures and a clip of FLUX.2, each finite, of the format's channels, of no single size."""
    scenes, clip = load_scenes(), load_clip()
    flux2 = LATENT_FORMATS["flux2"]
    for scene in scenes:
        flux2.check_shape("steps", scene.latents.shape)
    flux2.check_shape("clip", clip.latents.shape)
    assert all(np.isfinite(scene.latents).all() and scene.latents.std() > 0.3 for scene in (*scenes, clip))
    assert len({scene.latents.shape for scene in scenes}) > 1
    assert all(scene.prompt for scene in (*scenes, clip))


@pytest.mark.parametrize("scene", load_scenes(), ids=lambda scene: scene.name)
def test_predictions_come_nearer_until_they_are_the_scene(scene: DemoScene) -> None:
    """The sampler's belief begins far from the scene, never goes away from it, and ends at it."""
    steps = 20
    yielded = list(x0_predictions(scene, steps=steps, seed=3))
    assert [step for step, _, _ in yielded] == list(range(steps))
    assert [sigma for _, sigma, _ in yielded] == flow_sigmas(steps)[:-1]
    errors = [float(np.sqrt(np.mean((denoised - scene.latents) ** 2))) for _, _, denoised in yielded]
    spread = float(scene.latents.std())
    assert errors[0] > 0.5 * spread
    assert errors[-1] < 0.05 * spread
    assert all(after < before + 0.01 * spread for before, after in pairwise(errors))


def test_a_seed_gives_its_latents_and_no_other_ones() -> None:
    """The same seed walks the same way, another one another once noise tells something; the scene stays as it was."""
    scene = load_scenes()[0]
    before = scene.latents.copy()
    one, again, other = ([row[2] for row in x0_predictions(scene, steps=6, seed=seed)] for seed in (5, 5, 6))
    assert all(np.array_equal(left, right) for left, right in zip(one, again, strict=True))
    assert not any(np.array_equal(left, right) for left, right in zip(one[1:], other[1:], strict=True))
    assert np.array_equal(scene.latents, before)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """`taesd-stream demo` with a desktop whose browser only writes down what it is asked for; ended by Ctrl-C."""
    folder = tmp_path_factory.mktemp("demo")
    browser = folder / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {folder}/opened\nexec sleep 30\n')
    browser.chmod(0o755)
    environment = {"DISPLAY": ":0", "BROWSER": f"{browser} %s"}
    with Daemon(folder, command="demo", environment=environment) as daemon:
        yield daemon


def test_every_sampler_is_shown_live(demo: Daemon) -> None:
    """All built-in streams come up live, each with a picture of its own, made by the shipped nano decoder."""
    wait_for(lambda: {n for n, row in demo.streams().items() if row["state"] == "live"} >= STREAMS, 30.0, of="streams")
    for name in sorted(STREAMS):
        status, picture = demo.get(f"/streams/{name}/latest.jpg")
        assert status == 200, picture
        assert min(decode_jpeg(picture).shape[:2]) >= 128
    rows = demo.streams()
    assert {rows[name]["decoder"] for name in STREAMS} == {"nano"}
    assert len({(rows[name]["width"], rows[name]["height"]) for name in STREAMS}) > 1
    assert all(rows[name]["meta"]["prompt"] for name in STREAMS)


def test_the_video_plays(demo: Daemon) -> None:
    """The clip's stream shows another picture later, and its frames go on being counted."""
    wait_for(lambda: CLIP in demo.streams(), of="the clip's stream")
    first = decode_jpeg(demo.get(f"/streams/{CLIP}/latest.jpg")[1])
    seq = demo.streams()[CLIP]["seq"]
    wait_for(lambda: psnr_db(first, decode_jpeg(demo.get(f"/streams/{CLIP}/latest.jpg")[1])) < 40, of="another picture")
    wait_for(lambda: demo.streams()[CLIP]["seq"] > seq, of="a later frame")


@pytest.mark.parametrize("name", ["quick", pytest.param(CLIP, marks=pytest.mark.slow)])
def test_a_viewer_can_stop_a_sampler_and_it_comes_again(name: str, demo: Daemon) -> None:
    """Stop ends the run as stopped; after a while the next one begins."""
    wait_for(lambda: demo.streams().get(name), of=f"{name} in the list")

    def stopped() -> str:
        """The run that was told to stop; empty: there was none, or it ended just before."""
        row = demo.streams()[name]
        if not row["stoppable"] or row["state"] != "live":
            return ""
        status = demo.get(f"/api/v1/streams/{name}/stop", method="POST")[0]
        assert status in (200, 409)
        return str(row["run"]) if status == 200 else ""

    run = wait_for(stopped, of="a run to stop")
    wait_for(lambda: demo.streams()[name]["state"] == "stopped" or demo.streams()[name]["run"] != run, of="end")
    wait_for(lambda: demo.streams()[name]["run"] != run and demo.streams()[name]["seq"], 30.0, of="the next run")


def test_the_page_is_opened_where_there_is_a_desktop(demo: Daemon) -> None:
    """The browser is asked for the page once, and that it does not return holds nothing up."""
    wait_for((demo.folder / "opened").is_file, of="the browser")
    assert wait_for((demo.folder / "opened").read_text) == f"{demo.web}\n"


def test_ctrl_c_ends_it_without_a_desktop(tmp_path: Path) -> None:
    """Where there is no desktop it runs all the same; Ctrl-C ends it with 0, every role by itself."""
    environment = {"DISPLAY": "", "WAYLAND_DISPLAY": ""} | patient(tmp_path / "patient")
    daemon = Daemon(tmp_path, command="demo", environment=environment)
    with daemon:
        wait_for(lambda: set(daemon.streams()) >= STREAMS, of="streams")
    assert "role_killed" not in daemon.log()
    assert "Traceback" not in daemon.log()
    ended = [line for line in daemon.log().splitlines() if "stream_ended" in line]
    assert len([line for line in ended if "reason=stopped" in line]) >= 2
