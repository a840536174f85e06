"""The simulated tables of docs/capacity.md. `python -m tests.capacity_document` writes them anew, half a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.benchmarks.capacity import simulate, tables

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "capacity.md"
BEGIN: Final = "<!-- simulated: begin, made by tests/capacity_document.py -->"
END: Final = "<!-- simulated: end -->"


def parts() -> tuple[str, str, str]:
    """The document before its simulated tables, these, and what comes after."""
    before, begin, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    shown, end, after = rest.partition(END)
    assert begin
    assert end, f"{DOCUMENT}: its marks are gone"
    return before, shown.strip(), after


if __name__ == "__main__":
    before, _, after = parts()
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{tables(simulate())}\n\n{END}{after}", encoding="utf-8")
