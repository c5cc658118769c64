"""Jobs of the page: one at a time, with progress reports and cancellation."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Cancelled", "Jobs", "Report"]

Report = Callable[[Any], None]


class Cancelled(Exception):
    """The user pressed Cancel."""


class Jobs:
    """Runs jobs in threads, one at a time, because pipelines have state and share the machine."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._stops: dict[str, threading.Event] = {}

    def cancel(self, owner: str) -> None:
        """Make the owner's job raise `Cancelled` at its next report."""
        if stop := self._stops.get(owner):
            stop.set()

    def run(self, owner: str, work: Callable[[Report], Any]) -> Iterator[Any]:
        """Yield what `work` reports, then what it returns. Raises what it raises, and `Cancelled`.

        Args:
            owner: owner of the job, who can cancel it.
            work: function that takes the function to report with.
        """
        stop = self._stops[owner] = threading.Event()
        messages: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

        def report(item: Any) -> None:
            if stop.is_set():
                raise Cancelled
            messages.put(("report", item))

        def target() -> None:
            with self._turn:
                try:
                    report_end = ("result", work(report))
                except BaseException as error:  # raised again in the caller's thread
                    report_end = ("error", error)
                messages.put(report_end)

        threading.Thread(target=target, daemon=True).start()
        try:
            while True:
                kind, item = messages.get()
                if kind == "error":
                    raise item
                yield item
                if kind == "result":
                    return
        finally:  # also when the page is closed
            stop.set()
            if self._stops.get(owner) is stop:
                del self._stops[owner]
