"""README's Files section, made from the first line that each file says. `python -m tests.readme_document` writes it."""

from __future__ import annotations

import ast
import re
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
README: Final = ROOT / "README.md"
BEGIN: Final = "<!-- files: begin, made by tests/readme_document.py -->"
END: Final = "<!-- files: end -->"
PAGE: Final = "workers/taesd_stream_workers/streamer/web/page"
FOLDERS: Final = {
    "taesd_stream": "the library: no process, no signals, no logging set-up",
    "workers/taesd_stream_workers": "the daemon as a whole: checked, started, kept alive, asked",
    "workers/taesd_stream_workers/commands": "the command line",
    "workers/taesd_stream_workers/broker": "the broker: latents in, jobs out; no decoding",
    "workers/taesd_stream_workers/worker": "the decode worker: latents in, packets out; pixels live here only",
    "workers/taesd_stream_workers/streamer": "the streamer: packets in, viewers and files out",
    "workers/taesd_stream_workers/streamer/web": "its web address: pages, players, programs, other daemons",
    PAGE: "the page: no build step, nothing from elsewhere",
    "workers/taesd_stream_workers/role": "what the roles share: addresses, doors and keys, how a role lives and ends",
    "workers/taesd_stream_workers/offline": "latents and pictures in files: read, fitted, distilled, decoded anew",
    "workers/taesd_stream_workers/bench": "what a machine can do, measured",
    "configs": "settings",
    "deploy": "the daemon as a service, in containers, on clusters",
    "docs": "documents",
    "tools": "what makes the shipped data; not installed",
    "tests": "tests, and what they share",
}
WITHOUT_WORDS: Final = {  # files that cannot say what they are, and those whose first line is a title
    "configs/default.toml": "Every setting of the daemon at its default, explained.",
    "deploy/Dockerfile.dockerignore": "What the image is not made of.",
    "docs/capacity.md": "How many streams a machine holds: arithmetic, what was measured, 10,000 samplers simulated.",
    "docs/running.md": "How to run it day by day: roles, folders, ports, exit codes, logs, a full disk.",
    "docs/wire.md": "The protocol, for other languages.",
    "taesd_stream/data/README.md": "Where the data files come from, and their licences.",
    "taesd_stream/data/demo_flux2.safetensors": "The demo's latents: eight pictures and a clip.",
    "taesd_stream/data/latent_formats.json": "Facts on latent spaces and their tiny decoders.",
    "taesd_stream/data/linear_flux2.safetensors": "The linear projection for FLUX.2.",
    "taesd_stream/data/linear_sana.safetensors": "The rgb factors of Sana.",
    "taesd_stream/data/nano_flux2.safetensors": "The nano decoder for FLUX.2.",
    "docs/nano_decoders.jpg": "Original, taef2, nano and the linear projection side by side.",
    "taesd_stream/data/nano.md": "Model card of the nano decoders: data, licences, credits, figures.",
    "taesd_stream/data/nano_sana.safetensors": "The nano decoder for Sana.",
    "tests/javascript/package-lock.json": "The npm packages of the JavaScript client as they were tested.",
    "tests/javascript/package.json": "The npm packages that the JavaScript client needs.",
    "tests/benchmarks/RESULTS.md": "What was measured, on what, and by which command.",
    f"{PAGE}/connect.json": "The lines that connect a sampler, as the page shows them.",
    f"{PAGE}/embed.css": "How the bare player looks.",
    f"{PAGE}/embed.html": "A bare player, for an iframe, a notebook or OBS.",
    f"{PAGE}/icon.svg": "The icon.",
    f"{PAGE}/index.html": "The page's skeleton, and the shapes of its icons.",
    f"{PAGE}/style.css": "All of its looks: dark and light, desktop and phone.",
}
# golden and broken messages, of which tests/golden_messages.py has a word for each; what npm puts there
_SKIPPED: Final = {"tests/data", "tests/javascript/node_modules"}


def document() -> str:
    """The section's lines."""
    lines = [BEGIN]
    for folder, meaning in FOLDERS.items():
        lines += ["", f"**{folder}/**: {meaning}", ""]
        lines += [f"* `{path.relative_to(ROOT / folder).as_posix()}`: {said_by(path)}" for path in files_of(folder)]
    return "\n".join([*lines, "", END])


def files_of(folder: str) -> list[Path]:
    """The files that are listed under a folder: those of its own listed sub-folders, and empty ones, are not."""
    others = [ROOT / name for name in (*FOLDERS, *_SKIPPED) if name.startswith(f"{folder}/")]
    return sorted(
        path
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and path.suffix not in {".pyc", ".typed"}
        and path.stat().st_size
        and not any(other in path.parents for other in others)
    )


def said_by(path: Path) -> str:
    """The first sentence of a file about itself. Raises: ValueError for one that says nothing."""
    known = WITHOUT_WORDS.get(path.relative_to(ROOT).as_posix())
    if known:
        return known
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = [re.sub(r"^(//|#!.*|#)", "", line).strip() for line in text.splitlines()]
        said = " ".join(takewhile(bool, dropwhile(lambda line: not line, lines)))
    sentence = re.match(r"(.+?[.!?])(?=\s+[A-Z`[]|\s*$)", " ".join(said.partition("\n\n")[0].split()))
    if not sentence:
        raise ValueError(f"{path}: begins without a sentence that says what it is")
    return sentence[1]


def sections() -> tuple[str, str, str]:
    """README before the section, the section, and README behind it."""
    before, begin, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    section, end, after = rest.partition(END)
    return before, begin + section + end, after


if __name__ == "__main__":
    head, _, tail = sections()
    README.write_text(head + document() + tail, encoding="utf-8")
