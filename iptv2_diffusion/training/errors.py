"""Errors a user can mend: one line that names the numbers and the remedy, no traceback.

Scripts wrap their `main` in `run_main`; everything that is the user's to mend is raised as `UserError`. Errors of ours
(bugs) keep their traceback. `IPTV2_TRACEBACK=1` shows the traceback of user errors too.
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

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors, written in Rust, names the operating system's errors


class UserError(Exception):
    """Something the user can mend: the message is one line with the numbers and the remedy."""


class ConfigError(UserError):
    """An option that does not exist, has the wrong type, or contradicts another."""


class LocalError(UserError):
    """An error that one process alone may have, such as an unreadable image of its share: whoever has it prints it."""


class NonFiniteLossError(UserError):
    """The loss or the gradient became NaN or infinite."""


@contextlib.contextmanager
def user_errors(*kinds: type[Exception], as_error: type[UserError] = UserError) -> Iterator[None]:
    """Turn expected errors of the libraries below (default: OSError, ValueError) into one-line `UserError`s."""
    expected = kinds or (OSError, ValueError)
    try:
        yield
    except UserError:
        raise
    except expected as error:
        message = full_disk(error) or " ".join(str(error).split()) or type(error).__name__
        raise as_error(message) from error


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn the libraries' errors about a saved model or pipeline, a folder or a name on the Hub, into a `UserError`."""
    try:
        with user_errors(Exception):  # of diffusers, safetensors and json, about whatever the folder holds
            yield
    except UserError as error:
        hub = "" if Path(name).exists() else "no such folder here, and from the Hub: "
        told = str(error)
        raise UserError(f"cannot load {name}: {hub}{told[:500]}{'…' if len(told) > 500 else ''}") from error


def system_error(error: BaseException) -> int | None:
    """The operating system's number for what went wrong, also as a library in Rust tells it; None for other errors."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = _OS_ERROR.search(str(error))
    return int(match[1]) if match else None


def full_disk(error: BaseException) -> str | None:
    """Message for an error that means that the disk, or the quota, takes no more; None for any other error."""
    number = system_error(error)
    if number not in DISK_ERRORS:
        return None
    where = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
    remedy = "write to another disk" if number == errno.EROFS else "make room"
    return f"{os.strerror(number)}{where}: {remedy} and start the same command again; checkpoints are whole"


def run_main(main: Callable[[], int | None]) -> None:
    """Run `main` and leave the interpreter: exit code 0, or 1 after a user's error, printed as one line.

    With several processes only the first prints, so that the line is seen once: what is checked here is the same for
    all. A disk that fills outside of a checkpoint (which names more, see `checkpoint.py`) is told here too.
    """
    forgiving_streams()
    try:
        code = main()
    except UserError as error:
        if os.environ.get("IPTV2_TRACEBACK") == "1":
            raise
        code = _complain(str(error), everywhere=isinstance(error, LocalError))
    except KeyboardInterrupt as error:  # who raises it may say what is there
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would end Python's shutdown in a traceback
        stopped = "stopped: what was written before is whole; run the same command again to go on"
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
