"""README and docs/running.md are true: their commands parse, their code runs, and what they name exists as they say."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from typer.main import get_command

from taesd_stream.config import SECTIONS, DecoderConfig
from taesd_stream_workers.commands.command_line import app
from tests.daemon import Daemon, clean_environment, wait_for
from tests.readme_document import README, ROOT, document, sections

TEXT: Final = README.read_text(encoding="utf-8")
RUNNING: Final = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
UNITS: Final = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
CI_RUN: Final = ROOT / ".ci" / "run"


def blocks(language: str, text: str = TEXT) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def rows(heading: str) -> list[list[str]]:
    """Cells of the first table under a heading, without its head."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def named(path: str) -> Any:
    """What a dotted name stands for: a key of the configuration, or something in a module."""
    section, _, key = path.partition(".")
    if section in SECTIONS:
        return SECTIONS[section].model_fields[key].default
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"README names {path}: there is no such thing")


def test_the_two_commands() -> None:
    """README's first two shell blocks are one command each: the demo and the whole check, from the tested versions."""
    demo, check = (block.strip() for block in blocks("sh")[:2])
    for command in (demo, check):
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert "-c constraints.txt" in command
    assert demo.endswith(" && .venv/bin/taesd-stream demo")
    for part in ("ruff format --check", "ruff check", "mypy", "pytest"):
        assert f"&& .venv/bin/{part}" in check


def test_ci_runs_what_readme_says() -> None:
    """.ci/run takes its command out of README: nobody is told another one."""
    script = CI_RUN.read_text(encoding="utf-8")
    reader = script.partition("<<'PYTHON'\n")[2].partition("\nPYTHON\n")[0]
    said = subprocess.run([sys.executable, "-c", reader], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == blocks("sh")[1].strip()
    assert os.access(CI_RUN, os.X_OK)
    assert subprocess.run(["bash", "-n", str(CI_RUN)]).returncode == 0


def test_files_are_all_listed() -> None:
    """README has one line for each file, as the file itself begins."""
    assert sections()[1] == document(), "run `python -m tests.readme_document`"


@pytest.mark.parametrize("row", rows("Data path"), ids=lambda row: row[0])
def test_data_path(row: list[str]) -> None:
    """Each hop of the data path names functions that there are."""
    functions = re.findall(r"`([\w.]+)`", row[1])
    assert functions
    assert all(callable(named(path)) for path in functions)


@pytest.mark.parametrize("row", rows("Limits and timeouts"), ids=lambda row: row[0])
def test_limits(row: list[str]) -> None:
    """Each limit has the value that the code has."""
    value = named(row[1].strip("`"))
    found = re.search(r"(\d+(?:\.\d+)?)(?: (KiB|MiB|GiB))?", row[2])
    if found is None:
        assert (row[1], row[2], value) == ("`broker.log_max_bytes`", "half of the free disk", 0)
    else:
        # left alone, a budget is what a device has: README says that of a processor first
        assert float(found[1]) * UNITS.get(found[2], 1) == (value or DecoderConfig().budget_bytes(0))


@pytest.mark.parametrize("text", [TEXT, RUNNING], ids=["README", "running"])
def test_keys_exist(text: str) -> None:
    """Every key of the configuration that is named exists."""
    keys = set(re.findall(rf"(?<![\w.-])((?:{'|'.join(SECTIONS)})\.[a-z_]+)\b(?!\()", text))
    known = {f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields}
    files = {key for key in keys if key.rpartition(".")[2] in ("py", "md", "toml", "js", "css", "html", "json")}
    assert keys - files - known == set()
    assert keys & known


COMMANDS: Final = sorted(
    {
        line.partition("taesd-stream ")[2]
        for text in (TEXT, RUNNING)
        for block in blocks("sh", text)
        for line in block.splitlines()
        if re.match(r"(TAESD_\S+ )?taesd-stream ", line)
    }
)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str) -> None:
    """Each command that is shown is one that the command line takes."""
    group: Any = get_command(app)
    name, *arguments = shlex.split(line)
    with group.make_context("taesd-stream", [name, *arguments]) as context:
        _, command, rest = group.resolve_command(context, [name, *arguments])
        with command.make_context(name, rest, parent=context):
            pass


@pytest.mark.parametrize("text", [TEXT, RUNNING], ids=["README", "running"])
def test_links_lead_somewhere(text: str) -> None:
    """Links to files of the project have their file."""
    base = ROOT if text is TEXT else ROOT / "docs"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (base / target).resolve().is_file(), target


SAMPLER: Final = """
import numpy as np
sigmas, i, x, model = np.linspace(1, 0, 11), 9, np.zeros((16, 64, 64)), lambda x, sigma: x
latents, blocks = np.zeros((4, 64, 64)), np.zeros((3, 2, 16, 8, 8))
"""
# What stands before an example because its reader has it anyway, by a word of the example.
GIVEN: Final = {
    "pipe(": """
from pathlib import Path
from tests.diffusers_pipelines import sd1, with_prompts
pipe = with_prompts(sd1(), Path()).pipe
pipe.set_progress_bar_config(disable=True)
""",
    "sample_euler(": """
import torch
from tests.test_k_diffusion import denoise as model, sample_euler
sigmas, x = torch.tensor([10.0, 1.0, 0.0]), torch.zeros(4, 8, 8)
""",
    "writer.add_text(": """
global_step = 500
class writer:
    add_text = staticmethod(lambda tag, text, step: None)
""",
}


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_code_runs(number: int, daemon: Daemon, tmp_path: Path) -> None:
    """README's Python, as it stands, gives its streams; only what a sampler has anyway stands before it."""
    code = blocks("python")[number]
    given = SAMPLER + "".join(text for word, text in GIVEN.items() if word in code)
    environment = {
        **clean_environment(tmp_path),
        "TAESD_STREAM_ADDRESS": daemon.broker,
        "OMP_NUM_THREADS": "1",  # the networks are tiny
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TRANSFORMERS_VERBOSITY": "error",  # it says on stderr that torchvision is not there
    }
    done = subprocess.run(
        [sys.executable, "-c", given + code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    streams = re.findall(r'stream="([^"]+)"', code)
    assert streams
    wait_for(lambda: set(streams) <= set(daemon.streams()), of=str(streams))
    wait_for(lambda: all(daemon.streams()[name]["state"] == "done" for name in streams), of="their ends")
    if 'record="all"' in code:
        assert daemon.recording(daemon.streams()[streams[0]]["run"])["frames"] == 20
    for path in re.findall(r'save="([^"]+)"', code):
        assert (tmp_path / path).is_file()
