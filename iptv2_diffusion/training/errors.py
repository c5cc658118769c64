"""Errors that a user can fix: one line with the numbers and the remedy, without a traceback.

Scripts wrap their `main` in `run_main`. A mistake that the user can fix is raised as a `UserError`. Bugs keep their
traceback. `IPTV2_TRACEBACK=1` also shows the traceback of user errors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from iptv2_diffusion.files import DISK_ERRORS, forgiving_streams
from iptv2_diffusion.messages import one_line

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # an operating system's error in safetensors, which is written in Rust


class UserError(Exception):
    """Raised for a mistake that the user can fix. The message is one line with the numbers and the remedy."""


class ConfigError(UserError):
    """Raised for an option that does not exist, has the wrong type, or contradicts another."""


class LocalError(UserError):
    """Raised for an error of a single process, such as an unreadable image of its share. That process prints it."""


class NonFiniteLossError(UserError):
    """Raised if the loss or the gradient is NaN or infinite."""


@contextlib.contextmanager
def user_errors(*kinds: type[Exception], as_error: type[UserError] = UserError) -> Iterator[None]:
    """Convert expected errors of library calls (default: OSError, ValueError) to one-line `UserError`s."""
    expected = kinds or (OSError, ValueError)
    try:
        yield
    except UserError:
        raise
    except expected as error:
        message = full_disk(error) or one_line(error)
        raise as_error(message) from error


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Convert the libraries' errors about a saved model or pipeline, a folder or Hub name, to a `UserError`."""
    try:
        with user_errors(Exception):  # diffusers, safetensors and json raise various types for a bad folder
            yield
    except UserError as error:
        hub = "" if Path(name).exists() else "no such folder here, and from the Hub: "
        reason = str(error)
        raise UserError(f"cannot load {name}: {hub}{reason[:500]}{'…' if len(reason) > 500 else ''}") from error


def system_error(error: BaseException) -> int | None:
    """Return the operating system's error number, also from a message of a Rust library; None for other errors."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = _OS_ERROR.search(str(error))
    return int(match[1]) if match else None


def full_disk(error: BaseException) -> str | None:
    """Return the message for an error that means that the disk or the quota is full; None for any other error."""
    number = system_error(error)
    if number is None or number not in DISK_ERRORS:
        return None
    where = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
    remedy = "write to another disk" if number == errno.EROFS else "make room"
    return f"{os.strerror(number)}{where}: {remedy} and run the same command again; checkpoints are complete"


def run_main(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with code 0, or with code 1 after a user error, which is printed as one line.

    With several processes only the first one prints, because all have the same error. This also reports a disk that
    fills up outside of a checkpoint (see `checkpoint.py` for checkpoints).
    """
    forgiving_streams()
    try:
        code = main()
    except UserError as error:
        if os.environ.get("IPTV2_TRACEBACK") == "1":
            raise
        code = _complain(str(error), everywhere=isinstance(error, LocalError))
    except KeyboardInterrupt as error:  # the code that raises it can add what was saved
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would show a traceback during Python's shutdown
        stopped = "stopped: the files written so far are complete; run the same command to continue"
        _complain(str(error) or stopped, prefix="")
        code = 130
    except Exception as error:
        message = full_disk(error)
        if message is None or os.environ.get("IPTV2_TRACEBACK") == "1":
            raise
        code = _complain(message)
    sys.exit(code or 0)


def _complain(message: str, *, prefix: str = "error: ", everywhere: bool = False) -> int:
    if everywhere or int(os.environ.get("RANK", "0")) == 0:
        print(f"{prefix}{message}", file=sys.stderr, flush=True)
    return 1
