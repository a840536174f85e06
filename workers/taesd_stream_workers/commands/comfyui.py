"""`taesd-stream comfyui`: put our custom node into a ComfyUI, and take it out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Final

import typer

from taesd_stream.errors import ConfigError
from taesd_stream.integrations import comfyui
from taesd_stream_workers.commands.options import say

FOLDER: Final = "taesd-stream"  # in custom_nodes
NODE: Final = "__init__.py"
MARK: Final = "taesd_stream.integrations.comfyui"  # what our file, of whatever version, imports
PYTHONS: Final = (  # where ComfyUI's own Python may be; the last two: the portable one for Windows
    ".venv/bin/python",
    "venv/bin/python",
    ".venv/Scripts/python.exe",
    "venv/Scripts/python.exe",
    "../python_embeded/python.exe",
    "../python_embedded/python.exe",
)

PathArgument = Annotated[
    Path, typer.Argument(metavar="PATH", help="ComfyUI's folder: the one with custom_nodes in it.")
]


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the application."""
    words = "Every sampler node of a ComfyUI, shown.\n\nExample: taesd-stream comfyui install ~/ComfyUI"
    commands = typer.Typer(no_args_is_help=True, help=words)
    commands.command("install")(install)
    commands.command("uninstall")(uninstall)
    app.add_typer(commands, name="comfyui", rich_help_panel="Daemon")


def install(path: PathArgument) -> None:
    """Put the custom node there; again: renew it. The rest is in the package, which ComfyUI's own Python needs.

    Example: taesd-stream comfyui install ~/ComfyUI
    """
    folder = _node_folder(path)
    _check_ours(folder)
    source = Path(comfyui.__file__).parent / "custom_node" / NODE
    try:
        folder.mkdir(exist_ok=True)
        shutil.copyfile(source, folder / NODE)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error}") from error
    say(f"{folder}: installed; it is there once ComfyUI has started again")
    say(f"ComfyUI's own Python needs the package too: {_python(path)} -m pip install taesd-stream")


def uninstall(path: PathArgument) -> None:
    """Take the custom node out again.

    Example: taesd-stream comfyui uninstall ~/ComfyUI
    """
    folder = _node_folder(path)
    if not folder.exists():
        raise ConfigError(f"{folder}: is not there, so there is nothing to take out")
    _check_ours(folder)
    try:
        (folder / NODE).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be taken out: {error}") from error
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    if not any(folder.iterdir()):
        folder.rmdir()
    say(f"{folder}: taken out; a ComfyUI that runs has it until it starts again")


def _node_folder(path: Path) -> Path:
    """Where our node is, or would be. Raises: ConfigError where PATH is no ComfyUI."""
    if not path.is_dir():
        raise ConfigError(f"{path}: there is no such folder")
    is_comfyui = (path / "custom_nodes").is_dir() and ((path / "comfy").is_dir() or (path / "models").is_dir())
    if not is_comfyui:
        inside = path / "ComfyUI"
        hint = f"; did you mean {inside}" if (inside / "custom_nodes").is_dir() else ""
        raise ConfigError(f"{path}: is no ComfyUI, whose folder has custom_nodes and comfy (or models) in it{hint}")
    return path / "custom_nodes" / FOLDER


def _check_ours(folder: Path) -> None:
    """Raises: ConfigError for a folder that somebody else has put there."""
    if not folder.exists():
        return
    node = folder / NODE
    is_ours = node.is_file() and MARK in node.read_text("utf-8", "replace")
    if folder.is_symlink() or not (is_ours or (folder.is_dir() and not any(folder.iterdir()))):
        raise ConfigError(f"{folder}: is not from this command; move it away first")


def _python(path: Path) -> str:
    """The Python that ComfyUI runs in, as far as its folder tells."""
    found = next((path / name for name in PYTHONS if (path / name).exists()), None)
    return str(found) if found else "python"
