"""Errors a user can mend: one line that names the numbers and the remedy, no traceback.

Scripts wrap their `main` in `run_main`; everything that is the user's to mend is raised as `UserError`. Errors of ours
(bugs) keep their traceback. `IPTV2_TRACEBACK=1` shows the traceback of user errors too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator

_DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class UserError(Exception):
    """Something the user can mend: the message is one line with the numbers and the remedy."""


class ConfigError(UserError):
    """An option that does not exist, has the wrong type, or contradicts another."""


class NonFiniteLossError(UserError):
    """The loss or the gradient became NaN or infinite."""


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn expected errors of the libraries below (default: OSError, ValueError) into one-line `UserError`s."""
    expected = kinds or (OSError, ValueError)
    try:
        yield
    except UserError:
        raise
    except expected as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise UserError(message) from error


def run_main(main: Callable[[], int | None]) -> None:
    """Run `main` and leave the interpreter: exit code 0, or 1 after a user's error, printed as one line.

    With several processes only the first prints, so that the line is seen once: what is checked here is the same for
    all. A disk that fills outside of a checkpoint (which names more, see `checkpoint.py`) is told here too.
    """
    try:
        code = main()
    except UserError as error:
        if os.environ.get("IPTV2_TRACEBACK") == "1":
            raise
        code = _complain(str(error))
    except OSError as error:
        if error.errno not in _DISK_ERRORS or os.environ.get("IPTV2_TRACEBACK") == "1":
            raise
        where = f" at {error.filename}" if error.filename else ""
        code = _complain(f"{error.strerror}{where}: make room and start the same command again; checkpoints are whole")
    except KeyboardInterrupt:
        code = 130
    sys.exit(code or 0)


def _complain(message: str) -> int:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    return 1
