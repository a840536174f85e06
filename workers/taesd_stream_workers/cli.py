"""Entry point of `taesd-stream`: where the daemon's part is not installed, the one line that installs it."""

from __future__ import annotations

import sys
from typing import Final

INSTALL_LINE: Final = 'taesd-stream: its daemon part is not installed ({}): pip install "taesd-stream[daemon]"\n'
USAGE: Final = 2
INTERRUPTED: Final = 130


def main() -> None:
    """Run the command line."""
    try:
        from taesd_stream_workers.commands.command_line import run

        run()
    except KeyboardInterrupt:  # while modules were imported
        sys.exit(INTERRUPTED)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("taesd_stream"):
            raise  # our own fault, not a package that is not installed
        sys.stderr.write(INSTALL_LINE.format(error))
        sys.exit(USAGE)


if __name__ == "__main__":
    main()
