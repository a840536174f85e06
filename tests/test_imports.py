"""What importing costs and does: a sampler's start-up does not pay for the daemon, and nothing happens by itself."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.daemon import clean_environment

ROOT: Final = Path(__file__).parent.parent
WEB: Final = ("fastapi", "starlette", "uvicorn", "websockets", "pydantic", "pydantic_settings", "prometheus_client")
HEAVY: Final = ("torch", "av", *WEB, "typer", "rich", "platformdirs", "huggingface_hub", "safetensors", "diffusers")


def modules_of(folder: Path) -> list[str]:
    """Dotted names of a package's modules."""
    paths = sorted(path.relative_to(folder.parent).with_suffix("") for path in folder.rglob("*.py"))
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


LIBRARY: Final = modules_of(ROOT / "taesd_stream")
WORKERS: Final = modules_of(ROOT / "workers" / "taesd_stream_workers")


def run(code: str, folder: Path, *arguments: str) -> Any:
    """The JSON that a fresh interpreter prints for `code`; it must say nothing else and end well."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, env=clean_environment(folder), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def loaded_by(module: str, folder: Path) -> set[str]:
    """Top-level packages that a fresh interpreter has after importing one module."""
    code = f"import json, sys, {module}\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    return set(run(code, folder))


def test_a_sampler_pays_for_nothing_of_the_daemon(tmp_path: Path) -> None:
    """Neither the package nor its LatentPublisher imports torch, av or anything else of the daemon's extra."""
    code = "import json, sys\nfrom taesd_stream import LatentPublisher\nassert LatentPublisher.__name__\n"
    names = "sorted({name.partition('.')[0] for name in sys.modules})"
    loaded = set(run(f"{code}print(json.dumps({names}))", tmp_path))
    assert loaded & {*HEAVY, "taesd_stream_workers"} == set()
    assert {"taesd_stream", "numpy", "zmq", "msgpack"} <= loaded
    assert loaded_by("taesd_stream", tmp_path) & {*HEAVY, "taesd_stream_workers"} == set()


@pytest.mark.parametrize("name", ["diffusers", "comfyui.hook", "k_diffusion", "training"])
def test_an_integration_adds_little_to_its_framework(name: str, tmp_path: Path) -> None:
    """Where torch is loaded, importing an integration loads a few modules of ours, and nobody else's."""
    names = "[name for name in sys.modules if name not in before]"
    code = f"import json, sys, torch, numpy\nbefore = set(sys.modules)\nimport taesd_stream.integrations.{name}\n"
    added = run(f"{code}print(json.dumps({names}))", tmp_path)
    ours = {name for name in added if name.partition(".")[0] == "taesd_stream"}
    standard = {name for name in added if name.partition(".")[0] in sys.stdlib_module_names}
    assert set(added) - ours - standard == set()
    assert not ours & {"taesd_stream.publisher", "taesd_stream.wire", "taesd_stream.messages"}
    assert len(ours) <= 15


@pytest.mark.parametrize("name", ["frames", "wire", "publisher", "prediction", "latent_log", "latent_formats"])
def test_what_travels_is_light(name: str, tmp_path: Path) -> None:
    """The modules that a sampler or a foreign tool may import stand on the three base packages alone."""
    assert loaded_by(f"taesd_stream.{name}", tmp_path) & set(HEAVY) == set()


@pytest.mark.parametrize(
    ("module", "kept_out"),
    [
        ("broker.broker", ("torch", "av", "fastapi", "uvicorn", "starlette")),
        ("streamer.streamer", ("torch",)),
        ("worker.encoding_child", ("torch", "zmq")),
        ("supervisor", ("torch", "av", "fastapi", "uvicorn", "starlette")),
        ("commands.command_line", ("torch", "av", "fastapi", "uvicorn", "pydantic")),
        ("cli", ("torch", "av", "fastapi", "uvicorn", "pydantic", "typer")),
    ],
)
def test_a_role_imports_what_it_needs(module: str, kept_out: tuple[str, ...], tmp_path: Path) -> None:
    """Only the decode worker imports torch; only what handles pictures imports av; only the streamer the web stack."""
    loaded = loaded_by(f"taesd_stream_workers.{module}", tmp_path)
    assert loaded & set(kept_out) == set()
    assert "taesd_stream_workers" in loaded


PUBLISH_WITHOUT_THE_REST = """
import json, sys

class OnlyTheBase:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, OnlyTheBase())
import numpy as np
from taesd_stream import LatentPublisher
with LatentPublisher("tcp://127.0.0.1:1", stream="light", latent_format="sdxl") as publisher:
    publisher.publish(np.zeros((4, 8, 8), np.float16), step=0, total_steps=1, sigma=1.0)
print(json.dumps(publisher.error))
"""


def test_a_publisher_works_without_the_extra(tmp_path: Path) -> None:
    """With none of the extra's packages to be found, a sampler opens, publishes and closes without a complaint."""
    assert run(PUBLISH_WITHOUT_THE_REST, tmp_path, *HEAVY, "taesd_stream_workers") is None


@pytest.mark.parametrize("module", LIBRARY)
def test_the_library_knows_nothing_of_the_processes(module: str) -> None:
    """No module of `taesd_stream` imports `taesd_stream_workers`, not even inside a function."""
    path = ROOT.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    imported: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports here are absolute"
            imported.add(node.module or "")
    assert [name for name in imported if name.startswith("taesd_stream_workers")] == []


MAY_IMPORT: Final = {  # folders of the processes: what each may know of the others; the command line knows all
    "role": set(),
    "broker": {"role"},
    "worker": {"role"},
    "streamer": {"role"},
    "offline": {"worker"},
    "bench": {"role", "worker"},
}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_no_role_knows_another(folder: str) -> None:
    """Broker, worker and streamer share `role` and the wire: none of them imports another, and `role` imports none."""
    known: set[str] = set()
    for path in (ROOT / "workers" / "taesd_stream_workers" / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("taesd_stream_workers."):
                known.add(f"{node.module}.".split(".")[1])
    assert known - {folder} <= MAY_IMPORT[folder]
    assert known


IMPORT_AND_TELL = """
import importlib, json, logging, os, signal, sys, threading

def seen():
    root = logging.getLogger()
    ours = [name for name in logging.Logger.manager.loggerDict if name.startswith("taesd_stream")]
    return {
        "argv": list(sys.argv),
        "environment": dict(os.environ),
        "folder": [os.getcwd(), sorted(os.listdir())],
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "threads": [thread.name for thread in threading.enumerate()],
        "handlers": [str(one) for one in root.handlers],
        "level": root.level,
        "our handlers": [str(one) for name in ours for one in logging.getLogger(name).handlers],
    }

before = seen()
for name in sys.argv[1:]:
    importlib.import_module(name)
torch = sys.modules["torch"]
after = seen()
print(json.dumps([{key: after[key] for key in after if after[key] != before[key]}, torch.cuda.is_initialized()]))
"""


def test_importing_has_no_effect(tmp_path: Path) -> None:
    """All modules imported: no logging set up, no signal, thread, file or variable changed, no GPU woken."""
    assert run(IMPORT_AND_TELL, tmp_path, *LIBRARY, *WORKERS) == [{}, False]
