"""The message tables of docs/wire.md, made from FIELDS. `python -m tests.wire_document` writes them anew."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Final

from taesd_stream import message_fields, wire
from taesd_stream.frames import LatentFrame, Packet, Stamps
from taesd_stream.messages import Degraded, Job, JobItem, RunHello

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "wire.md"
BEGIN: Final = "<!-- tables: begin, made by tests/wire_document.py -->"
END: Final = "<!-- tables: end -->"

CHAPTERS: Final = {
    "Publisher to broker": wire.FROM_PUBLISHER,
    "Broker to publisher": wire.TO_PUBLISHER,
    "Worker and streamer to broker": wire.FROM_INSIDE,
    "Broker to worker": wire.TO_WORKER,
    "Worker to streamer": wire.FROM_WORKER_TO_STREAMER,
    "Broker to streamer": wire.TO_STREAMER,
    "Maps inside messages": (RunHello, JobItem, Degraded, Stamps),
}
DIRECTION: Final = re.compile(r"^\w+ -> [^:,]+[:,] ")  # of the docstrings; the chapter tells it
LIMITS: Final = {
    "VERSION": "`v` of every header",
    "MAX_FRAME_BYTES": "bytes of a FRAME's payload",
    "MAX_HEADER_BYTES": "bytes of a header from or to a publisher",
    "MAX_STATE_BYTES": "bytes of a header between the daemon's own roles",
    "MAX_MESSAGE_BYTES": "ZMQ_MAXMSGSIZE of every socket that binds",
    "MAX_META_BYTES": "bytes of OPEN's `meta` as msgpack",
    "MAX_TEXT_CHARS": "characters of a text that says why",
}


def _parts(cls: type) -> str:
    if cls in (LatentFrame, Packet):
        return "2 parts: header, payload"
    return "1 part, one payload an item, and one more of each item with history" if cls is Job else "1 part"


def _default(field: dataclasses.Field[object]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{json.dumps(field.default_factory())}`"
    if field.default is dataclasses.MISSING:
        return "needed"
    return f"`{json.dumps(field.default)}`"


def table(cls: type) -> str:
    """One message: what it is, its parts, its fields."""
    meaning = DIRECTION.sub("", " ".join((cls.__doc__ or "").split()))
    meaning = meaning[0].upper() + meaning[1:]
    role = getattr(cls, "ROLE", None)
    head = [f"### {message_fields.type_name(cls)} (`{cls.__name__}`)", "", f"{meaning}", "", f"{_parts(cls)}."]
    if cls in CHAPTERS["Maps inside messages"]:
        head = [f"### `{cls.__name__}`", "", meaning]
    if role:
        head[-1] += f' The header also has `role`: "{role}".'
    fields = {field.name: field for field in dataclasses.fields(cls)}
    rows = [
        f"| `{name}` | {check.says} | {_default(fields[name])} |" for name, check in message_fields.FIELDS[cls].items()
    ]
    if rows:
        rows = ["", "| field | must be | when absent |", "|---|---|---|", *rows]
    return "\n".join([*head, *rows, ""])


def tables() -> str:
    """All that stands between the two marks of the document."""
    values = {**vars(wire), **vars(message_fields)}
    limits = [f"| `{name}` | {values[name]} | {meaning} |" for name, meaning in LIMITS.items()]
    lines = ["## Limits", "", "| name | value | of |", "|---|---|---|", *limits, ""]
    told: set[type] = set()
    for chapter, classes in CHAPTERS.items():
        lines += [f"## {chapter}", ""]
        lines += [table(cls) for cls in classes if cls not in told]
        told |= set(classes)
    return "\n".join(lines)


def main() -> None:
    """Write the tables into the document."""
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{tables()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
