"""Errors of libraries, shortened to one line for our own messages."""

from __future__ import annotations

__all__ = ["first_line", "one_line"]


def one_line(error: BaseException, limit: int | None = None, empty: str | None = None) -> str:
    """Return an error's message on one line.

    Args:
        error: the error.
        limit: largest number of characters; None for the whole message.
        empty: text for an error without a message; None for the name of its class.
    """
    return " ".join(str(error).split())[:limit] or empty or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
