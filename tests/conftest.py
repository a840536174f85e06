"""What the tests share: the shared data's folder, and a daemon of real processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.broker_peer import BrokerPeer
from tests.daemon import Daemon

if TYPE_CHECKING:
    from playwright.sync_api import Browser

if "PYTEST_XDIST_WORKER" in os.environ:  # several of these share the cores: threads would wait for each other
    import torch

    torch.set_num_threads(1)

settings.register_profile("any-machine", deadline=None)  # an example that a busy machine held up is no fault
settings.load_profile("any-machine")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real weights and samples; tests that need it skip where it is not."""
    folder = os.environ.get("TAESD_STREAM_SHARED")
    if not folder:
        pytest.skip("TAESD_STREAM_SHARED is not set: no real weights and samples here")
    return Path(folder)


@pytest.fixture(scope="session")
def shared_or_none() -> Path | None:
    """The folder of real weights and samples, None where it is not."""
    folder = os.environ.get("TAESD_STREAM_SHARED")
    return Path(folder) if folder else None


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests that do not harm it: broker, worker and streamer on free ports, linear decoder."""
    with Daemon(tmp_path_factory.mktemp("daemon")) as one:
        yield one


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    from tests.page_fixture import chromium  # Playwright's import is for tests of the page alone

    with chromium() as started:
        yield started


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Logs that publishers leave go to a folder of the test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def peer() -> Iterator[BrokerPeer]:
    """A broker that the test speaks for."""
    with BrokerPeer() as one:
        yield one


@pytest.fixture
def beside() -> Iterator[ThreadPoolExecutor]:
    """Another thread, for calls that wait for an answer of the test."""
    with ThreadPoolExecutor(1) as pool:
        yield pool
