"""`taesd-stream doctor`: each check says what is, and each fault the way out."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from tests.commands import run_command
from tests.daemon import Daemon, clean_environment


def examine(folder: Path, *sets: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and the findings by what they are about."""
    base = ["broker.bind=tcp://127.0.0.1:0", "web.bind=127.0.0.1:0", f"recording.folder={folder / 'recordings'}"]
    words = [word for one in (*base, *sets) for word in ("--set", one)]
    done = run_command("doctor", "--json", *words, environment=clean_environment(folder))
    assert done.stderr == ""
    return done.returncode, {row["what"]: row for row in json.loads(done.stdout)["findings"]}


def test_a_machine_that_works(tmp_path: Path) -> None:
    """On a machine where `up` works nothing is a fault, each check is there, and nothing is made."""
    before = sorted(tmp_path.iterdir())
    code, found = examine(tmp_path)
    assert code == 0
    assert [row for row in found.values() if row["verdict"] == "fault"] == []
    keys = {"broker.bind", "web.bind", "recording.folder", "broker.log_folder"}
    assert found.keys() == {"taesd-stream", "device", "encoders", "export", "decoders"} | keys
    assert found["encoders"]["verdict"] == found["export"]["verdict"] == "ok"
    assert "no weights" in found["decoders"]["text"]
    assert "weights fetch" in found["decoders"]["way_out"]
    assert "GiB free" in found["recording.folder"]["text"]
    assert [path for path in tmp_path.iterdir() if path not in before and path.name != "cache"] == []


def test_a_fault_has_its_way_out(tmp_path: Path) -> None:
    """What keeps `up` from working is a fault that names the key and the way out, and the exit code is 2."""
    (tmp_path / "file").write_text("no folder")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        wrong = {
            "decoder.device": "cuda:9",
            "weights.folder": tmp_path / "none",
            "recording.folder": tmp_path / "file" / "x",
            "web.bind": f"127.0.0.1:{taken.getsockname()[1]}",
            "broker.bind": "http://127.0.0.1:1",
            "security.keys_folder": tmp_path,
        }
        code, found = examine(tmp_path, *(f"{key}={value}" for key, value in wrong.items()))
    assert code == 2
    texts = {
        "device": "decoder.device = cuda:9",
        "decoders": "there is no such folder",
        "recording.folder": "cannot be written",
        "web.bind": "Address already in use",
        "broker.bind": "expected tcp://host:port",
        "keys": "expected server.key",
    }
    for what, text in texts.items():
        assert found[what]["verdict"] == "fault"
        assert text in found[what]["text"]
        assert found[what]["way_out"] or any(word in found[what]["text"] for word in ("choose", "as in", "makes them"))


def test_a_daemon_that_runs_is_no_fault(daemon: Daemon, tmp_path: Path) -> None:
    """Where a daemon answers, its addresses are in use by it, and the doctor says so."""
    code, found = examine(tmp_path, f"web.bind={daemon.web.removeprefix('http://')}")
    assert code == 0
    assert "a daemon runs there already" in found["web.bind"]["text"]
