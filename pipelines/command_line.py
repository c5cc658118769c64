"""Shared parts of the console scripts: errors in one line, notes, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Sequence

from iptv2_diffusion.files import forgiving_streams

__all__ = ["CommandError", "run_command"]


class CommandError(Exception):
    """Raised for a mistake that the user can fix. The message is one line."""


def run_command(main: Callable[[Sequence[str]], int], stopped: str) -> None:
    """Run a command line's `main` and exit with its exit code.

    Args:
        main: function of the arguments that returns the exit code. A `CommandError` becomes one line and the code 1.
        stopped: line to print after Ctrl-C, whose exit code is 130.
    """
    forgiving_streams()
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    try:
        code = main(sys.argv[1:])
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would show a traceback during Python's shutdown
        print(stopped, file=sys.stderr)
        code = 130
    sys.exit(code)
