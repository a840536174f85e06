"""What is installed: the wheel holds every file of both packages, and a sampler's environment gets three packages."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any, Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.daemon import clean_environment

ROOT: Final = Path(__file__).parent.parent
PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BASE: Final = {"numpy", "pyzmq", "msgpack"}
NO_INDEX: Final = ("No matching distribution", "Could not find a version")  # what pip says where it cannot fetch


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the tree: a stale build folder must not lend it files."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("taesd_stream", "workers"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    try:
        is_here = Version(importlib.metadata.version("setuptools")) >= Version("77")
    except importlib.metadata.PackageNotFoundError:
        is_here = False
    isolation = ["--no-build-isolation"] if is_here else []
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", *isolation, "-w", str(folder / "dist"), str(folder)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode and not is_here and any(text in built.stderr for text in NO_INDEX):
        pytest.skip("setuptools 77 is neither installed nor to be had from an index: no wheel can be built")
    assert built.returncode == 0, built.stderr[-3000:]
    return zipfile.ZipFile(next((folder / "dist").glob("*.whl")))


def metadata_of(wheel: zipfile.ZipFile) -> Message:
    """The wheel's METADATA."""
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def test_the_wheel_holds_both_packages_whole(wheel: zipfile.ZipFile) -> None:
    """Every file of the packages is in the wheel, byte for byte: modules, page, data, py.typed; and nothing else."""
    expected = {
        str(path.relative_to(base)): path
        for base, package in ((ROOT, "taesd_stream"), (ROOT / "workers", "taesd_stream_workers"))
        for path in (base / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == set(expected)
    assert [name for name, path in expected.items() if wheel.read(name) != path.read_bytes()] == []
    assert {
        "taesd_stream/py.typed",
        "taesd_stream/data/demo_flux2.safetensors",
        "taesd_stream/data/nano_flux2.safetensors",
        "taesd_stream/data/nano_sana.safetensors",
        "taesd_stream_workers/py.typed",
        "taesd_stream_workers/streamer/web/page/index.html",
    } <= packed


def test_installing_moves_three_packages_at_most(wheel: zipfile.ZipFile) -> None:
    """Without an extra the wheel asks for numpy, pyzmq and msgpack, each without an upper bound."""
    required = [Requirement(text) for text in metadata_of(wheel).get_all("Requires-Dist", [])]
    base = [one for one in required if one.marker is None]
    assert {one.name for one in base} == BASE
    assert [str(one) for one in base if any(bound.operator != ">=" for bound in one.specifier)] == []


def test_an_older_environment_does_not_move(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Installed beside an older torch and diffusers, the bare package brings itself alone."""
    old = {"torch": "2.1.0", "diffusers": "0.27.0", "numpy": "1.26.4", "pyzmq": "25.1.2", "msgpack": "1.0.8"}
    venv.create(tmp_path / "old", with_pip=False)
    site = next((tmp_path / "old").rglob("site-packages"))
    for name, version in old.items():  # what pip sees of an installed package
        (site / f"{name}-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)
    python = next((tmp_path / "old").glob("[bS]*/python*"))
    report = tmp_path / "report.json"
    words = ["install", "--dry-run", "--no-index", "--report", str(report), str(wheel.filename)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    brought = [one["metadata"]["name"] for one in json.loads(report.read_text())["install"]]
    assert brought == ["taesd-stream"]


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    """Licence, Python versions, description and command are in the wheel."""
    metadata = metadata_of(wheel)
    assert (metadata["Name"], metadata["License-Expression"]) == ("taesd-stream", "Apache-2.0")
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "taesd-stream = taesd_stream_workers.cli:main" in wheel.read(points).decode()
    licence = next(name for name in wheel.namelist() if name.endswith("/LICENSE"))
    assert b"Apache License" in wheel.read(licence)


def test_the_shipped_scenes_are_small() -> None:
    """The demo's latents are at most 1.5 MB: everybody who installs the package carries them."""
    assert (ROOT / "taesd_stream" / "data" / "demo_flux2.safetensors").stat().st_size <= 1_500_000


def test_versions_agree() -> None:
    """The package, its metadata and the list of changes name the same version."""
    from taesd_stream import __version__

    assert PROJECT["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def pinned() -> dict[str, str]:
    """constraints.txt as name -> version; a line that pins nothing exactly fails."""
    versions: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        found = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)", line)
        assert found, f"constraints.txt: expected name==version (no path, no local build), got {line!r}"
        versions[canonicalize_name(found[1])] = found[2]
    return versions


def test_constraints_pin_all_that_is_asked_for() -> None:
    """Each package of each extra has one exact version in constraints.txt, and one that pyproject.toml allows."""
    versions = pinned()
    extras = PROJECT["optional-dependencies"].values()
    asked = [Requirement(text) for text in [*PROJECT["dependencies"], *(one for extra in extras for one in extra)]]
    for one in asked:
        if one.name != PROJECT["name"]:
            assert versions.get(canonicalize_name(one.name), "none") in one.specifier, str(one)


def test_constraints_pin_all_that_comes_along() -> None:
    """What the pinned packages need themselves is pinned too, as far as this environment has it."""
    versions = pinned()
    missing = set()
    for name in {canonicalize_name(one.name) for one in importlib.metadata.distributions()} & set(versions):
        for text in importlib.metadata.requires(name) or []:
            need = Requirement(text)
            wanted = need.marker is None or need.marker.evaluate({"extra": ""})
            if wanted and canonicalize_name(need.name) not in versions:
                missing.add(f"{name} needs {need.name}")
    assert missing == set()


def test_torch_is_pinned_without_a_build() -> None:
    """An index with CPU builds gives one of those: no CUDA wheels come to a machine that has no GPU."""
    assert pinned()["torch"] == "2.13.0"


RUN_WITHOUT = """
import runpy, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

missing, *arguments = sys.argv[1:]
sys.meta_path.insert(0, NotInstalled())
sys.argv = ["taesd-stream", *arguments]
runpy.run_module("taesd_stream_workers.cli", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("typer", ["--help"]),
        ("typer", ["demo"]),
        ("pydantic_settings", ["up"]),
        ("torch", ["worker"]),
        ("av", ["streamer"]),
    ],
)
def test_without_the_extra_it_says_what_to_install(missing: str, arguments: list[str], tmp_path: Path) -> None:
    """Where a package of the daemon is missing, the answer is one line, with the command that installs it; exit 2."""
    command = [sys.executable, "-c", RUN_WITHOUT, missing, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(tmp_path), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"taesd-stream: its daemon part is not installed (No module named '{missing}'): "
        'pip install "taesd-stream[daemon]"\n'
    )


def test_a_fault_of_ours_is_not_called_a_missing_package(tmp_path: Path) -> None:
    """A module of our own that cannot be found is a traceback: installing again would not help."""
    command = [sys.executable, "-c", RUN_WITHOUT, "taesd_stream", "streams"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "pip install" not in done.stderr
