"""Entry point of `taesd-stream`: where the daemon's part is not installed, the one line that installs it."""

from __future__ import annotations

import sys
from typing import Final

INSTALL_LINE: Final = 'taesd-stream: its daemon part is not installed ({}): pip install "taesd-stream[daemon]"'


def main() -> None:
    """Run the command line."""
    try:
        from taesd_stream_workers.commands import run
    except ModuleNotFoundError as error:
        sys.exit(INSTALL_LINE.format(error))
    run()


if __name__ == "__main__":
    main()
