"""Errors a user can mend: one line that names the numbers and the remedy, no traceback.

Scripts wrap their `main` in `run_main`; everything that is the user's to mend is raised as `UserError`. Errors of ours
(bugs) keep their traceback. `IPTV2_TRACEBACK=1` shows the traceback of user errors too.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator


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
    """Run `main` and leave the interpreter: exit code 0, or 1 after a `UserError` printed as one line.

    With several processes only the first prints (the others raise the same error), so that the line is seen once; an
    error that only one of the others met is printed by that one through `accelerate launch`'s own report.
    """
    try:
        code = main()
    except UserError as error:
        if os.environ.get("IPTV2_TRACEBACK") == "1":
            raise
        if int(os.environ.get("RANK", "0")) == 0 or os.environ.get("IPTV2_ALL_RANKS") == "1":
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = 1
    sys.exit(code or 0)
